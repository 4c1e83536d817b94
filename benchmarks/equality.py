"""Compare gradients over all splits of a step, and continued runs with uninterrupted ones; write `docs/equality.md`.

python benchmarks/equality.py    (or `make equality`; five minutes on two cores)
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several processes share the machine

import equality_gradients as gradients
import equality_resume as resume

PAGE = Path(__file__).parents[1] / "docs" / "equality.md"


def document(model: Path) -> str:
    """Measure everything and return `docs/equality.md`.

    Args:
        model: Folder that `equality_gradients.save_model` wrote.

    Raises:
        RuntimeError: If a gradient or a continued run differs by more than its tolerance.
    """
    measured = [gradients.measure(split, model) for split in gradients.all_splits(1)]
    for processes in (2, 4):
        measured += gradients.measure_together(gradients.all_splits(processes), model)
    largest = max(each.difference for each in measured)
    if not largest <= gradients.TOLERANCE:
        raise RuntimeError(f"gradients differ by {largest:.1e}:\n{gradients.table(measured)}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "lightning"))
    return f"""# Equality

Written by `make equality` ({versions}; CPU, float32, gloo).

## The gradient does not depend on the split

The same records, with weights 0.25, 1 and 3, are split into micro-batches, optimizer steps and processes in
{len(measured)} ways. Each gradient is compared with that of a bare PyTorch loop, which runs transformers' own attention
on one document at a time in float64, and divides Σ weight · cross entropy of an optimizer step by the step's weight.
The difference is the norm over all trained parameters, relative to the norm of the gradient; the table shows the
largest of the epoch's optimizer steps. The last step is incomplete, so some processes have no row in it. `concat` cuts
documents, so some of its rows have no supervised tokens.

Largest difference: {largest:.1e} (at most {gradients.TOLERANCE:.0e}).

{gradients.table(measured)}

## A continued run ends like an uninterrupted one

A run of two epochs with dropout, clipping and validation saves checkpoints at these moments. Each checkpoint is
continued to the end; n → m means that n processes started the run and m continued it.

- **bits**: rows, losses, weights, optimizer moments, schedule and random states equal those of the uninterrupted run to
  the last bit.
- **rows**: the number of processes changes, and there is no dropout. Every optimizer step has the same rows, and the
  largest relative difference of a loss is the number shown (at most {resume.TOLERANCE:.0e}).

{resume.table(model)}
"""


def main() -> None:
    """Measure, and write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        text = document(gradients.save_model(Path(temporary)))
    PAGE.write_text(text, encoding="utf-8")  # the standard output has messages of libraries


if __name__ == "__main__":
    main()
