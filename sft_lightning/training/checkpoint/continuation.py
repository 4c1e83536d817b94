"""What a checkpoint says of the step that comes next, and whether a continued run takes that step.

A checkpoint holds the hashes of the rows that come next and the numbers that each process's random generators draw
next. A run that continues it compares both at its first micro-batch, with the batch and the generators that train.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch.optim import Optimizer

from sft_lightning.batch import Batch
from sft_lightning.checks import Check
from sft_lightning.data.batches.loader import LastBatch
from sft_lightning.training.checkpoint import settings
from sft_lightning.training.checkpoint.state import random_state
from sft_lightning.training.optim import lr_factor
from sft_lightning.types import IGNORE_INDEX

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule

_SETTINGS, _NEXT = "settings", "next_step"
"""Keys of a checkpoint."""


class Continuation:
    """What a run saves in checkpoints so that it can be continued, and what it compares when it continues one.

    Args:
        log: Called with a line for each setting that changed, and for what cannot be compared.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._last: LastBatch | None = None
        self._optimizer: settings.Settings | None = None
        self._num_steps = 0
        self._loaded: dict[str, Any] | None = None

    def note_batch(self, epoch: int, index: int) -> None:
        """Note which micro-batch is being trained on.

        Args:
            epoch: Its epoch, from 0.
            index: Its number in the epoch, from 0.
        """
        self._last = LastBatch(epoch, index)

    def note_optimizer(self, optimizer: Optimizer, num_steps: int) -> None:
        """Note how the optimizer is configured, before a schedule or a checkpoint changes it.

        Args:
            optimizer: The optimizer.
            num_steps: Planned optimizer steps; counting them may take as long as planning every epoch.
        """
        self._optimizer, self._num_steps = settings.optimizer_settings(optimizer), num_steps

    # --- saving ----------------------------------------------------------------------------------------------------

    def state(
        self, module: CausalLMModule, random_states: Sequence[Mapping[str, Any]], *, within_step: bool
    ) -> dict[str, Any]:
        """Return what a checkpoint keeps.

        Args:
            module: The module of the run.
            random_states: The random states that the checkpoint keeps, by rank.
            within_step: Whether an optimizer step is under way, which is taken again from its first micro-batch.
        """
        return {
            _SETTINGS: {
                "weights": settings.weight_settings(module),
                "training": settings.training_settings(module, self._num_steps),
                "optimizer": self._optimizer,
            },
            _NEXT: {
                "rows": self._next_rows(module, within_step=within_step) if module.global_rank == 0 else None,
                "share_prompts": module.data.layout.share_prompts,
                "draws": [next_draws(state) for state in random_states],
            },
        }

    def _next_rows(self, module: CausalLMModule, *, within_step: bool) -> list[list[str]] | None:
        """Return the hashes of the rows of the step that comes next, over all ranks; `None` if they are not known."""
        if self._last is None:  # nothing was trained on since the checkpoint that was loaded
            saved: list[list[str]] | None = (self._loaded or {}).get(_NEXT, {}).get("rows")
            return saved
        last = self._last._replace(within_step=within_step)
        rows = module.data.rows.documents_after(last, module.trainer.train_dataloader)
        if rows is None:
            return None
        data, layout = module.data, replace(module.data.layout, same_shape=False)
        batches = (data.kind.collate([r], layout=layout, pad_token_id=data.pad_token_id, denominator=1.0) for r in rows)
        return [row_hashes(batch) for batch in batches]

    # --- continuing ------------------------------------------------------------------------------------------------

    def load(self, module: CausalLMModule, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint's weights mean the same in this run, and keep what is compared later.

        Args:
            module: The module, its model loaded.
            checkpoint: The whole checkpoint.

        Raises:
            UserError: If the base, the adapter, the quantization, RoPE or the type of the weights has changed.
        """
        trains = module.trainer.state.fn == "fit"
        self._loaded = checkpoint if trains else None
        saved = checkpoint.get(_SETTINGS)
        if saved is None:
            self._log(
                "--ckpt_path: the checkpoint has no settings, because an earlier release saved it; base, adapter and "
                "data are not compared with those of its run, and its optimizer settings are used"
            )
            return
        for line in settings.check_weights(saved["weights"], settings.weight_settings(module), trains=trains):
            self._log(line)

    def on_fit_start(self, module: CausalLMModule) -> None:
        """Let what the user configured win over the checkpoint's optimizer settings, before these are loaded.

        Raises:
            UserError: If the checkpoint has the state of another optimizer.
        """
        checkpoint = self._loaded or {}
        if self._loaded is not None:  # weights and optimizer are Lightning's to load and to free
            self._loaded = {key: checkpoint[key] for key in (_SETTINGS, _NEXT) if key in checkpoint}
        saved = checkpoint.get(_SETTINGS)
        if saved is None or saved["optimizer"] is None or self._optimizer is None:
            return
        settings.check_optimizer(saved["optimizer"], self._optimizer)
        lines = settings.describe_training_changes(
            saved["training"], settings.training_settings(module, self._num_steps)
        )
        if "optimizer_states" in checkpoint:  # else Lightning says what is missing
            config, num_steps = module.spec.lr_scheduler, self._num_steps
            lines += settings.let_configuration_win(
                checkpoint, saved["optimizer"], self._optimizer, lambda step: lr_factor(config, step, num_steps)
            )
        for line in lines:
            self._log(line)

    def check_first_batch(self, module: CausalLMModule, batch: Batch) -> None:
        """Check the first micro-batch after a checkpoint was loaded, and the generators that it is trained with; once.

        Args:
            module: The module of the run.
            batch: The micro-batch.

        Raises:
            CheckError: If the loader gave other rows than those that come next, or the generators draw other numbers.
        """
        if self._loaded is None:
            return
        expected, self._loaded = self._loaded.get(_NEXT), None
        if expected is None:
            module.checks.note(Check("continued rows", None, "the checkpoint of an earlier release does not say which"))
            return
        module.checks.run(lambda: self._compare_rows(module, batch, expected))
        draws = expected["draws"]
        own = draws[module.global_rank % len(draws)]
        module.checks.run(lambda: compare_draws(own, next_draws(random_state())))

    def _compare_rows(self, module: CausalLMModule, batch: Batch, expected: Mapping[str, Any]) -> Check:
        if expected["share_prompts"] != module.data.layout.share_prompts:
            return Check("continued rows", None, "prompts are shared now and were not before, or the reverse")
        if expected["rows"] is None:
            return Check("continued rows", None, "the checkpoint was saved where its run ended")
        size = module.data.spec.batch_size
        start = module.global_rank * size
        return compare_rows(expected["rows"][start : start + size], row_hashes(batch))


def row_hashes(batch: Batch) -> list[str]:
    """Return a hash of each row of a micro-batch that has a label: ids, labels and weights up to its last label.

    Padding comes after that, so it does not matter how wide the micro-batch is. Weights count as bfloat16, to which
    `trainer.precision: bf16-true` rounds those of the batches that train.

    Args:
        batch: A micro-batch on any device; waits for it.
    """
    names = ("input_ids", "labels", "loss_weights")
    found = []
    for ids, labels, weights in zip(*(batch[name].cpu() for name in names), strict=True):  # type: ignore[literal-required]
        labelled = (labels != IGNORE_INDEX).nonzero()
        if len(labelled):
            digest, end = xxhash.xxh3_64(), int(labelled[-1]) + 1
            for part in (ids[:end], labels[:end], weights[:end].bfloat16().float()):
                digest.update(part.contiguous().numpy().data)
            found.append(digest.hexdigest())
    return found


def compare_rows(expected: Sequence[Sequence[str]], found: Sequence[str]) -> Check:
    """Compare the first micro-batch of a continued run with what the checkpoint says comes next.

    Args:
        expected: Hashes of the rows that this process should get, one list for each planned row.
        found: `row_hashes` of the micro-batch.
    """
    wanted = [each for row in expected for each in row]
    if list(found) == wanted:
        return Check(
            "continued rows", True, f"the {len(wanted)} rows of the first micro-batch are those that come next"
        )
    shown = [" ".join(each) or "none" for each in (wanted, found)]
    return Check(
        "continued rows",
        False,
        f"the first micro-batch has other rows than those that come next in the checkpoint: {shown[0]} → {shown[1]}; "
        "start a new run from the checkpoint's weights with model.adapter.path (or model.model_name_or_path)",
    )


def next_draws(state: Mapping[str, Any]) -> dict[str, float]:
    """Return the number that each random generator draws next; no generator of the process moves.

    Args:
        state: From `random_state`.
    """
    python, numpy, torch_generator = random.Random(), np.random.RandomState(), torch.Generator()  # noqa: S311
    version, internal, gauss = state["python"]
    python.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    numpy.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch_generator.set_state(state["torch"])
    found = {
        "torch": float(torch.rand((), generator=torch_generator)),
        "python": python.random(),
        "numpy": float(numpy.random_sample()),
    }
    if state["cuda"] is not None and torch.cuda.is_available():
        on_gpu = torch.Generator("cuda")
        on_gpu.set_state(state["cuda"])
        found["cuda"] = float(torch.rand((), generator=on_gpu, device="cuda"))
    return found


def compare_draws(expected: Mapping[str, float], found: Mapping[str, float]) -> Check:
    """Compare the numbers that the random generators of a continued run draw next with those of the checkpoint.

    Args:
        expected: `next_draws` when the checkpoint was saved.
        found: `next_draws` now; a run on another kind of device has other generators.
    """
    both = [name for name in expected if name in found]
    wrong = [f"{name} {expected[name]:.6f} → {found[name]:.6f}" for name in both if expected[name] != found[name]]
    if wrong:
        return Check("continued random draws", False, f"other numbers than those of the checkpoint: {', '.join(wrong)}")
    return Check("continued random draws", True, f"the next numbers of {', '.join(both)} are those of the checkpoint")
