"""Objective: what a model learns from a micro-batch, and what is measured of it. `CausalLMModule` does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torchmetrics import Metric

from sft_lightning.training.losses import LossSums
from sft_lightning.training.step import StepShare

if TYPE_CHECKING:
    from sft_lightning.data.plan.split_reader import Split
    from sft_lightning.training.module import CausalLMModule


class SourceMeans:
    """The metrics of an evaluation: of all sources together, and of each source.

    Args:
        names: Names of the sources.
        make: Makes the metric of one source.
        per_source: Names of the means that are reported for each source too; `None` for all.
    """

    def __init__(
        self, names: Sequence[str], make: Callable[[], Metric], per_source: Sequence[str] | None = None
    ) -> None:
        self._per_source = per_source
        self._means = {name: make() for name in names}
        self._total = make()

    def update(self, source: int, *sums: Any) -> None:
        """Add a micro-batch of one source.

        Args:
            source: Number of the source, from 0.
            sums: Arguments of the metric's `update`.
        """
        for means in (list(self._means.values())[source], self._total):
            means.update(*sums)

    @property
    def weight(self) -> torch.Tensor:
        """What the means of all sources are divided by: a scalar, of this process's micro-batches."""
        return cast("torch.Tensor", self._total.weight)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return each source's means as `mean/source`, then the means of all sources; float32 scalars."""
        found: dict[str, torch.Tensor] = {}
        for name, metric in self._means.items():
            means = metric.compute()
            found |= {f"{key}/{name}": means[key] for key in self._per_source or means}
        return {key: value.float() for key, value in (found | self._total.compute()).items()}


class Objective(ABC):
    """The part of training that depends on what is learned. The module calls it and passes itself.

    An objective keeps only what it alone needs, such as the log-probabilities of a reference model.
    """

    step_means: tuple[str, ...] = ()
    """Names of `StepShare.means`, logged for each optimizer step as `train/<name>`."""

    def on_model_loaded(self, module: CausalLMModule) -> None:  # noqa: B027 (optional)
        """Look at the model as it was loaded, before a checkpoint changes it."""

    def on_fit_start(self, module: CausalLMModule) -> None:  # noqa: B027 (optional)
        """Prepare the training, on the device and before the first step."""

    def on_evaluation_start(self, module: CausalLMModule) -> None:  # noqa: B027 (optional)
        """Prepare an evaluation without training."""

    @abstractmethod
    def step_share(self, module: CausalLMModule, batch: Any) -> StepShare:
        """Return a micro-batch's share of its optimizer step's loss, a scalar.

        Args:
            module: The model.
            batch: A micro-batch; its `denominator` is what the sums of the whole step are divided by.
        """

    @abstractmethod
    def start_means(self, module: CausalLMModule, names: list[str]) -> SourceMeans:
        """Return the metrics of an evaluation.

        Args:
            module: The model.
            names: The sources that are evaluated.
        """

    @abstractmethod
    def update_means(self, module: CausalLMModule, means: SourceMeans, batch: Any, split: Split, source: int) -> None:
        """Add a micro-batch to the metrics of an evaluation.

        Args:
            module: The model.
            means: From `start_means`.
            batch: A micro-batch of one source.
            split: What the source is evaluated for.
            source: Number of the source, from 0.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {}

    def load_state_dict(self, module: CausalLMModule, checkpoint: dict[str, Any]) -> None:  # noqa: B027 (optional)
        """Take what a checkpoint kept, before the checkpoint's weights are loaded.

        Args:
            module: The model, as it was before training.
            checkpoint: The whole checkpoint.
        """


class TokenMeans(Metric):
    """Loss, perplexity and accuracy per supervised token; keeps three sums, never logits."""

    full_state_update = False

    loss: torch.Tensor
    weight: torch.Tensor
    correct: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in LossSums._fields:
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: LossSums) -> None:
        """Add a micro-batch."""
        self.loss += sums.loss.detach()
        self.weight += sums.weight
        self.correct += sums.correct

    def compute(self) -> dict[str, torch.Tensor]:
        """Return `loss` in nats per token, `perplexity` (inf where it overflows) and `token_accuracy`."""
        loss = self.loss / self.weight
        return {"loss": loss, "perplexity": loss.exp(), "token_accuracy": self.correct / self.weight}


class NextToken(Objective):
    """The mean cross entropy per supervised token."""

    def step_share(self, module: CausalLMModule, batch: Any) -> StepShare:
        """Return a micro-batch's share of the optimizer step's mean loss per supervised token, a scalar.

        Args:
            module: The model.
            batch: Packed rows.
        """
        return StepShare(module(batch).loss / (batch["denominator"] or 1.0))

    def start_means(self, module: CausalLMModule, names: list[str]) -> SourceMeans:
        """Return loss, perplexity and accuracy per supervised token.

        Args:
            module: The model.
            names: The sources that are evaluated.
        """
        return SourceMeans(names, lambda: TokenMeans().to(module.device), per_source=["loss", "perplexity"])

    def update_means(self, module: CausalLMModule, means: SourceMeans, batch: Any, split: Split, source: int) -> None:
        """Add the sums of a micro-batch.

        Args:
            module: The model.
            means: From `start_means`.
            batch: Packed rows of one source.
            split: What the source is evaluated for.
            source: Number of the source, from 0.
        """
        means.update(source, module(batch))
