"""ModelSpec: which model is loaded, how it is stored, and what trains on it; the YAML's keys under `model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import DTypeName, QuantizationConfig
from sft_lightning.models.base.overrides import ConfigOverrides
from sft_lightning.models.base.rope import RopeScalingConfig


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A causal language model, as the YAML describes it.

    The docstring of each field is its help on the command line and its entry in docs/configuration.md.

    Raises:
        UserError: If keys contradict each other, or a value is out of range.
    """

    model_name_or_path: str | None = None
    """Folder or Hub id of the base model."""

    from_config: dict[str, Any] | None = None
    """Build a model from scratch instead: `model_type` and the configuration keys of that model."""

    tokenizer_name_or_path: str | None = None
    """Folder or Hub id of the tokenizer; default: the model's."""

    dtype: DTypeName = "bfloat16"
    """Type of the loaded weights. For full fine-tuning use float32 with `trainer.precision: bf16-mixed`."""

    attn_implementation: str = "auto"
    """`auto`: attention that keeps the documents of a row apart; or a name of transformers, such as `sdpa`."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""

    rope_scaling: RopeScalingConfig | None = None
    """Stretch rotary position embeddings to a longer context; `null` for the model's own."""

    dropout: float | None = None
    """Probability of every dropout that the model has; `null` for the model's own."""

    add_tokens: list[str] | None = None
    """Tokens that the tokenizer lacks; new rows of the embeddings start at the mean of the old ones."""

    add_special_tokens: list[str] | None = None
    """Like `add_tokens`, but left out of decoded answers."""

    resize_vocabulary: bool = False
    """Accept a tokenizer that has more tokens than the model, and add rows to the embeddings for them."""

    pad_to_multiple_of: int | None = None
    """Round the number of rows of the embeddings up to a multiple of this, such as 8."""

    quantization: QuantizationConfig | None = None
    """How the frozen base is quantized; `null`: not at all. Requires `adapter`."""

    adapter: AdapterConfig | None = None
    """The adapter to train; `null` for full fine-tuning."""

    trainable: list[str] | None = None
    """Without an adapter: train only the parameters whose names contain a match of one of these regular expressions.
    `null` trains all parameters."""

    def __post_init__(self) -> None:
        if self.quantization is not None and self.adapter is None:
            raise UserError("model.quantization: quantized weights cannot be trained; set model.adapter too")
        if self.trainable is not None and self.adapter is not None:
            raise UserError(
                "model.trainable: cannot be combined with model.adapter; to train base weights beside an adapter, set "
                "model.adapter.modules_to_save, or model.adapter.only_adapter: false"
            )
        ConfigOverrides(dropout=self.dropout)  # checks the range

    @property
    def overrides(self) -> ConfigOverrides:
        """Changes to the configuration that comes with the model."""
        return ConfigOverrides(rope_scaling=self.rope_scaling, dropout=self.dropout)

    @property
    def added_tokens(self) -> list[str]:
        """All tokens that the tokenizer was given, which the model may not embed yet."""
        return [*(self.add_tokens or []), *(self.add_special_tokens or [])]
