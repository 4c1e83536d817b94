"""The settings that a checkpoint's weights and its optimizer mean something under, and what a continued run changed.

Settings of three kinds: those without which the weights are another model, which must stay as they are; those of the
training, where what the user writes now wins; and those of the optimizer, which win too, although its state is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch.optim import Optimizer

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.continuation import PEFT_KEYS
from sft_lightning.models.adapters.folder import CHANGE_BASE, method_name
from sft_lightning.training.preference.objective import PreferenceObjective

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule

_BASE, _NUM_STEPS = "model.model_name_or_path", "planned optimizer steps"

_NOT_OF_THE_WEIGHTS = {
    "inference_mode", "base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "peft_type",
    "lora_dropout", "runtime_config", "init_lora_weights",
}  # fmt: skip
"""Keys of PEFT's configurations that change no output of trained weights in evaluation."""

_OF_EVALUATION = ("model.dtype", "model.quantization.")
"""Beginnings of keys that may differ where nothing trains: the same weights are computed more or less exactly."""

_IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable"}
"""Keys of an optimizer's groups that choose how a step is computed, not which; the checkpoint's are kept."""

_NEW_RUN = "start a new run from the checkpoint's weights with model.adapter.path (or model.model_name_or_path)"

Settings = dict[str, Any]
"""YAML key → value, as `torch.load(weights_only=True)` reads it."""


def weight_settings(module: CausalLMModule) -> Settings:
    """Return the settings without which the trained weights are another model, from the model as it is loaded.

    Args:
        module: The module, its model loaded.
    """
    spec, text = module.spec, module.base_model.config.get_text_config()
    stored: Settings = dict.fromkeys(("bits", "quant_type", "double_quant", "compute_dtype"))
    if spec.quantization is not None:
        stored["bits"] = spec.quantization.bits
    if spec.quantization is not None and spec.quantization.bits == 4:
        stored |= {key: getattr(spec.quantization, key) for key in ("quant_type", "double_quant")}
        stored["compute_dtype"] = spec.quantization.compute_dtype or spec.dtype
    return {
        _BASE: [spec.model_name_or_path or "model.from_config", module.base_fingerprint],
        "model.dtype": spec.dtype,
        **{f"model.quantization.{key}": value for key, value in stored.items()},
        **_flat("model.rope_scaling", plain(getattr(text, "rope_parameters", None))),
        "model.rope_scaling.max_position_embeddings": getattr(text, "max_position_embeddings", None),
        "model.add_tokens (rows of the embeddings)": text.vocab_size,
        **_adapter_settings(module),
    }


def _adapter_settings(module: CausalLMModule) -> Settings:
    model = module.language_model
    if not isinstance(model, PeftModel):
        return {"model.adapter": None}
    config: Any = model.active_peft_config
    yaml_keys = {peft_key: key for key, peft_key in PEFT_KEYS.items()}
    found: Settings = {"model.adapter": method_name(config)}
    for key, value in config.to_dict().items():
        if key not in _NOT_OF_THE_WEIGHTS:
            found[f"model.adapter.{yaml_keys.get(key) or f'peft_config.init_args.{key}'}"] = plain(value)
    init = getattr(config, "init_lora_weights", None)
    found["model.adapter.init"] = init if init in CHANGE_BASE else None
    return found


def _flat(key: str, value: Any) -> Settings:
    """Return nested dictionaries as one; a release may add a key, which alone means nothing."""
    if not isinstance(value, dict):
        return {key: value}
    return {name: each for part in value for name, each in _flat(f"{key}.{part}", value[part]).items()}


def training_settings(module: CausalLMModule, num_steps: int) -> Settings:
    """Return the settings of the training that a continued run may change.

    Args:
        module: The module, its optimizer made.
        num_steps: Planned optimizer steps.
    """
    spec, objective = module.spec, module.objective
    found: Settings = {
        "model.dropout": spec.dropout,
        "model.neftune_alpha": spec.neftune_alpha,
        "model.adapter.dropout": None if spec.adapter is None else spec.adapter.dropout,
        "trainer.gradient_clip_val": module.trainer.gradient_clip_val,
        _NUM_STEPS: num_steps,
        **{f"model.lr_scheduler.{key}": value for key, value in asdict(spec.lr_scheduler).items()},
    }
    if isinstance(objective, PreferenceObjective):
        found |= {f"model.preference.{key}": value for key, value in asdict(objective.config).items()}
    return found


def optimizer_settings(optimizer: Optimizer) -> Settings:
    """Return the class of an optimizer, and the settings of its groups.

    Args:
        optimizer: The optimizer as it is configured, before a schedule or a checkpoint changes it.
    """
    groups = [
        {key: plain(value) for key, value in group.items() if key not in _IMPLEMENTATION}
        for group in optimizer.param_groups
    ]
    return {"class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}", "groups": groups}


def plain(value: Any) -> Any:
    """Return a value as numbers, strings, lists and dictionaries; sets sorted, empty collections as `None`."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()} or None
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value] or None
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs, as key → `key: old → new`; keys that only one side knows are of another release.

    Args:
        saved: Settings in a checkpoint.
        now: The same settings of this run.
    """
    return {
        key: f"{key}: {_shown(saved[key])} → {_shown(now[key])}" for key in now if saved.get(key, now[key]) != now[key]
    }


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def check_weights(saved: Settings, now: Settings, *, trains: bool) -> list[str]:
    """Check that a checkpoint's weights mean here what they meant in the run that saved it.

    Args:
        saved: `weight_settings` of the run that saved the checkpoint.
        now: `weight_settings` of this run.
        trains: Whether this run trains; evaluation may compute the same weights in another type.

    Returns:
        Lines for the log: what may differ, and what cannot be compared.

    Raises:
        UserError: If they mean something else, with every key that changed.
    """
    (name, fingerprint), (own_name, own) = saved.get(_BASE) or (None, None), now[_BASE]
    rest = changes({k: v for k, v in saved.items() if k != _BASE}, now)
    if "model.adapter" in rest:  # then all of the adapter's keys differ
        rest = {key: line for key, line in rest.items() if not key.startswith("model.adapter.")}
    if "model.quantization.bits" in rest:
        rest = {k: v for k, v in rest.items() if k.endswith(".bits") or not k.startswith("model.quantization.")}
    said = (
        []
        if trains
        else [f"{rest.pop(key)} (the configuration wins)" for key in [*rest] if key.startswith(_OF_EVALUATION)]
    )
    if fingerprint is None or own is None:
        said.append(
            f"--ckpt_path: the base cannot be verified: {name if fingerprint is None else own_name} has no fingerprint"
        )
    elif fingerprint != own:
        rest = {_BASE: f"{_BASE}: {name} (fingerprint {fingerprint}) → {own_name} (fingerprint {own})", **rest}
    if rest:
        raise UserError(
            "--ckpt_path: the checkpoint's weights are of a model with other settings: "
            f"{'; '.join(rest.values())}; restore the old values, or {_NEW_RUN}"
        )
    return said


def check_optimizer(saved: Settings, now: Settings) -> None:
    """Check that an optimizer can go on from the state of a checkpoint.

    Args:
        saved: `optimizer_settings` of the run that saved the checkpoint.
        now: `optimizer_settings` of this run.

    Raises:
        UserError: If it is another optimizer, or divides the parameters into other groups.
    """
    way = f"restore it, or {_NEW_RUN}"
    if saved["class"] != now["class"]:
        raise UserError(
            f"model.optimizer: {saved['class']} → {now['class']}: the checkpoint has the state of the first; {way}"
        )
    if len(saved["groups"]) != len(now["groups"]):
        raise UserError(
            f"model.adapter.lora_plus_ratio, model.adapter.base_lr: the optimizer had {len(saved['groups'])} groups of "
            f"parameters in the checkpoint, and has {len(now['groups'])} now; {way}"
        )


def let_configuration_win(
    checkpoint: dict[str, Any], saved: Settings, now: Settings, factor_at: Callable[[int], float]
) -> list[str]:
    """Write this run's settings of the optimizer and the schedule into a checkpoint that is about to be loaded.

    An unchanged run loads the checkpoint as it is.

    Args:
        checkpoint: The checkpoint, changed in place.
        saved: `optimizer_settings` of the run that saved the checkpoint.
        now: `optimizer_settings` of this run.
        factor_at: The schedule of this run: optimizer steps taken → what the rate is multiplied by.

    Returns:
        A line for the log for each setting that changed.
    """
    lines: dict[str, None] = {}
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    for group, before, after in zip(groups, saved["groups"], now["groups"], strict=True):
        for key, line in changes(before, after).items():
            lines[f"model.optimizer: {line.replace(':', '', 1)} (the configuration wins)"] = None
            group[key] = tuple(after[key]) if isinstance(after[key], list) else after[key]
    schedule = checkpoint["lr_schedulers"][0]
    factor = factor_at(schedule["last_epoch"])
    rates = [group["lr"] for group in now["groups"]]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"], group["initial_lr"] = rate * factor, rate
    schedule["base_lrs"], schedule["_last_lr"] = rates, [rate * factor for rate in rates]
    return list(lines)


def describe_training_changes(saved: Settings, now: Settings) -> list[str]:
    """Return a line for the log for each setting of the training that a continued run changed.

    Args:
        saved: `training_settings` of the run that saved the checkpoint.
        now: `training_settings` of this run.
    """
    return [f"{line} (the configuration wins)" for line in changes(saved, now).values()]
