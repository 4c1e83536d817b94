"""What `gradient_checkpointing: auto` recomputes in a run, decided on its loaded model before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from sft_lightning.models.checkpointing import free_memory_bytes
from sft_lightning.strategies.registry import sharding_of
from sft_lightning.training.memory.decision import (
    RecomputationDecision,
    budget_of,
    choices,
    decide_recomputation,
    obviously_fits,
)
from sft_lightning.training.memory.estimate import Estimator
from sft_lightning.training.memory.parts import Setup
from sft_lightning.training.memory.skeleton import build_skeleton
from sft_lightning.training.spec import PreferenceSpec

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule


def decide_for_run(module: CausalLMModule) -> RecomputationDecision:
    """Decide for `gradient_checkpointing: auto`: on rank 0, for all processes.

    A model that cannot be simulated trains all the same, with all layers recomputed.
    """
    strategy = module.trainer.strategy
    decision = _decide_on_rank_zero(module) if module.trainer.is_global_zero else None
    return cast("RecomputationDecision", strategy.broadcast(decision))


def _decide_on_rank_zero(module: CausalLMModule) -> RecomputationDecision:
    spec, data, trainer, model = module.spec, module.data, module.trainer, module.base_model
    setup = Setup(
        batch_size=data.spec.batch_size,
        max_length=data.spec.max_length,
        recomputation=0,
        bits=None if spec.quantization is None else spec.quantization.bits,
        sharding=sharding_of(trainer.strategy),
        num_gpus=trainer.world_size,
    )
    budget = budget_of(module.language_model, module.device)
    obvious = obviously_fits(model, setup, free_memory_bytes(module.device))
    if obvious is not None:
        return obvious
    ways = choices(model, setup.sharding)
    try:
        with torch.random.fork_rng(devices=[]):  # the run's random numbers stay what they are
            return decide_recomputation(_estimator(module).memory, setup, ways, budget)
    except Exception as error:  # whatever a model's own code does with tensors that have no values
        reason = next(iter(str(error).strip().splitlines()), "")
        return RecomputationDecision(ways[-1], f"auto: not simulated, {type(error).__name__}: {reason}")


def _estimator(module: CausalLMModule) -> Estimator:
    spec, data, trainer = module.spec, module.data, module.trainer
    return Estimator(
        spec,
        build_skeleton(spec, len(data.tokenizer), trainer.precision),
        precision=trainer.precision,
        max_length=data.spec.max_length,
        accumulates=trainer.accumulate_grad_batches > 1,
        of_pairs=isinstance(spec, PreferenceSpec),
        device="cuda" if module.device.type == "cuda" else "cpu",
    )
