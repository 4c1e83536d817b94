"""The keys of `model.adapter`, checked; imports neither PEFT nor model code."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, Literal

from sft_lightning.errors import UserError, one_of

INITS = ("default", "gaussian", "pissa", "olora", "orthogonal", "mica", "loftq")
_NOT_LORA = ("peft_config", "path", "drop_modules_to_save", "only_adapter", "base_lr")
_NEED_DATA = ("eva", "corda", "lora_ga")

PRESETS = ("all-linear", "attention", "mlp", "mamba")
"""`all-linear`: every linear layer but the head; `attention` and `mlp`: linear layers inside and outside of attention;
`mamba`: `in_proj`, and the embeddings unless they are tied to the head."""


class PeftMethodConfig(ABC):
    """A virtual base class of `peft.PeftConfig`, so that this module need not import PEFT, which takes seconds."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the keys and their values."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        peft = sys.modules.get("peft")  # no class of PEFT exists before PEFT is imported
        return peft is not None and issubclass(other, peft.PeftConfig)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A LoRA adapter (Hu et al., 2021, arXiv:2106.09685), another method of PEFT, or an adapter to continue.

    Raises:
        UserError: If a value is out of range, or two keys contradict each other.
    """

    r: int = 16
    """Rank of the update."""

    alpha: float = 32
    """The update is scaled by alpha / r (with rsLoRA, by alpha / sqrt(r))."""

    dropout: float = 0.0
    """Dropout probability of the adapter's input; above 0, a step takes more time and memory."""

    target_modules: list[str] | str = "all-linear"
    """Modules to adapt: a list of name endings; a regular expression for whole names; or a preset: `all-linear` (all
    linear layers but the head), `attention`, `mlp`, `mamba`."""

    modules_to_save: list[str] | None = None
    """Modules to train in full and save with the adapter, such as `embed_tokens` and `lm_head`; kept in float32."""

    trainable_token_indices: list[int] | Literal["added"] | None = None
    """Rows of the embedding to train and save: token ids, or `added` for those of `model.add_tokens`."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train."""

    use_dora: bool = False
    """Weight-decomposed LoRA (Liu et al., 2024, arXiv:2402.09353)."""

    use_rslora: bool = False
    """Rank-stabilized scaling (Kalajdzievski, 2023, arXiv:2312.03732)."""

    init: str = "default"
    """Initial weights: `default` (the update starts at zero), `gaussian`, `pissa` (Meng et al., 2024,
    arXiv:2404.02948), `olora`, `orthogonal`, `mica`, or `loftq` (a 4-bit base's quantization error; Li et al., 2023,
    arXiv:2310.08659)."""

    rank_pattern: dict[str, int] | None = None
    """`r` for some modules: name ending or regular expression → `r`."""

    alpha_pattern: dict[str, float] | None = None
    """`alpha` for some modules, by the same patterns."""

    layers_to_transform: list[int] | None = None
    """Adapt only these layers, from 0."""

    lora_plus_ratio: float | None = None
    """LoRA+ (Hayou et al., 2024, arXiv:2402.12354): the learning rate of the B matrices is multiplied by this."""

    peft_config: PeftMethodConfig | None = None
    """Another method of PEFT, by `class_path` (such as `peft.IA3Config`) and `init_args`; replaces the keys above."""

    path: str | None = None
    """Continue training the adapter in this folder, of any method; its own configuration overrides the keys above, and
    every difference is logged."""

    drop_modules_to_save: bool = False
    """Continue the adapter in `path` without training the modules that it trained in full; they keep their values."""

    only_adapter: bool = True
    """`false` also trains every floating-point weight that has no adapter, as DeepSpeed-Chat does by default."""

    base_lr: float | None = None
    """With `only_adapter: false`: the learning rate of the base's weights; default: the optimizer's."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.adapter.r: must be at least 1 (got {self.r})")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.adapter.dropout: must be in [0, 1) (got {self.dropout})")
        if self.lora_plus_ratio is not None and self.lora_plus_ratio <= 0:
            raise UserError(f"model.adapter.lora_plus_ratio: must be above 0 (got {self.lora_plus_ratio})")
        _check_init(self.init)
        self._check_base()
        self._check_method()

    def _check_base(self) -> None:
        if self.base_lr is not None and self.base_lr <= 0:
            raise UserError(f"model.adapter.base_lr: must be above 0 (got {self.base_lr})")
        if self.base_lr is not None and self.only_adapter:
            raise UserError(
                f"model.adapter.base_lr: only valid with model.adapter.only_adapter: false (got {self.base_lr}); set "
                "it, or remove base_lr"
            )

    def _check_method(self) -> None:
        is_regex = isinstance(self.target_modules, str) and self.target_modules not in PRESETS
        if self.layers_to_transform is not None and is_regex:
            raise UserError(
                "model.adapter.layers_to_transform: cannot be combined with a regular expression in target_modules "
                f"(got {self.target_modules!r}); name the layers in it"
            )
        if self.drop_modules_to_save and self.path is None:
            raise UserError("model.adapter.drop_modules_to_save: only valid with model.adapter.path; set it")
        if self.peft_config is None:
            return
        ignored = [field.name for field in fields(self) if field.name not in _NOT_LORA]
        ignored = [name for name in ignored if getattr(self, name) != _default(name)]
        if ignored or self.path is not None:
            keys = ", ".join(ignored or ["path"])
            raise UserError(
                f"model.adapter.peft_config: cannot be combined with {keys}; set them in peft_config.init_args, or "
                "remove one of the two"
            )


def _default(name: str) -> Any:
    return next(field.default for field in fields(AdapterConfig) if field.name == name)


def _check_init(init: str) -> None:
    if init in _NEED_DATA:
        raise UserError(
            f"model.adapter.init: {init!r} is not supported, because it measures the model on data first; use default"
        )
    if init.startswith("pissa_niter"):
        raise UserError(
            f"model.adapter.init: {init!r} changes the base by a random factorization, which cannot be repeated when "
            "the adapter is loaded; use 'pissa', whose factorization is exact"
        )
    if init not in INITS:
        raise one_of("model.adapter.init", init, INITS)
