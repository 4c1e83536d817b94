"""Examples as one self-contained HTML page."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from markupsafe import Markup, escape

from sft_lightning.views.highlight import ShownSource, ShownToken, visible
from sft_lightning.views.html_page import Filters, render_html

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class PreviewPage:
    """Content of the page."""

    template: str
    """Name of the template."""

    stop: str
    """The stop token, as text."""

    loss_on: str
    """`data.loss_on`."""

    max_length: int
    """`data.max_length`, in tokens."""

    overlong: str | None
    """`data.overlong`; `None` if no example is too long by itself, as with packing: concat."""

    sources: Sequence[ShownSource]
    """The first examples of each source."""


def render_page(page: PreviewPage) -> str:
    """Return the page as HTML text."""
    filters: Filters = {"marked": _marked, "json": _json, "runs": _runs, "tip": _tip, "classes": _classes}
    return render_html(_FOLDER / "page.html.jinja", {"page": page}, filters, scripts=[_FOLDER / "page.js"])


def _marked(text: str, spaces: bool = False) -> Markup:
    """Return escaped text with each mark of an invisible character in an element of its own."""
    pieces = (
        Markup("<i>{}</i>").format(text) if is_mark else escape(text) for text, is_mark in visible(text, spaces=spaces)
    )
    return Markup("").join(pieces)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1, default=str)


def _runs(tokens: Sequence[ShownToken]) -> list[tuple[float, list[ShownToken]]]:
    """Return runs of tokens with the same loss weight."""
    return [(weight, list(run)) for weight, run in groupby(tokens, key=lambda token: token.weight)]


def _classes(token: ShownToken) -> str:
    """Return the CSS classes of a token: always t; s if supervised, x if special, r if right to left."""
    right_to_left = any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in token.text)
    flags = {"s": token.weight > 0, "x": token.special, "r": right_to_left}
    return " ".join(["t", *(name for name, on in flags.items() if on)])


def _tip(token: ShownToken) -> str:
    note = "" if token.text else ", no text of its own"
    return f"id {token.id}, position {token.position}, weight {token.weight:g}, {token.name!r}{note}"
