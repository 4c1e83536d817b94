"""Segments become tokens with loss weights; token stores on disk and their cache."""
