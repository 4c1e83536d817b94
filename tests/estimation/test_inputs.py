"""What `fit` refuses before it reads any weight is refused by the plan, too; see `tests/cli/commands/test_plan.py`."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import pytest
import torch

from sft_lightning.data.plan.epoch_plan import Topology
from sft_lightning.errors import UserError
from sft_lightning.estimation.inputs import PlanInputs, check_as_fit, check_optimizer_as_fit
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.spec import ModelSpec
from sft_lightning.strategies import DeepSpeedZeRO
from sft_lightning.strategies.refusals import RunFacts
from sft_lightning.strategies.sharding import SHORT_NAMES
from sft_lightning.training.spec import TrainingSpec

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")


class Data:
    """Stands in for a datamodule of four micro-batches of two rows on eight GPUs."""

    topology = Topology(batch_size=2, accumulate=4, world_size=8)


def inputs(strategy: object) -> PlanInputs:
    return PlanInputs(
        spec=TrainingSpec(model_name_or_path="none"),
        data=cast("Any", Data()),
        strategy=strategy,
        gradient_clip_val=1.0,
        precision="bf16-mixed",
        num_epochs=1,
        max_steps=-1,
        gpu_bytes=None,
        mfu=0.4,
        tflops=312.0,
    )


def adamw(lr: float = 2e-4) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=lr, weight_decay=0.0)


def test_a_short_name_has_what_it_shards() -> None:
    assert inputs("fsdp2_offload").sharding == SHORT_NAMES["fsdp2_offload"]


def test_an_adapter_that_peft_cannot_put_on_the_quantized_base_is_refused() -> None:
    model = ModelSpec(
        model_name_or_path="none", quantization=QuantizationConfig(bits=4), adapter=AdapterConfig(init="pissa")
    )
    with pytest.raises(UserError, match="PEFT cannot read in 4 bits"):
        check_as_fit("auto", RunFacts(model=model))


def test_an_optimizer_that_cannot_be_offloaded_is_refused() -> None:
    check_optimizer_as_fit(adamw(), inputs("deepspeed_stage_2_offload"))
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(UserError, match=r"model\.optimizer: SGD cannot be offloaded to the CPU"):
        check_optimizer_as_fit(sgd, inputs("deepspeed_stage_2_offload"))


@needs_deepspeed
def test_a_deepspeed_json_that_contradicts_the_yaml_is_refused() -> None:
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 2e-4}}, "train_batch_size": 64}
    strategy = DeepSpeedZeRO(config=config)
    check_optimizer_as_fit(adamw(), inputs(strategy))
    with pytest.raises(UserError, match=r"contradicts the YAML: optimizer\.params\.lr is 0\.0002, .* is 0\.001"):
        check_optimizer_as_fit(adamw(lr=1e-3), inputs(strategy))
