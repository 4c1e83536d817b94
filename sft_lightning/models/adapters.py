"""The LoRA family through PEFT: what is wrapped, and what trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from sft_lightning.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A LoRA adapter (Hu et al., 2021, arXiv:2106.09685), as PEFT's `LoraConfig` under the field's names.

    Raises:
        UserError: If `r` is below 1 or `dropout` is outside [0, 1).
    """

    r: int = 16
    """Rank of the update."""

    alpha: float = 32
    """The update is scaled by alpha / r (by alpha / sqrt(r) with rsLoRA)."""

    dropout: float = 0.05
    """Dropout on the adapter's input."""

    target_modules: list[str] | str = "all-linear"
    """Modules to adapt: a list of name endings, a regular expression, or `all-linear` (all linear but the head)."""

    modules_to_save: list[str] | None = None
    """Modules to train in full and save with the adapter, such as `embed_tokens` and `lm_head`."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train."""

    use_dora: bool = False
    """Weight-decomposed LoRA (Liu et al., 2024, arXiv:2402.09353)."""

    use_rslora: bool = False
    """Rank-stabilized scaling (Kalajdzievski, 2023, arXiv:2312.03732)."""

    init: str = "default"
    """Initial weights: `default` (the update starts at zero), or a PEFT `init_lora_weights` name such as `pissa`."""

    path: str | None = None
    """Continue training the adapter in this folder; its own configuration wins over the keys above."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.adapter.r: must be at least 1 (got {self.r})")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.adapter.dropout: must be in [0, 1) (got {self.dropout})")

    def to_peft(self) -> LoraConfig:
        """Return the same configuration for PEFT."""
        init: Any = True if self.init == "default" else self.init
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            modules_to_save=self.modules_to_save,
            bias=self.bias,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            init_lora_weights=init,
        )


def add_adapter(model: PreTrainedModel, config: AdapterConfig) -> PeftModel:
    """Freeze the model and put a trainable adapter on it; adapter weights are float32 whatever the base is.

    Raises:
        UserError: If a listed target matches no module, or `path` holds no adapter.
    """
    if config.path is not None:
        return _continue_adapter(model, config.path)
    if isinstance(config.target_modules, list):
        _check_targets(model, "model.adapter.target_modules", config.target_modules)
    _check_targets(model, "model.adapter.modules_to_save", config.modules_to_save or [])
    for parameter in model.parameters():
        parameter.requires_grad = False
    try:
        wrapped = get_peft_model(model, config.to_peft())
    except ValueError as error:
        raise UserError(f"model.adapter: PEFT refuses {config}: {error}") from error
    if not isinstance(wrapped, PeftModel):
        raise TypeError(f"PEFT returned a {type(wrapped).__name__}")
    return wrapped


def _continue_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, path, is_trainable=True)
    except (OSError, ValueError) as error:
        raise UserError(f"model.adapter.path: cannot load an adapter from {path!r}: {error}") from error


def _check_targets(model: torch.nn.Module, key: str, targets: list[str]) -> None:
    """Every listed name must be the end of some module's name."""
    names = [name for name, _ in model.named_modules() if name]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            endings = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
            raise UserError(
                f"{key}: {target!r} matches no module of the model.{did_you_mean(target, endings)} "
                f"Module names end in: {', '.join(endings)}."
            )
