"""Load the base model from a folder or a Hub id, or build it from a configuration."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from sft_lightning.compat.transformers import stores_other_tensors
from sft_lightning.errors import UserError, clear_load_errors
from sft_lightning.models.attention.document_mask import choose_attention
from sft_lightning.models.base.building import build_model
from sft_lightning.models.base.config import DTypeName, QuantizationConfig
from sft_lightning.models.base.overrides import ConfigOverrides
from sft_lightning.models.base.pretrained import load_pretrained
from sft_lightning.models.base.quantization import load_quantized
from sft_lightning.models.inspection import base_model

_MODEL = ("model.model_name_or_path", "model")
_MODEL_FILES = ("config.json",)


def load_model(
    name_or_path: str | None,
    *,
    from_config: dict[str, Any] | None,
    dtype: DTypeName,
    attn_implementation: str,
    quantization: QuantizationConfig | None,
    vocab_size: int,
    overrides: ConfigOverrides = ConfigOverrides(),  # noqa: B008 (frozen)
    trust_remote_code: bool = False,
    on_cpu: bool = False,
) -> PreTrainedModel:
    """Load a base model, or build one from scratch.

    Args:
        name_or_path: Folder or Hub id.
        from_config: Instead of `name_or_path`: `model_type` and keys of its configuration, for random weights.
        dtype: Type of the weights that are not quantized.
        attn_implementation: `auto` for attention that keeps documents apart, or a name that transformers knows.
        quantization: How to quantize the weights; `None` for not at all.
        vocab_size: Number of tokens of the tokenizer; used if `from_config` sets none.
        overrides: Changes to the model's configuration.
        trust_remote_code: Run code that comes with the model.
        on_cpu: Leave quantized and random weights in CPU memory, too; a strategy that shards them moves them itself.

    Raises:
        UserError: If not exactly one of `name_or_path` and `from_config` is given, the model cannot be loaded, or it is
            not a causal language model.
    """
    if (name_or_path is None) == (from_config is None):
        raise UserError("model: set either model_name_or_path or from_config")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    config = base_config(
        name_or_path, from_config=from_config, vocab_size=vocab_size, trust_remote_code=trust_remote_code
    )
    _check_causal("model.model_name_or_path" if from_config is None else "model.from_config", config)
    overrides.apply(config)
    options["attn_implementation"] = choose_attention(attn_implementation, config)
    if from_config is not None:
        return build_model(config, quantization, on_cpu=on_cpu, **options)
    with clear_load_errors(*_MODEL, str(name_or_path), _MODEL_FILES):
        if quantization is not None:
            model = load_quantized(str(name_or_path), quantization, config=config, on_cpu=on_cpu, **options)
        else:
            model = base_model(load_pretrained(str(name_or_path), config=config, **options))
    model.train()  # from_pretrained returns it in evaluation mode, and Lightning does not change that
    return model


def base_config(
    name_or_path: str | None,
    *,
    from_config: dict[str, Any] | None,
    vocab_size: int,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """Return a base's own configuration, without the run's changes; arguments as for `load_model`.

    Args:
        name_or_path: Folder or Hub id.
        from_config: Instead of `name_or_path`: `model_type` and keys of its configuration.
        vocab_size: Number of tokens of the tokenizer; used if `from_config` sets none.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: If there is no configuration, or transformers rejects it.
    """
    if from_config is not None:
        return _config_of(from_config, vocab_size)
    with clear_load_errors(*_MODEL, str(name_or_path), _MODEL_FILES):
        config: PretrainedConfig = AutoConfig.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    return config


def copies_weights(
    name_or_path: str | None, *, dtype: DTypeName, quantization: QuantizationConfig | None, trust_remote_code: bool
) -> bool:
    """Whether loading a model allocates its tensors, instead of mapping those of the files into memory.

    It does if the type differs from that of the files, if the weights are quantized, and for families whose files have
    other tensors than the model, such as experts one by one.

    Args:
        name_or_path: Folder or Hub id; `None` for a model that is built from scratch.
        dtype: As for `load_model`.
        quantization: As for `load_model`.
        trust_remote_code: Run code that comes with the model.
    """
    if name_or_path is None or quantization is not None:
        return True
    with clear_load_errors(*_MODEL, name_or_path, _MODEL_FILES):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    return bool(config.dtype != getattr(torch, dtype)) or stores_other_tensors(config.model_type)


def _config_of(from_config: dict[str, Any], vocab_size: int) -> PretrainedConfig:
    values = {"vocab_size": vocab_size, **copy.deepcopy(from_config)}
    model_type = values.pop("model_type", None)
    try:
        config: PretrainedConfig = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.from_config: transformers rejects {from_config}: {error}") from error
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model.from_config.vocab_size: must be at least the tokenizer's {vocab_size} (got {config.vocab_size}); "
            "remove it to use the tokenizer's"
        )
    return config


_ENCODER_DECODER_ADVICE = (
    "; FastChat and Vigogne trained T5: use transformers' Seq2SeqTrainer for it, or fine-tune a decoder-only model"
)


def _check_causal(key: str, config: PretrainedConfig) -> None:
    """Check that a model is a causal decoder: not bidirectional, and without a separate encoder."""
    looks_ahead = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    if config.is_encoder_decoder:
        kind = f"an encoder-decoder{_ENCODER_DECODER_ADVICE}"
    elif looks_ahead:
        kind = "a masked language model"
    elif not known:
        kind = "not a language model that transformers knows"
    else:
        return
    raise UserError(f"{key}: must be a causal (decoder-only) language model ({config.model_type!r} is {kind})")
