"""All processes that hold the whole model hold the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sft_lightning.checks import Check
from sft_lightning.compat.lightning.loops import is_accumulating
from sft_lightning.models.export.fingerprint import bit_sum
from sft_lightning.models.inspection import is_sharded
from sft_lightning.training.checks.hooks import RunCheck, values_of_processes

if TYPE_CHECKING:
    from torch import nn

    from sft_lightning.training.module import CausalLMModule


class SameWeights(RunCheck):
    """Compare the trained weights of all processes after the first update and after the last one.

    Data-parallel processes start with the same weights and average their gradients, so they stay the same to the last
    bit. If one draws apart, the run logs and exports one of several models.
    """

    def __init__(self) -> None:
        self._compared = False

    def on_train_batch_end(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Compare the weights when the first update of this run is complete."""
        if not self._compared and not is_accumulating(module.trainer):
            self._compared = True
            module.checks.run(lambda: check_weights(module.language_model))

    def on_train_end(self, module: CausalLMModule) -> None:
        """Compare the weights that are exported."""
        module.checks.run(lambda: check_weights(module.language_model))


def check_weights(model: nn.Module) -> Check:
    """Check that every trained weight has the same bits in all processes; all of them must call this.

    Args:
        model: The model, adapters included.
    """
    name = "weights of processes"
    if is_sharded(model):
        return Check(name, None, "each process has its own part of the weights")
    trained = [(each, parameter) for each, parameter in model.named_parameters() if parameter.requires_grad]
    sums = torch.stack([bit_sum(parameter) for _, parameter in trained]).tolist() if trained else []
    every = values_of_processes(sums)
    if len(every) == 1:
        return Check(name, None, "one process")
    apart = [each for number, (each, _) in enumerate(trained) if len({values[number] for values in every}) > 1]
    figure = f"{len(apart)} of {len(trained)} trained tensors differ between {len(every)} processes"
    return Check(name, not apart, f"{figure}: {apart[0]} …" if apart else figure)
