"""Longer contexts by scaled rotary position embeddings (RoPE)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from sft_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Scaling of rotary position embeddings (RoPE).

    An adapter's `run_manifest.json` has it, for `chat`, `compare`, `merge` and continuing. For plain PEFT, load the
    base with the same `rope_parameters`.

    Raises:
        UserError: If not exactly one of `factor` and `target_length` is set, or it is out of range.
    """

    type: Literal["linear", "dynamic", "yarn"] = "linear"
    """`linear`: position interpolation (Chen et al., 2023, arXiv:2306.15595); `yarn`: Peng et al., 2023,
    arXiv:2309.00071; `dynamic`: NTK-aware, only for batches longer than the model's own context, scaled by the longest
    text seen so far, so that a loss depends on earlier batches."""

    factor: float | None = None
    """Factor by which the context becomes longer."""

    target_length: int | None = None
    """Instead of `factor`: the longer context in tokens; the factor is its ratio to the model's own context, rounded up
    (as in FastChat, fastchat/train/train.py)."""

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.target_length is None):
            raise UserError(
                "model.rope_scaling: set either factor or target_length "
                f"(got factor {self.factor}, target_length {self.target_length})"
            )
        if self.factor is not None and self.factor <= 1:
            raise UserError(f"model.rope_scaling.factor: must be above 1 (got {self.factor})")

    def factor_for(self, context: int) -> float:
        """Return the factor for a model whose own context has `context` tokens.

        Raises:
            UserError: If `target_length` is not longer.
        """
        if self.target_length is None:
            return float(self.factor or 1)
        if self.target_length <= context:
            raise UserError(
                f"model.rope_scaling.target_length: must be above the model's own context of {context} tokens (got "
                f"{self.target_length}); remove model.rope_scaling"
            )
        return float(math.ceil(self.target_length / context))


def scale_rope(config: PretrainedConfig, scaling: RopeScalingConfig) -> None:
    """Write the scaling into a model's configuration, in place of a scaling that it may have.

    In a model with two kinds of layers (Gemma 3), only the full-attention layers are scaled: sliding-window layers
    never see distant positions.

    Args:
        config: Changed in place.
        scaling: The scaling.

    Raises:
        UserError: If the model has no rotary position embeddings.
    """
    text: Any = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        raise UserError(f"model.rope_scaling: {text.model_type} models have no rotary position embeddings; remove it")
    nested = "rope_type" not in parameters
    old = parameters["full_attention"] if nested else parameters
    context = int(old.get("original_max_position_embeddings") or text.max_position_embeddings)
    factor = scaling.factor_for(context)
    new = {key: old[key] for key in ("rope_theta", "partial_rotary_factor") if key in old}
    new |= {"rope_type": scaling.type, "factor": factor}
    if scaling.type == "yarn":
        new["original_max_position_embeddings"] = context
        text.max_position_embeddings = math.floor(context * factor)
    text.rope_parameters = {**parameters, "full_attention": new} if nested else new


def check_packing(config: PretrainedConfig, scaling: RopeScalingConfig, max_length: int) -> None:
    """Check that packed documents do not change each other's positions.

    Args:
        config: The model's configuration, scaled.
        scaling: The scaling.
        max_length: Tokens per packed row.

    Raises:
        UserError: If the scaling is dynamic and a document may be longer than the model's own context: the longest
            document of a row would then set the frequencies of all documents.
    """
    context = config.get_text_config().max_position_embeddings
    if scaling.type == "dynamic" and max_length > context:
        raise UserError(
            f"model.rope_scaling.type: dynamic scales all documents of a packed row by the longest one, because "
            f"data.max_length ({max_length}) is above the model's own context ({context}); use linear or yarn, or set "
            "data.packing: none"
        )
