"""Record when a process began to load its model, and when it had its shard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LoadingWatch(Callback):
    """Writes `<rank>.json` into the folder that `WATCH_FOLDER` names."""

    def __init__(self) -> None:
        self._marks: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the time before the model is loaded, and before its optimizer is made."""
        module: Any = pl_module
        module.configure_model = self._marking("empty", module.configure_model)
        module.configure_optimizers = self._marking("sharded", module.configure_optimizers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        file = Path(os.environ["WATCH_FOLDER"]) / f"{trainer.global_rank}.json"
        file.write_text(json.dumps(self._marks))

    def _marking(self, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        def marked() -> Any:
            self._marks[name] = time.time()
            return call()

        return marked
