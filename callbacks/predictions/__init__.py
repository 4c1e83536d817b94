"""Predictions: the callback that writes them, and the file of an unfinished run."""
