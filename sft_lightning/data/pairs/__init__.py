"""Preference pairs: the same stages as the other data, for two answers to one prompt."""
