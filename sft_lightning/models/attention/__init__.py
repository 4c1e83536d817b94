"""Attention that keeps the documents of a packed row apart, and the check that it does."""
