from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_lightning.batch import RowSums
from sft_lightning.data.batches.loader import Document, documents_of
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.formats.fields import Malformed
from sft_lightning.data.pairs.kind import Pairs, pair_parts, reference_folder
from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.data.plan.epoch_plan import Layout
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError
from sft_lightning.types import DocumentLength, SharedPrompt, TokenizedExample, num_tokens

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


def test_a_pair_is_planned_as_one_example(tmp_path: Path, model_dir: Path) -> None:
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


def test_the_length_of_a_pair_counts_both_conversations(tmp_path: Path, model_dir: Path) -> None:
    rows = [*GOOD, {"prompt": "q", "chosen": "good", "rejected": "bad " * 200}]
    with pytest.raises(UserError, match=r"data\.max_length is 400"):
        make(tmp_path / "pairs.json", model_dir, rows)
    data = make(tmp_path / "pairs.json", model_dir, rows, overlong="drop")
    assert dict(data.report.sources["train/toy"].dropped) == {"overlong": 1}


def test_a_record_can_have_a_higher_weight(tmp_path: Path, model_dir: Path) -> None:
    data = make(tmp_path / "pairs.json", model_dir, [{**GOOD[0], "weight": 3}, GOOD[1]])
    assert data.plan(0).step_weight(0) + (data.plan(0).step_weight(1) if data.plan(0).num_steps > 1 else 0) == 4.0


def test_data_without_pairs_is_refused(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(UserError, match="has no pairs of answers, which task: dpo needs"):
        make(tmp_path / "pairs.json", model_dir, [{"instruction": "q", "output": "a"}])


def test_the_same_file_makes_different_examples_for_sft(tmp_path: Path, model_dir: Path) -> None:
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


def test_the_layout_says_how_pairs_share_rows(tmp_path: Path, model_dir: Path) -> None:
    data = make(tmp_path / "pairs.json", model_dir, GOOD[:1])
    [document] = documents_of(data.plan(0), [0], data.blend.examples)[0]

    def documents(layout: Layout) -> list[list[DocumentLength]]:
        return data.kind.collate([[document]], layout=layout, pad_token_id=0, denominator=1.0)["document_lengths"]

    chosen, rejected = (half.document_length for half in document.tokens.halves())  # type: ignore[attr-defined]
    assert documents(Layout(packing="best_fit")) == [[chosen, rejected]]
    assert [row[0] for row in documents(Layout(packing="none"))] == [chosen, rejected]
    [[shared]] = documents(Layout(packing="best_fit", share_prompts=True))
    assert isinstance(shared, SharedPrompt)
    assert shared.num_tokens == num_tokens(chosen) + num_tokens(rejected) - shared.common


def test_conversations_are_refused_as_pairs() -> None:
    tokens = TokenizedExample(np.zeros(2, np.int32), np.zeros(2, np.float32))
    with pytest.raises(TypeError, match="expected a pair, found a TokenizedExample"):
        Pairs(PairDataSpec()).collate(
            [[Document(0, tokens, RowSums())]], layout=Layout(packing="none"), pad_token_id=0, denominator=1.0
        )


def test_the_parts_are_the_pairs_of_each_split_and_source(tmp_path: Path, model_dir: Path) -> None:
    options = {"val_fraction": 0.25, "store_dir": str(tmp_path / "stores")}
    data = make(tmp_path / "pairs.json", model_dir, GOOD, **options)
    parts = pair_parts(data)
    assert [(part.split, part.name, part.num_pairs) for part in parts] == [("train", "toy", 4), ("val", "toy", 4)]
    numbers = [sorted(index for batch in part.loader for index in batch["pairs"].tolist()) for part in parts]  # type: ignore[typeddict-item]
    assert sorted(numbers[0] + numbers[1]) == [0, 1, 2, 3]
    assert len(numbers[1]) == 1
    assert parts[0].content != parts[1].content
    assert [part.content for part in pair_parts(make(tmp_path / "pairs.json", model_dir, GOOD, **options))] == [
        part.content for part in parts
    ]
    assert reference_folder(data) == tmp_path / "stores" / "references"
