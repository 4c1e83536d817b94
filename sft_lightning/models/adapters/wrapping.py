"""Adapters through PEFT: what is asked for, what is wrapped, and what trains."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from transformers import PreTrainedModel

from sft_lightning.errors import UserError, one_of
from sft_lightning.models.adapters.continuation import continue_weights, read_adapter_config
from sft_lightning.models.adapters.quantized import check_quantized_base, prepare_adapted
from sft_lightning.models.adapters.targets import PRESETS, check_names, check_targets, resolve_preset
from sft_lightning.models.adapters.trainable import train_base
from sft_lightning.models.base.quantization import QuantizationConfig
from sft_lightning.models.base.vocabulary import embedding_names, tied_names

INITS = ("default", "gaussian", "pissa", "olora", "orthogonal", "mica", "loftq")
_NOT_FOR_LORA_ONLY = ("peft_config", "path", "drop_modules_to_save", "only_adapter", "base_lr")
_NEED_DATA = ("eva", "corda", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A LoRA adapter (Hu et al., 2021, arXiv:2106.09685), as PEFT's `LoraConfig` under the field's names.

    Raises:
        UserError: If a value is out of range, or two keys contradict each other.
    """

    r: int = 16
    """Rank of the update."""

    alpha: float = 32
    """The update is scaled by alpha / r (by alpha / sqrt(r) with rsLoRA)."""

    dropout: float = 0.05
    """Dropout on the adapter's input."""

    target_modules: list[str] | str = "all-linear"
    """Modules to adapt: a list of name endings; a regular expression for whole names; or a preset: `all-linear` (all
    linear but the head), `attention`, `mlp`, `mamba`."""

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
    """Another `r` for the modules that a name ending or regular expression matches."""

    alpha_pattern: dict[str, float] | None = None
    """Another `alpha`, in the same way."""

    layers_to_transform: list[int] | None = None
    """Adapt only these layers, from 0."""

    lora_plus_ratio: float | None = None
    """LoRA+ (Hayou et al., 2024, arXiv:2402.12354): the B matrices learn at the learning rate times this."""

    peft_config: PeftConfig | None = None
    """Another method of PEFT, by `class_path` (such as `peft.IA3Config`) and `init_args`; takes the place of the keys
    above."""

    path: str | None = None
    """Continue training the adapter in this folder, whatever its method; its own configuration wins over the keys
    above, and every difference is said."""

    drop_modules_to_save: bool = False
    """Continue with `path`'s adapter without the modules that it trained in full."""

    only_adapter: bool = True
    """`false`: every floating-point weight that the adapter does not stand for trains too, as by DeepSpeed-Chat's
    default."""

    base_lr: float | None = None
    """With `only_adapter: false`, the learning rate of the weights that are not the adapter's; default: the
    optimizer's."""

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
                "model.adapter.base_lr: only the adapter trains, so no base weight would learn at "
                f"{self.base_lr}; set model.adapter.only_adapter: false, or remove it"
            )

    def _check_method(self) -> None:
        is_regex = isinstance(self.target_modules, str) and self.target_modules not in PRESETS
        if self.layers_to_transform is not None and is_regex:
            raise UserError(
                "model.adapter.layers_to_transform: does not go with target_modules as a regular expression; name the "
                f"layers in it (got {self.target_modules!r})"
            )
        if self.drop_modules_to_save and self.path is None:
            raise UserError("model.adapter.drop_modules_to_save: is for continuing; set model.adapter.path")
        if self.peft_config is None:
            return
        ignored = [field.name for field in fields(self) if field.name not in _NOT_FOR_LORA_ONLY]
        ignored = [name for name in ignored if getattr(self, name) != _default(name)]
        if ignored or self.path is not None:
            keys = ", ".join(ignored or ["path"])
            raise UserError(
                f"model.adapter.peft_config: brings its own configuration, so model.adapter has no place for {keys}; "
                "set it in peft_config.init_args, or remove one of the two"
            )

    def to_peft(self) -> PeftConfig:
        """Return the same configuration for PEFT; a preset of `target_modules` is not resolved yet."""
        if self.peft_config is not None:
            config = copy.deepcopy(self.peft_config)  # PEFT writes what it finds into it
            config.task_type = config.task_type or "CAUSAL_LM"
            return config
        init: Any = True if self.init in ("default", "loftq") else self.init
        indices = self.trainable_token_indices
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
            lora_dropout=self.dropout,
            target_modules=[] if self.target_modules in PRESETS else self.target_modules,
            modules_to_save=self.modules_to_save,
            trainable_token_indices=cast("Any", None if isinstance(indices, str) else indices),  # resolved later
            bias=self.bias,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            init_lora_weights=init,
            rank_pattern=dict(self.rank_pattern or {}),
            alpha_pattern=cast("Any", dict(self.alpha_pattern or {})),
            layers_to_transform=self.layers_to_transform,
        )


def _default(name: str) -> Any:
    return next(field.default for field in fields(AdapterConfig) if field.name == name)


def _check_init(init: str) -> None:
    if init in _NEED_DATA:
        raise UserError(f"model.adapter.init: {init!r} measures the model on data beforehand, which is not done here")
    if init.startswith("pissa_niter"):
        raise UserError(
            f"model.adapter.init: {init!r} changes the base by a random factorization, which nobody who loads the "
            "adapter can repeat; use 'pissa', whose factorization is exact"
        )
    if init not in INITS:
        raise one_of("model.adapter.init", init, INITS)


def add_adapter(model: PreTrainedModel, config: AdapterConfig, *, added_token_ids: Sequence[int] = ()) -> PeftModel:
    """Freeze the model and put a trainable adapter on it; adapter weights are float32 whatever the base is.

    Args:
        model: The base, changed in place.
        config: What to put on it, or which adapter to continue.
        added_token_ids: Tokens that are new to the model, for `trainable_token_indices: added`.

    Raises:
        UserError: If a target matches no module, PEFT refuses the configuration, or `path` holds no adapter that fits.
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
    return wrapped


def check_base_of_adapter(config: AdapterConfig, quantization: QuantizationConfig, dtype: str) -> None:
    """Check that PEFT can put an adapter on a quantized base, before anything is loaded.

    Args:
        config: The adapter.
        quantization: How the base is stored.
        dtype: `model.dtype`.

    Raises:
        UserError: If PEFT cannot.
    """
    if config.path is None:
        check_quantized_base(config.to_peft(), quantization, dtype)
    else:
        continued = read_adapter_config(config.path, drop_modules_to_save=config.drop_modules_to_save)
        check_quantized_base(continued, quantization, dtype)


def _resolve(model: PreTrainedModel, config: AdapterConfig, added_token_ids: Sequence[int]) -> PeftConfig:
    """Return PEFT's configuration with everything in it that depends on the model, checked against the model."""
    peft_config: Any = config.to_peft()
    owner = "model.adapter" if config.peft_config is None else "model.adapter.peft_config.init_args"
    targets = getattr(peft_config, "target_modules", None)
    if config.peft_config is None and isinstance(config.target_modules, str) and config.target_modules in PRESETS:
        peft_config.target_modules = set(resolve_preset(model, config.target_modules))
    elif isinstance(targets, str) and targets in PRESETS:
        peft_config.target_modules = set(resolve_preset(model, targets))
    elif targets:
        check_targets(model, f"{owner}.target_modules", targets)
    check_names(model, f"{owner}.modules_to_save", getattr(peft_config, "modules_to_save", None) or [])
    if isinstance(config.trainable_token_indices, str):
        if not added_token_ids:
            raise UserError("model.adapter.trainable_token_indices: 'added', but model.add_tokens adds none")
        peft_config.trainable_token_indices = {name: list(added_token_ids) for name in embedding_names(model)}
    trained_in_full = getattr(peft_config, "modules_to_save", None) or []
    tied = any(name.endswith(module) for name in tied_names(model) for module in trained_in_full)
    if tied and hasattr(peft_config, "ensure_weight_tying"):
        peft_config.ensure_weight_tying = True  # else PEFT would train two copies of what is one matrix
    return cast("PeftConfig", peft_config)


def _wrap(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    for parameter in model.parameters():
        parameter.requires_grad = False
    if getattr(peft_config, "init_lora_weights", None) == "loftq":
        _check_cuda_for_loftq()
    try:
        wrapped = get_peft_model(model, peft_config)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(f"model.adapter: PEFT refuses {type(peft_config).__name__}: {error}") from error
    if not isinstance(wrapped, PeftModel):
        raise TypeError(f"PEFT returned a {type(wrapped).__name__}")
    prepare_adapted(wrapped)  # before weights are loaded, which would be rounded
    return wrapped


def _start_at_quantization_error(wrapped: PeftModel) -> None:
    """LoftQ on a 4-bit base: A and B start at what quantization lost; the base stays as it is."""
    base = wrapped.get_base_model()
    if not getattr(base, "is_loaded_in_4bit", False):
        raise UserError("model.adapter.init: 'loftq' makes up for a 4-bit base; set model.quantization: {bits: 4}")
    _check_cuda_for_loftq()
    source = str(cast("PreTrainedModel", base).config._name_or_path)
    try:
        replace_lora_weights_loftq(wrapped, model_path=source if Path(source).is_dir() else None)
    except (OSError, ValueError) as error:
        raise UserError(f"model.adapter.init: 'loftq' needs the base's safetensors on disk: {error}") from error


def _check_cuda_for_loftq() -> None:
    if not torch.cuda.is_available():
        raise UserError(
            "model.adapter.init: PEFT computes 'loftq' on a CUDA device only, and there is none; use 'pissa'"
        )
