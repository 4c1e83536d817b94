"""A comparison as one self-contained HTML page without scripts."""

from __future__ import annotations

from pathlib import Path

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
from sft_lightning.views.html_page import Filters, render_html

_FOLDER = Path(__file__).parent


def render_page(comparison: Comparison) -> str:
    """Return the page as HTML text."""
    filters: Filters = {
        "metrics_line": metrics_line,
        "parameters": parameters,
        "prompting": prompting,
        "perplexity_text": perplexity_text,
    }
    values = {
        "comparison": comparison,
        "columns": COLUMNS + (REFERENCE_COLUMNS if comparison.has_references else ()),
        "rows": [table_row(summary, comparison.has_references) for summary in summarize(comparison)],
    }
    return render_html(_FOLDER / "page.html.jinja", values, filters, styles=[_FOLDER / "page.css"])
