"""Checks of preference training: the loss at the start, and the isolation of pairs in packed rows."""

from __future__ import annotations

import math
from typing import Any

import torch

from sft_lightning.checks import Check, within
from sft_lightning.data.pairs.collate import collate_pairs
from sft_lightning.data.pairs.store import PairExample
from sft_lightning.models.inspection import evaluating
from sft_lightning.selftest.short_runs import Run
from sft_lightning.selftest.small_data import SmallData
from sft_lightning.training.preference.forward import answer_log_probs
from sft_lightning.training.preference.losses import PreferenceConfig

_FLOAT32_TOLERANCE = 1e-5


def check_start(run: Run, config: PreferenceConfig) -> Check:
    """Check that the loss of the first step is that of a model which equals its reference.

    Args:
        run: A run of one step without dropout and noise.
        config: The preference loss.
    """
    name = "loss at step 0"
    if not config.has_reference:
        return Check(name, None, f"the loss {config.loss} has no reference model")
    module = run.module
    if config.reference == "adapter_off" and module.spec.adapter is not None and module.spec.adapter.path is not None:
        return Check(
            name, None, "with model.preference.reference: adapter_off the reference is the base, not the loaded adapter"
        )
    found, expected = float(run.trainer.callback_metrics["train/loss"]), start_loss(config)
    wanted = "log 2" if config.loss == "sigmoid" else f"{expected:.6f}"
    what = f"{found:.6f}, expected {wanted}: relative difference"
    return within(name, abs(found - expected) / expected, max(_FLOAT32_TOLERANCE, run.rounding), what)


def start_loss(config: PreferenceConfig) -> float:
    """Return the loss of a pair whose chosen and rejected log-ratios are equal."""
    return {"sigmoid": math.log(2), "ipo": 1 / (2 * config.beta) ** 2, "hinge": 1.0}[config.loss]


def check_pairs(run: Run, small: SmallData) -> Check:
    """Compare the log-probabilities of answers in a packed row with those of each conversation in its own row.

    Args:
        run: A run whose model is loaded.
        small: Pairs to pack.
    """
    data = small.module(batch_size=1, packing="best_fit")
    data.setup("fit")
    plan = data.plan(0)
    row = max((plan.row(each).tolist() for each in range(plan.num_rows)), key=len)
    examples = [(document[0], data.blend.examples.example(*document)) for document in row]
    pairs = [(number, example) for number, example in examples if isinstance(example, PairExample)]
    module = run.module.to(run.device)
    with evaluating(module), torch.no_grad(), run.trainer.precision_plugin.forward_context():
        packed, separate = (
            answer_log_probs(
                module,
                _on_device(
                    collate_pairs([pairs], together=together, pad_token_id=data.stop_token_id, denominator=1.0),
                    run.device,
                ),
            ).log_probs
            for together in (True, False)
        )
    scale = max(1.0, float(separate.abs().max()))
    what = f"{len(pairs)} pairs in one row: log-probabilities differ from those in separate rows by"
    return within(
        "pair isolation", float((packed - separate).abs().max()) / scale, max(_FLOAT32_TOLERANCE, run.rounding), what
    )


def _on_device(batch: Any, device: torch.device) -> Any:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
