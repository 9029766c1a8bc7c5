"""What the numbers of a store and of a model stand for; known to the rooms of rows and to the solver alike."""
