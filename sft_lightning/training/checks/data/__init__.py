"""Checks on the data of the run: what its batches hold, and where that comes from."""
