"""The optimizer whose state ZeRO puts on the host or on NVMe: DeepSpeed's Adam for the host."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from sft_lightning.errors import UserError


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
