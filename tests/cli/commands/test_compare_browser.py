from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_lightning.comparison.page import render_page
from sft_lightning.comparison.perplexity import ReferenceLoss
from sft_lightning.comparison.prompts import ComparisonPrompt
from sft_lightning.comparison.results import ComparedModel, Comparison, ModelResult, make_response
from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.generation.serving import Answer

pytestmark = pytest.mark.browser

Browse = Callable[..., str]

ANSWERS = [
    "<script>document.title = 'broken into'</script><b>bold</b> & " + "unbroken" * 60,
    "مرحبا \u202eevil\n\n  indented 👨‍👩‍👧",
    "",
]

PROBE = "<script>document.title = [document.documentElement.scrollWidth, innerWidth].join(' of ')</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = [
        ComparisonPrompt([{"role": "user", "content": "Why? " * 60}], "", f"p.jsonl, line {number}", "Because.")
        for number in range(3)
    ]
    models = []
    for role in ("baseline", "finetuned", "adapter"):
        found = [[make_response(Answer(text, [1] * 9, "length"), "Because.")] * 2 for text in ANSWERS]
        spec = ComparedModel(role, f"{role} " + "x" * 50, f"runs/{role}")
        models.append(ModelResult(spec, True, {"greedy": found, "beam": found}, [ReferenceLoss(1.0, 2)] * 3))
    configs = {"greedy": GenerationConfig(), "beam": GenerationConfig(num_beams=4)}
    path = tmp_path_factory.mktemp("compare") / "page.html"
    path.write_text(render_page(Comparison(prompts, configs, models)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browse(chromium: str, page: Path) -> Browse:
    """Open a page in a window, and return what becomes of its document."""

    def run(path: Path, *options: str, width: int = 1400, scheme: int = 1) -> str:
        command = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},1600"),
            *(f"--blink-settings=preferredColorScheme={scheme}", *options, path.as_uri()),
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    return run


def test_answers_arrive_as_text_and_nothing_in_them_runs(page: Path, browse: Browse) -> None:
    dom = browse(page, "--dump-dom")
    assert "<title>Comparison of 3 models</title>" in dom
    assert dom.count("&lt;b&gt;bold&lt;/b&gt; &amp; unbroken") == 2 * 3 * 2
    assert dom.count('class="answers"') == 3 * 2


def test_a_script_that_gets_in_is_forbidden_by_the_policy(page: Path, browse: Browse) -> None:
    changed = page.with_name("forbidden.html")
    changed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    assert "<title>Comparison of 3 models</title>" in browse(changed, "--dump-dom")


@pytest.mark.parametrize("width", [500, 1400])
def test_nothing_is_wider_than_the_window(page: Path, browse: Browse, width: int) -> None:
    html = re.sub("<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))  # the policy would forbid the probe
    changed = page.with_name("probed.html")
    changed.write_text(html.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    found = re.search(r"<title>(\d+) of (\d+)</title>", browse(changed, "--dump-dom", width=width))
    assert found
    assert int(found[1]) <= int(found[2]) == width


@pytest.mark.parametrize("width", [500, 1400])
@pytest.mark.parametrize("scheme", [1, 0])
def test_the_page_can_be_painted(page: Path, browse: Browse, tmp_path: Path, width: int, scheme: int) -> None:
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", width=width, scheme=scheme)
    assert struct.unpack(">4xII", picture.read_bytes()[12:24])[0] == width
    assert picture.stat().st_size > 20_000  # an empty page has less
