"""The run's changes to a model's configuration, applied before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from sft_lightning.errors import UserError
from sft_lightning.models.base.rope import RopeScalingConfig, scale_rope

# Dropouts of heads that a causal language model does not have.
_OTHER_HEADS = ("classifier_dropout", "summary_first_dropout")


@dataclass(frozen=True, kw_only=True)
class ConfigOverrides:
    """Changes to a model's configuration.

    Raises:
        UserError: If `dropout` is outside [0, 1).
    """

    rope_scaling: RopeScalingConfig | None = None
    """Scaling of the rotary position embeddings."""

    dropout: float | None = None
    """Probability of every dropout of the model."""

    trained_with: Mapping[str, Any] | None = None
    """Values of the configuration that a continued adapter was trained with; `rope_scaling` replaces them."""

    def __post_init__(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout: must be in [0, 1) (got {self.dropout})")

    def apply(self, config: PretrainedConfig) -> None:
        """Write the changes into `config`, and let a mixture of experts return its router logits.

        Raises:
            UserError: If the model has no such setting.
        """
        text = config.get_text_config()
        if self.rope_scaling is not None:
            scale_rope(config, self.rope_scaling)
        else:
            for key, value in (self.trained_with or {}).items():
                setattr(text, key, value)
        if self.dropout is not None:
            set_dropout(config, self.dropout)
        if getattr(text, "router_aux_loss_coef", None):
            text.output_router_logits = True


def set_dropout(config: PretrainedConfig, probability: float) -> list[str]:
    """Set every dropout of a model's configuration, and return the names of the fields.

    Args:
        config: Changed in place.
        probability: Probability of every dropout.

    Raises:
        UserError: If the model has no dropout.
    """
    text = config.get_text_config()
    fields = [name for name in text.to_dict() if name.endswith(("dropout", "pdrop")) and name not in _OTHER_HEADS]
    if not fields:
        raise UserError(f"model.dropout: {text.model_type} models have no dropout (got {probability}); remove it")
    for name in fields:
        setattr(text, name, probability)
    return fields
