"""A comparison as one self-contained HTML page: no external resource, no script.

Everything that models and files say goes through Jinja's autoescape, and the page's Content-Security-Policy allows its
own style, named by its hash, and nothing else.
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
    asked,
    cells,
    numbers,
    parameters,
    perplexity,
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
    environment.filters |= {"numbers": numbers, "parameters": parameters, "asked": asked, "perplexity": perplexity}
    style = "\n".join(file.read_text(encoding="utf-8") for file in (_HOUSE_STYLE, _FOLDER / "page.css"))
    return environment.get_template("page.html.jinja").render(
        comparison=comparison,
        columns=COLUMNS + (REFERENCE_COLUMNS if comparison.has_references else ()),
        rows=[cells(summary, comparison.has_references) for summary in summarize(comparison)],
        style=Markup(style),  # noqa: S704 (our own files)
        style_hash="sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )
