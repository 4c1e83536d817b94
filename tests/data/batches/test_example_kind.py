from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.batch import RowSums
from sft_lightning.data.batches.example_kind import Conversations
from sft_lightning.data.batches.loader import Document
from sft_lightning.data.plan.epoch_plan import Layout
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.data.templates.binding import bind_template
from sft_lightning.types import TokenizedExample


def document(number: int, *ids: int) -> Document:
    return Document(number, TokenizedExample(np.array(ids, np.int32), np.ones(len(ids), np.float32)), RowSums())


@pytest.mark.parametrize("layout", [Layout(packing="best_fit"), Layout(packing="none", share_prompts=True)])
def test_conversations_are_laid_out_document_by_document(layout: Layout) -> None:
    rows = [[document(4, 1, 2), document(0, 3)], [document(2, 5, 6)]]
    batch = Conversations(DataSpec()).collate(rows, layout=layout, pad_token_id=9, denominator=2.0)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 6, 9]]
    assert batch["document_lengths"] == [[2, 1], [2, 1]]
    assert batch["denominator"] == 2.0


@pytest.mark.parametrize(("packing", "shape"), [("best_fit", (3, 8)), ("none", (1, 2))])
def test_packed_rows_have_one_shape_where_layers_are_compiled(packing: Any, shape: tuple[int, int]) -> None:
    layout = Layout(packing=packing, same_shape=True)
    spec = DataSpec(batch_size=3, max_length=8)
    batch = Conversations(spec).collate([[document(0, 1, 2)]], layout=layout, pad_token_id=9, denominator=2.0)
    assert batch["input_ids"].shape == shape


def test_the_builder_and_the_reader_follow_the_keys(
    tokenizer: PreTrainedTokenizerFast, alpaca_file: Path, tmp_path: Path
) -> None:
    sources = {"toy": SourceConfig(path=str(alpaca_file))}
    spec = DataSpec(sources=sources, loss_on="all", malformed="drop", val_fraction=0.25, store_dir=str(tmp_path))
    builder = Conversations(spec).make_builder(tokenizer, bind_template("alpaca", tokenizer))
    assert (builder.loss_on, builder.malformed) == ("all", "drop")
    reader = Conversations(spec).make_reader(builder)
    assert [part.report.examples for part in (*reader.examples("train"), *reader.examples("val"))] == [18, 6]
    assert reader.prepare("train", "toy").folder.parent == tmp_path
