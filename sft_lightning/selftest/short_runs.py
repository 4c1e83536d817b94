"""Short runs of the user's configuration: a few optimizer steps on one device, in a folder of their own."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sft_lightning.checks import Check, CheckError
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.training.module import CausalLMModule

_TRAINER_KEYS: Mapping[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "fast_dev_run": False,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "limit_train_batches": 1.0,
    "limit_val_batches": 0,
    "overfit_batches": 0.0,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": 0,
    "profiler": None,
    "barebones": False,
    "deterministic": "warn",
}
"""Keys of `trainer` that every short run sets; the user's precision, optimizer and `model` keys stay."""


@dataclass
class Run:
    """A finished run."""

    module: CausalLMModule
    """The trained model."""

    data: SFTDataModule
    """The data that it was trained on."""

    trainer: Any
    """Lightning's trainer; only the wiring imports Lightning, so it has no type here."""

    @property
    def device(self) -> torch.device:
        """The device that the model was trained on."""
        device: torch.device = self.trainer.strategy.root_device
        return device

    @property
    def rounding(self) -> float:
        """Relative rounding error (machine epsilon) of the coarsest data type that the run computes in."""
        return max(torch.finfo(dtype).eps for dtype in self._dtypes())

    def _dtypes(self) -> set[torch.dtype]:
        known = (torch.float16, torch.bfloat16, torch.float32)
        dtypes = {p.dtype for p in self.module.language_model.parameters() if p.dtype in known}
        precision = str(self.trainer.precision)
        if precision.startswith("bf16"):
            dtypes.add(torch.bfloat16)
        elif precision.startswith("16"):
            dtypes.add(torch.float16)
        if self.module.spec.quantization is not None:
            dtypes.add(getattr(torch, self.module.spec.quantization.compute_dtype or self.module.spec.dtype))
        return dtypes


class Configuration(Protocol):
    """A parsed configuration: it builds the run's model and trainer. The command line hands it in."""

    @property
    def module(self) -> CausalLMModule:
        """The configured module; its weights are not loaded yet."""

    def instantiate_trainer(self) -> Any:
        """Return Lightning's trainer."""


Configure = Callable[[Sequence[str]], Configuration]
"""Parse the configuration again with more options (`--trainer.max_steps=2`), which win, and seed as `fit` does."""


class Runner:
    """Runs a configuration for a few optimizer steps.

    Args:
        configure: Parses the configuration with further options.
        folder: The runs write here.
    """

    def __init__(self, configure: Configure, folder: Path) -> None:
        self._configure = configure
        self._folder = folder

    def configured_module(self) -> CausalLMModule:
        """Return the configured module, newly seeded; its weights are not loaded yet."""
        return self._configure([]).module

    def fit(
        self,
        data: SFTDataModule,
        *,
        max_steps: int,
        accumulate: int,
        module: CausalLMModule | None = None,
        trainer: Mapping[str, Any] | None = None,
        ckpt_path: Path | None = None,
    ) -> Run:
        """Train for a few optimizer steps.

        Args:
            data: The training data.
            max_steps: Optimizer steps.
            accumulate: Micro-batches per optimizer step.
            module: A loaded model to train further; default: the configuration's, loaded anew.
            trainer: Further keys of `trainer`.
            ckpt_path: Checkpoint to continue from.

        Raises:
            CheckError: If the run ended before it had taken all steps.
        """
        keys = {
            **_TRAINER_KEYS,
            "default_root_dir": str(self._folder / "run"),
            "max_steps": max_steps,
            "max_epochs": max_steps,  # each epoch has a step; without this bound, one that has none would go on forever
            "accumulate_grad_batches": accumulate,
            "callbacks": [],
            "enable_checkpointing": False,
            **(trainer or {}),
        }
        configuration = self._configure([f"--trainer.{key}={_yaml(value)}" for key, value in keys.items()])
        with _quietly():
            lightning = configuration.instantiate_trainer()
            lightning.callbacks[:] = [each for each in lightning.callbacks if not _is_observer(each)]
            module = module or configuration.module
            lightning.fit(module, datamodule=data, ckpt_path=None if ckpt_path is None else str(ckpt_path))
        if lightning.global_step != max_steps:
            figure = f"{lightning.global_step} of {max_steps} optimizer steps in {max_steps} epochs"
            raise CheckError(Check("optimizer steps", False, figure))
        return Run(module, data, lightning)


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _is_observer(callback: object) -> bool:
    """Whether a callback is one of this project's, none of which changes a learned weight."""
    return type(callback).__module__.partition(".")[0] == "callbacks"


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress the trainer's usual messages, and restore torch's global settings afterwards."""
    logger = logging.getLogger("lightning.pytorch")
    level, deterministic = logger.level, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (r"(?s).*determinis", "Be aware that when using `ckpt_path`"):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(level)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
