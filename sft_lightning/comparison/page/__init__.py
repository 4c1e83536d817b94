"""A comparison as one self-contained HTML page without scripts or external resources.

All text from models and files goes through Jinja's autoescape. The page's Content-Security-Policy allows its own style,
named by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sft_lightning.comparison.results import Comparison, summarize
from sft_lightning.comparison.text_reports import (
    COLUMNS,
    REFERENCE_COLUMNS,
    metrics_line,
    parameters,
    perplexity_text,
    prompting,
    table_row,
)

_FOLDER = Path(__file__).parent
_HOUSE_STYLE = _FOLDER.parents[1] / "views" / "preview_page" / "page.css"


def render_page(comparison: Comparison) -> str:
    """Return the page as HTML text."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "metrics_line": metrics_line,
        "parameters": parameters,
        "prompting": prompting,
        "perplexity_text": perplexity_text,
    }
    style = "\n".join(file.read_text(encoding="utf-8") for file in (_HOUSE_STYLE, _FOLDER / "page.css"))
    return environment.get_template("page.html.jinja").render(
        comparison=comparison,
        columns=COLUMNS + (REFERENCE_COLUMNS if comparison.has_references else ()),
        rows=[table_row(summary, comparison.has_references) for summary in summarize(comparison)],
        style=Markup(style),  # noqa: S704 (our own files)
        style_hash="sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )
