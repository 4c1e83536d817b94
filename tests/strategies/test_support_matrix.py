"""Covers sft_lightning.strategies.fsdp2.strategy, sft_lightning.strategies.zero.strategy and
sft_lightning.strategies.refusals.

Every mode under every strategy, in two real processes; the results are the table in `docs/scaling.md`.

    SFT_WRITE_MATRIX=1 python -m pytest tests/strategies/test_support_matrix.py -m "slow or not slow"

runs all cells and writes the table into the page.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.spec import ModelSpec
from sft_lightning.strategies.refusals import sharding_refusal
from sft_lightning.strategies.sharding import SHORT_NAMES

PAGE = Path(__file__).parents[2] / "docs/scaling.md"
Logged = Callable[[Path, str], list[float]]
FULL = ModelSpec(model_name_or_path="none")
LORA, QLORA, INT8 = (
    ModelSpec(model_name_or_path="none", adapter=AdapterConfig(), quantization=quantization)
    for quantization in (None, QuantizationConfig(bits=4), QuantizationConfig(bits=8))
)
CHECKPOINTING = "--model.gradient_checkpointing=true"
MODES: Mapping[str, tuple[str, tuple[str, ...], ModelSpec]] = {
    "full": ("full", (), FULL),
    "full, checkpointing": ("full", (CHECKPOINTING,), FULL),
    "LoRA": ("lora", (), LORA),
    "LoRA, checkpointing, packed": ("lora", (CHECKPOINTING, "--data.packing=best_fit", "--data.val_fraction=0"), LORA),
    "LoRA with a trained head": ("lora", ("--model.adapter.modules_to_save=[lm_head]",), LORA),
    "DoRA": ("lora", ("--model.adapter.use_dora=true",), LORA),
    "QLoRA": ("qlora", (), QLORA),
    "int8 LoRA": ("lora", ("--model.quantization.bits=8",), INT8),
}
"""Row of the table → mode of `conftest.MODES`, options beside it, and the model that they describe."""

CELLS = [
    pytest.param(mode, strategy, marks=pytest.mark.slow, id=f"{mode}-{strategy}")
    for mode in MODES
    for strategy in SHORT_NAMES
]
REFUSED = "refused"


@pytest.fixture(scope="module")
def one_process(runs: Any, logged: Logged, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """The training losses of a mode in one process, made once."""
    losses: dict[str, list[float]] = {}

    def run(mode: str) -> list[float]:
        if mode not in losses:
            folder = tmp_path_factory.mktemp("one")
            runs(folder, MODES[mode][0], *MODES[mode][1])
            losses[mode] = logged(folder, "train/loss")
        return losses[mode]

    return run


@pytest.mark.parametrize(("mode", "strategy"), CELLS)
def test_a_cell_learns_what_one_process_learns_or_is_refused(
    runs: Any,
    logged: Logged,
    tmp_path: Path,
    one_process: Callable[[str], list[float]],
    mode: str,
    strategy: str,
) -> None:
    base, extra, model = MODES[mode]
    if sharding_refusal(model, SHORT_NAMES[strategy]) is not None:
        assert_refused(runs.command(tmp_path / "run", base, *extra, processes=2, strategy=strategy))
        compare_with_page(mode, strategy, REFUSED)
        return
    runs(tmp_path / "run", base, *extra, processes=2, strategy=strategy)
    one, two = one_process(mode), logged(tmp_path / "run", "train/loss")
    assert one
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    assert worst <= 1e-5
    compare_with_page(mode, strategy, f"{worst:.0e}")


def assert_refused(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "; use " in done.stderr
    assert "Traceback" not in done.stderr


def compare_with_page(mode: str, strategy: str, found: str) -> None:
    """Check that the page has the result of a cell, after writing it there if `SFT_WRITE_MATRIX` is set."""
    text = PAGE.read_text(encoding="utf-8")
    [row] = re.findall(rf"(?m)^\| {re.escape(mode)} \|.*\|$", text)
    cells = row.split(" | ")
    column = 1 + list(SHORT_NAMES).index(strategy)
    if os.environ.get("SFT_WRITE_MATRIX"):
        end = " |" if cells[column].endswith(" |") else ""
        cells[column] = found + end
        PAGE.write_text(text.replace(row, " | ".join(cells)), encoding="utf-8")
    assert (cells[column].removesuffix(" |") == REFUSED) == (found == REFUSED)


def test_the_page_has_a_row_for_every_mode() -> None:
    rows = re.findall(
        r"(?m)^\| ([^|]+) \|.*\|$",
        PAGE.read_text(encoding="utf-8").split("<!-- matrix -->")[1].split("<!-- end -->")[0],
    )
    assert [row for row in rows if row != "mode"] == list(MODES)
