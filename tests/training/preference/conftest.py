"""Short preference runs in this process, whose logged values and gradients are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.kind import Pairs
from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.optim import LRScheduleConfig
from sft_lightning.training.preference.objective import PreferenceObjective
from sft_lightning.training.preference.reference_log_probs import ReferenceLogProbs
from sft_lightning.training.spec import PreferenceSpec

NUM_PAIRS = 20
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": AdapterConfig(r=4, dropout=0.1)},
    "lora without dropout": {"adapter": AdapterConfig(r=4, dropout=0.0)},
    "modules_to_save": {"adapter": AdapterConfig(r=4, dropout=0.1, modules_to_save=["lm_head"])},
    "qlora": {"adapter": AdapterConfig(r=4, dropout=0.1), "quantization": QuantizationConfig()},
    "full": {},
}


class Watch(Callback):
    """Keeps the gradient that each optimizer step sees, by parameter name."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        named = pl_module.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None})


class Watched(CausalLMModule):
    """Keeps what it logs of each optimizer step."""

    watch: Watch

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        super().log(name, value, **kwargs)
        if name == "train/loss":
            self.watch.logged.append({})
        if name.startswith("train/") and name not in ("train/lr", "train/grad_norm"):
            self.watch.logged[-1][name] = float(value)


class Run:
    """A run that has ended."""

    def __init__(self, module: Watched, data: SFTDataModule, trainer: Trainer) -> None:
        self.module, self.data, self.trainer = module, data, trainer

    @property
    def logged(self) -> list[dict[str, float]]:
        """Logged values of each optimizer step."""
        return self.module.watch.logged

    @property
    def losses(self) -> list[float]:
        return [step["train/loss"] for step in self.logged]

    @property
    def gradients(self) -> list[dict[str, torch.Tensor]]:
        return self.module.watch.gradients

    @property
    def reference(self) -> ReferenceLogProbs:
        assert isinstance(self.module.objective, PreferenceObjective)
        return self.module.objective.reference

    def gradient_difference(self, other: Run) -> float:
        """Largest difference to another run's gradients, relative to the largest gradient of this run."""
        assert len(self.gradients) == len(other.gradients) > 0
        scale = max(float(gradient.abs().max()) for step in self.gradients for gradient in step.values())
        steps = zip(self.gradients, other.gradients, strict=True)
        return max(float((mine[name] - theirs[name]).abs().max()) for mine, theirs in steps for name in mine) / scale


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[[str, int], Path]:
    """Write a file with the first pairs."""

    def write(name: str, number: int = NUM_PAIRS) -> Path:
        pairs = [
            {
                "prompt": f"{i} and {i}?",
                "chosen": f"{i} and {i} is {2 * i}" + "." * (i % 5),
                "rejected": "No" + "!" * (i % 3),
            }
            for i in range(number)
        ]
        (tmp_path / name).write_text(json.dumps(pairs))
        return tmp_path / name

    return write


@pytest.fixture
def train(model_dir: Path, tmp_path: Path, write_pairs: Callable[..., Path]) -> Callable[..., Run]:
    """Train on pairs; all runs of the same kind start with the same weights."""
    file = write_pairs("pairs.json")

    def run(
        kind: str = "lora",
        *,
        lr: float = 0.0,
        data: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        ckpt_path: Path | None = None,
        **model: Any,
    ) -> Run:
        torch.manual_seed(0)
        source = {"sources": {"toy": SourceConfig(path=str(file))}, "template": "alpaca", "max_length": 400}
        datamodule = SFTDataModule(
            PairDataSpec(**{**source, "tokenizer_name_or_path": str(model_dir), **(data or {})}), Pairs
        )
        options: dict[str, Any] = {
            "model_name_or_path": str(model_dir),
            "dtype": "float32",
            "lr_scheduler": LRScheduleConfig(name="constant"),
            "optimizer": lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0),
        }
        module = Watched(PreferenceSpec(**{**options, **KINDS[kind], **model}))
        module.watch = Watch()
        settings: dict[str, Any] = {
            "max_epochs": 1, "accumulate_grad_batches": 2, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
            "default_root_dir": tmp_path, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **(trainer or {}),
        }  # fmt: skip
        fit = Trainer(callbacks=[module.watch], **settings)
        fit.fit(module, datamodule, ckpt_path=ckpt_path)
        return Run(module, datamodule, fit)

    return run
