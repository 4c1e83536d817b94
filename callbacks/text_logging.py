"""Text to the loggers that show text."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger


def log_text(trainer: Trainer, tag: str, markdown: str) -> None:
    """Give a text to TensorBoard and Weights & Biases; other loggers keep numbers alone."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, markdown, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(tag, columns=["text"], data=[[markdown]], step=trainer.global_step)


def fenced(text: str, language: str = "") -> str:
    """Return a text as a block of Markdown that shows it as it is, whatever fences it has itself."""
    longest = max((len(run) for run in _runs_of_backticks(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _runs_of_backticks(text: str) -> list[str]:
    return "".join(each if each == "`" else " " for each in text).split()
