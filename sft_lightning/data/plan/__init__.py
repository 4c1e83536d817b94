"""Splits, limits, blending and packing: which examples each row and each optimizer step has."""
