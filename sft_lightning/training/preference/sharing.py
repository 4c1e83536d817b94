"""Prompt sharing: computing a prompt once for both of its answers, where a probe of the loaded model allows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sft_lightning.batch import batch_to
from sft_lightning.compat.bitsandbytes import without_int8_outliers
from sft_lightning.compat.transformers import attention_of
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.collate import PairBatch, collate_pairs
from sft_lightning.data.pairs.store import PairExample, share_prompt
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.inspection import evaluating
from sft_lightning.training.preference.forward import answer_log_probs

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule

_PROMPT, _ANSWER = 48, 16
"""Number of tokens of the pair that the model is probed with."""

_PAIRS_COUNTED = 1000


@dataclass(frozen=True)
class SharingProbe:
    """How the log-probabilities of a probe's answers change with the layout of their pair, in nats per answer."""

    leak: float
    """Change of the rejected answer's log-probability when the chosen answer changes."""

    difference: float
    """Largest difference between a shared prompt and two separate conversations."""

    effect: float
    """Smallest change when the prompt changes, which is the error of a layout that loses the prompt."""

    tolerance: float
    """Largest difference that rounding explains."""

    @property
    def passed(self) -> bool:
        """Whether a shared prompt gives what separate conversations give; `False` if anything is NaN."""
        return self.leak <= self.tolerance / 32 and self.difference <= min(self.tolerance, self.effect / 8)

    def describe(self) -> str:
        """Return the measured differences in words."""
        return (
            f"with a shared prompt the log-probabilities of answers differ by {self.difference:.1e} from those of "
            f"separate conversations, and by {self.leak:.1e} with the other answer"
        )


@torch.no_grad()
def why_prompts_are_not_shared(module: CausalLMModule, *, wanted: bool) -> str | None:
    """Return why each answer of a pair needs its own copy of the prompt; `None` if one copy is enough.

    Args:
        module: The model, on the device that it computes on.
        wanted: `model.preference.share_prompts`.
    """
    model, config = module.language_model, module.base_model.config
    if not wanted:
        return "model.preference.share_prompts is false"
    if attention_of(config) != PACKED:
        return f"the model's attention is {attention_of(config)}, which cannot keep the two answers apart"
    if module.spec.neftune_alpha is not None:
        return "model.neftune_alpha adds noise to each conversation"
    if getattr(config.get_text_config(), "output_router_logits", False):
        return "the routers' loss counts a prompt once for each of its answers"
    with evaluating(module), without_int8_outliers(model):
        rounding = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
        vocab_size = len(module.data.tokenizer)
        probe = probe_sharing(
            lambda batch: answer_log_probs(module, batch).log_probs, vocab_size, module.device, rounding
        )
    return None if probe.passed else probe.describe()


def probe_sharing(
    log_probs: Callable[[PairBatch], torch.Tensor], vocab_size: int, device: torch.device, rounding: float
) -> SharingProbe:
    """Measure on a loaded model how a pair's answers change when their prompt is computed once.

    Args:
        log_probs: The model in evaluation mode: a batch of P pairs → log-probabilities of their answers, (P, 2).
        vocab_size: Number of token ids to draw from.
        device: Where the model is.
        rounding: Relative rounding error of the coarsest type that it computes in.
    """
    drawn = np.random.default_rng(0).integers(vocab_size, size=(5, _PROMPT), dtype=np.int32)
    prompt, other_prompt, chosen, rejected, other_chosen = drawn

    def asked(prompt: np.ndarray, chosen: np.ndarray, *, share: bool) -> torch.Tensor:
        pair = _pair(prompt, chosen[:_ANSWER], rejected[: _ANSWER // 2])
        batch = collate_pairs([[(0, pair)]], together=True, pad_token_id=0, denominator=1.0, share=share)
        return log_probs(batch_to(batch, device))[0]

    separate, shared = (asked(prompt, chosen, share=share) for share in (False, True))
    other_answer = asked(prompt, other_chosen, share=True)
    other_question = asked(other_prompt, chosen, share=False)
    return SharingProbe(
        leak=float((shared - other_answer)[1].abs()),
        difference=float((shared - separate).abs().max()),
        effect=float((other_question - separate).abs().min()),
        tolerance=32 * rounding * float(separate.abs().max()),
    )


def _pair(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> PairExample:
    ids = [prompt, chosen, prompt, rejected]
    weights = [np.full(len(part), float(i % 2), np.float32) for i, part in enumerate(ids)]
    return PairExample(np.concatenate(ids), np.concatenate(weights), len(prompt) + len(chosen), 1.0)


def shared_fraction(data: SFTDataModule) -> float:
    """Return the share of tokens that prompt sharing saves, measured on the first pairs of the first epoch."""
    tokens = saved = 0
    for document in data.plan(0).documents[:_PAIRS_COUNTED].tolist():
        pair = data.blend.examples.example(*document)
        shared = share_prompt(pair) if isinstance(pair, PairExample) else None
        tokens += len(pair.input_ids)
        saved += 0 if shared is None else shared.shared.common
    return saved / max(1, tokens)
