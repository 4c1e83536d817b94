from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[3])
if ROOT not in sys.path:  # the benchmarks are not installed
    sys.path.insert(0, ROOT)
