"""What FSDP2 and ZeRO share: checks, loading, checkpoints of a single process's form, full weights for exports."""

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
"""How long a process waits in a collective for the processes that load after it."""


class ShardedStrategy(ModuleServices, Strategy):
    """Base class of the sharded strategies; to be listed before Lightning's strategy."""

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
            raise RuntimeError("the strategy has no module before the trainer connects it")
        return self.lightning_module

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether weights are loaded after `setup`: no, before it, while they are not sharded."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning restores the optimizer's state: yes, by `load_optimizer_state_dict`."""
        return True

    def connect(self, model: LightningModule) -> None:
        """Refuse, before any weight is read, a model that this strategy cannot train."""
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
        """Write one file on rank 0; meanwhile its module holds the full weights, for an export beside the file.

        Args:
            checkpoint: The checkpoint, with full tensors.
            filepath: Path of the file.
            storage_options: Passed on to the checkpoint plugin.
        """
        gathered = checkpoint.get("state_dict", {}) if self.shards_weights else {}
        with full_parameters(self._module, gathered):
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file in every process.

        Args:
            checkpoint_path: Path of the file.
            weights_only: Passed on to `torch.load`.
        """
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer unchanged.

        Raises:
            UserError: If it cannot step on shards.
        """
        check_optimizer(optimizer, self.sharding)
        return optimizer

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        """Gather the weights to the CPU of rank 0: those that train, or all of a model without an adapter."""
        if not self.shards_weights:
            yield
            return
        has_adapter = isinstance(self._module.language_model, PeftModel)
        gathered = gather_parameters(self._module, keep=self.is_global_zero, trainable_only=has_adapter)
        with full_parameters(self._module, gathered):
            yield


@contextmanager
def one_process_at_a_time(*, wanted: bool) -> Iterator[None]:
    """Let the processes of this run on one machine into the block one after the other.

    Args:
        wanted: Whether to; not needed for weights that are only mapped, which the processes share anyway.
    """
    if not wanted:
        yield
        return
    rank_zero_info(
        "loading: the processes of a machine load one after the other, because each holds a full copy while it loads"
    )
    with FileLock(_lock_file()):  # the system releases it if the process dies
        yield


def _lock_file() -> Path:
    """Return a file that the processes of this user's run on this machine share; they meet at one port."""
    return Path(tempfile.gettempdir()) / f"sft_lightning_{os.getuid()}_{os.environ.get('MASTER_PORT', 0)}.lock"
