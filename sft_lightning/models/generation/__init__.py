"""Answers of a model: decoding, and models that are served."""
