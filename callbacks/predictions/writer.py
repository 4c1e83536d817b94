"""Writes predictions to `predictions.jsonl` in the order of the data; a killed run can be continued."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

import xxhash
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.predictions.partial_file import PartialPredictions, join_parts, part_paths
from callbacks.run_outputs import run_folder
from sft_lightning.data.batches.generation_prompts import PromptLoader
from sft_lightning.models.export.fingerprint import model_fingerprint
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.startup import datamodule_of

_NAME = "predictions.jsonl"


class PredictionWriter(Callback):
    """Write each prediction of `predict` as a line of `predictions.jsonl`, which appears when it is complete.

    Until then each process writes to a file `predictions.jsonl.partial…`, whose header has everything that answers
    depend on. The same command continues a killed run: finished answers are kept, and the rest are the same as in an
    uninterrupted run. If weights, prompts or generation settings have changed, the command fails, so that no file has
    answers of two models.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CausalLMModule):
            raise TypeError(f"PredictionWriter works with a CausalLMModule, not {type(pl_module).__name__}")
        target = run_folder(trainer) / _NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        loader = _loader(trainer)
        parts = part_paths(target, trainer.world_size)
        partial = PartialPredictions(parts[trainer.global_rank])
        partial.check_alone(parts)
        partial.check_made_with(_made_with(trainer, pl_module, loader))
        trainer.strategy.barrier("predictions checked")  # no process may write before all have checked
        loader.num_answered, num_rows = partial.whole_batches(loader.batch_lengths)
        if num_rows:
            rank_zero_info(f"predictions: continuing after the {num_rows:,} answers in {partial.path}")
        self._file = partial.open_after(num_rows)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Sequence[dict[str, Any]],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._file is not None:
            self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in outputs)
            self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._file is None:
            return
        self._close()
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            target = run_folder(trainer) / _NAME
            join_parts(part_paths(target, trainer.world_size), _loader(trainer).batch_size, target)
            rank_zero_info(f"predictions: {target}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _loader(trainer: Trainer) -> PromptLoader:
    loader = trainer.predict_dataloaders
    if not isinstance(loader, PromptLoader):
        raise TypeError(f"expected a PromptLoader, found a {type(loader).__name__}")
    return loader


def _made_with(trainer: Trainer, module: CausalLMModule, loader: PromptLoader) -> dict[str, Any]:
    """Return everything that answers depend on; the keys are the words of error messages."""
    prompts = json.dumps([prompt["prompt"] for prompt in loader.prompts]).encode()
    return {
        "the model": model_fingerprint(module.language_model),
        "model.generation": asdict(module.spec.generation),
        "trainer.precision": str(trainer.precision),
        "the tokenizer": datamodule_of(trainer).builder.tokenizer_checksum,
        "the prompts": xxhash.xxh3_128(prompts).hexdigest(),
        "data.batch_size": loader.batch_size,
    }
