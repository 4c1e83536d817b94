"""The reference model of preference training: the model before training, kept as an adapter switched off or as numbers.

A copy of the model would cost its memory again. With an adapter whose update starts at zero, the model before training
is there all the time, below the adapter. For the rest, two numbers a pair are enough: they are computed once, kept in
checkpoints, and beside the token stores for the next run of the same model on the same data.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import xxhash
from peft import PeftModel

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.trainable import trainable_base_names
from sft_lightning.training.preference.losses import Reference

logger = logging.getLogger(__name__)

_STARTS_AT_ZERO = ("default", "gaussian")
"""Values of `model.adapter.init` for which the new adapter changes nothing, and the base stays as it was."""


class ReferenceChoice(NamedTuple):
    """Where the reference's log-probabilities come from."""

    kind: Literal["adapter_off", "precomputed"]
    reason: str


def choose_reference(setting: Reference, model: torch.nn.Module, adapter: AdapterConfig | None) -> ReferenceChoice:
    """Return where the reference's log-probabilities come from.

    Args:
        setting: `model.preference.reference`.
        model: The model, adapter included.
        adapter: Its configuration; `None` for full fine-tuning.

    Raises:
        UserError: If the adapter is to be switched off, and what is left would not be a model of its own.
    """
    changes = _why_not_switched_off(model, adapter)
    if setting == "precomputed":
        return ReferenceChoice("precomputed", "as model.preference.reference says")
    if setting == "adapter_off":
        if changes is not None and (adapter is None or adapter.path is None or trainable_base_names(model)):
            raise UserError(f"model.preference.reference: adapter_off, but {changes}; use precomputed")
        return ReferenceChoice("adapter_off", "as model.preference.reference says")
    if changes is not None:
        return ReferenceChoice("precomputed", changes)
    return ReferenceChoice("adapter_off", "the adapter's update starts at zero")


def _why_not_switched_off(model: torch.nn.Module, adapter: AdapterConfig | None) -> str | None:
    """Return why the model with its adapter switched off is not the model before training; `None` if it is."""
    if adapter is None or not isinstance(model, PeftModel):
        return "there is no adapter to switch off"
    base = sorted(trainable_base_names(model))
    if base:
        return f"weights of the base train too ({base[0]}, …)"
    if adapter.path is not None:
        return f"training goes on from the adapter in {adapter.path}, without which the model is another one"
    if adapter.peft_config is not None:
        return "not every method of PEFT starts at the base model"
    if adapter.init not in _STARTS_AT_ZERO:
        return f"model.adapter.init: {adapter.init} changes the base, or does not start at it"
    return None


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Make the model its base inside, `modules_to_save` included; what trains is afterwards what trained before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, trains in flags:
            parameter.requires_grad = trains


def table_key(*parts: str) -> str:
    """Return the name of a table of log-probabilities, made of everything that decides them."""
    return xxhash.xxh3_128("\n".join(parts).encode()).hexdigest()


def load_table(folder: Path, key: str, num_pairs: int) -> torch.Tensor | None:
    """Return a table of log-probabilities, (num_pairs, 2) float32; `None` if there is none that is whole."""
    path = folder / f"{key}.npy"
    if not path.is_file():
        return None
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("the reference log-probabilities in %s are damaged (%s) and are computed again", path, error)
        return None
    if table.shape != (num_pairs, 2) or table.dtype != np.float32:
        logger.warning("the reference log-probabilities in %s are of other data and are computed again", path)
        return None
    return torch.from_numpy(table)


def save_table(folder: Path, key: str, table: torch.Tensor) -> None:
    """Keep a table for the next run, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{key}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        np.save(file, table.numpy())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / f"{key}.npy")
