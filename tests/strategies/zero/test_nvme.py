"""Covers sft_lightning.strategies.zero.strategy, sft_lightning.strategies.zero.state and
sft_lightning.strategies.zero.partition.

ZeRO-3 with its optimizer and its weights offloaded to files, written and read by libaio as on an NVMe disk.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

Logged = Callable[[Path, str], list[float]]
EVERY_3 = (
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=3",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks.filename={step}",
)
TWO_EPOCHS = "--trainer.max_epochs=2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra"),
]


@pytest.fixture
def zero(tmp_path: Path) -> dict[str, Any]:
    """Options of two processes that offload all optimizer state and weights to files."""
    if not importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio (Debian: apt install libaio-dev)")
    (tmp_path / "disk").mkdir()
    disk = {"device": "nvme", "nvme_path": str(tmp_path / "disk")}
    section = {
        "stage": 3,
        "sub_group_size": 1_000_000,  # several partitions
        "stage3_param_persistence_threshold": 10_000,
        "offload_optimizer": disk,
        "offload_param": {**disk, "max_in_cpu": 0, "buffer_size": 1_000_000, "buffer_count": 8},
    }
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": section}))
    strategy = "sft_lightning.strategies.DeepSpeedZeRO"
    return {"extra": f"--trainer.strategy.config={tmp_path / 'ds.json'}", "processes": 2, "strategy": strategy}


@pytest.fixture(scope="module")
def larger(
    runs: Any, records_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Starts runs of a model whose layers have 1 MiB, the smallest tensor that DeepSpeed writes to a file."""
    folder = tmp_path_factory.mktemp("larger_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return type(runs)(folder, records_file)


def test_full_fine_tuning_learns_what_one_process_learns_and_continues_on_two_processes_and_on_one(
    larger: Any, logged: Logged, tmp_path: Path, zero: dict[str, Any]
) -> None:
    extra = zero.pop("extra")
    larger(tmp_path / "one", "full", TWO_EPOCHS)
    larger(tmp_path / "two", "full", TWO_EPOCHS, *EVERY_3, extra, **zero)
    for name, rel in {"train/loss": 1e-5, "val/loss": 1e-5, "train/grad_norm": 1e-4}.items():  # a norm of 5 M values
        expected = logged(tmp_path / "one", name)
        assert logged(tmp_path / "two", name) == pytest.approx(expected, rel=rel), name
    written = {file.parent.parent.name for file in (tmp_path / "disk").rglob("*.swp")}
    assert written == {"optimizer", "float32params"}

    resume = (TWO_EPOCHS, f"--ckpt_path={tmp_path / 'two/checkpoints/step=3.ckpt'}")
    expected = logged(tmp_path / "two", "train/loss")[3:]
    larger(tmp_path / "again", "full", *resume, extra, **zero)
    assert logged(tmp_path / "again", "train/loss") == expected
    larger(tmp_path / "alone", "full", *resume)
    assert logged(tmp_path / "alone", "train/loss") == pytest.approx(expected, rel=1e-5)


def test_an_adapter_over_an_offloaded_base_learns_what_one_process_learns(
    larger: Any, logged: Logged, tmp_path: Path, zero: dict[str, Any]
) -> None:
    extra = zero.pop("extra")
    larger(tmp_path / "one", "lora", "--model.adapter.r=128")
    larger(tmp_path / "two", "lora", "--model.adapter.r=128", extra, **zero)
    expected = logged(tmp_path / "one", "train/loss")
    assert logged(tmp_path / "two", "train/loss") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("folder", ["/no/such/folder", "/proc"])
def test_a_folder_that_cannot_be_written_is_refused(runs: Any, tmp_path: Path, folder: str) -> None:
    keys = ("--trainer.strategy.stage=3", "--trainer.strategy.offload_optimizer=nvme")
    path, strategy = f"--trainer.strategy.nvme_path={folder}", "sft_lightning.strategies.DeepSpeedZeRO"
    command = runs.command(tmp_path, "full", *keys, path, processes=2, strategy=strategy)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"trainer.strategy: nvme_path '{folder}'" in done.stderr
    assert "Traceback" not in done.stderr
