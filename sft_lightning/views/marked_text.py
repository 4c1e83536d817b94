"""Tokens as one text that highlights the supervised ones, with or without colours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from sft_lightning.views.highlight import ShownToken, visible

FRAME = ("⟦", "⟧")
"""Frame around supervised text without colours."""


def marked_text(tokens: Sequence[ShownToken], *, colours: bool) -> Text:
    """Return the text of tokens with the supervised ones highlighted, and with loss weights other than 1.

    Args:
        tokens: The tokens of an example, or of a part of one.
        colours: Whether supervised tokens are green and special tokens reversed; else supervised text is framed.
    """
    text = Text()
    frame = ("", "") if colours else FRAME
    for weight, run in groupby(tokens, key=lambda token: token.weight):
        supervised = weight > 0
        if weight not in (0, 1):
            text.append(f"×{weight:g} ", "yellow")
        text.append(frame[0] if supervised else "")
        for token in run:
            style = ("bold green" if supervised else "dim") + (" reverse" if token.special else "")
            text.append("".join(piece.text for piece in visible(token.text, spaces=False)), style)
        text.append(frame[1] if supervised else "")
    return text


def around_the_first_answer(tokens: Sequence[ShownToken], limit: int) -> list[ShownToken]:
    """Return consecutive tokens with the first supervised one among them.

    Args:
        tokens: The tokens of an example.
        limit: The most tokens to return.
    """
    first = next((token.position for token in tokens if token.weight > 0), 0)
    start = max(0, min(first - limit // 2, len(tokens) - limit))
    return list(tokens[start : start + limit])
