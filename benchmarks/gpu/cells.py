"""The cells of the GPU benchmark as data: what each one trains, and what it should reach on an H200.

The goals are predictions for one H200 (docs/gpu.md has the device model). Cells of one group run in one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["ceiling", "fit", "bare", "peft", "trl"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement."""

    name: str
    """Name on the command line and in the results."""

    group: str
    """Cells of a group share a process."""

    kind: Kind = "fit"
    """`fit` is our command line; `bare` a loop of our parts without Lightning; `peft` transformers with PEFT and
    Liger's kernels; `trl` TRL's trainer; `ceiling` an operation by itself."""

    shape: str = "7b"
    """Key of `inputs.SHAPES`."""

    rows: Literal["short", "full"] = "short"
    """Documents: `short` of about 500 tokens, packed; `full` as long as a row."""

    max_length: int = 4096
    """Tokens of a row."""

    batch_size: int = 4
    """Rows of a micro-step."""

    train: Literal["lora", "qlora", "full"] = "lora"
    """What trains: a LoRA adapter of rank 16, the same on a 4-bit base, or all weights."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the configuration, by their dotted names; a lever that is off."""

    patch: Literal["unfused_lora"] | None = None
    """A part of ours that no key turns off."""

    goal: Mapping[str, float] = field(default_factory=dict)
    """What is to be reached: the least `tokens_per_second`, the most `peak_gib`, or the least speed as a multiple of
    another cell's, by that cell's name."""


_FULL_BF16 = {"trainer.precision": "bf16-true"}
_16K = "lora-16k"


def _lever(name: str, **values: Any) -> Cell:
    """The first cell with one lever off."""
    return Cell(name=f"{_16K}-{name}", group="levers", **values)


CELLS: tuple[Cell, ...] = (
    Cell(name="ceiling-matmul", group="ceilings", kind="ceiling"),
    Cell(name="ceiling-copy", group="ceilings", kind="ceiling"),
    Cell(name="ceiling-attention", group="ceilings", kind="ceiling"),
    Cell(name="ceiling-head-128k", group="ceilings", kind="ceiling", shape="8b-128k"),
    Cell(name=_16K, group="lora", goal={"tokens_per_second": 19_000, "lora-16k-bare": 0.99}),
    Cell(name="lora-16k-bare", group="lora", kind="bare"),
    Cell(name="lora-8k", group="lora", batch_size=2),
    Cell(name="lora-full-rows", group="lora", rows="full", goal={"tokens_per_second": 16_500}),
    Cell(
        name="lora-4k-checkpointing", group="lora", rows="full", batch_size=1, goal={"peak_gib": 16.5},
        options={"model.gradient_checkpointing": True},
    ),
    _lever("peft-forward", patch="unfused_lora"),
    _lever("not-compiled", options={"model.torch_compile": False}),
    _lever("compiled", options={"model.torch_compile": True}),
    _lever("dropout", options={"model.adapter.dropout": 0.05}),
    _lever("float32-adapters", options={"trainer.precision": "32-true"}),
    _lever("bfloat16-adapters", options={"trainer.precision": "bf16-true"}),
    _lever("sdpa-mask", options={"model.attn_implementation": "sdpa"}),
    _lever("flash-attention-2", options={"model.attn_implementation": "flash_attention_2"}),
    _lever("selective", options={"model.gradient_checkpointing": "selective"}),
    _lever("checkpointing", options={"model.gradient_checkpointing": True}),
    Cell(
        name="qlora-4k", group="qlora", rows="full", batch_size=1, train="qlora", goal={"peak_gib": 7.0},
        options={"model.gradient_checkpointing": True},
    ),
    Cell(name="qlora-16k", group="qlora", train="qlora", goal={_16K: 0.93}),
    Cell(name="full-1.5b", group="full", shape="1.5b", train="full"),
    Cell(
        name="full-7b", group="full", batch_size=2, train="full", options=_FULL_BF16,
        goal={"tokens_per_second": 13_000},
    ),
    Cell(name="full-8b-128k", group="full", shape="8b-128k", batch_size=2, train="full", options=_FULL_BF16),
    Cell(name="lora-8b-128k", group="vocabulary", shape="8b-128k"),
    Cell(name="peft-16k", group="peers", kind="peft", goal={}),
    Cell(name="peft-full-rows", group="peers", kind="peft", rows="full"),
    Cell(name="trl-16k", group="trl", kind="trl"),
    Cell(name="trl-full-rows", group="trl", kind="trl", rows="full"),
)  # fmt: skip


def cells_named(wanted: list[str]) -> list[Cell]:
    """Return the cells of some names or groups, in the order of the table; all without a name.

    Raises:
        SystemExit: If a name is neither a cell nor a group.
    """
    known = {cell.name for cell in CELLS} | {cell.group for cell in CELLS}
    unknown = sorted(set(wanted) - known)
    if unknown:
        raise SystemExit(
            f"--cells: no cell or group is named {', '.join(unknown)}; there are: {', '.join(sorted(known))}"
        )
    return [cell for cell in CELLS if not wanted or cell.name in wanted or cell.group in wanted]
