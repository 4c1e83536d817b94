from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from sft_lightning.views.html_page import HOUSE_STYLE, render_html

TEMPLATE = (
    "<meta content=\"style-src '{{ style_hash }}'; script-src '{{ script_hash }}'\">"
    "<style>{{ style }}</style>{{ text | shout }}<script>{{ script }}</script>"
)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    (tmp_path / "page.html.jinja").write_text(TEMPLATE)
    (tmp_path / "own.css").write_text("b > i { color: red }")
    (tmp_path / "own.js").write_text('if (1 < 2) alert("&");')
    return tmp_path / "page.html.jinja"


def page_of(template: Path, text: str) -> str:
    files = {"styles": [template.with_name("own.css")], "scripts": [template.with_name("own.js")]}
    return render_html(template, {"text": text}, {"shout": lambda text: text.upper()}, **files)


def test_data_is_escaped_and_style_and_script_are_not(template: Path) -> None:
    page = page_of(template, "<b>&</b>")
    assert "&lt;B&gt;&amp;&lt;/B&gt;" in page
    assert "b > i { color: red }</style>" in page
    assert '<script>if (1 < 2) alert("&");</script>' in page


def test_the_shared_style_comes_first(template: Path) -> None:
    assert f"<style>{HOUSE_STYLE.read_text()}\nb > i" in page_of(template, "")


@pytest.mark.parametrize("element", ["style", "script"])
def test_the_hashes_are_those_of_the_elements_in_the_page(element: str, template: Path) -> None:
    page = page_of(template, "")
    inside = page.partition(f"<{element}>")[2].partition(f"</{element}>")[0]
    assert f"{element}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" in page


def test_a_missing_value_is_an_error(template: Path) -> None:
    with pytest.raises(UndefinedError, match="'text' is undefined"):
        render_html(template, {}, {"shout": lambda text: text.upper()})
