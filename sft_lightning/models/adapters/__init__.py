"""Adapters: configuration, target modules, wrapping, trainable weights, continuing from a folder."""
