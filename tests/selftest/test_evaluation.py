from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.selftest.evaluation import batch_of, documents_of_row, evaluate


def test_the_documents_of_a_row_are_its_examples(make_data: Callable[..., SFTDataModule]) -> None:
    data = make_data(packing="best_fit")
    data.setup("fit")
    documents = documents_of_row(data, 0)
    assert len(documents) > 1
    batch = batch_of([documents], data, torch.device("cpu"))
    assert [lengths[: len(documents)] for lengths in batch["document_lengths"]] == [
        [len(document.input_ids) for document in documents]
    ]


def test_evaluation_has_the_loss_of_transformers(make_data: Callable[..., SFTDataModule], model_dir: Path) -> None:
    data = make_data(packing="none")
    data.setup("fit")
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=PACKED)
    batch = batch_of([documents_of_row(data, 0)], data, torch.device("cpu"))
    found = evaluate(model, batch, nullcontext)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert found.loss == pytest.approx(float(expected), rel=1e-5)
    assert found.logits.shape[0] == int((batch["labels"][:, 1:] >= 0).sum())
    assert not model.training
