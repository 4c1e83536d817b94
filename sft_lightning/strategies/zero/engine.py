"""The precision plugin and the CPU optimizer that DeepSpeed's engine gets."""

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
    """Lightning's plugin without three conversions.

    Lightning's converts a bfloat16 base to float32 under `precision: 32-true`, rounds the loss weights in a batch, and
    lets DeepSpeed divide the loss by the number of micro-batches a second time.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the model only if the precision is 16-bit."""
        return module if self.precision == "32-true" else super().convert_module(module)

    def convert_input(self, data: Any) -> Any:
        """Return the batch unchanged: its only floating-point values are loss weights."""
        return data

    def backward(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass without dividing the loss again.

        Args:
            tensor: The loss, a scalar.
            args: Passed on to Lightning's plugin.
            kwargs: Passed on to Lightning's plugin.
        """
        super().backward(tensor, *args, scale_wrt_gas=False, **kwargs)


def cpu_adam(optimizer: Optimizer) -> Optimizer:
    """Return DeepSpeed's CPU Adam with the groups and hyper-parameters of a torch Adam.

    Args:
        optimizer: `torch.optim.Adam` or `AdamW`, which `refusals.check_optimizer` has checked.
    """
    make: Any = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    name = type(optimizer).__name__
    rank_zero_info(f"optimizer: offloaded; DeepSpeedCPUAdam replaces {name}, with the same hyper-parameters")
    keys: Mapping[str, Any] = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    on_cpu: Optimizer = make(optimizer.param_groups, adamw_mode=name == "AdamW", **keys)
    return on_cpu
