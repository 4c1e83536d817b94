"""Undocumented parts of Lightning that we use."""
