"""Text that a model wrote, made safe to print: nothing in it can command the terminal."""

from __future__ import annotations

_VISIBLE = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
"""Control characters → their pictures: ESC → ␛; those of Latin-1's upper half have none."""


def printable(text: str) -> str:
    """Return the text with control characters other than line feed and tab made visible."""
    return text.translate(_VISIBLE)
