from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from sft_lightning.data.sources.report import DataReport, SourceReport
from sft_lightning.views.report_table import report_tables


def shown(report: DataReport, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    for part in report_tables(report):
        console.print(part, markup=False, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def source() -> SourceReport:
    report = SourceReport(
        "train", "alpaca", records=52_002, examples=51_990, tokens=9_123_456_789, supervised_tokens=4_123_456_789
    )
    report.set_lengths(np.array([1_111, 22_222]))
    return report


def test_counts_and_lengths_are_not_cut_at_100_columns(source: SourceReport) -> None:
    text = shown(DataReport({"train/a_source_with_a_rather_long_name": source}))
    for number in ("52,002", "51,990", "9,123,456,789", "4,123,456,789 (45%)", "1,111", "22,222"):
        assert number in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_report_without_drops_has_no_table_of_them(source: SourceReport) -> None:
    assert "dropped" not in shown(DataReport({"train/a": source}))


def test_drops_repairs_cuts_and_rewritten_records_have_one_line_each(source: SourceReport) -> None:
    source.dropped["overlong"], source.dropped_at["overlong"] = 1, ["data/[bold]chat.jsonl, line 3"]
    source.repairs["leading_answer"] = 31
    source.truncated, source.supervised_tokens_lost = 4, 12_345
    source.rewritten_records, source.rewritten_examples = 10, 32
    text = shown(DataReport({"train/a": source}))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "train/a dropped: overlong 1 data/[bold]chat.jsonl, line 3" in lines
    assert "repaired: leading_answer 31" in lines
    assert "examples truncated 4" in lines
    assert "supervised tokens lost 12,345" in lines
    assert "records rewritten to 32 examples 10" in lines


def test_the_wanted_and_delivered_shares_of_a_blend_are_shown(source: SourceReport) -> None:
    source.wanted, source.delivered = 0.75, 0.749
    text = shown(DataReport({"train/a": source, "val/b": SourceReport("val")}, blend_unit="tokens"))
    assert "wanted (tokens)" in text
    assert "75.0%" in text
    assert "74.9%" in text


def test_without_a_blend_there_are_no_shares(source: SourceReport) -> None:
    assert "wanted" not in shown(DataReport({"val/b": source}))


def test_the_plan_of_the_first_epoch_is_shown_if_there_is_one(source: SourceReport) -> None:
    report = DataReport({"train/a": source}, max_length=2048, rows=1234, optimizer_steps=77, fill=0.987)
    assert "1,234 rows of 2,048 tokens, 98.7% full; 77 optimizer steps per epoch" in shown(report)
    assert "optimizer steps" not in shown(DataReport({"val/a": source}))


def test_the_largest_distance_from_a_share_is_shown_for_blends_only(source: SourceReport) -> None:
    source.wanted = source.delivered = 1.0
    alone = DataReport({"train/a": source}, rows=10, largest_deviation=0.0)
    assert "of its share" not in shown(alone)
    blend = DataReport({"train/a": source, "train/b": source}, rows=10, largest_deviation=0.74)
    assert "every source is within 0.7 rows of its share" in " ".join(shown(blend).split())


def test_a_report_without_sources_says_so() -> None:
    assert report_tables(DataReport()) == ["data: no source was read"]
