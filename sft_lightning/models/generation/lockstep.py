"""Forward passes of processes that share the weights of one model: a pass of one is a pass of all.

Each layer's weights are gathered from all processes just before it runs, so a pass that a process takes alone waits for
the others. Texts end where their model ends them: processes with other prompts want other numbers of passes.
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
    """Let every process take the passes that it wants, none of them included; all take as many as who wants the most.

    A process that wants no more goes on with stand-in passes over one token, until nobody wants one. A model that is
    whole in every process is left alone.

    Args:
        model: In evaluation mode; all processes come here together, and leave together.
    """
    if not is_sharded(model):
        yield
        return
    device = computing_device(model)
    # Before the strategy's own hooks, which gather.
    announcement = model.register_forward_pre_hook(lambda *_: _announce(device), prepend=True)
    try:
        yield
    finally:
        announcement.remove()
    while _is_wanted(device):
        _take_stand_in(model, device)


def _announce(device: torch.device) -> None:
    dist.all_reduce(torch.ones((), device=device))


def _is_wanted(device: torch.device) -> bool:
    """Whether another process takes a pass now; the counterpart of `_announce`."""
    number = torch.zeros((), device=device)
    dist.all_reduce(number)
    return bool(number)


@torch.no_grad()
def _take_stand_in(model: PreTrainedModel, device: torch.device) -> None:
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
