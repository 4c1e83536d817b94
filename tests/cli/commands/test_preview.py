from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.__main__ import main

WriteJson = Callable[[str, Any], Path]


@pytest.fixture
def preview_of(fit_args: list[str], write_json: WriteJson) -> Callable[..., int]:
    """Run `preview` on records of messages."""

    def run(messages: list[dict[str, Any]], *options: str) -> int:
        path = write_json("chat.json", [{"messages": messages}])
        return main(["preview", *fit_args, f"--data.sources={{chat: {{path: {path}}}}}", *options])

    return run


@pytest.mark.end_to_end
def test_examples_are_shown_with_their_location_and_counts(
    fit_args: list[str], alpaca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", *fit_args, "--num=2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("supervised; messages: user, assistant") == 2
    assert "train/toy  alpaca; 2 records" in shown
    assert "⟦0 and 0 is 0.</s>⟧" in shown  # framed, because nothing is green in a file
    assert "2 and 2 is 4" not in shown
    assert f"{alpaca_file}, record 0" in shown


def test_validation_sources_are_shown_too(
    fit_args: list[str], alpaca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", *fit_args, "--num=1", f"--data.val_sources={{held: {{path: {alpaca_file}}}}}"]) == 0
    assert "val/held  alpaca; 1 records" in capsys.readouterr().out


def test_max_examples_below_the_number_to_show_is_kept(
    fit_args: list[str], alpaca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = f"--data.sources={{toy: {{path: {alpaca_file}, max_examples: 1}}}}"
    assert main(["preview", *fit_args, sources]) == 0
    assert "1 records" in capsys.readouterr().out


def test_line_feeds_weights_and_control_characters_are_visible(
    preview_of: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [
        {"role": "user", "content": "one\ntwo\u001b[31m [bold]"},
        {"role": "assistant", "content": "three", "weight": 0.5},
    ]
    assert preview_of(messages) == 0
    shown = capsys.readouterr().out
    assert "one↵\ntwo␛[31m [bold]" in shown
    assert "×0.5 ⟦three</s>⟧" in shown


def test_the_page_has_every_example_token_by_token(fit_args: list[str], tmp_path: Path) -> None:
    assert main(["preview", *fit_args, "--num=2", f"--html={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 2
    assert '<span class="s">0 and 0 is 0.&lt;/s&gt;</span>' in page
    assert 'title="id 2, position ' in page
    assert "http:" not in page
    assert "https:" not in page


def test_the_page_holds_no_markup_of_the_data(preview_of: Callable[..., int], tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "<script>alert(1)</script> & مرحبا"},
        {"role": "assistant", "content": "👍"},
    ]
    assert preview_of(messages, f"--html={tmp_path / 'page.html'}") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; مرحبا" in page
    assert '<span class="s">👍&lt;/s&gt;</span>' in page


def test_a_malformed_record_ends_the_preview_as_it_ends_training(
    preview_of: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert preview_of([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) == 2
    assert "chat.json, record 0" in capsys.readouterr().err


def test_a_record_that_training_drops_is_shown_with_its_reason(
    preview_of: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert preview_of([{"role": "user", "content": "no answer"}]) == 0
    shown = capsys.readouterr().out
    assert "dropped: no_answer: " in shown
    assert "chat.json, record 0" in shown


def test_a_preview_without_sources_is_refused(fit_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", *fit_args, "--data.sources={}"]) == 2
    assert "data.sources" in capsys.readouterr().err


def test_a_number_below_one_is_refused_with_the_option(fit_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", *fit_args, "--num=0"]) == 2
    assert "--num: must be at least 1 (got 0)" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused_with_the_option(
    fit_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", *fit_args, f"--html={tmp_path / 'missing' / 'page.html'}"]) == 2
    assert "--html: cannot write" in capsys.readouterr().err


def test_templates_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", "--list_templates"]) == 0
    assert {"vicuna_v1.1", "alpaca"} <= set(capsys.readouterr().out.split())


def test_both_conversations_of_a_pair_are_shown_with_their_masks(
    fit_args: list[str], write_json: WriteJson, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        {"prompt": "Hot?", "chosen": "Cold.", "rejected": "Red."},
        {"prompt": "One?", "chosen": "Two.", "rejected": "Two."},
    ]
    source = f"--data.sources={{toy: {{path: {write_json('pairs.json', pairs)}, format: preference}}}}"
    page = tmp_path / "page.html"
    assert main(["preview", "--task=dpo", *fit_args, source, f"--html={page}"]) == 0
    shown = capsys.readouterr().out
    chosen, rejected = shown.partition("record 0, rejected: ")[::2]
    assert "record 0, chosen: " in chosen
    assert "⟦Cold.</s>⟧" in chosen
    assert "⟦Red.</s>⟧" in rejected
    assert "⟦" not in rejected.partition("Hot?")[0]
    assert "dropped: same_answers" in shown
    assert "record 0, rejected</h3>" in page.read_text(encoding="utf-8")
