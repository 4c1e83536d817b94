"""The reference model's log-probabilities: computed at every step, or once before training.

Computed ones are kept in checkpoints, and on disk beside the token stores for the next run of the same model on the
same data.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import xxhash
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.collate import PairBatch
from sft_lightning.data.pairs.kind import PairPart, Pairs, pair_parts, reference_folder
from sft_lightning.data.plan.split_reader import Split
from sft_lightning.errors import UserError
from sft_lightning.models.export.fingerprint import weight_fingerprint
from sft_lightning.models.inspection import evaluating
from sft_lightning.training.preference.forward import answer_log_probs
from sft_lightning.training.preference.losses import PreferenceConfig
from sft_lightning.training.preference.reference import ReferenceChoice, adapter_off, choose_reference

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule

logger = logging.getLogger(__name__)


def pair_data_of(module: CausalLMModule) -> SFTDataModule:
    """Return the data module of a module that trains on pairs.

    Raises:
        UserError: If its examples are not pairs.
    """
    if not isinstance(module.data.kind, Pairs):
        raise UserError("a PreferenceObjective trains on pairs; make the data module as SFTDataModule(spec, Pairs)")
    return module.data


class ReferenceLogProbs:
    """The log-probabilities of all pairs under the model before training.

    Args:
        config: `model.preference`.
    """

    def __init__(self, config: PreferenceConfig) -> None:
        self._config = config
        self._choice: ReferenceChoice | None = None
        self._start = ""  # fingerprint of the model before training
        self.tables: dict[str, torch.Tensor] = {}
        """Precomputed log-probabilities by key, (pairs, 2) each; a checkpoint keeps them."""

        self.split_tables: dict[Split, list[torch.Tensor]] = {}
        """The tables of each split: one for all training sources together, one for each source of other splits."""

    @property
    def kind(self) -> Literal["adapter_off", "precomputed"] | None:
        """Where the log-probabilities come from; `None` for losses without a reference."""
        return None if self._choice is None else self._choice.kind

    def choose(self, module: CausalLMModule) -> None:
        """Decide where the log-probabilities come from; called while the model is as it was loaded."""
        if not self._config.has_reference:
            return
        self._choice = choose_reference(self._config.reference, module.language_model, module.spec.adapter)
        rank_zero_info(f"reference model: {self._choice.kind} ({self._choice.reason})")
        if self._choice.kind == "precomputed":
            self._start = weight_fingerprint(module.language_model)

    def prepare(self, module: CausalLMModule) -> None:
        """Compute what is missing of the log-probabilities, if they are precomputed; all processes take part."""
        if self._choice is None or self._choice.kind == "adapter_off":
            return
        data = pair_data_of(module)
        if set(self.split_tables) == set(data.reader.read):
            return
        strategy, spec = module.trainer.strategy, module.spec
        found: dict[Split, list[torch.Tensor]] = {}
        for part in pair_parts(data):
            key = table_key(self._start, part.content, str(module.trainer.precision), spec.attn_implementation)
            key = strategy.broadcast(key)  # the fingerprint of a sharded model differs from rank to rank
            if key not in self.tables:
                self.tables[key] = self._find_table(module, reference_folder(data), part, key)
            found.setdefault(part.split, []).append(self.tables[key])
        self.split_tables = found
        if "train" in found:  # a training batch counts its pairs through all sources
            self.split_tables["train"] = [torch.cat(found["train"])]

    def _find_table(self, module: CausalLMModule, folder: Path, part: PairPart, key: str) -> torch.Tensor:
        """Return the log-probabilities of a part's pairs, from the disk or from the model, (pairs, 2)."""
        strategy, writes = module.trainer.strategy, module.trainer.is_global_zero
        table = strategy.broadcast(load_table(folder, key, part.num_pairs) if writes else None)
        if table is not None:
            return table
        table = compute_table(module, part)
        if writes:
            save_table(folder, key, table)
        rank_zero_info(f"reference log-probabilities: computed for the pairs of {part.split}/{part.name}")
        return table

    @torch.no_grad()
    def log_probs(self, module: CausalLMModule, batch: PairBatch, split: Split, source: int = 0) -> torch.Tensor | None:
        """Return the reference's log-probabilities of a micro-batch's answers, (P, 2); `None` for losses without.

        Args:
            module: The model as it is now.
            batch: P pairs.
            split: The split that they are from.
            source: Number of their source in the split; 0 for the training split.
        """
        if self._choice is None:
            return None
        if self._choice.kind == "precomputed":
            tables = self.split_tables[split]
            tables[source] = tables[source].to(module.device)  # once; indexing on the device waits for nothing
            return tables[source][batch["pairs"]]
        model = module.language_model
        if not isinstance(model, PeftModel):
            raise TypeError(f"a {type(model).__name__} has no adapter to switch off")
        _ = module.head  # checked on the model as it trains
        with evaluating(module), adapter_off(model):
            return answer_log_probs(module, batch).log_probs


@torch.no_grad()
def compute_table(module: CausalLMModule, part: PairPart) -> torch.Tensor:
    """Return the log-probabilities of a part's pairs under the model as it is now, (pairs, 2); all ranks take part.

    Args:
        module: The model.
        part: The pairs that a split has of a source.
    """
    strategy = module.trainer.strategy
    if module.device != strategy.root_device:
        module.to(strategy.root_device)  # a checkpoint is loaded before the trainer moves the model
    table = torch.zeros(part.num_pairs, 2, device=module.device)
    with evaluating(module), module.trainer.precision_plugin.forward_context():
        for batch in part.loader:
            batch = strategy.batch_to_device(batch, module.device)
            table[batch["pairs"]] = answer_log_probs(module, batch).log_probs
    total: torch.Tensor = strategy.reduce(table, reduce_op="sum")
    return total.cpu()


def table_key(*parts: str) -> str:
    """Return the name of a table of log-probabilities: a hash of everything that they depend on."""
    return xxhash.xxh3_128("\n".join(parts).encode()).hexdigest()


def load_table(folder: Path, key: str, num_pairs: int) -> torch.Tensor | None:
    """Return a table of log-probabilities, (num_pairs, 2) float32; `None` if there is none, or it is damaged.

    Args:
        folder: Where tables are kept.
        key: From `table_key`.
        num_pairs: Number of pairs that the table must have.
    """
    path = folder / f"{key}.npy"
    if not path.is_file():
        return None
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("the reference log-probabilities in %s are damaged (%s) and are computed again", path, error)
        return None
    if table.shape != (num_pairs, 2) or table.dtype != np.float32:
        logger.warning("the reference log-probabilities in %s belong to other data and are computed again", path)
        return None
    return torch.from_numpy(table)


def save_table(folder: Path, key: str, table: torch.Tensor) -> None:
    """Keep a table for the next run; a killed process leaves all of it or nothing.

    Args:
        folder: Where tables are kept.
        key: From `table_key`.
        table: Log-probabilities, (pairs, 2) float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{key}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        np.save(file, table.numpy())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / f"{key}.npy")
