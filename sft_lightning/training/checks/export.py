"""What the run exported: the weights after its last step, a tokenizer that renders as in training, a stop token.

The exports verify themselves against the model that they are given. These checks read the finished folders, and compare
them with the tensors that the optimizer updated, as they were right after its last step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel

from sft_lightning.checks import Check, CheckError
from sft_lightning.models.base.weight_files import read_tensors, weight_files
from sft_lightning.models.export.fingerprint import bit_sum
from sft_lightning.models.export.target import MANIFEST
from sft_lightning.models.inspection import has_virtual_tokens, is_sharded
from sft_lightning.training.checkpoint.files import AtomicCheckpointIO
from sft_lightning.training.checks.exported_tokenizer import check_tokenizer
from sft_lightning.training.checks.hooks import RunCheck

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sft_lightning.training.module import CausalLMModule

_ADAPTER, _MODEL = "adapter", "model"
_ADAPTER_FILE = "adapter_model.safetensors"
_NAME = "exported weights"


class Bits(NamedTuple):
    """What two tensors have in common if they have the same bits."""

    shape: tuple[int, ...]
    """Their shape."""

    dtype: torch.dtype
    """Their type."""

    sum: int
    """The sum of their values, each read as an integer."""


class TrainedBits(NamedTuple):
    """The tensors that the optimizer updates, at one optimizer step."""

    step: int
    """Number of optimizer steps taken."""

    bits: Mapping[str, Bits]
    """By the parameter's name in the model."""


def bits_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Bits]:
    """Return what identifies the bits of each tensor; waits for their device once.

    Args:
        tensors: By name.
    """
    if not tensors:
        return {}
    sums = torch.stack([bit_sum(tensor) for tensor in tensors.values()]).tolist()
    return {
        name: Bits(tuple(tensor.shape), tensor.dtype, total)
        for (name, tensor), total in zip(tensors.items(), sums, strict=True)
    }


def trained_bits(module: CausalLMModule) -> TrainedBits:
    """Return the bits of everything that the optimizer updates now.

    Args:
        module: The module of the run; no parameter is sharded.
    """
    updated = {id(each) for group in module.trainer.optimizers[0].param_groups for each in group["params"]}
    named = {name: each for name, each in module.language_model.named_parameters() if id(each) in updated}
    if not named:  # DeepSpeed updates a copy of its own, from which it sets the model's
        named = {name: each for name, each in module.language_model.named_parameters() if each.requires_grad}
    return TrainedBits(module.trainer.global_step, bits_of(named))


class ExportedFolders(RunCheck):
    """Check the folders that the run exported, at its end and with each checkpoint."""

    def __init__(self) -> None:
        self._before: dict[str, int | None] = {}
        self._last: TrainedBits | None = None
        self._rate: float | None = None  # the largest of this process's steps
        self._num_checkpoints = 0

    def on_fit_start(self, module: CausalLMModule) -> None:
        """Note which folders are there already, and look at the adapter of each checkpoint when it is written."""
        folder = Path(module.trainer.default_root_dir)
        self._before = {name: _time_of(folder / name) for name in (_ADAPTER, _MODEL)}
        checkpoint_io = module.trainer.strategy.checkpoint_io
        if isinstance(checkpoint_io, AtomicCheckpointIO):
            checkpoint_io.after_save.append(lambda path: self._check_checkpoint(module, path))

    def on_before_optimizer_step(self, module: CausalLMModule, optimizer: Optimizer) -> None:
        """Note whether any step changes weights."""
        self._rate = max(self._rate or 0.0, *(float(group["lr"]) for group in optimizer.param_groups))

    def on_train_batch_end(self, module: CausalLMModule, batch: Any, index: int) -> None:
        """Note the weights right after the last planned step."""
        if module.trainer.global_step == module.data.num_optimizer_steps:
            self.on_train_epoch_end(module)

    def on_train_epoch_end(self, module: CausalLMModule) -> None:
        """Note the weights after the last step of a run that something ended early."""
        step = module.trainer.global_step
        if (self._last is None or self._last.step != step) and not is_sharded(module.language_model):
            self._last = trained_bits(module)

    def _check_checkpoint(self, module: CausalLMModule, checkpoint: Path) -> None:
        """Check the adapter of a checkpoint; only the process that has written it does, so no outcome is exchanged."""
        folder = checkpoint.with_suffix(".adapter")
        model = module.language_model
        if not isinstance(model, PeftModel) or is_sharded(model) or not (folder / MANIFEST).is_file():
            return
        check = check_weights(folder, trained_bits(module), has_updated=bool(self._rate))
        if check.passed is False:
            raise CheckError(check)
        self._num_checkpoints += 1

    def after_training(self, module: CausalLMModule) -> None:
        """Check the folders that were written since the run began; rank 0 does, and all processes stop if one fails."""
        weights = Check(_NAME, None, "no folder was exported")
        tokenizer = Check("exported tokenizer", None, "no folder was exported")
        written = self._written(module) if module.trainer.is_global_zero else None
        if written is not None:
            weights = self._check_folder(module, written)
            tokenizer = check_tokenizer(written, module.data, trust_remote_code=module.spec.trust_remote_code)
            if False in (weights.passed, tokenizer.passed):
                written.rename(_rejected(written))
        module.checks.note(weights)
        module.checks.note(tokenizer)

    def _written(self, module: CausalLMModule) -> Path | None:
        folder = Path(module.trainer.default_root_dir)
        new = (name for name, time in self._before.items() if _time_of(folder / name) not in (None, time))
        return next((folder / name for name in new), None)

    def _check_folder(self, module: CausalLMModule, folder: Path) -> Check:
        model = module.language_model
        if is_sharded(model):
            return Check(_NAME, None, "no process has the whole model after the export, which was compared with it")
        # A run that was continued with nothing left to train has the weights of its checkpoint.
        last = self._last or trained_bits(module)
        if last.step != module.trainer.global_step:
            return Check(_NAME, False, f"the weights were noted after step {last.step}, not after the last step")
        if has_virtual_tokens(model):
            return Check(_NAME, None, "an adapter of virtual tokens is exported as their embeddings")
        return check_weights(
            folder, last, has_updated=self._rate != 0, more=f"; {self._num_checkpoints} adapters of checkpoints too"
        )


def check_weights(folder: Path, trained: TrainedBits, *, has_updated: bool, more: str = "") -> Check:
    """Check that an exported folder has the bits of what was trained, and that they have learned something.

    Args:
        folder: An adapter, or a whole model.
        trained: What the optimizer has updated.
        has_updated: Whether a step was taken with a learning rate above 0; without one, an adapter stays at zero.
        more: Further text of the figure.
    """
    step = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("optimizer_steps")
    if step != trained.step:
        return Check(_NAME, False, f"{folder} is of optimizer step {step}, and the run is at step {trained.step}")
    is_adapter = (folder / _ADAPTER_FILE).is_file()
    written = bits_in(folder)
    if is_adapter and has_updated and (zero := _all_zero(written)):
        return Check(_NAME, False, f"{folder} has learned nothing: all of its {zero} are zero")
    missing = missing_in_adapter(written, trained.bits) if is_adapter else different_in_model(written, trained.bits)
    if missing:
        figure = f"{len(missing)} of {len(trained.bits)} trained tensors are not in {folder} as they are after step"
        return Check(_NAME, False, f"{figure} {step}: {missing[0]} …")
    known = len(trained.bits) if is_adapter else len(trained.bits.keys() & written.keys())
    if not known:
        return Check(_NAME, None, "this family's files have other names than its weights; the export compared them")
    return Check(_NAME, True, f"{known} of {len(trained.bits)} trained tensors have the bits of step {step}{more}")


def bits_in(folder: Path) -> dict[str, Bits]:
    """Return the bits of each tensor in the files of an adapter or a model, read one at a time."""
    files = [folder / _ADAPTER_FILE] if (folder / _ADAPTER_FILE).is_file() else weight_files(folder)
    tensors: Iterator[tuple[str, torch.Tensor]] = (item for file in files for item in read_tensors(file))
    return {name: bits for key, tensor in tensors for name, bits in bits_of({key: tensor}).items()}


def missing_in_adapter(written: Mapping[str, Bits], trained: Mapping[str, Bits]) -> list[str]:
    """Return the names of trained tensors that an adapter's file does not have, under whatever name.

    Args:
        written: The tensors in the file, by PEFT's names.
        trained: The trained tensors, by their names in the model.
    """
    left = Counter(written.values())
    missing = []
    for name, bits in trained.items():
        left[bits] -= 1
        if left[bits] < 0:
            missing.append(name)
    return missing


def different_in_model(written: Mapping[str, Bits], trained: Mapping[str, Bits]) -> list[str]:
    """Return the names of trained tensors that a model's files have with other bits.

    Args:
        written: The tensors in the files; families that store them under other names are compared by the export.
        trained: The trained tensors.
    """
    return [name for name, bits in trained.items() if name in written and written[name] != bits]


def _all_zero(written: Mapping[str, Bits]) -> str:
    """Return the kind of tensors that make up the update if all of them are zero; LoRA starts with B at zero."""
    b = [bits for name, bits in written.items() if "lora_B" in name or "lora_embedding_B" in name]
    tensors, kind = (b, "B matrices") if b else (list(written.values()), "tensors")
    return f"{len(tensors)} {kind}" if tensors and not any(bits.sum for bits in tensors) else ""


def _time_of(folder: Path) -> int | None:
    """Return when a folder's manifest was written; `None` if it has none."""
    file = folder / MANIFEST
    return file.stat().st_mtime_ns if file.is_file() else None


def _rejected(folder: Path) -> Path:
    """Return the name that a folder gets when a check rejects it; no command takes it for an export."""
    return folder.with_name(f"{folder.name}.rejected-{_time_of(folder)}")
