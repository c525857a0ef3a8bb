"""Using a trained model: predictions for files and streams, a page, retrieval, programs for others."""
