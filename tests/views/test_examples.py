from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError
from sft_lightning.views.examples import first_examples, print_examples
from sft_lightning.views.preview_page import PreviewPage

Data = Callable[..., SFTDataModule]


@pytest.fixture
def data(model_dir: Path, alpaca_file: Path) -> Data:
    """Make the data of a run on the Alpaca file."""

    def make(**changes: Any) -> SFTDataModule:
        options = {"sources": {"toy": SourceConfig(path=str(alpaca_file))}, "template": "alpaca", "max_length": 256}
        return SFTDataModule(DataSpec(**{**options, "tokenizer_name_or_path": str(model_dir), **changes}))

    return make


def printed(page: PreviewPage, **options: Any) -> str:
    file = io.StringIO()
    print_examples(page, Console(file=file, width=80, **options))
    return file.getvalue()


def test_the_first_records_of_training_and_validation_sources_are_shown(data: Data, alpaca_file: Path) -> None:
    page = first_examples(data(val_sources={"held": SourceConfig(path=str(alpaca_file), max_examples=1)}), 3)
    assert [(source.name, source.num_records, len(source.examples)) for source in page.sources] == [
        ("train/toy", 3, 3), ("val/held", 1, 1),
    ]  # fmt: skip
    assert page.sources[0].format == "alpaca"
    assert page.sources[0].examples[2].location == f"{alpaca_file}, record 2"


def test_a_dropped_record_is_shown_with_its_reason(data: Data, write_json: Callable[..., Path]) -> None:
    path = write_json("a.json", [{"instruction": "a", "output": ""}, {"instruction": "a", "output": "b"}])
    [source] = first_examples(data(sources={"s": SourceConfig(path=str(path))}), 2).sources
    assert len(source.examples) == 1
    [dropped] = source.dropped
    assert dropped.startswith(f"no_answer: {path}, record 0: ")


@pytest.mark.parametrize(("packing", "shown"), [("best_fit", "drop"), ("concat", None)])
def test_overlong_is_shown_unless_packing_cuts_examples(packing: str, shown: str | None, data: Data) -> None:
    assert first_examples(data(overlong="drop", packing=packing), 1).overlong == shown


def test_without_sources_there_is_nothing_to_show(data: Data) -> None:
    with pytest.raises(UserError, match=r"data\.sources: no source given"):
        first_examples(data(sources={}), 1)


def test_supervised_text_is_framed_where_there_are_no_colours(data: Data) -> None:
    text = printed(first_examples(data(), 1))
    assert "an answer ends with '</s>'; supervised text is between ⟦ and ⟧" in text
    assert "⟦0 and 0 is 0.</s>⟧" in text


def test_supervised_text_is_green_in_a_terminal(data: Data) -> None:
    text = printed(first_examples(data(), 1), force_terminal=True, color_system="standard")
    assert "supervised text is green" in text
    assert "⟦" not in text
    assert "\x1b[1;32m" in text
