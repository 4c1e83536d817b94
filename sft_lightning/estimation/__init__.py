"""Estimates of a run before it starts: optimizer steps, what fits, time."""
