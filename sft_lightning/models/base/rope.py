"""Longer contexts: rotary position embeddings, scaled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from sft_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Scaling of rotary position embeddings (RoPE).

    An adapter folder does not hold it: whoever loads the adapter loads the base with the same `rope_parameters`.

    Raises:
        UserError: If not exactly one of `factor` and `target_length` is set, or it is out of range.
    """

    type: Literal["linear", "dynamic", "yarn"] = "linear"
    """`linear`: position interpolation (Chen et al., 2023, arXiv:2306.15595); `yarn`: Peng et al., 2023,
    arXiv:2309.00071; `dynamic`: NTK-aware, changes only batches longer than the model's own context, where transformers
    goes by the longest text seen lately, so that a loss depends on what came before it."""

    factor: float | None = None
    """How many times longer the context becomes."""

    target_length: int | None = None
    """Or the context in tokens; the factor is its ratio to the model's own, rounded up (as FastChat does,
    fastchat/train/train.py)."""

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.target_length is None):
            raise UserError(
                "model.rope_scaling: set either factor or target_length "
                f"(got factor {self.factor}, target_length {self.target_length})"
            )
        if self.factor is not None and self.factor <= 1:
            raise UserError(f"model.rope_scaling.factor: must be above 1 (got {self.factor})")

    def factor_for(self, context: int) -> float:
        """Return the factor for a model whose own context has that many tokens.

        Raises:
            UserError: If `target_length` is within it.
        """
        if self.target_length is None:
            return float(self.factor or 1)
        if self.target_length <= context:
            raise UserError(
                f"model.rope_scaling.target_length: {self.target_length} is within the model's own {context} tokens; "
                "remove model.rope_scaling"
            )
        return float(math.ceil(self.target_length / context))


def scale_rope(config: PretrainedConfig, scaling: RopeScalingConfig) -> None:
    """Write the scaling into a model's configuration, over the scaling that it may have.

    A model with several bases (Gemma 3) is scaled in its full-attention layers: sliding ones never see far positions.

    Raises:
        UserError: If the model has no rotary position embeddings.
    """
    text: Any = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        raise UserError(f"model.rope_scaling: a {text.model_type} model has no rotary position embeddings to scale")
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
        config: The model's configuration.
        scaling: What was written into it.
        max_length: Tokens per packed row.

    Raises:
        UserError: If the scaling is dynamic and a document may be longer than the model's own context: the longest
            document of a row then sets the frequencies of all.
    """
    context = config.get_text_config().max_position_embeddings
    if scaling.type == "dynamic" and max_length > context:
        raise UserError(
            f"model.rope_scaling.type: 'dynamic' lets the longest document of a row of {max_length} tokens change "
            f"the others beyond {context} tokens; use linear or yarn, or set data.packing: none"
        )
