"""Find and check the modules that an adapter is put on: presets, names and regular expressions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sft_lightning.errors import UserError, did_you_mean
from sft_lightning.models.adapters.config import PRESETS
from sft_lightning.models.base.vocabulary import tied_embedding_names
from sft_lightning.models.inspection import bypassed_modules


def resolve_preset(model: PreTrainedModel, preset: str) -> list[str]:
    """Return the shortest name endings that match exactly the modules of a preset.

    Args:
        model: The base.
        preset: One of `PRESETS`.

    Raises:
        UserError: If the model has no such module.
    """
    linear = linear_names(model)
    attention = {name for name in linear if _inside_attention(model, name)}
    mamba = {name for name in linear if name.endswith(".in_proj")}
    if not tied_embedding_names(model):
        mamba.add(_name_of(model, model.get_input_embeddings()))
    is_mamba = bool(bypassed_modules(model.config))
    wanted = {
        "all-linear": linear,
        "attention": attention,
        "mlp": set() if is_mamba else linear - attention,
        "mamba": mamba if is_mamba else set(),
    }[preset]
    if not wanted:
        raise UserError(
            f"model.adapter.target_modules: {preset!r} matches no module of this {model.config.model_type} model. "
            f"{_what_exists(model)}"
        )
    return _endings(wanted, {name for name, _ in model.named_modules() if name} - wanted)


def linear_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the linear layers that can have an adapter: not the head, nor layers that are bypassed."""
    head = model.get_output_embeddings()
    bypassed = bypassed_modules(model.config)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and name.rsplit(".", 1)[-1] not in bypassed
    }


def check_module_names(model: torch.nn.Module, key: str, names: Iterable[str]) -> None:
    """Check that every name is the ending of some module's name.

    Args:
        model: The base.
        key: The YAML key, for messages.
        names: Name endings.

    Raises:
        UserError: If a name matches no module; the message lists the names that exist.
    """
    existing = [name for name, _ in model.named_modules() if name]
    for wanted in names:
        if not any(name == wanted or name.endswith("." + wanted) for name in existing):
            near = did_you_mean(wanted, module_endings(model))
            raise UserError(f"{key}: {wanted!r} matches no module of the model.{near} {_what_exists(model)}")


def check_targets(model: PreTrainedModel, key: str, targets: str | Collection[str]) -> None:
    """Check that every name, or the regular expression, matches a module that can have an adapter.

    Args:
        model: The base.
        key: The YAML key, for messages.
        targets: Name endings, or a regular expression for whole names.

    Raises:
        UserError: If a name matches no module, the regular expression is invalid, the model bypasses a module, or a
            module is an embedding tied to the head, whose update could not be merged.
    """
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        try:
            matched = [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise UserError(f"{key}: {targets!r} is not a valid regular expression: {error}") from error
        if not matched:
            near = did_you_mean(targets, [*PRESETS, *module_endings(model)])
            raise UserError(
                f"{key}: the regular expression {targets!r} matches no whole module name.{near} {_what_exists(model)}"
            )
    else:
        check_module_names(model, key, targets)
        matched = [name for name in names if any(name == end or name.endswith("." + end) for end in targets)]
    bypassed = {name.rsplit(".", 1)[-1] for name in matched} & bypassed_modules(model.config)
    if bypassed:
        raise UserError(
            f"{key}: {model.config.model_type} reads the weight of {', '.join(sorted(bypassed))} without calling the "
            "module, so an adapter there would not train; use the preset 'mamba', or 'in_proj'"
        )
    tied = tied_embedding_names(model)
    if adapted := sorted(set(matched) & set(tied)):
        others = " and ".join(sorted({*tied} - {adapted[0]}))
        raise UserError(
            f"{key}: {adapted[0]} shares its matrix with {others}, so an adapter on it cannot be merged; train it in "
            "full by modules_to_save"
        )


def module_endings(model: torch.nn.Module) -> list[str]:
    """Return the sorted last parts of all module names, without layer numbers."""
    endings = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name}
    return sorted(ending for ending in endings if not ending.isdigit())


def _what_exists(model: torch.nn.Module) -> str:
    return f"Module names end in: {', '.join(module_endings(model))}; presets: {', '.join(PRESETS)}."


def _inside_attention(model: torch.nn.Module, name: str) -> bool:
    parts = name.split(".")[:-1]
    above = (model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts) + 1))
    return any("attention" in type(module).__name__.lower() for module in above)


def _name_of(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _endings(wanted: set[str], others: set[str]) -> list[str]:
    """Return the shortest name endings that match all of `wanted` and none of `others`."""
    found = set()
    for name in wanted:
        parts = name.split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        found.add(next(e for e in endings if not any(o == e or o.endswith("." + e) for o in others)))
    return sorted(found)
