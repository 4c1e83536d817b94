"""Tokenized examples as flat arrays, addressed by index."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sft_lightning.types import TokenizedExample


@dataclass(frozen=True)
class TokenStore:
    """All examples, one after the other: three arrays, however many examples there are."""

    input_ids: npt.NDArray[np.int32]
    """Token ids of all examples, (T,)."""

    loss_weights: npt.NDArray[np.float32]
    """Loss weight of each token, (T,)."""

    starts: npt.NDArray[np.int64]
    """Where each example starts, and the end of the last, (N + 1,)."""

    @classmethod
    def from_examples(cls, examples: Sequence[TokenizedExample]) -> TokenStore:
        """Lay examples out one after the other."""
        lengths = [len(example.input_ids) for example in examples]
        return cls(
            np.concatenate([example.input_ids for example in examples] or [np.zeros(0, np.int32)]),
            np.concatenate([example.loss_weights for example in examples] or [np.zeros(0, np.float32)]),
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        )

    @classmethod
    def concatenate(cls, stores: Sequence[TokenStore]) -> TokenStore:
        """Return one store with the examples of all, in order."""
        lengths = np.concatenate([store.lengths for store in stores])
        return cls(
            np.concatenate([store.input_ids for store in stores]),
            np.concatenate([store.loss_weights for store in stores]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, (N,)."""
        return np.diff(self.starts)

    def example(self, index: int, start: int, stop: int) -> TokenizedExample:
        """Return tokens `start` to `stop` of an example."""
        part = slice(self.starts[index] + start, self.starts[index] + stop)
        return TokenizedExample(self.input_ids[part], self.loss_weights[part])

    def fingerprint(self, lengths: npt.NDArray[np.int64]) -> str:
        """Return a hash of all examples, and of how much of each is kept."""
        digest = hashlib.sha256()
        for array in (self.input_ids, self.loss_weights, self.starts, lengths):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def weigh(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the loss weight that each document contributes, (D,).

        The first token of a document has nothing before it to be predicted from, so it does not count.

        Args:
            documents: Example, first token and end of each, (D, 3).
        """
        return _sums(self._weights_before, self.starts, documents)

    def supervised_tokens(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many tokens of each example have a loss when cut to `lengths` tokens, (N,)."""
        before = np.concatenate([[0], np.cumsum(self.loss_weights > 0, dtype=np.int64)])
        cut = np.stack([np.arange(len(self)), np.zeros_like(lengths), lengths], axis=1)
        return _sums(before, self.starts, cut)

    @functools.cached_property
    def _weights_before(self) -> npt.NDArray[np.float64]:
        return np.concatenate([[0.0], np.cumsum(self.loss_weights, dtype=np.float64)])


def _sums(
    before: npt.NDArray[Any], starts: npt.NDArray[np.int64], documents: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    """Sum over each document but its first token, given the running sums before each token."""
    first, end = (starts[documents[:, 0]] + documents[:, column] for column in (1, 2))
    sums: npt.NDArray[Any] = before[end] - before[np.minimum(first + 1, end)]
    return sums
