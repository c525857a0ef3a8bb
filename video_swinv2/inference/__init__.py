"""Using a trained model: prediction, streams, search by example, export, and the web page of `serve`."""
