"""Printing to a terminal or a file: how wide, and how text that a model wrote is made safe or shown verbatim."""

from __future__ import annotations

import re
import sys

from rich.console import Console

WIDTH_OF_FILES = 160
"""Columns of output that does not go to a terminal, so that tables and answers are not broken up."""

_VISIBLE = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
"""Control character → its picture (ESC → ␛), or U+FFFD for U+0080 to U+009F, which have none."""


def make_console() -> Console:
    """Return a console on stdout, as wide as the terminal or `WIDTH_OF_FILES`."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES)


def printable(text: str) -> str:
    """Return text with control characters made visible, so that it cannot send commands to the terminal.

    Line feeds and tabs stay.
    """
    return text.translate(_VISIBLE)


def fenced(text: str, language: str = "") -> str:
    """Return text as a Markdown code block; its fence is longer than any run of backticks in the text.

    Args:
        text: The text to show verbatim.
        language: Language of its highlighting.
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
