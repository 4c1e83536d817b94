"""Checks of the reference model: it is the model before training, and stays so while the policy moves away from it.

One pair's log-probabilities are computed again: each conversation alone in its row, from the model's own logits, by the
base without adapters, or by the whole model while nothing has been updated yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from sft_lightning.checks import Check, within
from sft_lightning.data.pairs.store import PairExample
from sft_lightning.models.export.check import copy_without_adapters
from sft_lightning.models.inspection import evaluating, is_sharded
from sft_lightning.training.checks.hooks import RunCheck, coarsest_rounding, is_logging_point
from sft_lightning.training.preference.forward import answer_log_probs
from sft_lightning.types import TokenizedExample

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sft_lightning.training.module import CausalLMModule

_NAME = "reference model"
_CONSTANT = "reference at the end"
_APART = "policy and reference"
_FLOAT32_TOLERANCE = 1e-4
_ROUNDINGS = 4
_CONSTANT_TOLERANCE = 1e-5, 1e-3
"""Largest relative change of a reference that is computed twice, in float32 and in a coarser type."""

_MUST_DIFFER = 1e-5
"""Sum of the steps' learning rates from which on policy and reference differ in float32."""


class ReferenceModel(RunCheck):
    """Check the reference's log-probabilities of the first micro-batch, before the first update and after the last."""

    def __init__(self) -> None:
        self._batch: Any = None
        self._start: torch.Tensor | None = None
        self._saved: dict[str, torch.Tensor] = {}
        self._rates = 0.0
        self._compared = False

    def on_load_checkpoint(self, module: CausalLMModule, checkpoint: dict[str, Any]) -> None:
        """Keep the log-probabilities by the model before training, as the checkpoint has them."""
        self._saved = {key: table.clone() for key, table in checkpoint.get("reference_log_probs", {}).items()}

    def on_train_batch_start(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Compute the reference of the first pair again."""
        kind = kind_of_reference(module)
        if self._batch is None and kind is not None:
            self._batch = batch
            self._start = start = _reference(module, batch)
            if kind == "precomputed" and module.trainer.global_step > 0:
                module.checks.run(lambda: check_tables(self._saved, _tables(module)))
            else:
                module.checks.run(lambda: check_reference(module, batch, start, kind))

    def on_before_optimizer_step(self, module: CausalLMModule, optimizer: Optimizer) -> None:
        """Note how far the policy may have moved."""
        self._rates += max(float(group["lr"]) for group in optimizer.param_groups)

    def on_train_batch_end(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Compare policy and reference after the first logged update."""
        if self._start is not None and not self._compared and self._rates > 0 and is_logging_point(module):
            self._compared = True
            self._compare(module)

    def on_train_end(self, module: CausalLMModule) -> None:
        """Compare the reference with itself at the start, and with the policy."""
        if self._start is not None:
            start, end = self._start, _reference(module, self._batch)
            coarse = coarsest_rounding(module) > torch.finfo(torch.float32).eps
            module.checks.run(lambda: check_constant(start, end, _CONSTANT_TOLERANCE[coarse]))
            self._compare(module)

    def _compare(self, module: CausalLMModule) -> None:
        reference = _reference(module, self._batch)
        with torch.no_grad(), evaluating(module), module.trainer.precision_plugin.forward_context():
            policy = answer_log_probs(module, self._batch).log_probs
        coarse = coarsest_rounding(module) > torch.finfo(torch.float32).eps
        must = self._rates >= _MUST_DIFFER and not coarse
        module.checks.run(lambda: check_apart(policy, reference, must_differ=must))


def kind_of_reference(module: CausalLMModule) -> str | None:
    """Return where the run's reference comes from, `adapter_off` or `precomputed`; `None` if it has none.

    Args:
        module: The module of a run.
    """
    reference: Any = getattr(module.objective, "reference", None)
    return None if reference is None else reference.kind


def _tables(module: CausalLMModule) -> dict[str, torch.Tensor]:
    objective: Any = module.objective
    tables: dict[str, torch.Tensor] = objective.reference.tables
    return tables


def check_tables(saved: Mapping[str, torch.Tensor], used: Mapping[str, torch.Tensor]) -> Check:
    """Check that a continued run has the reference of its checkpoint: the model before training is no longer there.

    Args:
        saved: The tables of log-probabilities in the checkpoint, (pairs, 2) each.
        used: Those of the run.
    """
    known = saved.keys() & used.keys()
    if not known:
        return Check(_NAME, None, "the checkpoint has no log-probabilities of the run's pairs")
    apart = max(float((saved[key].cpu() - used[key].cpu()).abs().max()) for key in known)
    figure = f"precomputed: {len(known)} tables, log-probabilities differ from the checkpoint's by {apart:.1e}"
    return Check(_NAME, apart == 0, figure)


def _reference(module: CausalLMModule, batch: Any) -> torch.Tensor:
    objective: Any = module.objective
    with module.trainer.precision_plugin.forward_context():
        found: torch.Tensor = objective.reference.log_probs(module, batch, "train")
    return found.detach().float().clone()


def check_reference(module: CausalLMModule, batch: Any, reference: torch.Tensor, kind: str) -> Check:
    """Compute the reference's log-probabilities of a micro-batch's first pair again, and compare them.

    Args:
        module: The module; if the reference is precomputed, before the first update of the run.
        batch: P pairs.
        reference: What training takes for their reference, (P, 2).
        kind: From `kind_of_reference`.
    """
    model = module.language_model
    if is_sharded(model):
        return Check(_NAME, None, "a forward pass of one pair needs all processes")
    if not len(reference) or module.data.spec.streams:
        return Check(_NAME, None, "this process has no pair in the first micro-batch, or its pairs are streamed")
    examples, number = module.data.blend.examples, int(batch["pairs"][0])
    pair = examples.example(number, 0, int(examples.kept[number]))
    if not isinstance(pair, PairExample):
        raise TypeError(f"expected a pair, found a {type(pair).__name__}")
    before: Any = model
    if kind == "adapter_off" and isinstance(model, PeftModel):
        before = copy_without_adapters(model.get_base_model())
    with torch.no_grad(), evaluating(before), module.trainer.precision_plugin.forward_context():
        again = torch.stack([log_prob_alone(before, half, module.device) for half in pair.halves()])
    scale = max(1.0, float(again.abs().max()))
    tolerance = max(_FLOAT32_TOLERANCE, _ROUNDINGS * coarsest_rounding(module))
    how = "without the adapter" if kind == "adapter_off" else "by the model before training"
    what = f"{kind}: log-probabilities of a pair, computed again {how}, differ by"
    return within(_NAME, float((again - reference[0]).abs().max()) / scale, tolerance, what)


def log_prob_alone(model: Any, example: TokenizedExample, device: torch.device) -> torch.Tensor:
    """Return the log-probability of a conversation's supervised tokens, alone in its row, a float32 scalar.

    Args:
        model: A causal language model.
        example: The conversation.
        device: Where the model computes.
    """
    ids = torch.from_numpy(example.input_ids.astype("int64")).to(device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    chosen = torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None]).squeeze(1)
    return chosen[torch.from_numpy(example.loss_weights[1:] > 0).to(device)].sum()


def check_constant(start: torch.Tensor, end: torch.Tensor, tolerance: float) -> Check:
    """Check that training has not changed the reference.

    Args:
        start: Its log-probabilities before the first update, (P, 2).
        end: Those of the same pairs after the last, (P, 2).
        tolerance: The largest difference, relative to the largest log-probability.
    """
    if not len(start):
        return Check(_CONSTANT, None, "this process has no pair in the first micro-batch")
    scale = max(1.0, float(start.abs().max()))
    what = f"{len(start)} pairs: log-probabilities differ from those at the start by"
    return within(_CONSTANT, float((end - start).abs().max()) / scale, tolerance, what)


def check_apart(policy: torch.Tensor, reference: torch.Tensor, *, must_differ: bool) -> Check:
    """Check that the policy is no longer the reference.

    Args:
        policy: Log-probabilities by the trained model, (P, 2).
        reference: Those by the reference, (P, 2).
        must_differ: Whether the updates so far cannot have been lost in rounding.
    """
    if not len(policy):
        return Check(_APART, None, "this process has no pair in the first micro-batch")
    apart = float((policy.float() - reference).abs().max())
    if apart == 0 and not must_differ:
        return Check(_APART, None, "the updates so far are too small for the type that the model computes in")
    return Check(_APART, apart != 0, f"log-probabilities of {len(policy)} pairs differ by up to {apart:.1e}")
