"""Checks on the gradient and the optimizer step."""
