"""The invariants of the house, proven on a user's own model and data."""
