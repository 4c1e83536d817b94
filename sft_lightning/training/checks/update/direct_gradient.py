"""The gradient of a micro-batch's loss by its definition: the model's own logits, and cross entropy of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sft_lightning.training.forward import decoder_inputs
from sft_lightning.types import IGNORE_INDEX

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule

_PART_BYTES = 1 << 26
"""Memory for float32 logits, their log-probabilities and gradients, where they are made in parts."""

_LOGIT_BYTES = 1 << 29
"""The most memory for all of them, where they are not."""


@dataclass
class Recorded:
    """A micro-batch that was trained on, and the random states of its forward pass."""

    batch: Any
    """The micro-batch, on its device."""

    cpu_state: torch.Tensor
    """State of torch's generator."""

    device_state: torch.Tensor | None
    """State of the GPU's generator; `None` on the CPU."""


def targets_of(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the tokens with a loss are, (B, S - 1) from the second on, and their weights in that order."""
    wanted = (batch["labels"][:, 1:] != IGNORE_INDEX) & (batch["position_ids"][:, 1:] > 0)
    return wanted, torch.where(wanted, batch["loss_weights"][:, 1:].float(), 0.0)


def direct_gradient(module: CausalLMModule, recorded: Recorded, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Return the gradient of a micro-batch's summed loss, float32, by the model's own logits.

    Args:
        module: The module, in training mode.
        recorded: The micro-batch.
        parameter: What the gradient is of.

    Returns:
        The gradient; `None` if the logits cannot be made in parts, and all of them together are too large.
    """
    wanted, weights = targets_of(recorded.batch)
    tokens = Tokens(wanted, recorded.batch["input_ids"][:, 1:][wanted], weights[wanted])
    if not len(tokens.ids):
        return torch.zeros_like(parameter).float()
    for loss_of in (_loss_in_parts, _loss_at_once):
        with _random_states(module, recorded), module.trainer.precision_plugin.forward_context(), torch.enable_grad():
            loss = loss_of(module, recorded.batch, tokens)
            if loss is not None:
                (gradient,) = torch.autograd.grad(loss, [parameter], allow_unused=True)
                return torch.zeros_like(parameter).float() if gradient is None else gradient.float()
    return None


class Tokens(NamedTuple):
    """The N supervised tokens of a micro-batch."""

    wanted: torch.Tensor
    """Which tokens they are, from the second on, (B, S - 1)."""

    ids: torch.Tensor
    """Their ids, (N,)."""

    weights: torch.Tensor
    """Their loss weights, (N,) float32."""

    def loss(self, logits: torch.Tensor, part: slice) -> torch.Tensor:
        """Return Σ weight · cross entropy of some of them.

        Args:
            logits: Their logits, (n, vocabulary).
            part: Which of them.
        """
        losses = F.cross_entropy(logits.float(), self.ids[part], reduction="none")
        return (losses * self.weights[part]).sum()


def _loss_in_parts(module: CausalLMModule, batch: Any, tokens: Tokens) -> torch.Tensor | None:
    """Return the loss with the logits of few tokens at a time, which the backward pass makes again.

    `None` if this family changes what its head returns, or does not call it on all positions.
    """
    head = module.base_model.get_output_embeddings()
    hidden: list[torch.Tensor] = []

    def keep_and_shorten(part: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if inputs[0].shape[:-1] != (tokens.wanted.shape[0], tokens.wanted.shape[1] + 1):
            return None
        hidden.append(inputs[0][:, :-1][tokens.wanted])
        return (hidden[0][None, :1], *inputs[1:])

    if head is None:
        return None
    hook = head.register_forward_pre_hook(keep_and_shorten)
    try:
        first = module.language_model(**decoder_inputs(batch)).logits
    finally:
        hook.remove()
    if len(hidden) != 1 or not torch.equal(first, head(hidden[0][None, :1])):
        return None
    size = max(1, _PART_BYTES // (12 * first.shape[-1]))
    parts = [slice(start, start + size) for start in range(0, len(tokens.ids), size)]
    losses = [checkpoint(_part_loss, head, hidden[0][part], tokens, part, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum()


def _part_loss(head: torch.nn.Module, hidden: torch.Tensor, tokens: Tokens, part: slice) -> torch.Tensor:
    return tokens.loss(head(hidden[None])[0], part)


def _loss_at_once(module: CausalLMModule, batch: Any, tokens: Tokens) -> torch.Tensor | None:
    """Return the loss with all logits of the model; `None` if they are too large."""
    if 12 * tokens.wanted.numel() * module.base_model.config.get_text_config().vocab_size > _LOGIT_BYTES:
        return None
    logits = module.language_model(**decoder_inputs(batch)).logits
    return tokens.loss(logits[:, :-1][tokens.wanted], slice(None))


@contextmanager
def _random_states(module: CausalLMModule, recorded: Recorded) -> Iterator[None]:
    """Draw the random numbers of the recorded forward pass again; afterwards the generators are as they were."""
    devices = [module.device] if recorded.device_state is not None else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(recorded.cpu_state)
        if recorded.device_state is not None:
            torch.cuda.set_rng_state(recorded.device_state, module.device)
        yield
