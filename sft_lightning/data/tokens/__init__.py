"""Segments → tokens with loss weights; token stores on disk, found by what they were made of."""
