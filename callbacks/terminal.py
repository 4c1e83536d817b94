"""Where callbacks print."""

from __future__ import annotations

import sys

from rich.console import Console


def console() -> Console:
    """Return the terminal, or a wide page where the output is a file, so that tables and answers are not broken up."""
    return Console(width=None if sys.stdout.isatty() else 160)
