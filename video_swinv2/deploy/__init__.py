"""Using a trained model: predictions for files."""
