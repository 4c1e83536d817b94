"""What DeepSpeed's engine is given: the optimizer, and the types of weights, batches and losses."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from sft_lightning.errors import UserError


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


class OnHost:
    """Makes DeepSpeed's Adam for the host in the place of a torch Adam with the same groups and values.

    Args:
        make: `model.optimizer`.
    """

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, groups: Any) -> Optimizer:
        made: Optimizer = self._make(groups)
        name = type(made).__name__
        if name not in ("Adam", "AdamW"):
            raise UserError(f"model.optimizer: {name} has no version for the host; take AdamW, or do not offload it")
        host_adam: Any = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam

        keys: Mapping[str, Any] = {key: made.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
        rank_zero_info(f"optimizer: DeepSpeedCPUAdam takes {name}'s steps on the host, with its values")
        on_host: Optimizer = host_adam(made.param_groups, adamw_mode=name == "AdamW", **keys)
        return on_host
