"""Self-contained HTML pages: they load nothing, and nothing in their data can run.

Everything from the data goes through Jinja's autoescape, and the page's Content-Security-Policy allows only its own
style and script, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

Filters = Mapping[str, Callable[..., Any]]
"""Functions that the template may call, by name."""

HOUSE_STYLE = Path(__file__).with_name("page.css")
"""The style that all pages share."""


def render_html(
    template: Path,
    values: Mapping[str, Any],
    filters: Filters,
    *,
    styles: Sequence[Path] = (),
    scripts: Sequence[Path] = (),
) -> str:
    """Return a page as HTML text.

    The template also gets `style`, `script`, `style_hash` and `script_hash`, the last two for its
    Content-Security-Policy.

    Args:
        template: The Jinja template of the page.
        values: Values of the template by name.
        filters: Filters of the template by name.
        styles: CSS files to add to the shared style.
        scripts: JavaScript files.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    style, script = _joined([HOUSE_STYLE, *styles]), _joined(scripts)
    own = {"style": style, "script": script, "style_hash": _hash(style), "script_hash": _hash(script)}
    return environment.get_template(template.name).render(**values, **own)


def _joined(files: Sequence[Path]) -> Markup:
    return Markup("\n".join(file.read_text(encoding="utf-8") for file in files))  # noqa: S704 (our own files)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
