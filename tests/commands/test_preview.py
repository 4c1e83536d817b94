from __future__ import annotations

from pathlib import Path

import pytest

from sft_lightning.__main__ import main


def test_examples_are_shown_with_their_place_and_counts(
    fit_args: list[str], alpaca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", *fit_args, "--num=2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("supervised") == 2
    assert "0 and 0 is 0.</s>" in shown
    assert "2 and 2 is 4" not in shown
    assert str(alpaca_file) in shown.replace("\n", "")


def test_the_page_has_the_supervised_text_in_green(fit_args: list[str], tmp_path: Path) -> None:
    assert main(["preview", *fit_args, "--num=1", f"--html={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<html>" in page
    assert 'color: #008000; text-decoration-color: #008000; font-weight: bold">0 and 0 is 0.</span>' in page
    assert "http" not in page.split("<body>")[1]


def test_a_preview_of_nothing_names_the_key(fit_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", *fit_args, "--data.sources={}"]) == 2
    assert "data.sources" in capsys.readouterr().err


def test_templates_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", "--list_templates"]) == 0
    assert {"vicuna_v1.1", "alpaca"} <= set(capsys.readouterr().out.split())
