"""Tokens as one text in which supervised tokens stand out, with colours and without."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from sft_lightning.views.highlight import ShownToken, visible

FRAME = ("⟦", "⟧")
"""Around supervised text where there are no colours."""


def marked_text(tokens: Sequence[ShownToken], *, colours: bool) -> Text:
    """Return the text, each run of tokens in the colour of what happens to it, its weight before it if that is not 1.

    Args:
        tokens: Of an example, or a part of one.
        colours: Supervised tokens green and special ones reversed; else supervised runs stand between frames.
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
    """Return at most `limit` tokens that follow each other, the first supervised one among them."""
    first = next((token.position for token in tokens if token.weight > 0), 0)
    start = max(0, min(first - limit // 2, len(tokens) - limit))
    return list(tokens[start : start + limit])
