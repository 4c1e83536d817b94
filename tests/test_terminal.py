from __future__ import annotations

import sys

import pytest

from sft_lightning.terminal import WIDTH_OF_FILES, fenced, make_console, printable


def test_control_characters_become_visible_and_text_stays() -> None:
    assert printable("a\x1b[2J\x07\x9b\x7f\nb\tc 世界") == "a␛[2J␇\ufffd␡\nb\tc 世界"


def test_output_to_a_file_is_wide(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("word " * 30)
    assert capsys.readouterr().out.count("\n") == 1
    assert make_console().width == WIDTH_OF_FILES


def test_a_terminal_has_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert make_console().width == 60


@pytest.mark.parametrize(("text", "fence"), [("plain", "```"), ("a `word`", "```"), ("```python\n```", "````")])
def test_a_text_with_fences_of_its_own_gets_a_longer_fence(text: str, fence: str) -> None:
    assert fenced(text, "yaml") == f"{fence}yaml\n{text}\n{fence}"
