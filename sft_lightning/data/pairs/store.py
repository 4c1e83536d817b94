"""A token store of chosen and rejected examples, read as a store of pairs, which are planned and packed whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sft_lightning.data.tokens.store import TokenStore
from sft_lightning.types import Longs, SharedPrompt, TokenizedExample


@dataclass(frozen=True)
class PairExample(TokenizedExample):
    """Both examples of a pair in one array of L tokens, the chosen example first."""

    num_chosen: int
    """Tokens of the chosen example."""

    weight: float
    """Weight of the pair's loss."""

    def halves(self) -> tuple[TokenizedExample, TokenizedExample]:
        """Return the chosen and the rejected example."""
        first, second = slice(None, self.num_chosen), slice(self.num_chosen, None)
        return (
            TokenizedExample(self.input_ids[first], self.loss_weights[first]),
            TokenizedExample(self.input_ids[second], self.loss_weights[second]),
        )


@dataclass(frozen=True)
class SharedPair(TokenizedExample):
    """A pair as one document: the common beginning, the rest of the chosen example, the rest of the rejected one."""

    shared: SharedPrompt
    """Tokens of the common beginning and of both rests."""

    @property
    def document_length(self) -> SharedPrompt:
        """Its entry in the document lengths of its row."""
        return self.shared

    @property
    def positions(self) -> Longs:
        """Position of each token in its conversation, (L,)."""
        shared = self.shared
        first = np.arange(shared.common + shared.first)
        return np.concatenate([first, np.arange(shared.common, shared.common + shared.second)])


def share_prompt(pair: PairExample) -> SharedPair | None:
    """Return a pair with the common beginning of both conversations once; `None` if they have none.

    Each rest begins with the token before its answer, because the first token of the answer is predicted from it.
    """
    chosen, rejected = pair.halves()
    shorter = min(len(chosen.input_ids), len(rejected.input_ids))
    differ = np.flatnonzero(chosen.input_ids[:shorter] != rejected.input_ids[:shorter])
    # The weights from the second on: each index is that of the token before.
    answers = [np.flatnonzero(half.loss_weights[1:] > 0) for half in (chosen, rejected)]
    common = min([int(differ[0]) if len(differ) else shorter, *(int(found[0]) for found in answers if len(found))])
    if common < 1:
        return None
    rests = len(chosen.input_ids) - common, len(rejected.input_ids) - common
    return SharedPair(
        np.concatenate([chosen.input_ids, rejected.input_ids[common:]]),
        np.concatenate([chosen.loss_weights, rejected.loss_weights[common:]]),
        SharedPrompt(common, *rests),
    )


@dataclass(frozen=True)
class PairStore(TokenStore):
    """All N pairs of a source. `lengths` and `supervised` count both examples of a pair; `weights` are the pairs'.

    If one example of a pair has no supervised token, the pair counts as having none, and is dropped.
    """

    spans: Longs
    """Start and end of the chosen and the rejected example of each pair in the flat arrays, (N, 2, 2)."""

    whole_lengths: Longs
    """Tokens of each pair before it was shortened, (N,)."""

    lost: Longs
    """Supervised tokens that each pair lost when it was shortened, (N,)."""

    def example(self, index: int, start: int, stop: int) -> PairExample:
        """Return a pair.

        Args:
            index: The pair.
            start: Its first token to take; always 0.
            stop: Its first token not to take; always its length.

        Raises:
            ValueError: If they are not, since a pair is never cut.
        """
        if (start, stop) != (0, int(self.lengths[index])):
            raise ValueError(f"a pair cannot be cut: expected tokens 0 to {self.lengths[index]}, got {start} to {stop}")
        chosen, rejected = (slice(first, end) for first, end in self.spans[index].tolist())
        return PairExample(
            np.concatenate([self.input_ids[chosen], self.input_ids[rejected]]),
            np.concatenate([self.loss_weights[chosen], self.loss_weights[rejected]]),
            chosen.stop - chosen.start,
            float(self.weights[index]),
        )


class Shortening(NamedTuple):
    """How long pairs are shortened; Firefly's `max_seq_length` and `max_prompt_length`."""

    max_length: int
    """Tokens of an answer with its prompt."""

    max_prompt_length: int
    """Tokens at the end of the prompt that are always kept; fewer than `max_length`."""


def shorten(prompt: Longs, chosen: Longs, rejected: Longs, limits: Shortening) -> tuple[Longs, Longs, Longs]:
    """Return how many tokens are kept of prompts and answers, all (N,), by the rule of Firefly's DPO dataset.

    A pair that fits is not shortened. Of the prompt of a pair that does not, the last
    `max(max_prompt_length, max_length - longer answer)` tokens are kept, so `max_prompt_length` is a minimum, not a
    maximum. If that is not enough, both answers are cut to the remaining room.

    Args:
        prompt: Tokens of the prompts, (N,).
        chosen: Tokens of the chosen answers, (N,).
        rejected: Tokens of the rejected answers, (N,).
        limits: The two lengths.
    """
    longer = np.maximum(chosen, rejected)
    too_long = prompt + longer > limits.max_length
    kept = np.minimum(prompt, np.maximum(limits.max_prompt_length, limits.max_length - longer))
    prompt = np.where(too_long, kept, prompt)
    room = limits.max_length - prompt  # if the pair was not too long, at least the longer answer
    return prompt, np.minimum(chosen, room), np.minimum(rejected, room)


def pair_store(store: TokenStore, limits: Shortening | None = None) -> PairStore:
    """Return a store of examples, alternately chosen and rejected, as a store of pairs; no token is copied.

    Args:
        store: 2N examples; examples 2i and 2i + 1 come from the same record.
        limits: How long pairs are shortened; `None` leaves them as they are.

    Raises:
        ValueError: If the examples are not pairs.
    """
    if len(store) % 2 or not np.array_equal(store.records[::2], store.records[1::2]):
        raise ValueError("the store's examples are not pairs of a chosen and a rejected one")
    spans = np.stack([store.starts, store.starts + store.lengths], axis=1)
    supervised = store.supervised
    if limits is not None:
        spans = _shortened(store, spans, limits)
        supervised = _supervised(store, spans)
    means = np.divide(store.weights, store.supervised, out=np.zeros(len(store)), where=store.supervised > 0)
    lengths = _by_pair(spans[:, 1] - spans[:, 0]).sum(axis=1)
    of_both = _by_pair(supervised)
    return PairStore(
        input_ids=store.input_ids,
        loss_weights=store.loss_weights,
        lengths=lengths,
        records=store.records[::2],
        supervised=np.where((of_both > 0).all(axis=1), of_both.sum(axis=1), 0),
        weights=_by_pair(means).mean(axis=1),
        starts=spans[::2, 0],
        marks=store.marks,
        spans=spans.reshape(-1, 2, 2),
        whole_lengths=_by_pair(store.lengths).sum(axis=1),
        lost=_by_pair(store.supervised - supervised).sum(axis=1),
    )


def _by_pair(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return values of 2N examples as those of N pairs, (N, 2)."""
    return values.reshape(-1, 2)


def _shortened(store: TokenStore, spans: Longs, limits: Shortening) -> Longs:
    """Return start and end of each example after long pairs are shortened, (2N, 2)."""
    positions = np.flatnonzero(store.loss_weights > 0)
    found = np.searchsorted(positions, spans[:, 0] + 1)  # a first token has no loss
    answers = np.append(positions, len(store.loss_weights))[found]
    prompts = np.minimum(answers, spans[:, 1]) - spans[:, 0]
    answer_lengths = (store.lengths - prompts).reshape(-1, 2)
    prompt = prompts.reshape(-1, 2).max(axis=1)
    kept, chosen, rejected = shorten(prompt, answer_lengths[:, 0], answer_lengths[:, 1], limits)
    begins = spans[:, 0] + np.repeat(prompt - kept, 2)
    ends = spans[:, 0] + prompts + np.stack([chosen, rejected], axis=1).reshape(-1)
    return np.stack([begins, ends], axis=1)


def _supervised(store: TokenStore, spans: Longs) -> Longs:
    """Return how many tokens of each span are supervised, without its first token, (2N,)."""
    before = np.concatenate([[0], np.cumsum(store.loss_weights > 0)])
    counts: Longs = before[spans[:, 1]] - before[np.minimum(spans[:, 0] + 1, spans[:, 1])]
    return counts
