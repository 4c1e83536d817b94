"""Covers sft_lightning.training.checks.data.masks and sft_lightning.training.checks.data.documents."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.training.checks.data.masks import check_batch
from sft_lightning.types import IGNORE_INDEX

PAIRS = [{"prompt": f"Name {n}?", "chosen": f"yes {n}", "rejected": "no " * n} for n in range(1, 7)]
TEXTS = [{"text": f"a document of {n} words " * n} for n in range(1, 7)]


def first_batch(data: SFTDataModule) -> Any:
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize(
    ("records", "changes"),
    [
        (None, {}),
        (None, {"packing": "none", "loss_on": "last_turn"}),
        (None, {"loss_on": "all", "template": "llama2"}),
        (None, {"packing": "concat", "max_length": 24}),
        (None, {"overlong": "truncate", "max_length": 130}),
        (TEXTS, {"task": "pretrain"}),
        (PAIRS, {"template": "alpaca"}),
        (PAIRS, {"packing": "none"}),
    ],
)
def test_the_batches_of_training_have_the_masks_of_their_records(
    records: Any, changes: dict[str, Any], make_data: Callable[..., SFTDataModule]
) -> None:
    data = make_data(records, **changes)
    check = check_batch(data, first_batch(data), 0, 0)
    assert check.passed, check.figure
    assert "not" not in check.figure


def shift_the_labels(batch: Any) -> None:
    batch["labels"][:, 1:] = batch["labels"][:, :-1].clone()


def shift_the_mask(batch: Any) -> None:
    weights = batch["loss_weights"]
    weights[:, 2:] = weights[:, 1:-1].clone()
    batch["labels"] = torch.where(weights > 0, batch["input_ids"], IGNORE_INDEX)


def supervise_a_user(batch: Any) -> None:
    batch["loss_weights"][0, 1] = 1.0
    batch["labels"][0, 1] = batch["input_ids"][0, 1]


def leave_out_the_stop(batch: Any) -> None:
    stops = (batch["input_ids"] == 2) & (batch["labels"] != IGNORE_INDEX)
    batch["labels"][stops], batch["loss_weights"][stops] = IGNORE_INDEX, 0.0


def continue_the_positions(batch: Any) -> None:
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])


def label_the_padding(batch: Any) -> None:
    assert batch["document_lengths"][-1][-1] > 0
    row = [length[-1] for length in batch["document_lengths"]].index(batch["document_lengths"][-1][-1])
    batch["labels"][row, -1], batch["loss_weights"][row, -1] = 0, 1.0


def give_another_weight(batch: Any) -> None:
    batch["loss_weights"] *= 0.5


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (shift_the_labels, "labels differ from the token ids"),
        (shift_the_mask, "has loss weight"),
        (supervise_a_user, "token 1 .* has loss weight 1, but its message has 0"),
        (leave_out_the_stop, "'</s>'.* has loss weight 0, but its message has 1"),
        (continue_the_positions, "positions begin with"),
        (label_the_padding, "padding has a label"),
        (give_another_weight, "has loss weight 0.5, but its message has 1"),
    ],
)
def test_a_wrong_batch_is_found(tamper: Any, message: str, make_data: Callable[..., SFTDataModule]) -> None:
    data = make_data(packing="concat" if tamper is continue_the_positions else "best_fit")
    batch = first_batch(data)
    tamper(batch)
    check = check_batch(data, batch, 0, 0)
    assert check.passed is False
    assert re.search(message, check.figure), check.figure


def test_a_batch_of_other_records_than_the_plan_says_is_found(make_data: Callable[..., SFTDataModule]) -> None:
    data = make_data(packing="none", batch_size=1)
    first, second = (batch for batch, _ in zip(data.train_dataloader(), range(2), strict=False))
    assert check_batch(data, first, 0, 0).passed
    check = check_batch(data, second, 0, 0)
    assert check.passed is False
    assert "its token ids are not those of its record" in check.figure


def test_a_template_that_doubles_the_bos_is_found(
    make_data: Callable[..., SFTDataModule], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    template = tmp_path / "double.jinja"
    template.write_text(
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    monkeypatch.setattr("sft_lightning.data.tokens.examples.check_examples", lambda *_: None)  # it finds this too
    data = make_data(template=str(template))
    check = check_batch(data, first_batch(data), 0, 0)
    assert check.passed is False
    assert "it begins with 2 BOS tokens" in check.figure


def test_streamed_records_are_not_read_again_but_their_labels_are_checked(
    make_data: Callable[..., SFTDataModule], tmp_path: Path
) -> None:
    source = SourceConfig(path=str(tmp_path / "records.json"), streaming=True)
    streamed = make_data(sources={"toy": source})
    batch = first_batch(make_data(store_dir=str(tmp_path / "others")))
    assert check_batch(streamed, batch, 0, 0).passed is None
    shift_the_labels(batch)
    assert check_batch(streamed, batch, 0, 0).passed is False
