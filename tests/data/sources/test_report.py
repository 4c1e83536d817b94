from __future__ import annotations

import json

import numpy as np

from sft_lightning.data.sources.report import DataReport, SourceReport


def test_percentiles_are_lengths_of_examples() -> None:
    report = SourceReport("train")
    report.set_lengths(np.arange(1, 101))
    assert (report.length_p50, report.length_p90, report.length_p99, report.longest) == (50, 90, 99, 100)
    report.set_lengths(np.array([10, 1000]))
    assert (report.length_p50, report.length_p90, report.longest) == (10, 1000, 1000)


def test_without_examples_all_lengths_are_zero() -> None:
    report = SourceReport("train", length_p50=3, longest=4)
    report.set_lengths(np.zeros(0, np.int64))
    assert (report.length_p50, report.longest) == (0, 0)


def test_the_report_is_plain_json() -> None:
    source = SourceReport("train", tokens=np.int64(7), wanted=0.75, delivered=np.float64(0.5))  # type: ignore[arg-type]
    source.dropped["overlong"] += 1
    source.dropped_at["overlong"] = ["chat.jsonl, line 1"]
    source.repairs["empty_turn"] += 2
    report = json.loads(json.dumps(DataReport({"train/chat": source}, max_length=10).as_dict()))
    assert report["max_length"] == 10
    assert report["blend_unit"] == "tokens"
    assert report["sources"]["train/chat"]["dropped"] == {"overlong": 1}
    assert report["sources"]["train/chat"]["dropped_at"] == {"overlong": ["chat.jsonl, line 1"]}
    assert report["sources"]["train/chat"]["repairs"] == {"empty_turn": 2}
    assert report["sources"]["train/chat"]["tokens"] == 7
    assert report["sources"]["train/chat"]["delivered"] == 0.5
