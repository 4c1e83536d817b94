"""Tokenized examples as flat arrays, one example after the other: what rows are planned on and taken from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sft_lightning.data.tokens.tokenization import TokenizedBatch
from sft_lightning.types import Longs, TokenizedExample


@dataclass(frozen=True)
class FlatExamples:
    """N examples of T tokens together, and the sums that a plan needs of each."""

    input_ids: npt.NDArray[np.int32]
    """Token ids of all examples, (T,)."""

    loss_weights: npt.NDArray[np.float32]
    """Loss weight of each token, (T,)."""

    lengths: Longs
    """Tokens of each example, (N,)."""

    supervised: Longs
    """Supervised tokens of each example, (N,). Its first token is not counted: no token before it predicts it."""

    weights: npt.NDArray[np.float64]
    """Sum of the loss weights of each example's supervised tokens, (N,)."""

    starts: Longs
    """Where each example starts in the flat arrays, (N,)."""

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int, start: int, stop: int) -> TokenizedExample:
        """Return tokens of an example.

        Args:
            index: The example.
            start: Its first token to take.
            stop: Its first token not to take.
        """
        first = int(self.starts[index])
        part = slice(first + start, first + stop)
        return TokenizedExample(self.input_ids[part], self.loss_weights[part])

    def weigh(self, documents: Longs) -> npt.NDArray[np.float64]:
        """Return the loss weight that each document contributes, (D,).

        Args:
            documents: Example, first token and end of each, (D, 3).
        """
        weights = self.weights[documents[:, 0]]
        for row in self._partial(documents):
            weights[row] = float(self._after_first(documents[row]).sum(dtype=np.float64))
        return weights

    def supervise(self, documents: Longs) -> Longs:
        """Return how many tokens of each document are supervised, (D,).

        Args:
            documents: Example, first token and end of each, (D, 3).
        """
        supervised = self.supervised[documents[:, 0]]
        for row in self._partial(documents):
            supervised[row] = int((self._after_first(documents[row]) > 0).sum())
        return supervised

    def _partial(self, documents: Longs) -> list[int]:
        """Return the rows of the documents that are parts of examples; the sums of whole examples are known."""
        is_whole = (documents[:, 1] == 0) & (documents[:, 2] == self.lengths[documents[:, 0]])
        rows: list[int] = np.flatnonzero(~is_whole).tolist()
        return rows

    def _after_first(self, document: Longs) -> npt.NDArray[np.float32]:
        """Return the loss weights of a document without its first token."""
        index, start, stop = document.tolist()
        first = int(self.starts[index])
        return self.loss_weights[first + start + 1 : first + stop]


def flat_examples(batch: TokenizedBatch) -> FlatExamples:
    """Return the examples of a batch with the sums that a plan needs."""
    lengths, supervised, weights = summarize(batch)
    return FlatExamples(batch.input_ids, batch.loss_weights, lengths, supervised, weights, starts_of(lengths))


def starts_of(lengths: Longs) -> Longs:
    """Return where each example starts, given how long each is, (N,)."""
    return np.cumsum(lengths) - lengths


def summarize(batch: TokenizedBatch) -> tuple[Longs, Longs, npt.NDArray[np.float64]]:
    """Return length, supervised tokens and loss weight of each example, all (N,)."""
    weights = batch.loss_weights.astype(np.float64)
    starts = starts_of(batch.counts)
    weights[starts[batch.counts > 0]] = 0.0
    before = np.concatenate([[0.0], np.cumsum(weights)])
    supervised = np.concatenate([[0], np.cumsum(weights > 0)])
    ends = starts + batch.counts
    return batch.counts, supervised[ends] - supervised[starts], before[ends] - before[starts]
