"""What a strategy cannot train is refused before any weight is read."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import bitsandbytes.optim as bnb
import pytest
import torch
from peft import PromptTuningConfig

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.spec import ModelSpec
from sft_lightning.strategies import FSDP2, refusals
from sft_lightning.strategies.refusals import RunFacts, check_optimizer, check_run
from sft_lightning.strategies.sharding import SHORT_NAMES, ShardingSpec, fsdp2_sharding
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.spec import TrainingSpec

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")
FSDP2_SHARDING, OFFLOAD = SHORT_NAMES["fsdp2"], SHORT_NAMES["fsdp2_offload"]
ZERO2, ZERO2_OFFLOAD = SHORT_NAMES["deepspeed_stage_2"], SHORT_NAMES["deepspeed_stage_2_offload"]
ZERO3, ZERO3_OFFLOAD = SHORT_NAMES["deepspeed_stage_3"], SHORT_NAMES["deepspeed_stage_3_offload"]


def adapted(*, bits: Literal[4, 8] | None = None, dtype: Any = "bfloat16", **adapter: Any) -> ModelSpec:
    """A model with an adapter."""
    quantization = None if bits is None else QuantizationConfig(bits=bits)
    return ModelSpec(
        model_name_or_path="no/such/model", dtype=dtype, quantization=quantization, adapter=AdapterConfig(**adapter)
    )


LORA, QLORA, INT8 = adapted(), adapted(bits=4), adapted(bits=8)
PROMPTS = adapted(peft_config=PromptTuningConfig(num_virtual_tokens=4))
BASE_TRAINS = adapted(only_adapter=False)
INSTEAD_OF_INT8 = r"use bits: 4 \(QLoRA\), or trainer\.strategy: deepspeed_stage_2 or ddp"
INSTEAD_OF_PROMPTS = r"use trainer\.strategy: ddp or deepspeed_stage_2"


@pytest.mark.parametrize(
    ("model", "sharding", "reason", "instead"),
    [
        (INT8, ZERO3, "row scales", INSTEAD_OF_INT8),
        (INT8, FSDP2_SHARDING, "row scales", INSTEAD_OF_INT8),
        (BASE_TRAINS, ZERO3, "in one type", r"set model\.dtype: float32"),
        (BASE_TRAINS, FSDP2_SHARDING, "in one type", r"set model\.dtype: float32"),
        (PROMPTS, FSDP2_SHARDING, "virtual tokens", INSTEAD_OF_PROMPTS),
        (PROMPTS, ZERO3, "virtual tokens", INSTEAD_OF_PROMPTS),
    ],
)
def test_a_model_that_cannot_be_sharded_is_refused_with_the_nearest_combination_that_works(
    model: ModelSpec, sharding: ShardingSpec, reason: str, instead: str
) -> None:
    said = rf"^model\..* cannot be combined with trainer\.strategy {sharding.name}.*{reason}.*{instead}"
    with pytest.raises(UserError, match=said):
        check_run(RunFacts(model=model), sharding)


@pytest.mark.parametrize(
    ("model", "sharding"),
    [
        *((LORA, each) for each in SHORT_NAMES.values()),
        *((QLORA, each) for each in SHORT_NAMES.values()),
        *((ModelSpec(model_name_or_path="no/such/model"), each) for each in SHORT_NAMES.values()),
        (INT8, ZERO2),
        (INT8, ZERO2_OFFLOAD),  # only the optimizer is offloaded
        (INT8, SHORT_NAMES["ddp"]),
        (PROMPTS, ZERO2),
        (PROMPTS, SHORT_NAMES["ddp"]),
        (adapted(only_adapter=False, dtype="float32"), FSDP2_SHARDING),
    ],
)
def test_a_combination_that_works_is_accepted(model: ModelSpec, sharding: ShardingSpec) -> None:
    check_run(RunFacts(model=model), sharding)


def test_replicas_that_do_not_divide_the_processes_are_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.strategy\.replicas: 3 does not divide .* 2 \(trainer\.devices"):
        check_run(RunFacts(model=LORA, num_processes=2), fsdp2_sharding(replicas=3))
    check_run(RunFacts(model=LORA, num_processes=6), fsdp2_sharding(replicas=3))


def test_a_module_is_refused_when_it_is_connected_and_has_loaded_nothing() -> None:
    module = CausalLMModule(TrainingSpec(**vars(INT8)))
    strategy = FSDP2()
    strategy.parallel_devices = [torch.device("cpu")]
    with pytest.raises(
        UserError, match=r"model\.quantization\.bits: 8 cannot be combined with trainer\.strategy fsdp2"
    ):
        strategy.connect(module)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_float16_on_a_cpu_without_it_is_refused_with_the_types_that_work(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(refusals, "cpu_has_float16", lambda: False)
    instead = precision.replace("16", "bf16")
    said = rf"^trainer\.precision: {precision} .*set trainer\.precision: {instead} or 32-true, or train on a GPU$"
    with pytest.raises(UserError, match=said):
        check_run(RunFacts(model=LORA, precision=precision, on_gpu=False), ZERO2)


def test_float16_is_accepted_where_deepspeed_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "cpu_has_float16", lambda: False)
    check_run(RunFacts(model=LORA, precision="16-mixed", on_gpu=True), ZERO2)
    check_run(RunFacts(model=LORA, precision="bf16-mixed", on_gpu=False), ZERO2)
    check_run(RunFacts(model=LORA, precision="32-true", on_gpu=False), ZERO2)
    check_run(RunFacts(model=LORA, precision="16-true", on_gpu=False), FSDP2_SHARDING)  # torch computes, not DeepSpeed
    monkeypatch.setattr(refusals, "cpu_has_float16", lambda: True)
    check_run(RunFacts(model=LORA, precision="16-mixed", on_gpu=False), ZERO2)


@needs_deepspeed
def test_the_cpus_float16_is_what_deepspeeds_engine_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    for supported in (True, None):  # DeepSpeed's method returns None for no
        monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self, answer=supported: answer)
        assert refusals.cpu_has_float16() is bool(supported)


@pytest.mark.parametrize(
    ("make", "sharding", "reason"),
    [
        (bnb.AdamW8bit, FSDP2_SHARDING, "take plain tensors"),
        (bnb.PagedAdamW32bit, OFFLOAD, "take plain tensors"),
        (bnb.AdamW8bit, ZERO2, "cut through the blocks"),
        (bnb.PagedAdamW8bit, ZERO3, "cut through the blocks"),
    ],
)
def test_an_optimizer_that_cannot_step_on_shards_is_refused(make: Any, sharding: ShardingSpec, reason: str) -> None:
    with pytest.raises(UserError, match=rf"trainer\.strategy {sharding.name}.*{reason}.*use torch\.optim\.AdamW"):
        check_optimizer(make([torch.nn.Parameter(torch.ones(2))]), sharding)


def test_other_optimizers_are_accepted() -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]
    check_optimizer(torch.optim.AdamW(weights), FSDP2_SHARDING)
    check_optimizer(bnb.PagedAdamW32bit(weights), ZERO2)
    check_optimizer(bnb.AdamW8bit(weights), SHORT_NAMES["ddp"])
