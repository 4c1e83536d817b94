"""What cannot be sharded is refused before any weight is read."""

from __future__ import annotations

from typing import Any

import bitsandbytes.optim as bnb
import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.strategies.fsdp2.strategy import FSDP2
from sft_lightning.strategies.refusals import Asked, Sharding, check_optimizer, refusal
from sft_lightning.training.module import model_from_keys

FSDP = Sharding("fsdp2", 3)
OFFLOAD = Sharding("fsdp2_offload", 3)
ZERO2 = Sharding("deepspeed_stage_2", 2)
ZERO2_OFFLOAD = Sharding("deepspeed_stage_2_offload", 2)
ZERO3 = Sharding("deepspeed_stage_3", 3)
ZERO3_OFFLOAD = Sharding("deepspeed_stage_3_offload", 3)


@pytest.mark.parametrize(
    ("asked", "sharding", "reason", "way_out"),
    [
        (
            Asked(quantization_bits=8),
            ZERO3,
            "row scales",
            "use bits: 4 (QLoRA), or trainer.strategy: deepspeed_stage_2",
        ),
        (Asked(quantization_bits=8), FSDP, "row scales", "use bits: 4 (QLoRA), or trainer.strategy: deepspeed_stage_2"),
        (Asked(only_adapter=False), ZERO3, "must have one type", "set model.dtype: float32"),
        (Asked(prompt_learning=True), FSDP, "virtual tokens", "use trainer.strategy: ddp"),
        (Asked(prompt_learning=True), ZERO3, "virtual tokens", "use trainer.strategy: ddp"),
        (Asked(only_adapter=False), FSDP, "must have one type", "set model.dtype: float32"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_with_the_nearest_that_does(
    asked: Asked, sharding: Sharding, reason: str, way_out: str
) -> None:
    said = refusal(asked, sharding)
    assert said is not None
    assert sharding.name in said
    assert reason in said
    assert way_out in said


@pytest.mark.parametrize(
    ("asked", "sharding"),
    [
        (Asked(), FSDP),
        (Asked(), OFFLOAD),
        (Asked(quantization_bits=4), FSDP),
        (Asked(quantization_bits=4), OFFLOAD),
        (Asked(quantization_bits=4), ZERO3_OFFLOAD),
        (Asked(quantization_bits=4), ZERO2),
        (Asked(quantization_bits=4), ZERO2_OFFLOAD),  # only the optimizer is offloaded
        (Asked(quantization_bits=8), ZERO2),
        (Asked(only_adapter=False, dtype="float32"), FSDP),
        (Asked(prompt_learning=True), ZERO2),
        (Asked(), ZERO3),
        (Asked(), ZERO3_OFFLOAD),
        (Asked(quantization_bits=4), ZERO3),
    ],
)
def test_a_combination_that_works_is_let_through(asked: Asked, sharding: Sharding) -> None:
    assert refusal(asked, sharding) is None


def test_every_way_out_is_itself_let_through() -> None:
    assert refusal(Asked(quantization_bits=4), FSDP) is None
    assert refusal(Asked(quantization_bits=4), ZERO3) is None
    assert refusal(Asked(quantization_bits=8), ZERO2) is None


def test_a_module_is_refused_when_it_is_connected_and_has_loaded_nothing() -> None:
    module = model_from_keys(
        model_name_or_path="no/such/model",
        quantization=QuantizationConfig(bits=8),
        adapter=AdapterConfig(target_modules="all-linear"),
    )
    with pytest.raises(UserError, match=r"model\.quantization\.bits: 8, but trainer\.strategy fsdp2"):
        FSDP2().connect(module)


@pytest.mark.parametrize(
    ("make", "sharding", "reason"),
    [
        (bnb.AdamW8bit, FSDP, "take plain tensors"),
        (bnb.PagedAdamW32bit, OFFLOAD, "take plain tensors"),
        (bnb.AdamW8bit, ZERO2, "quantizes its state in blocks"),
        (bnb.PagedAdamW8bit, ZERO3, "quantizes its state in blocks"),
    ],
)
def test_an_optimizer_that_cannot_step_on_shards_is_refused(make: Any, sharding: Sharding, reason: str) -> None:
    with pytest.raises(UserError, match=rf"{reason}.*{sharding.name}.*use torch\.optim\.AdamW"):
        check_optimizer(make([torch.nn.Parameter(torch.ones(2))]), sharding)


def test_other_optimizers_are_let_through() -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]
    check_optimizer(torch.optim.AdamW(weights), FSDP)
    check_optimizer(bnb.PagedAdamW32bit(weights), ZERO2)
