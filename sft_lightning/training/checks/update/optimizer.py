"""The optimizer: it updates exactly what trains, decays no vector, and has the rates of the schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sft_lightning.checks import Check
from sft_lightning.compat.deepspeed import full_shape
from sft_lightning.strategies.services import services_of
from sft_lightning.training.checks.hooks import RunCheck, is_logging_point
from sft_lightning.training.optim import LRScheduleConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sft_lightning.training.module import CausalLMModule

_RATES = "learning rate"
_GROUPS = "optimizer groups"


class OptimizerGroups(RunCheck):
    """Check what the live optimizer updates and decays, when training starts."""

    def on_train_start(self, module: CausalLMModule) -> None:
        """Look at the groups of the optimizer, which a checkpoint may have changed."""
        services = services_of(module.trainer.strategy)
        if services.manages_gradients or services.shards_weights:
            # After a forward pass, FSDP2 leaves the gathered tensors of its root in the model instead of its shards.
            reason = "the optimizer updates flat copies (DeepSpeed) or shards (FSDP2) of the model's tensors"
            module.checks.note(Check(_GROUPS, None, reason))
            return
        named = list(module.language_model.named_parameters())
        module.checks.run(lambda: check_groups(named, module.trainer.optimizers[0].param_groups))


def check_groups(named: Sequence[tuple[str, Any]], groups: Sequence[dict[str, Any]]) -> Check:
    """Check that the groups have exactly the trainable parameters, each once, and that vectors are not decayed.

    Args:
        named: Names and parameters of the model.
        groups: The groups of the optimizer.
    """
    names = {id(parameter): name for name, parameter in named}
    trainable = {id(parameter) for _, parameter in named if parameter.requires_grad}
    updated = [id(parameter) for group in groups for parameter in group["params"]]
    wrong = [names.get(each, "a tensor that the model does not have") for each in trainable ^ set(updated)]
    if wrong or len(updated) != len(trainable):
        what = f"{len(wrong)} tensors that train, or that are updated, are not both: {', '.join(sorted(wrong)[:3])}"
        return Check(_GROUPS, False, what if wrong else f"{len(updated) - len(trainable)} tensors are updated twice")
    decayed = [
        names[id(parameter)]
        for group in groups
        for parameter in group["params"]
        if group.get("weight_decay") and len(full_shape(parameter)) < 2
    ]
    if decayed:
        return Check(_GROUPS, False, f"{len(decayed)} norms or biases have a weight decay: {decayed[0]} …")
    figure = f"{len(updated)} tensors are updated, as many as train; no norm and no bias has a weight decay"
    return Check(_GROUPS, True, figure)


class LearningRate(RunCheck):
    """Check at each optimizer step that every group has the rate of the schedule; noted when a step is logged."""

    def __init__(self) -> None:
        self._base: list[float] = []
        self._num_steps = 0
        self._first = 0
        self._wrong: Check | None = None
        self._latest: Check | None = None

    def on_train_start(self, module: CausalLMModule) -> None:
        """Note the rates that the schedule multiplies."""
        self._base = [
            float(group.get("initial_lr", group["lr"])) for group in module.trainer.optimizers[0].param_groups
        ]
        self._num_steps = module.data.num_optimizer_steps
        # The first step of a run that is continued has the rate that the checkpoint was saved with.
        self._first = module.trainer.global_step

    def on_before_optimizer_step(self, module: CausalLMModule, optimizer: Optimizer) -> None:
        """Compare the rates of a step."""
        step, groups = module.trainer.global_step, module.trainer.optimizers[0].param_groups
        if step == self._first > 0 or self._wrong is not None:
            return
        rates = [float(group["lr"]) for group in groups]
        check = check_rates(rates, self._base, expected_factor(module.spec.lr_scheduler, step, self._num_steps), step)
        self._latest = check
        if not check.passed:
            self._wrong = check

    def on_train_batch_end(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Note the outcome when a step is logged."""
        if self._latest is not None and is_logging_point(module):
            module.checks.note(self._wrong or self._latest)
            self._latest = None

    def on_train_end(self, module: CausalLMModule) -> None:
        """Note the outcome of the steps since the last logged one."""
        if self._latest is not None:
            module.checks.note(self._wrong or self._latest)


def check_rates(rates: Sequence[float], base: Sequence[float], factor: float, step: int) -> Check:
    """Check the rates of all groups at one step.

    Args:
        rates: The rates of the groups.
        base: Their rates at the schedule's peak.
        factor: The schedule's factor.
        step: Optimizer steps taken before, for the figure.
    """
    expected = [peak * factor for peak in base]
    wrong = [
        (rate, wanted)
        for rate, wanted in zip(rates, expected, strict=True)
        if not math.isclose(rate, wanted, rel_tol=1e-6, abs_tol=1e-12)
    ]
    if wrong:
        figure = f"{wrong[0][0]:.6g} at step {step + 1}, {wrong[0][1]:.6g} by model.lr_scheduler"
        return Check(_RATES, False, figure)
    return Check(_RATES, True, f"{rates[0]:.6g} at step {step + 1}, as model.lr_scheduler says")


def expected_factor(config: LRScheduleConfig, step: int, num_steps: int) -> float:
    """Return the schedule's factor, from the keys of `model.lr_scheduler`.

    Written again, so that a fault in the schedule or in how it is stepped is not shared.

    Args:
        config: The schedule.
        step: Optimizer steps taken before.
        num_steps: Optimizer steps of the whole run.
    """
    warmup = config.warmup_steps or 0
    if config.warmup_ratio is not None:
        warmup = math.ceil(num_steps * config.warmup_ratio)
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    if config.name == "wsd":
        share = 0.1 if config.decay_ratio is None else config.decay_ratio
        shape = max(0, num_steps - step) / max(1.0, min(share * num_steps, num_steps - warmup))
    else:
        shape = _decay(config, done)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * min(1.0, shape)


def _decay(config: LRScheduleConfig, done: float) -> float:
    """Return the decay without its floor when a share of it is done."""
    if config.name == "constant":
        return 1.0
    if config.name == "linear":
        return 1 - done
    if config.name == "polynomial":
        return float((1 - done) ** (1.0 if config.power is None else config.power))
    cycle = 1.0 if done == 1 else math.fmod(done * (config.num_cycles or 1), 1.0)
    return math.cos(math.pi * cycle / 2) ** 2
