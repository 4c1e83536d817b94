"""Checks on the model of the run."""
