"""Covers sft_lightning.training.preference.objective and sft_lightning.training.preference.reference_log_probs.

Preference training in real processes over gloo has the losses and gradients of a single process.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TIMEOUT = 240
"""Seconds after which a run hangs."""

MODES = {
    "lora": ("--model.adapter={r: 4, dropout: 0}",),
    "full": (),
    "qlora": ("--model.adapter={r: 4, dropout: 0}", "--model.quantization.bits=4"),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 pairs: in steps of 4, the last one leaves a rank without a pair."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.json"
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad" * (i % 3 + 1)} for i in range(11)]
    file.write_text(json.dumps(rows))
    return file


def run(model_dir: Path, pairs: Path, folder: Path, mode: str, strategy: str, processes: int) -> None:
    command = [
        *(sys.executable, "-m", "sft_lightning", "fit", "--task=dpo", *MODES[mode]),
        *(f"--model.model_name_or_path={model_dir}", "--model.dtype=float32"),
        *("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"),
        *(f"--data.sources={{toy: {{path: {pairs}}}}}", f"--data.val_sources={{held: {{path: {pairs}}}}}"),
        *("--data.template=alpaca", "--data.max_length=400", "--data.packing=none", f"--data.store_dir={folder / 's'}"),
        *("--trainer.accelerator=cpu", f"--trainer.devices={processes}", f"--trainer.strategy={strategy}"),
        *(f"--trainer.accumulate_grad_batches={4 // processes}", "--trainer.gradient_clip_val=null"),
        *("--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"),
        *("--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={folder}"),
        *("--trainer.logger.name=", "--trainer.logger.version=", f"--trainer.default_root_dir={folder}"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


def column(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return load_file(file)


@pytest.fixture(scope="module")
def alone(model_dir: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each mode's run in one process."""
    folders = {mode: tmp_path_factory.mktemp(f"alone_{mode}") for mode in MODES}
    for mode, folder in folders.items():
        run(model_dir, pairs, folder, mode, "auto", 1)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_learn_the_same_as_one(
    mode: str, strategy: str, alone: dict[str, Path], model_dir: Path, pairs: Path, tmp_path: Path
) -> None:
    run(model_dir, pairs, tmp_path, mode, strategy, 2)
    names = ("train/loss", "train/grad_norm", "train/rewards/margin", "train/log_probs/chosen", "val/loss/held")
    for name in names:
        expected = column(alone[mode], name)
        assert len(expected) == (2 if name.startswith("val") else 6)
        print(
            mode,
            strategy,
            name,
            max(abs(a - b) / abs(b or 1) for a, b in zip(column(tmp_path, name), expected, strict=True)),
        )
        assert column(tmp_path, name) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    one, two = weights(alone[mode]), weights(tmp_path)
    assert max(float((two[name] - tensor).abs().max()) for name, tensor in one.items()) <= 1e-6
