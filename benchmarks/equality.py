"""One gradient for every split, and one outcome for every interrupted run; writes `docs/equality.md`.

python benchmarks/equality.py > docs/equality.md    (`make equality`; five minutes on two cores)
"""

from __future__ import annotations

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
    """Measure everything and return `docs/equality.md`."""
    measured = [gradients.measure(split, model) for split in gradients.all_splits(1)]
    for processes in (2, 4):
        measured += gradients.measure_together(gradients.all_splits(processes), model)
    largest = max(each.difference for each in measured)
    if not largest <= gradients.TOLERANCE:
        raise RuntimeError(f"gradients differ by {largest:.1e}:\n{gradients.table(measured)}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "lightning"))
    return f"""# Equality

Written by `make equality` ({versions}; CPU, float32, gloo).

## One gradient for every split

The same records, with weights 0.25, 1 and 3, are dealt to micro-batches, steps and processes in {len(measured)} ways.
Each is compared with the gradient that a bare PyTorch loop finds: transformers' own attention, one document at a time,
float64, Σ weight · cross entropy of the optimizer step over its weight. The difference is the norm over all trained
parameters, relative to the gradient's norm, the largest of the epoch's optimizer steps. The last step is a partial one,
so that some processes have no row in it; of `concat`, which cuts documents, some rows have no token with a loss.

Largest difference: {largest:.1e} (at most {gradients.TOLERANCE:.0e}).

{gradients.table(measured)}

## One outcome for every interrupted run

A run of two epochs with dropout, clipping and validation leaves checkpoints at these moments; each is continued to
the end, n → m: begun by n processes, continued by m. **bits**: rows, losses, weights, optimizer moments, schedule and
random states are those of the uninterrupted run to the last bit. **rows**, where the number of processes changes, and
without dropout: every optimizer step has the same rows, and no loss differs by more than the number beside it,
relative (at most {resume.TOLERANCE:.0e}).

{resume.table(model)}
"""


def main() -> None:
    """Write the document."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        text = document(gradients.save_model(Path(temporary)))
    PAGE.write_text(text, encoding="utf-8")  # not to the standard output, where libraries say things too


if __name__ == "__main__":
    main()
