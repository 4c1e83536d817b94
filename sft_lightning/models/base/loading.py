"""The base model, from a folder, a Hub id, or a config."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from sft_lightning.compat.transformers import stores_other_tensors
from sft_lightning.errors import UserError, clear_load_errors
from sft_lightning.models.attention.document_mask import choose_attention
from sft_lightning.models.base.overrides import ConfigOverrides
from sft_lightning.models.base.quantization import QuantizationConfig, load_quantized

DTypeName = Literal["float32", "bfloat16", "float16"]

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
        from_config: Instead: `model_type` and the keys of that model's configuration; random weights.
        dtype: Type of the weights that are not quantized.
        attn_implementation: `auto` for attention that keeps documents apart, or a name that transformers knows.
        quantization: How the base weights are stored; `None` as they are.
        vocab_size: The tokenizer's, used by `from_config` where it names none.
        overrides: What to change in the model's configuration.
        trust_remote_code: Run code that comes with the model.
        on_cpu: Leave quantized weights in host memory too, as all others are.

    Raises:
        UserError: If not exactly one of the two is given, nothing can be loaded from it, or it is no causal language
            model.
    """
    if (name_or_path is None) == (from_config is None):
        raise UserError("model: set either model_name_or_path or from_config")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if from_config is not None:
        if quantization is not None:
            raise UserError(
                "model.quantization: a model built by from_config is random; train and export it, then quantize"
            )
        config = _config_of(from_config, vocab_size)
    else:
        with clear_load_errors(*_MODEL, str(name_or_path), _MODEL_FILES):
            config = AutoConfig.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    _check_causal("model.model_name_or_path" if from_config is None else "model.from_config", config)
    overrides.apply(config)
    options["attn_implementation"] = choose_attention(attn_implementation, config)
    if from_config is not None:
        return _checked(AutoModelForCausalLM.from_config(config, **options))
    with clear_load_errors(*_MODEL, str(name_or_path), _MODEL_FILES):
        if quantization is not None:
            model = load_quantized(str(name_or_path), quantization, config=config, on_cpu=on_cpu, **options)
        else:
            model = _checked(AutoModelForCausalLM.from_pretrained(str(name_or_path), config=config, **options))
    model.train()  # from_pretrained returns it in eval mode, and Lightning leaves it there
    return model


def copies_weights(
    name_or_path: str | None, *, dtype: DTypeName, quantization: QuantizationConfig | None, trust_remote_code: bool
) -> bool:
    """Whether loading a model makes tensors of its own, where it could map those in the files.

    It does for another type than theirs, and for families whose files transformers stores otherwise than it computes
    (experts one by one, for one).

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
        raise UserError(f"model.from_config: transformers refuses {from_config}: {error}") from error
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model.from_config.vocab_size: {config.vocab_size} is below the tokenizer's {vocab_size}; leave it out"
        )
    return config


def _check_causal(key: str, config: PretrainedConfig) -> None:
    """Check that each token of a model sees only those before it, and that all text goes in on one side."""
    looks_ahead = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    if config.is_encoder_decoder:
        kind = "an encoder-decoder"
    elif looks_ahead:
        kind = "a masked language model"
    elif not known:
        kind = "no language model that transformers knows"
    else:
        return
    raise UserError(f"{key}: {config.model_type!r} is {kind}; only causal (decoder-only) language models are trained")


def _checked(model: object) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"transformers returned a {type(model).__name__}")
    return model
