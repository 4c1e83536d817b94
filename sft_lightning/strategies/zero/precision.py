"""What types ZeRO's weights, batches and losses have."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from torch import nn


class ZeroPrecision(DeepSpeedPrecision):
    """Lightning's, which would make float32 of a bfloat16 base under `precision: 32-true`, round the weights of the
    loss, and divide it by the number of micro-batches a second time."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Leave the types alone, unless all is to be in half precision."""
        return module if self.precision == "32-true" else super().convert_module(module)

    def convert_input(self, data: Any) -> Any:
        """Leave a batch as it is: its only floating-point values are the weights of the loss."""
        return data

    def backward(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Let DeepSpeed run the backward pass of a loss that is divided already."""
        super().backward(tensor, *args, scale_wrt_gas=False, **kwargs)
