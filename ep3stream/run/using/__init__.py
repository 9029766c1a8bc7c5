"""What a model is for: loading, predicting, scoring, exporting."""
