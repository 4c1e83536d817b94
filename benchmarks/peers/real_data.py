"""Find the folder with real texts, tokenizers and models that some benchmarks need."""

from __future__ import annotations

import os
from pathlib import Path

REAL_DATA = Path(os.environ.get("SFT_REAL_DATA", Path(__file__).parents[3] / "shared" / "data")).resolve()
"""The folder that `SFT_REAL_DATA` names; default: `shared/data` beside the checkout."""


def require_real_data(name: str) -> Path:
    """Return a folder of the real data.

    Args:
        name: Path of the folder, relative to `REAL_DATA`.

    Raises:
        SystemExit: If it does not exist.
    """
    folder = REAL_DATA / name
    if not folder.is_dir():
        raise SystemExit(f"SFT_REAL_DATA: {REAL_DATA} has no {name}; set it to the folder with the real data")
    return folder
