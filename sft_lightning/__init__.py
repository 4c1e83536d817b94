"""Supervised fine-tuning of causal language models on PyTorch Lightning, verified in the user's own run.

Importing this package imports nothing heavy: `--help` and `--version` must answer at once.
"""

__version__ = "0.1.0"
