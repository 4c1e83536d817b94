"""Attention that keeps the documents of a packed row apart: our own function, or a mask for families with their own."""
