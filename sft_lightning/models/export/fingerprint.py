"""Hashes of a model: of its weights, and of everything that decides its answers."""

from __future__ import annotations

import json
from typing import Any

import torch
import xxhash
from peft import PeftModel
from transformers import PreTrainedModel

from sft_lightning.compat.deepspeed import own_part
from sft_lightning.models.inspection import base_model

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of as many bytes."""


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor's values, each read as an integer: an int64 scalar that any changed bit changes.

    It is computed on the tensor's device, which is not waited for.

    Args:
        tensor: Any shape and type.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)


def weight_fingerprint(model: torch.nn.Module) -> str:
    """Return a hash of all weights and buffers; for a sharded model, of this process's part of them."""
    digest = xxhash.xxh3_128()
    tensors: list[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        local = _own_part(tensor)
        digest.update(f"{name} {local.dtype} {tuple(local.shape)}".encode())
        flat = local.detach().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _own_part(tensor: Any) -> torch.Tensor:
    """Return this process's part of a tensor: the shard of FSDP2, the partition of ZeRO-3, or the whole tensor."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else own_part(tensor)
    return part


def model_fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """Return a hash of the weights, the model's configuration and the adapters' configurations."""
    configs: list[dict[str, Any]] = [base_model(model).config.to_dict()]
    if isinstance(model, PeftModel):
        configs += [config.to_dict() for _, config in sorted(model.peft_config.items())]
    text = json.dumps(configs, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    return xxhash.xxh3_128(f"{weight_fingerprint(model)} {text}".encode()).hexdigest()
