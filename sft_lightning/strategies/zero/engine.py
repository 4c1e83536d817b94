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


def cpu_adam(optimizer: Optimizer) -> Optimizer:
    """Return DeepSpeed's CPU Adam with the groups and hyper-parameters of a torch Adam, for an offloaded optimizer.

    Args:
        optimizer: `torch.optim.Adam` or `AdamW`, which `refusals.check_optimizer` has checked.
    """
    make: Any = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    name = type(optimizer).__name__
    rank_zero_info(f"optimizer: DeepSpeedCPUAdam takes the steps of {name} on the CPU, with the same hyper-parameters")
    keys: Mapping[str, Any] = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    on_cpu: Optimizer = make(optimizer.param_groups, adamw_mode=name == "AdamW", **keys)
    return on_cpu
