"""FlashAttention-3 and -4 below torch's variable-length kernel, where the device and the installed packages have them.

torch computes attention by FlashAttention-2 unless a newer version is activated, for the whole process. A version that
is activated here has first given the result and the gradients of FlashAttention-2 on the run's own device and shapes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PretrainedConfig

from sft_lightning.batch import DocumentLengths
from sft_lightning.compat.torch import activate_flash_attention, restore_flash_attention, shares_key_value_heads
from sft_lightning.models.attention.kernels import KERNELS, prepare_kernel, torch_kernel

Version = Literal["FA3", "FA4"]
"""torch's names of the versions."""

_MODULES: dict[Version, str] = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
_TOLERANCE = 2e-2
"""Largest difference, relative to the largest value: a few rounding errors of bfloat16."""

_DOCUMENTS = [[300, 17, 129, 66]]
_ERRORS = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, NotImplementedError, AssertionError)


@dataclass(frozen=True, kw_only=True)
class HeadShapes:
    """The heads that a version is tried with."""

    heads: int
    """Query heads."""

    key_value_heads: int
    """Key/value heads."""

    width: int
    """Width of a head, a multiple of 8."""


@dataclass(frozen=True)
class _Change:
    """What a change of the kernel does to its numbers."""

    difference: float
    """Largest difference, relative to the largest value; NaN if the kernel failed."""

    reason: str
    """Why the change is not used."""

    @property
    def verified(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= _TOLERANCE


def _changed_numbers(attend: Callable[[], Sequence[torch.Tensor]], change: Callable[[], None]) -> _Change:
    expected = attend()
    try:
        change()
        found = attend()
    except _ERRORS as error:
        reason = str(error).strip().partition("\n")[0]
        return _Change(float("nan"), f"failed ({type(error).__name__}: {reason})")
    differences = [_relative_difference(one, other) for one, other in zip(found, expected, strict=True)]
    difference = float(torch.tensor(differences).max())  # NaN if one is
    return _Change(difference, f"changes the numbers by {difference:.1e} (at most {_TOLERANCE:.0e})")


def head_shapes(config: PretrainedConfig) -> HeadShapes | None:
    """Return the shapes of a model's heads; `None` if its configuration has no heads of one width.

    Args:
        config: The model's configuration.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return None
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    return HeadShapes(heads=heads, key_value_heads=key_value_heads, width=-(-width // 8) * 8)


def choose_version(capability: tuple[int, int], installed: Collection[Version]) -> Version | None:
    """Return the newest version that is made for a device; `None` for FlashAttention-2.

    Args:
        capability: CUDA's compute capability.
        installed: Versions whose packages are installed.
    """
    made_for: dict[int, Version] = {9: "FA3", 10: "FA4"}
    version = made_for.get(capability[0])
    return version if version in installed else None


def installed_versions() -> list[Version]:
    """Return the versions whose packages are installed (`flash_attn_interface`, `flash_attn.cute`)."""
    return [version for version, module in _MODULES.items() if _is_installed(module)]


def use_newest_version(config: PretrainedConfig, device: torch.device) -> str | None:
    """Activate the newest version for a device, if it is installed and right.

    Args:
        config: The model's configuration.
        device: Where the model computes.

    Returns:
        A line for the log; `None` if there is none to choose.
    """
    shapes = head_shapes(config)
    if device.type != "cuda" or shapes is None:
        return None
    version = choose_version(torch.cuda.get_device_capability(device), installed_versions())
    if version is None:
        return None
    return use_version(version, lambda: attention_and_gradients(shapes, device, torch.bfloat16))


def use_version(version: Version, attend: Callable[[], Sequence[torch.Tensor]]) -> str:
    """Activate a version if it gives the numbers of FlashAttention-2; return a line for the log.

    Args:
        version: The version.
        attend: Returns tensors, attention and its gradients, computed by whichever version is active.
    """
    found = _changed_numbers(attend, lambda: activate_flash_attention(version))
    if found.verified:
        return f"FlashAttention-{version[2:]} ({_MODULES[version]}; verified, differs from 2 by {found.difference:.1e})"
    restore_flash_attention()
    return f"FlashAttention-2, because {version} {found.reason}"


def share_heads(config: PretrainedConfig, device: torch.device) -> str | None:
    """Let query heads share key/value heads where torch's kernel has no argument for it (before 2.12), if it is right.

    Repeated heads take the memory of all query heads in every layer.

    Args:
        config: The model's configuration.
        device: Where the model computes.

    Returns:
        A line for the log; `None` if there is nothing to choose.
    """
    shapes = head_shapes(config)
    if device.type != "cuda" or shapes is None or shapes.heads == shapes.key_value_heads or shares_key_value_heads():
        return None
    return use_shared_heads(lambda: attention_and_gradients(shapes, device, torch.bfloat16))


def use_shared_heads(attend: Callable[[], Sequence[torch.Tensor]]) -> str:
    """Put torch's kernel without repeated heads into `KERNELS`, if it gives the same; return a line for the log.

    Args:
        attend: Returns tensors, attention and its gradients, computed by the kernel in `KERNELS`.
    """
    prepare_kernel("torch")
    repeating = KERNELS["torch"]
    found = _changed_numbers(attend, lambda: KERNELS.update(torch=torch_kernel(repeat_heads=False)))
    if found.verified:
        return f"key/value heads are shared (verified, differs from repeated ones by {found.difference:.1e})"
    KERNELS["torch"] = repeating
    return f"key/value heads are repeated, because sharing them {found.reason}"


def attention_and_gradients(shapes: HeadShapes, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Compute attention within a few documents by torch's kernel, on random numbers that are always the same.

    Args:
        shapes: The heads.
        device: A CUDA device.
        dtype: float16 or bfloat16.

    Returns:
        The result, and its gradients with respect to queries, keys and values.
    """
    prepare_kernel("torch")
    documents = DocumentLengths(_DOCUMENTS).to(device)
    generator, tokens = torch.Generator().manual_seed(0), sum(_DOCUMENTS[0])
    heads = (shapes.heads, shapes.key_value_heads, shapes.key_value_heads)
    inputs = [torch.randn(tokens, each, shapes.width, generator=generator) for each in heads]
    q, k, v = (each.to(device, dtype).requires_grad_() for each in inputs)
    out = KERNELS["torch"](q, k, v, documents, scale=shapes.width**-0.5, window=0, softcap=0.0, dropout=0.0)
    return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]


def _relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module is in
        return False
