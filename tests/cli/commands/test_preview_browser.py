from __future__ import annotations

import functools
import io
import json
import re
import struct
import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sft_lightning.__main__ import main

pytestmark = pytest.mark.browser

Browse = Callable[..., str]
Look = Callable[..., dict[str, Any]]

LIGHT, DARK = 1, 0
"""Blink's numbers of the preferred colour schemes."""

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b> & kind. <script>document.title = 'broken into'</script>"},
    {"role": "user", "content": "one\n\ttwo مرحبا \u202eevil " + "unbroken" * 40},
    {"role": "assistant", "content": "three 👨‍👩‍👧", "weight": 0.5},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "a long answer, " * 3000},
]

ALPACA = [{"instruction": f"What is {i}?", "output": f"{i} is a number."} for i in range(3)]

PROBE = """
document.querySelector(".tokens").focus();
for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft"])
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const style = element => getComputedStyle(document.querySelector(element));
parent.postMessage(JSON.stringify({
  width: document.documentElement.scrollWidth,
  window: window.innerWidth,
  background: style("body").backgroundColor,
  bar: document.getElementById("bar").textContent,
  tokens: style(".tokens").display,
  text: style(".text").display,
}), "*");
"""


FRAME = """<!DOCTYPE html><script>onmessage = event => document.body.dataset.seen = event.data</script>
<body><iframe src="changed.html" style="width: {width}px; height: 900px; border: 0"></iframe></body>"""
"""Holds the probed page, because no window gets as narrow as a telephone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preview")


@pytest.fixture(scope="module")
def page(model_dir: Path, folder: Path) -> Path:
    """The page of two sources, one of them hostile, long, and in a chat template with a system message."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "chat.json").write_text(json.dumps([{"messages": MESSAGES}]), encoding="utf-8")
    (folder / "alpaca.json").write_text(json.dumps(ALPACA), encoding="utf-8")
    options = [
        f"--model.model_name_or_path={model_dir}",
        f"--model.tokenizer_name_or_path={folder / 'tokenizer'}",
        f"--data.sources={{chat: {{path: {folder / 'chat.json'}}}, toy: {{path: {folder / 'alpaca.json'}}}}}",
        "--data.template=qwen",
        f"--trainer.default_root_dir={folder / 'run'}",
        f"--html={folder / 'page.html'}",
    ]
    with redirect_stdout(io.StringIO()):  # 40,000 characters that no failure needs
        assert main(["preview", *options]) == 0
    return folder / "page.html"


@pytest.fixture(scope="module")
def browse(chromium: str, folder: Path) -> Browse:
    """Open a page in a window, and return what becomes of its document."""

    def run(page: Path, *options: str, width: int = 1400, scheme: int = LIGHT) -> str:
        command = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1600"),
            *(f"--blink-settings=preferredColorScheme={scheme}", *options, page.as_uri()),
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    return run


@pytest.fixture(scope="module")
def look(page: Path, browse: Browse) -> Look:
    """Return what the probe finds in the page; each window is opened once."""

    @functools.cache
    def run(width: int = 1400, scheme: int = LIGHT, as_text: bool = False) -> dict[str, Any]:
        # Without the policy, which would forbid the probe.
        html = re.sub("<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))
        if as_text:
            html = html.replace('id="as-text"', 'id="as-text" checked')
        changed(page, html, f"<script>{PROBE}</script>")
        frame = page.with_name("frame.html")
        frame.write_text(FRAME.format(width=width), encoding="utf-8")
        dom = browse(frame, "--dump-dom", "--virtual-time-budget=5000", scheme=scheme)
        found = re.search('data-seen="([^"]*)"', dom)
        assert found
        result: dict[str, Any] = json.loads(unescape(found[1]))
        return result

    return run


def changed(page: Path, html: str, script: str) -> Path:
    """Write a copy of the page with a script at its end."""
    copy = page.with_name("changed.html")
    copy.write_text(html.replace("</body>", f"{script}</body>"), encoding="utf-8")
    return copy


def test_every_token_and_the_text_arrive_and_the_pages_own_script_runs(page: Path, browse: Browse) -> None:
    dom = browse(page, "--dump-dom")
    written = page.read_text(encoding="utf-8")
    assert dom.count('title="id ') == written.count('title="id ') > 10_000
    assert "three 👨‍👩‍👧&lt;|im_end|&gt;" in dom
    assert "&lt;b&gt;brief&lt;/b&gt; &amp; kind." in dom
    assert "Point at a token" in dom  # written by the script, so the policy's hash is right
    assert "<title>Preview: qwen</title>" in dom


def test_a_script_that_is_not_the_pages_own_does_not_run(page: Path, browse: Browse) -> None:
    script = "<script>document.title = 'broken into'</script>"
    dom = browse(changed(page, page.read_text(encoding="utf-8"), script), "--dump-dom")
    assert "<title>Preview: qwen</title>" in dom


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(look: Look, width: int) -> None:
    found = look(width=width)
    assert found["window"] == width
    assert found["width"] <= width


def test_the_page_is_light_or_dark_as_the_system_is(look: Look) -> None:
    assert look(scheme=LIGHT)["background"] == "rgb(246, 247, 249)"
    assert look(scheme=DARK)["background"] == "rgb(18, 22, 28)"


def test_the_arrow_keys_go_from_token_to_token_and_the_bar_tells_of_them(look: Look) -> None:
    assert re.fullmatch(r"id \d+, position 0, weight 0, '<\|im_start\|>'", look()["bar"])


def test_tokens_and_text_take_turns(look: Look) -> None:
    assert (look()["tokens"], look()["text"]) == ("block", "none")
    assert (look(as_text=True)["tokens"], look(as_text=True)["text"]) == ("none", "block")


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_the_page_can_be_painted(page: Path, browse: Browse, tmp_path: Path, width: int, scheme: int) -> None:
    picture = tmp_path / f"{width}-{scheme}.png"
    browse(page, f"--screenshot={picture}", width=width, scheme=scheme)
    head = picture.read_bytes()[:24]
    assert struct.unpack(">4xII", head[12:])[0] == width
    assert picture.stat().st_size > 20_000  # an empty page has less
