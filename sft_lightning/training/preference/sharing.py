"""Whether a prompt can be computed once for both of its answers: not taken from a model's name, but measured on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.collate import PairBatch, collate_pairs
from sft_lightning.data.pairs.store import PairExample, share_prompt

_PROMPT, _ANSWER = 48, 16
"""Tokens of the pair that is asked."""

_PAIRS_LOOKED_AT = 1000


@dataclass(frozen=True)
class Sharing:
    """How far log-probabilities of answers move with the layout of their pair, in nats of a whole answer."""

    leak: float
    """Change of the rejected answer's when the chosen answer changes."""

    difference: float
    """Largest difference between the shared layout and two separate conversations."""

    effect: float
    """Smallest change of an answer's when its prompt changes: what a layout without the prompt would be wrong by."""

    tolerance: float
    """What rounding may do."""

    @property
    def proven(self) -> bool:
        """Whether the shared layout says what separate conversations say; not if anything is NaN."""
        return self.leak <= self.tolerance / 32 and self.difference <= min(self.tolerance, self.effect / 8)

    def describe(self) -> str:
        """Return in words what was measured."""
        return (
            f"log-probabilities of answers differ by {self.difference:.1e} from those of separate conversations, "
            f"and by {self.leak:.1e} with the other answer"
        )


def measure_sharing(
    log_probs: Callable[[PairBatch], torch.Tensor], vocab_size: int, device: torch.device, rounding: float
) -> Sharing:
    """Measure on a loaded model what becomes of a pair's answers when its prompt is computed once.

    Args:
        log_probs: Asks the model, without chance: a batch of pairs → log-probabilities of their answers, (P, 2).
        vocab_size: Ids to draw from.
        device: Where the model is.
        rounding: Relative rounding error of the coarsest type that it computes in.
    """
    drawn = np.random.default_rng(0).integers(vocab_size, size=(5, _PROMPT), dtype=np.int32)
    prompt, other_prompt, chosen, rejected, other_chosen = drawn

    def asked(prompt: np.ndarray, chosen: np.ndarray, *, share: bool) -> torch.Tensor:
        pair = _pair(prompt, chosen[:_ANSWER], rejected[: _ANSWER // 2])
        batch = collate_pairs([[(0, pair)]], together=True, pad_token_id=0, denominator=1.0, share=share)
        for key, value in batch.items():
            if isinstance(value, torch.Tensor):
                batch[key] = value.to(device)  # type: ignore[literal-required]  # the keys are the batch's own
        return log_probs(batch)[0]

    separate, shared = (asked(prompt, chosen, share=share) for share in (False, True))
    moved = asked(prompt, other_chosen, share=True)
    elsewhere = asked(other_prompt, chosen, share=False)
    return Sharing(
        leak=float((shared - moved)[1].abs()),
        difference=float((shared - separate).abs().max()),
        effect=float((elsewhere - separate).abs().min()),
        tolerance=32 * rounding * float(separate.abs().max()),
    )


def _pair(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> PairExample:
    ids = [prompt, chosen, prompt, rejected]
    weights = [np.full(len(part), float(i % 2), np.float32) for i, part in enumerate(ids)]
    return PairExample(np.concatenate(ids), np.concatenate(weights), len(prompt) + len(chosen), 1.0)


def shared_fraction(data: SFTDataModule) -> float:
    """Return the share of tokens that is not computed a second time, of the first pairs of the first epoch."""
    tokens = saved = 0
    for document in data.plan(0).documents[:_PAIRS_LOOKED_AT].tolist():
        pair = data.blend.examples.example(*document)
        shared = share_prompt(pair) if isinstance(pair, PairExample) else None
        tokens += len(pair.input_ids)
        saved += 0 if shared is None else shared.shared.common
    return saved / max(1, tokens)
