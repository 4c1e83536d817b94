"""Predictions of `predict`: the callback that writes them, and the file of an interrupted run."""
