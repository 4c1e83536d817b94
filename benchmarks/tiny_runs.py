"""Run tiny models on the CPU, in this process or in several."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer


def cpu_trainer(folder: Path, processes: int = 1, **options: Any) -> Trainer:
    """Return a trainer on the CPU that logs nothing and saves no checkpoints.

    Args:
        folder: Its default folder.
        processes: Processes that share each optimizer step; every one of them calls this.
        options: Further arguments of the trainer.
    """
    return Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder, **options,
    )  # fmt: skip


def run_in_processes(script: str, work: Any, processes: int) -> None:
    """Run a script with torchrun, and wait for it.

    Args:
        script: Path of the script.
        work: Its argument, passed as JSON.
        processes: Number of processes.

    Raises:
        RuntimeError: If the script fails.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*launcher, script, json.dumps(work)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} failed in {processes} processes:\n{done.stderr[-3000:]}")
