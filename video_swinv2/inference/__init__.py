"""Using a trained model: prediction, streams, retrieval, export, the page."""
