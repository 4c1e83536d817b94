"""Covers docs/training.md: what its keys for `save_steps`, `save_strategy` and `save_total_limit` save.

Covers callbacks.checkpoints and sft_lightning.cli.trainer too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from sft_lightning.__main__ import main

GUIDE = Path(__file__).parents[2] / "docs" / "training.md"

FILES = {
    "save_strategy: epoch": ["last", "step=2", "step=4", "step=6"],
    "save_strategy: steps, save_steps: 500": ["last", "step=2", "step=4", "step=6"],
    "save_total_limit: 3": ["last", "step=4", "step=5", "step=6"],
    "load_best_model_at_end, metric_for_best_model": ["best", "last"],
    "save_only_model": ["last", "step=2", "step=4", "step=6"],
}
"""Checkpoints that a run of three epochs of two steps leaves, where the guide's 500 steps are two, or one."""


def keys_of(option: str) -> str:
    [line] = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{option}` |")]
    found = re.search(r"`(\{.*\})`", line)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    "option",
    [pytest.param(option, marks=[pytest.mark.slow] if option.startswith("save_") else []) for option in FILES],
)
def test_the_keys_in_the_guide_save_the_files_that_it_says(option: str, fit_args: list[str], tmp_path: Path) -> None:
    steps = "1" if option.startswith("save_total") else "2"
    given = yaml.safe_load(keys_of(option).replace("500", steps))
    callback = yaml.safe_dump(given, default_flow_style=True, width=999).strip()
    assert main([
        "fit", *fit_args, f"--trainer.callbacks+={callback}",
        "--trainer.max_epochs=3", "--trainer.accumulate_grad_batches=2", "--data.val_fraction=0.2",
        "--data.max_length=500",
    ]) == 0  # fmt: skip
    assert sorted(path.stem for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")) == FILES[option]
