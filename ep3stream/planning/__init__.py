"""What a fit will take: cost formulas and a pilot run that measures their rates."""
