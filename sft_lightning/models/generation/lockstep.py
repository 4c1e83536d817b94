"""Keep the forward passes of processes that share a sharded model in lockstep during generation.

Each layer's weights are gathered from all processes just before it runs, so a process that runs a forward pass alone
would wait forever. But answers have different lengths, so processes need different numbers of passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from sft_lightning.models.inspection import computing_device, is_sharded


@contextmanager
def lockstep(model: PreTrainedModel) -> Iterator[None]:
    """Let each process run any number of forward passes, also none, without leaving the others waiting.

    A process that is done runs dummy passes over one token until all processes are done. A model that is not sharded is
    not changed.

    Args:
        model: The model, in evaluation mode; all processes enter and leave the block together.
    """
    if not is_sharded(model):
        yield
        return
    device = computing_device(model)
    # Runs before the strategy's hooks, which gather the weights.
    announcement = model.register_forward_pre_hook(lambda *_: _announce_pass(device), prepend=True)
    try:
        yield
    finally:
        announcement.remove()
    while _is_pass_announced(device):
        _run_dummy_pass(model, device)


def _announce_pass(device: torch.device) -> None:
    dist.all_reduce(torch.ones((), device=device))


def _is_pass_announced(device: torch.device) -> bool:
    """Whether another process runs a forward pass now; the counterpart of `_announce_pass`."""
    number = torch.zeros((), device=device)
    dist.all_reduce(number)
    return bool(number)


@torch.no_grad()
def _run_dummy_pass(model: PreTrainedModel, device: torch.device) -> None:
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
