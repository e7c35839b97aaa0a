"""The web page of a trained model."""
