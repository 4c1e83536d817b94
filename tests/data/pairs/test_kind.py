from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.formats.fields import Malformed
from sft_lightning.data.pairs.kind import Pairs
from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError

GOOD = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad" * (i + 1)} for i in range(4)]
BROKEN: list[dict[str, Any]] = [
    {"prompt": "q", "chosen": "same", "rejected": "same"},
    {"prompt": "q", "chosen": "alone"},
    {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}],
    },
]


def make(path: Path, model_dir: Path, rows: list[dict[str, Any]], **changes: Any) -> SFTDataModule:
    path.write_text(json.dumps(rows))
    settings = {"template": "alpaca", "max_length": 400, "tokenizer_name_or_path": str(model_dir), **changes}
    data = SFTDataModule(PairDataSpec(sources={"toy": SourceConfig(path=str(path))}, **settings), Pairs)
    data.setup("fit")
    return data


def test_pairs_are_planned_whole(tmp_path: Path, model_dir: Path) -> None:
    data = make(tmp_path / "pairs.json", model_dir, GOOD)
    plan = data.plan(0)
    assert sorted(plan.documents[:, 0].tolist()) == [0, 1, 2, 3]
    assert plan.step_weight(0) == plan.row_weights[0] == plan.rows.counts[0]
    assert data.packs
    batches = list(data.train_dataloader())
    assert sorted(index for batch in batches for index in batch["pairs"].tolist()) == [0, 1, 2, 3]  # type: ignore[typeddict-item]
    assert data.report.sources["train/toy"].examples == 4


def test_the_decoded_documents_are_the_two_conversations(tmp_path: Path, model_dir: Path) -> None:
    data = make(tmp_path / "pairs.json", model_dir, GOOD[:1], packing="none")
    [batch] = data.train_dataloader()
    assert not data.packs
    rows = zip(batch["input_ids"], batch["labels"], strict=True)
    assert [data.tokenizer.decode(ids[labels != -100]) for ids, labels in rows] == ["good 0</s>", "bad</s>"]


def test_pairs_that_cannot_be_compared_are_dropped_and_counted(tmp_path: Path, model_dir: Path) -> None:
    data = make(tmp_path / "pairs.json", model_dir, [*GOOD, *BROKEN], malformed="drop")
    report = data.report.sources["train/toy"]
    assert report.examples == 4
    assert dict(report.dropped) == {"same_answers": 1, "broken_record": 1, "different_prompts": 1}


@pytest.mark.parametrize(("row", "error"), [(BROKEN[1], Malformed), (BROKEN[2], Malformed)])
def test_a_broken_pair_stops_the_run_by_default(
    row: dict[str, Any], error: type[Exception], tmp_path: Path, model_dir: Path
) -> None:
    with pytest.raises(error, match=r"pairs\.json"):
        make(tmp_path / "pairs.json", model_dir, [*GOOD, row])


def test_a_pair_is_too_long_as_a_whole(tmp_path: Path, model_dir: Path) -> None:
    rows = [*GOOD, {"prompt": "q", "chosen": "good", "rejected": "bad " * 200}]
    with pytest.raises(UserError, match=r"data\.max_length is 400"):
        make(tmp_path / "pairs.json", model_dir, rows)
    data = make(tmp_path / "pairs.json", model_dir, rows, overlong="drop")
    assert dict(data.report.sources["train/toy"].dropped) == {"overlong": 1}


def test_a_record_can_weigh_more(tmp_path: Path, model_dir: Path) -> None:
    data = make(tmp_path / "pairs.json", model_dir, [{**GOOD[0], "weight": 3}, GOOD[1]])
    assert data.plan(0).step_weight(0) + (data.plan(0).step_weight(1) if data.plan(0).num_steps > 1 else 0) == 4.0


def test_data_without_pairs_is_refused(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(UserError, match="no pairs of a better and a worse answer"):
        make(tmp_path / "pairs.json", model_dir, [{"instruction": "q", "output": "a"}])


def test_the_same_file_makes_other_examples_for_sft(tmp_path: Path, model_dir: Path) -> None:
    pairs = make(tmp_path / "pairs.json", model_dir, GOOD, store_dir=str(tmp_path / "stores"))
    plain = SFTDataModule(DataSpec(
        sources={"toy": SourceConfig(path=str(tmp_path / "pairs.json"))}, template="alpaca", max_length=400,
        tokenizer_name_or_path=str(model_dir), store_dir=str(tmp_path / "stores"),
    ))  # fmt: skip
    plain.setup("fit")
    assert plain.report.sources["train/toy"].supervised_tokens < pairs.report.sources["train/toy"].supervised_tokens


def test_a_sample_prompt_has_the_better_answer_as_its_reference(tmp_path: Path, model_dir: Path) -> None:
    [prompt] = make(tmp_path / "pairs.json", model_dir, GOOD).sample_prompts(1)
    assert prompt["reference"] == "good 0"
