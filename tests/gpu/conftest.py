"""Runs on a GPU that print nothing and keep their losses. They need no more than benchmarks/gpu/wheels collects.

SFT_GPU_TESTS_ON=cpu runs them on a CPU instead, to try the tests themselves; those of CUDA's own parts are skipped.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from sft_lightning.__main__ import main

DEVICE = os.environ.get("SFT_GPU_TESTS_ON", "cuda")


@pytest.fixture
def cuda() -> None:
    """For what no CPU can stand in for."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> str:
    """Where the tests run."""
    if DEVICE == "cuda":
        request.getfixturevalue("cuda")
    return DEVICE


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama with widths that every kernel takes: heads of 32, multiples of 64; float32."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Run:
    """A run that has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "log"

    def column(self, name: str) -> list[float]:
        """A logged value of each optimizer step."""
        with (self.folder / "metrics.csv").open() as file:
            return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]

    @property
    def losses(self) -> list[float]:
        return self.column("train/loss")

    @property
    def norms(self) -> list[float]:
        return self.column("train/grad_norm")


@pytest.fixture
def fit(llama: Path, alpaca_file: Path, tmp_path: Path) -> Callable[..., Run]:
    """Train six optimizer steps on two packed rows each; options as on the command line."""

    def train(name: str, *options: str, device: str = DEVICE) -> Run:
        folder = tmp_path / name
        logger = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder), "name": "", "version": "log", "flush_logs_every_n_steps": 1},
        }
        args = [
            "fit", f"--model.model_name_or_path={llama}", "--model.dtype=bfloat16", "--model.adapter.r=8",
            "--model.adapter.dropout=0", f"--data.sources={{toy: {{path: {alpaca_file}, format: alpaca}}}}",
            "--data.template=alpaca", "--data.max_length=256", "--data.batch_size=2", "--trainer.max_epochs=20",
            "--trainer.max_steps=6", "--trainer.log_every_n_steps=1", f"--trainer.default_root_dir={folder}",
            "--trainer.enable_progress_bar=false", f"--trainer.accelerator={'gpu' if device == 'cuda' else device}",
            "--trainer.devices=1", "--model.optimizer.init_args.lr=0.01", f"--trainer.logger={json.dumps(logger)}",
            "--trainer.precision=bf16-mixed",
        ]  # fmt: skip
        assert main([*args, *options]) == 0
        return Run(folder)

    return train
