"""The results of the cells: a JSON file that grows cell by cell, and its table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import CELLS, Cell

RESULTS = Path(__file__).parents[1] / "results"
Found = dict[str, Any]
HEAD = (
    "cell",
    "tokens/s",
    "MFU",
    "ms per step",
    "peak GiB",
    "goal",
    "reached",
    "loss, first and last",
    "gradient norm",
)


def result_file(device: str, folder: Path = RESULTS) -> Path:
    """Return the file of a device's results: the latest one that is not finished, else today's.

    Args:
        device: The device's name.
        folder: Folder of the results.
    """
    name = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    files = sorted(folder.glob(f"{name}_2*.json"))
    if files and not json.loads(files[-1].read_text())["finished"]:
        return files[-1]
    return folder / f"{name}_{date.today().isoformat()}.json"


def read(file: Path) -> Found:
    """Return what a file holds; an empty result if there is none."""
    return json.loads(file.read_text()) if file.exists() else {"finished": False, "cells": {}}


def write(file: Path, found: Mapping[str, Any]) -> None:
    """Write the results in place, so that a machine that goes away leaves a whole file, and the table beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((file, json.dumps(found, indent=2)), (file.with_suffix(".md"), page(found))):
        unfinished = path.with_name(f"{path.name}.tmp")
        unfinished.write_text(text + "\n")
        unfinished.replace(path)


def missing(cells: list[Cell], found: Mapping[str, Any]) -> list[Cell]:
    """Return the cells without a result; a cell that failed has one."""
    return [cell for cell in cells if cell.name not in found["cells"]]


def page(found: Mapping[str, Any]) -> str:
    """Return the results as a Markdown page."""
    facts = {key: value for key, value in found.items() if key != "cells"}
    lines = [
        f"# {facts.get('device', 'GPU benchmark')}",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        "",
    ]
    steps = [cell for cell in CELLS if cell.kind != "ceiling" and cell.name in found["cells"]]
    rows = [_row(cell, found) for cell in steps]
    table = ["| " + " | ".join(row) + " |" for row in [HEAD, ["---"] * len(HEAD), *rows]]
    ceilings = [cell.name for cell in CELLS if cell.kind == "ceiling" and cell.name in found["cells"]]
    return "\n".join([*lines, *table, "", *(f"- {name}: {_figures(found['cells'][name])}" for name in ceilings)])


def _row(cell: Cell, found: Mapping[str, Any]) -> list[str]:
    answer = found["cells"][cell.name]
    said = answer.get("error") or answer.get("not_installed")
    if said is not None:
        return [cell.name, said.replace("|", "/").replace("\n", " ")[:200], *[""] * (len(HEAD) - 2)]
    goals, reached = zip(*goals_of(cell, found["cells"]), strict=True) if cell.goal else ((), ())
    losses, norms = answer["losses"], answer["grad_norms"] or [float("nan")]
    mfu = answer.get("mfu")
    return [
        cell.name, f"{answer['tokens_per_second']:,.0f}", "" if mfu is None else f"{mfu:.1%}",
        f"{1e3 * answer['seconds_per_step']:.1f}", f"{answer.get('peak_gib', 0):.1f}", "; ".join(goals),
        "; ".join({True: "yes", False: "no", None: "unknown"}[each] for each in reached),
        f"{losses[0]:.4f} {losses[-1]:.4f}", f"{norms[-1]:.3g}",
    ]  # fmt: skip


def goals_of(cell: Cell, answers: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, bool | None]]:
    """Return each goal of a cell in words, and whether it is reached; `None` if what it compares with is missing.

    Args:
        cell: The cell.
        answers: The results of all cells, by name.
    """
    answer, goals = answers[cell.name], list[tuple[str, bool | None]]()
    for key, value in cell.goal.items():
        if key == "tokens_per_second":
            goals.append((f"≥ {value:,.0f} tokens/s", answer[key] >= value))
        elif key == "peak_gib":
            goals.append((f"≤ {value} GiB", answer[key] <= value if key in answer else None))
        else:
            other = answers.get(key, {}).get("tokens_per_second")
            ratio = None if other is None else answer["tokens_per_second"] / other
            words = f"≥ {value} × {key}" + ("" if ratio is None else f" (is {ratio:.3f})")
            goals.append((words, None if ratio is None else ratio >= value))
    return goals


def _figures(answer: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in answer.items()
    )
