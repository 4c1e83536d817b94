"""Mode × strategy: every cell that can run here, in two real processes; `docs/scaling.md` holds what came out.

    SFT_WRITE_MATRIX=1 python -m pytest tests/strategies/test_support_matrix.py -m "slow or not slow"

runs every cell and writes the table into the page.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.strategies.refusals import Asked, Sharding, refusal

PAGE = Path(__file__).parents[2] / "docs/scaling.md"
Logged = Callable[[Path, str], list[float]]
MODES: Mapping[str, tuple[str, tuple[str, ...], Asked]] = {
    "full": ("full", (), Asked()),
    "full, recomputed": ("full", ("--model.gradient_checkpointing=true",), Asked()),
    "LoRA": ("lora", (), Asked()),
    "LoRA, recomputed, packed": (
        "lora",
        ("--model.gradient_checkpointing=true", "--data.packing=best_fit", "--data.val_fraction=0"),
        Asked(),
    ),
    "LoRA with a trained head": ("lora", ("--model.adapter.modules_to_save=[lm_head]",), Asked()),
    "DoRA": ("lora", ("--model.adapter.use_dora=true",), Asked()),
    "QLoRA": ("qlora", (), Asked(quantization_bits=4)),
    "int8 LoRA": ("lora", ("--model.quantization.bits=8",), Asked(quantization_bits=8)),
}
STRATEGIES: Mapping[str, Sharding | None] = {
    "ddp": None,
    "fsdp2": Sharding("fsdp2", 3),
    "fsdp2_offload": Sharding("fsdp2_offload", 3, offload=True),
}
FAST = {("LoRA", "ddp"), ("QLoRA", "fsdp2"), ("int8 LoRA", "fsdp2")}
CELLS = [
    pytest.param(mode, strategy, marks=() if (mode, strategy) in FAST else pytest.mark.slow, id=f"{mode}-{strategy}")
    for mode in MODES
    for strategy in STRATEGIES
]
REFUSED = "refused"


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], str]:
    """What each cell came to."""
    return {}


@pytest.mark.parametrize(("mode", "strategy"), CELLS)
def test_a_cell_learns_what_one_process_learns_or_is_refused(
    runs: Any,
    logged: Logged,
    tmp_path: Path,
    found: dict[tuple[str, str], str],
    mode: str,
    strategy: str,
) -> None:
    base, extra, asked = MODES[mode]
    sharding = STRATEGIES[strategy]
    if sharding is not None and refusal(asked, sharding) is not None:
        assert_refused(runs.command(tmp_path / "run", base, *extra, processes=2, strategy=strategy))
        found[mode, strategy] = REFUSED
        return
    runs(tmp_path / "run", base, *extra, processes=2, strategy=strategy)
    runs(tmp_path / "one", base, *extra)
    one, two = (logged(tmp_path / name, "train/loss") for name in ("one", "run"))
    assert one
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    assert worst <= 1e-5
    found[mode, strategy] = f"{worst:.0e}"


def assert_refused(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "; use " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_page_holds_this_table(found: dict[tuple[str, str], str]) -> None:
    cells = [(mode, strategy) for mode in MODES for strategy in STRATEGIES]
    if found.keys() != set(cells):
        pytest.skip("needs every cell above")
    text = PAGE.read_text(encoding="utf-8")
    if os.environ.get("SFT_WRITE_MATRIX"):
        text = re.sub(r"(?s)(<!-- matrix -->\n).*(<!-- end -->)", lambda m: m[1] + table(found) + m[2], text)
        PAGE.write_text(text, encoding="utf-8")
    for mode, strategy in cells:
        assert (found[mode, strategy] == REFUSED) == (cell_of(text, mode, strategy) == REFUSED)


def table(found: Mapping[tuple[str, str], str]) -> str:
    head = f"| mode | {' | '.join(STRATEGIES)} |\n|---|{'---|' * len(STRATEGIES)}\n"
    return head + "".join(
        f"| {mode} | {' | '.join(found[mode, strategy] for strategy in STRATEGIES)} |\n" for mode in MODES
    )


def cell_of(page: str, mode: str, strategy: str) -> str:
    [row] = re.findall(rf"(?m)^\| {re.escape(mode)} \|(.*)\|$", page)
    return str(row.split("|")[list(STRATEGIES).index(strategy)].strip())
