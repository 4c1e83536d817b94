"""A model with the shapes and types of the real one and without weights."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from sft_lightning.compat.torch import fake_tensor_mode
from sft_lightning.compat.transformers import keep_activations
from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.continuation import read_adapter_config
from sft_lightning.models.adapters.targets import linear_names
from sft_lightning.models.adapters.trainable import train_only
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.loading import load_model
from sft_lightning.models.checkpointing import Recomputation, enable_gradient_checkpointing
from sft_lightning.models.inspection import base_model
from sft_lightning.models.spec import ModelSpec


@dataclass(frozen=True)
class Skeleton:
    """A model of fake tensors on the CPU."""

    model: PreTrainedModel | PeftModel
    """The model, adapter included."""

    mode: Any
    """torch's fake tensor mode, which operations on the model must run in."""

    linears: frozenset[int]
    """`id` of the base's linear weights that quantization stores in fewer bits."""

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without the PEFT model around it."""
        return base_model(self.model)

    @functools.cached_property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def build_skeleton(spec: ModelSpec, vocab_size: int, precision: str = "32-true") -> Skeleton:
    """Build the model of a configuration without weights; only its `config.json` is read.

    Args:
        spec: The keys under `model`.
        vocab_size: Number of tokens of the tokenizer.
        precision: `trainer.precision` in its long form, such as `bf16-mixed`.

    Raises:
        UserError: If the model's configuration cannot be read, or the adapter does not fit the model.
    """
    values = _config_values(spec, vocab_size)
    with torch.device("meta"):
        base = load_model(
            None,
            from_config=values,
            dtype=spec.dtype,
            attn_implementation="auto",
            quantization=None,
            vocab_size=vocab_size,
            overrides=spec.overrides,
        )
        base.train()
        names = linear_names(base)
        layers = [m for name, m in base.named_modules() if name in names and isinstance(m, torch.nn.Linear)]
        model: PreTrainedModel | PeftModel = base
        if spec.adapter is not None:
            model = add_adapter(base, _without_init(spec.adapter))
        elif spec.trainable is not None:
            train_only(base, spec.trainable)
        if precision in _TRUE_PRECISION:
            torch.nn.Module.to(model, _TRUE_PRECISION[precision])
    mode = fake_tensor_mode()
    _make_fake(model, mode)
    linears = frozenset(id(layer.weight) for layer in layers)
    return Skeleton(model, mode, linears)


_TRUE_PRECISION = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Precisions for which the trainer converts the full model → the type."""


def _make_fake(model: torch.nn.Module, mode: Any) -> None:
    """Replace the meta tensors of a model by fake CPU tensors, whose operations allocate as those of real tensors."""
    fake: dict[int, torch.Tensor] = {}
    kept: list[torch.Tensor] = []  # an id is unique only while its tensor is alive

    def fake_of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fake:
            kept.append(tensor)
            with mode:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            trains = tensor.requires_grad
            fake[id(tensor)] = torch.nn.Parameter(made, trains) if isinstance(tensor, torch.nn.Parameter) else made
        return fake[id(tensor)]

    for module in model.modules():
        parameters = list(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, tensor in [*parameters, *module.named_buffers(recurse=False, remove_duplicate=False)]:
            setattr(module, name, fake_of(tensor))


def _config_values(spec: ModelSpec, vocab_size: int) -> dict[str, Any]:
    if spec.from_config is not None:
        return spec.from_config
    if spec.model_name_or_path is None:
        raise UserError("model: set either model_name_or_path or from_config")
    try:
        config = AutoConfig.from_pretrained(spec.model_name_or_path, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.model_name_or_path: cannot read the configuration of {spec.model_name_or_path!r}: "
            f"{str(error).strip().splitlines()[0]}; a folder with its config.json is enough"
        ) from error
    values: dict[str, Any] = config.to_dict()
    for key in ("torch_dtype", "dtype", "quantization_config", "architectures", "transformers_version"):
        values.pop(key, None)
    multiple = spec.pad_to_multiple_of or 1
    if "vocab_size" in values:
        rows = max(values["vocab_size"], vocab_size)
        values["vocab_size"] = -(-rows // multiple) * multiple
    return values


def _without_init(config: AdapterConfig) -> AdapterConfig:
    """Return an adapter of the same shapes whose initialization does not read weights."""
    if config.path is not None:
        continued = read_adapter_config(config.path, drop_modules_to_save=config.drop_modules_to_save)
        return AdapterConfig(peft_config=continued, only_adapter=config.only_adapter)  # type: ignore[arg-type]  # a virtual subclass
    indices = None if isinstance(config.trainable_token_indices, str) else config.trainable_token_indices
    return replace(config, init="default", trainable_token_indices=indices)


def stored_bytes(skeleton: Skeleton, quantization: QuantizationConfig | None) -> tuple[float, float]:
    """Return the bytes of frozen weights and buffers, and the bytes of weights that train.

    Args:
        skeleton: The model without weights.
        quantization: How the base is quantized; `None` if it is not.
    """
    frozen, trained = stored_bytes_of(skeleton.model.parameters(), skeleton.linears, quantization)
    return frozen + sum(buffer.numel() * buffer.element_size() for buffer in skeleton.model.buffers()), trained


def stored_bytes_of(
    parameters: Iterable[torch.nn.Parameter], linears: Collection[int], quantization: QuantizationConfig | None
) -> tuple[float, float]:
    """Return the bytes of the frozen ones of some parameters, and the bytes of those that train.

    Args:
        parameters: Parameters of a model, of any shape.
        linears: `id` of the weights that quantization stores in fewer bits.
        quantization: How the base is quantized; `None` if it is not.
    """
    frozen = trained = 0.0
    for parameter in parameters:
        if parameter.requires_grad:
            trained += parameter.numel() * parameter.element_size()
        elif quantization is not None and id(parameter) in linears:
            frozen += quantized_bytes(parameter.numel(), parameter.shape[-1], quantization)
        else:
            frozen += parameter.numel() * parameter.element_size()
    return frozen, trained


def quantized_bytes(numel: int, columns: int, quantization: QuantizationConfig) -> float:
    """Return the bytes of a quantized weight.

    NF4 and FP4 take half a byte per parameter and a float32 constant per 64 parameters; with double quantization, one
    byte per 64 and a float32 per 64 · 256 (Dettmers et al., 2023, arXiv:2305.14314, section 3). LLM.int8 takes one byte
    per parameter and a float32 per row.

    Args:
        numel: Number of parameters.
        columns: Parameters per row.
        quantization: How the weight is quantized.
    """
    if quantization.bits == 8:
        return numel + 4 * numel / columns
    constants = (1 / 64 + 4 / (64 * 256)) if quantization.double_quant else 4 / 64
    return numel * (0.5 + constants)


@contextmanager
def recomputing(model: PreTrainedModel, how: Recomputation) -> Iterator[None]:
    """Enable gradient checkpointing while the context is open.

    Args:
        model: The transformers model.
        how: What is recomputed; with 0, nothing changes.
    """
    if how:
        enable_gradient_checkpointing(model, how)
    try:
        yield
    finally:
        if how:
            keep_activations(model)
