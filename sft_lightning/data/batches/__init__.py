"""Rows of the plan become batches; loaders, and windows of streamed data."""
