"""Checkpoints and exports of a sharded model: those of a single process, written by rank 0 from whole weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from filelock import FileLock
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch.optim import Optimizer

from sft_lightning.strategies.full_tensors import full_parameters, gather_parameters
from sft_lightning.strategies.refusals import RunFacts, check_optimizer, check_run
from sft_lightning.strategies.services import ModuleServices
from sft_lightning.strategies.sharding import ShardingSpec

TIMEOUT = timedelta(hours=2)
"""How long a process that has its shard waits in a collective for those whose turn to load comes last."""


class ShardedStrategy(ModuleServices, Strategy):
    """What sharded strategies have in common; stands before Lightning's strategy in the list of bases."""

    @property
    def sharding(self) -> ShardingSpec:
        """What the strategy shards and offloads."""
        raise NotImplementedError

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds the whole model."""
        return self.sharding.shards_weights

    def check(self, run: RunFacts) -> None:
        """Check that the strategy can train a model; for `fit`, before any weight is read, and for `plan`.

        Raises:
            UserError: If it cannot.
        """
        check_run(run, self.sharding)

    @property
    def _module(self) -> Any:
        if self.lightning_module is None:
            raise RuntimeError("the strategy has no module yet; the trainer connects it")
        return self.lightning_module

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded while they are whole."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is Lightning's to restore."""
        return True

    def connect(self, model: LightningModule) -> None:
        """Refuse, before any weight is read, what cannot be trained."""
        module, processes = cast("Any", model), cast("Any", self)  # both subclasses are parallel strategies
        self.check(
            RunFacts(
                model=module.spec,
                precision=str(self.precision_plugin.precision),
                num_processes=processes.num_nodes * processes.num_processes,
                on_gpu=self.root_device.type == "cuda",
            )
        )
        super().connect(model)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write one file on rank 0, whose module holds the full weights meanwhile, for an export beside the file."""
        gathered = checkpoint.get("state_dict", {}) if self.shards_weights else {}
        with full_parameters(self._module, gathered):
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file; every process its own."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer, if it can step on shards.

        Raises:
            UserError: If it cannot.
        """
        check_optimizer(optimizer, self.sharding)
        return optimizer

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        """Gather the weights to rank 0's CPU: of an adapted model those that train, otherwise all."""
        if not self.shards_weights:
            yield
            return
        has_adapter = isinstance(self._module.language_model, PeftModel)
        gathered = gather_parameters(self._module, keep=self.is_global_zero, trainable_only=has_adapter)
        with full_parameters(self._module, gathered):
            yield


@contextmanager
def one_process_at_a_time(*, wanted: bool) -> Iterator[None]:
    """Let the processes of this run that share a host into the block one after the other.

    Args:
        wanted: Do so at all; weights that are only mapped are shared by all processes as it is.
    """
    if not wanted:
        yield
        return
    rank_zero_info(
        "loading: one process of a host after the other, because each makes a copy of the weights for a while"
    )
    with FileLock(_lock_file()):  # a process that dies gives it back
        yield


def _lock_file() -> Path:
    """Return a file of this host, this user and this run, whose processes meet at one port."""
    return Path(tempfile.gettempdir()) / f"sft_lightning_{os.getuid()}_{os.environ.get('MASTER_PORT', 0)}.lock"
