"""What `CausalLMModule` asks of its strategy: full weights for exports, the optimizer, and who clips gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer


class ModuleServices:
    """What a strategy does for the module; here, for a strategy that leaves model and optimizer as they are."""

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds the whole model: all processes must then run every forward pass together."""
        return False

    @property
    def manages_gradients(self) -> bool:
        """Whether the strategy itself keeps float32 master weights, scales the loss, and clips gradients."""
        return False

    @property
    def grad_norm(self) -> float | torch.Tensor | None:
        """L2 norm of the gradients of the last optimizer step, before clipping, over all processes; a scalar.

        `None` if the strategy does not manage gradients.
        """
        return None

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer to train with: the given one, or one that takes the same steps on another device.

        Raises:
            UserError: If it cannot step on this strategy's shards.
        """
        return optimizer

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        """Hold the full weights in rank 0's module while the context is open, for exports.

        All processes must enter it together, and no forward pass may run inside.
        """
        yield


def services_of(strategy: Strategy) -> ModuleServices:
    """Return what a strategy does for the module; Lightning's own strategies leave model and optimizer as they are."""
    return strategy if isinstance(strategy, ModuleServices) else ModuleServices()
