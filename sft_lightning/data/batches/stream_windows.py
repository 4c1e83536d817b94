"""Streamed sources, which may be larger than disk and memory → rows that are packed while training.

A *window* is a small epoch in memory: the next examples of the sources, shuffled and packed by `plan_epoch`. Only its
complete optimizer steps are trained on; the examples of the remaining rows start the next window, so none is lost and
none is seen twice. Every rank reads the same streams and takes its part of the rows of each step, so denominators are
known without communication. A position says how much of each source was taken when a window began, and which examples
were carried into it; the same window is made again from that, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from sft_lightning.data.batches.stream_source import (
    Cursor,
    SourceStream,
    join_batches,
    stream_share_unit,
    stream_shares,
)
from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_plan import EpochExamples, EpochPlan, Packing, plan_epoch
from sft_lightning.data.tokens.flat_examples import FlatExamples, flat_examples
from sft_lightning.data.tokens.tokenization import TokenizedBatch
from sft_lightning.types import TokenizedExample

ROWS_OF_A_WINDOW = 1024
"""Rows that a window holds at least, unless they are too many tokens."""

TOKENS_OF_A_WINDOW = 2**24
"""Tokens that a window holds at most, unless 4 optimizer steps are more; 134 MB of ids and weights."""


def rows_per_window(rows_per_step: int, max_length: int) -> int:
    """Return how many full rows of tokens a window holds, which bounds the memory.

    A window has 16 optimizer steps or 1024 rows, whichever is more, so that there are examples to shuffle and pack; but
    at most 2^24 tokens (134 MB of ids and weights), unless 4 optimizer steps are more. In memory are two windows at a
    time, the one that is trained on and the next, and the examples of `RECORDS_AT_ONCE` records of each source.

    Args:
        rows_per_step: The global batch.
        max_length: Tokens per row.
    """
    wanted = min(max(16 * rows_per_step, ROWS_OF_A_WINDOW), TOKENS_OF_A_WINDOW // max_length)
    return max(4, -(-wanted // rows_per_step)) * rows_per_step


class Drawn(NamedTuple):
    """An example that was drawn from a source."""

    source: int
    """Number of the source."""

    example: TokenizedExample
    """The example."""


@dataclass(frozen=True)
class Window:
    """The examples of some optimizer steps, and their plan."""

    start: Mapping[str, Any]
    """The position at which the window begins, see `StreamWindows.position`."""

    examples: FlatExamples
    """The examples."""

    plan: EpochPlan
    """Their rows."""

    num_steps: int
    """Complete optimizer steps; the rows of the plan after them are not trained on."""

    digest: str
    """A hash of all tokens and weights of the window, in order."""

    @property
    def first_step(self) -> int:
        """Optimizer steps of the run before the window."""
        return int(self.start["steps"])

    @property
    def end_step(self) -> int:
        """Optimizer steps of the run up to the end of the window."""
        return self.first_step + self.num_steps


class StreamWindows:
    """The windows of a run, one after the other.

    Args:
        streams: The training sources.
        blend: What the sources' weights mean.
        packing: How examples share rows.
        max_length: Tokens per row.
        rows_per_step: The global batch.
        seed: Seed of the run.
    """

    def __init__(
        self,
        streams: Sequence[SourceStream],
        blend: BlendConfig,
        *,
        packing: Packing,
        max_length: int,
        rows_per_step: int,
        seed: int,
    ) -> None:
        self._streams = streams
        self._shares = stream_shares([stream.config for stream in streams], blend)
        self._unit = stream_share_unit(blend)
        self._packing: Packing = packing
        self._max_length = max_length
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._rows = rows_per_window(rows_per_step, max_length)
        for stream, share in zip(streams, self._shares, strict=True):
            stream.report.wanted = share
        self._stand_at(0, 0, [Cursor() for _ in streams], [0.0 for _ in streams], [])

    def _stand_at(
        self, number: int, steps: int, cursors: list[Cursor], amounts: list[float], carried: list[Drawn]
    ) -> None:
        self._number, self._steps = number, steps
        self._cursors, self._amounts, self._carried = cursors, amounts, carried
        self._examples = [stream.examples(cursor) for stream, cursor in zip(self._streams, cursors, strict=True)]

    def position(self) -> dict[str, Any]:
        """Return where the next window begins, for a checkpoint: a dictionary of numbers and tensors."""
        carried = _batch_of(self._carried)
        return {
            "window": self._number,
            "steps": self._steps,
            "cursors": [tuple(cursor) for cursor in self._cursors],
            "amounts": list(self._amounts),
            "carried": {
                "sources": torch.tensor([drawn.source for drawn in self._carried], dtype=torch.int64),
                "lengths": torch.from_numpy(carried.counts),
                "input_ids": torch.from_numpy(carried.input_ids),
                "loss_weights": torch.from_numpy(carried.loss_weights),
            },
        }

    def seek(self, position: Mapping[str, Any]) -> None:
        """Continue at the position of a window; the sources are read up to it, and tokenized from there on."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in position["carried"].items()}
        examples = TokenizedBatch(arrays["input_ids"], arrays["loss_weights"], arrays["lengths"])
        carried = [Drawn(*each) for each in zip(arrays["sources"].tolist(), examples, strict=True)]
        cursors = [Cursor(*cursor) for cursor in position["cursors"]]
        self._stand_at(position["window"], position["steps"], cursors, list(position["amounts"]), carried)

    def next_window(self) -> Window:
        """Read, tokenize and plan the next window.

        Raises:
            UserError: If a record is wrong, an example too long, or a source has no example.
        """
        start = self.position()
        drawn, rest = self._fill()
        examples = flat_examples(_batch_of(drawn))
        chosen = EpochExamples(
            np.arange(len(drawn)),
            np.array([each.source for each in drawn]),
            examples.lengths,
            np.array([self._amount(each.example) for each in drawn]),
        )
        plan = plan_epoch(
            chosen,
            examples.weigh,
            packing=self._packing,
            max_length=self._max_length,
            rows_per_step=self._rows_per_step,
            shuffle=(self._seed, self._number),
        )
        num_steps = plan.num_rows // self._rows_per_step
        left = plan.rows.documents[plan.rows.starts[num_steps * self._rows_per_step] :, 0]
        self._carried = [*(drawn[index] for index in left.tolist()), *rest]
        self._number, self._steps = self._number + 1, self._steps + num_steps
        self._report()
        return Window(start, examples, plan, num_steps, _digest(examples))

    def _fill(self) -> tuple[list[Drawn], list[Drawn]]:
        """Return the examples of a window, and the rest of the last example, if it had to be cut.

        With `concat` and `none` the examples fill complete optimizer steps; `best_fit` leaves rows for the next window.
        """
        wanted = self._rows * self._max_length
        drawn = list(self._carried)
        tokens = sum(len(each.example.input_ids) for each in drawn)
        while len(drawn) < self._rows if self._packing == "none" else tokens < wanted:
            drawn.append(self._draw())
            tokens += len(drawn[-1].example.input_ids)
        if self._packing != "concat" or tokens == wanted:
            return drawn, []
        source, example = drawn.pop()
        cut = len(example.input_ids) - (tokens - wanted)
        first, rest = (
            Drawn(source, TokenizedExample(example.input_ids[part], example.loss_weights[part]))
            for part in (slice(cut), slice(cut, None))
        )
        return [*drawn, first], [rest]

    def _draw(self) -> Drawn:
        """Return the next example of the source that is furthest behind its share."""
        source = min(range(len(self._streams)), key=lambda each: self._amounts[each] / self._shares[each])
        self._cursors[source], example = next(self._examples[source])
        self._amounts[source] += self._amount(example)
        return Drawn(source, example)

    def _amount(self, example: TokenizedExample) -> float:
        """Return what an example counts towards its source's share."""
        if self._unit == "supervised_tokens":
            return float((example.loss_weights[1:] > 0).sum())
        return 1.0 if self._unit == "examples" else float(len(example.input_ids))

    def _report(self) -> None:
        for stream, amount in zip(self._streams, self._amounts, strict=True):
            stream.report.delivered = amount / sum(self._amounts)


def _batch_of(drawn: Sequence[Drawn]) -> TokenizedBatch:
    examples = [each.example for each in drawn]
    return join_batches(
        [TokenizedBatch(e.input_ids, e.loss_weights, np.array([len(e.input_ids)], np.int64)) for e in examples]
    )


def _digest(examples: FlatExamples) -> str:
    digest = xxhash.xxh3_128()
    for array in (examples.input_ids, examples.loss_weights, examples.lengths):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
