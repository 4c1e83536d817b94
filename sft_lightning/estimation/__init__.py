"""Estimates of a run before it starts: optimizer steps, memory by part, time."""
