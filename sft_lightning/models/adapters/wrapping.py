"""Put an adapter on a base model: the modules that PEFT wraps, and the weights that it starts from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from transformers import PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import PRESETS, AdapterConfig
from sft_lightning.models.adapters.continuation import continue_weights, read_adapter_config
from sft_lightning.models.adapters.fused_lora import fuse_lora
from sft_lightning.models.adapters.quantized import check_quantized_base, prepare_adapted
from sft_lightning.models.adapters.targets import check_module_names, check_targets, resolve_preset
from sft_lightning.models.adapters.trainable import train_base
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.vocabulary import embedding_names, tied_embedding_names


def add_adapter(model: PreTrainedModel, config: AdapterConfig, *, added_token_ids: Sequence[int] = ()) -> PeftModel:
    """Freeze a model and put a trainable adapter on it; the adapter's weights are float32 on any base.

    Args:
        model: The base, changed in place.
        config: The adapter, or which one to continue.
        added_token_ids: Ids of tokens that are new to the model, for `trainable_token_indices: added`.

    Raises:
        UserError: If a target matches no module, PEFT rejects the configuration, or the adapter in `path` does not fit.
    """
    if config.path is None:
        wrapped = _wrap(model, _resolve(model, config, added_token_ids))
        if config.init == "loftq":
            _start_at_quantization_error(wrapped)
    else:
        wrapped = _wrap(model, read_adapter_config(config.path, drop_modules_to_save=config.drop_modules_to_save))
    if not config.only_adapter:
        train_base(wrapped)
    if config.path is not None:
        continue_weights(wrapped, config)
    fuse_lora(wrapped)
    return wrapped


def peft_config_of(config: AdapterConfig) -> PeftConfig:
    """Return PEFT's configuration of an adapter; a preset of `target_modules` is not resolved yet."""
    if config.peft_config is not None:
        own = cast("PeftConfig", copy.deepcopy(config.peft_config))  # PEFT changes it
        own.task_type = own.task_type or "CAUSAL_LM"
        return own
    init: Any = True if config.init in ("default", "loftq") else config.init
    indices = config.trainable_token_indices
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
        lora_dropout=config.dropout,
        target_modules=[] if config.target_modules in PRESETS else config.target_modules,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=cast("Any", None if isinstance(indices, str) else indices),  # resolved later
        bias=config.bias,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        init_lora_weights=init,
        rank_pattern=dict(config.rank_pattern or {}),
        alpha_pattern=cast("Any", dict(config.alpha_pattern or {})),
        layers_to_transform=config.layers_to_transform,
    )


def check_adapter_on_quantized_base(config: AdapterConfig, quantization: QuantizationConfig, dtype: str) -> None:
    """Check, before anything is loaded, that an adapter, new or continued, works on a quantized base.

    Args:
        config: The adapter.
        quantization: How the base is quantized.
        dtype: `model.dtype`.

    Raises:
        UserError: If PEFT's method does not work on such a base.
    """
    if config.path is None:
        check_quantized_base(peft_config_of(config), quantization, dtype)
    else:
        continued = read_adapter_config(config.path, drop_modules_to_save=config.drop_modules_to_save)
        check_quantized_base(continued, quantization, dtype)


def _resolve(model: PreTrainedModel, config: AdapterConfig, added_token_ids: Sequence[int]) -> PeftConfig:
    """Return PEFT's configuration, with presets and `added` resolved and names checked on the model."""
    peft_config: Any = peft_config_of(config)
    owner = "model.adapter" if config.peft_config is None else "model.adapter.peft_config.init_args"
    targets = getattr(peft_config, "target_modules", None)
    if config.peft_config is None and isinstance(config.target_modules, str) and config.target_modules in PRESETS:
        peft_config.target_modules = set(resolve_preset(model, config.target_modules))
    elif isinstance(targets, str) and targets in PRESETS:
        peft_config.target_modules = set(resolve_preset(model, targets))
    elif targets:
        check_targets(model, f"{owner}.target_modules", targets)
    check_module_names(model, f"{owner}.modules_to_save", getattr(peft_config, "modules_to_save", None) or [])
    if isinstance(config.trainable_token_indices, str):
        if not added_token_ids:
            raise UserError(
                "model.adapter.trainable_token_indices: added requires new tokens, but model.add_tokens adds none"
            )
        peft_config.trainable_token_indices = {name: list(added_token_ids) for name in embedding_names(model)}
    trained_in_full = getattr(peft_config, "modules_to_save", None) or []
    tied = any(name.endswith(module) for name in tied_embedding_names(model) for module in trained_in_full)
    if tied and hasattr(peft_config, "ensure_weight_tying"):
        peft_config.ensure_weight_tying = True  # else PEFT would train two copies of one matrix
    return cast("PeftConfig", peft_config)


def _wrap(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    for parameter in model.parameters():
        parameter.requires_grad = False
    if getattr(peft_config, "init_lora_weights", None) == "loftq":
        _check_cuda_for_loftq()
    try:
        wrapped = get_peft_model(model, peft_config)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(f"model.adapter: PEFT rejects {type(peft_config).__name__}: {error}") from error
    if not isinstance(wrapped, PeftModel):
        raise TypeError(f"PEFT returned a {type(wrapped).__name__}")
    prepare_adapted(wrapped)  # before the weights are loaded, which would be rounded
    return wrapped


def _start_at_quantization_error(wrapped: PeftModel) -> None:
    """LoftQ on a 4-bit base: A and B start at the quantization error; the base does not change."""
    base = wrapped.get_base_model()
    if not getattr(base, "is_loaded_in_4bit", False):
        raise UserError("model.adapter.init: 'loftq' requires a 4-bit base; set model.quantization: {bits: 4}")
    _check_cuda_for_loftq()
    source = str(cast("PreTrainedModel", base).config.name_or_path)
    try:
        replace_lora_weights_loftq(wrapped, model_path=source if Path(source).is_dir() else None)
    except (OSError, ValueError) as error:
        raise UserError(f"model.adapter.init: 'loftq' requires the base's safetensors on disk: {error}") from error


def _check_cuda_for_loftq() -> None:
    if not torch.cuda.is_available():
        raise UserError("model.adapter.init: 'loftq' requires a CUDA device, and there is none; use 'pissa'")
