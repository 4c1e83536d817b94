"""What a checkpoint contains: trainable weights, random states, and the position at the start of an optimizer step.

A checkpoint contains the trainable weights, never the frozen base. Lightning adds the optimizer, the schedule and the
position in the data; we add the random states, so that dropout continues to the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sft_lightning.compat.lightning.loops import align_progress, reopen_epoch
from sft_lightning.data.batches.training_rows import TrainingRows
from sft_lightning.errors import UserError


def trainable_state(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the part of a state dict that trains.

    Args:
        module: The module that the state dict is of.
        state: Name → tensor of any shape.
    """
    trainable = _trainable_names(module)
    return {name: tensor for name, tensor in state.items() if name in trainable}


def check_trainable_state(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Check that a checkpoint has exactly the weights that train here.

    Args:
        module: The module to load the weights into.
        state: Weights of a checkpoint: name → tensor of any shape.

    Raises:
        UserError: If some are missing, or some do not train here.
    """
    trainable = _trainable_names(module)
    missing, extra = sorted(trainable - state.keys()), sorted(state.keys() - trainable)
    if missing or extra:
        raise UserError(
            "--ckpt_path: the checkpoint was saved with different keys under model: "
            f"{_describe_names(missing)} train here and are missing in it, {_describe_names(extra)} are in it and do "
            "not train here; restore the keys of the run that saved it, or start a new run"
        )


def _describe_names(names: list[str]) -> str:
    return f"{len(names)} weights{f' ({names[0]}, …)' if names else ''}"


def _trainable_names(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def random_state() -> dict[str, Any]:
    """Return the states of this process's random generators, as values that `torch.load(weights_only=True)` reads."""
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": [algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set this process's random generators to a state that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def gather_random_states(own: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the random states of all processes, by rank; every process must call this.

    They differ from rank to rank, because dropout draws a number for each token of the rank's rows.
    """
    if not torch.distributed.is_initialized():
        return [own]
    states: list[dict[str, Any]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(states, own)
    return states


class RandomStates:
    """The random states that a run continues from a checkpoint, and those that it saves in one.

    A checkpoint has no gradients, so an optimizer step under way is taken again from its first micro-batch. The states
    from before that micro-batch are saved.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._before_step: dict[str, Any] | None = None

    def load(self, states: Sequence[dict[str, Any]], rank: int) -> None:
        """Keep the states of a checkpoint until `continue_loaded`.

        Args:
            states: One for each process of the run that saved the checkpoint.
            rank: Rank of this process; there may be more processes now.
        """
        self._loaded = states[rank % len(states)]

    def continue_loaded(self) -> bool:
        """Set the generators to the loaded states, once; return whether there were any."""
        if self._loaded is None:
            return False
        set_random_state(self._loaded)
        self._loaded = None
        return True

    def note_step_start(self) -> None:
        """Remember the states from before the first micro-batch of an optimizer step."""
        self._before_step = random_state()

    def gather(self, *, within_step: bool) -> list[dict[str, Any]]:
        """Return the states to save, of all processes by rank; every process must call this.

        Args:
            within_step: Whether an optimizer step is under way.
        """
        # Loaded states that were not continued: the run had no step left to take.
        own = self._before_step if within_step else self._loaded
        return gather_random_states(own or random_state())


def rewind_to_step_start(fit_loop: dict[str, Any], rows: TrainingRows) -> None:
    """Set the position of a checkpoint to the start of an optimizer step, in its `loops["fit_loop"]`.

    Lightning counts micro-batches. A checkpoint may fall between two of one optimizer step, whose gradients it does not
    hold, or come from a run that split the same global batch in another way.

    Args:
        fit_loop: What Lightning keeps of its training loop.
        rows: What this run trains on.
    """
    for position in fit_loop["state_dict"].get("combined_loader", []):
        align_progress(fit_loop, rows.micro_batches_done(position))
        if rows.is_within_epoch(position):
            reopen_epoch(fit_loop, position["epoch"])
