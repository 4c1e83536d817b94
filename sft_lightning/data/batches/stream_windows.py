"""Sources larger than disk or memory → rows, read, tokenized and packed while training.

A *window* is a small epoch in memory: the next examples of the sources, shuffled and packed by `plan_epoch`. Only whole
optimizer steps are taken from it, and the examples of the rows that are left begin the next window, so none is lost and
none is seen twice. Every rank reads the same stream and takes its part of each step's rows, so denominators are known
without communication. A position is where each source stood when a window began, and the examples carried into it: the
window is built again from that, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from sft_lightning.data.batches.stream_source import Cursor, SourceStream, join_batches, share_unit, shares
from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_plan import EpochExamples, EpochPlan, Packing, plan_epoch
from sft_lightning.data.tokens.flat_examples import FlatExamples, flat_examples
from sft_lightning.data.tokens.tokenization import TokenizedBatch
from sft_lightning.types import TokenizedExample

ROWS_OF_A_WINDOW = 1024
TOKENS_OF_A_WINDOW = 2**24


def rows_per_window(rows_per_step: int, max_length: int) -> int:
    """Return how many full rows of tokens a window holds: the bound on memory.

    16 optimizer steps or 1024 rows, whichever is more, so that there is something to shuffle and to pack; but no more
    than 2^24 tokens (134 MB of ids and weights), unless 4 optimizer steps are more than that. Two windows are in memory
    at a time, the one that is trained on and the next, and of each source what `RECORDS_AT_ONCE` records make.

    Args:
        rows_per_step: The global batch.
        max_length: Tokens per row.
    """
    wanted = min(max(16 * rows_per_step, ROWS_OF_A_WINDOW), TOKENS_OF_A_WINDOW // max_length)
    return max(4, -(-wanted // rows_per_step)) * rows_per_step


class Drawn(NamedTuple):
    """An example, and the number of its source."""

    source: int
    example: TokenizedExample


@dataclass(frozen=True)
class Window:
    """Some optimizer steps' examples, and their plan."""

    start: Mapping[str, Any]
    """The position at which it begins, see `StreamWindows.position`."""

    examples: FlatExamples
    """The examples."""

    plan: EpochPlan
    """Their rows."""

    num_steps: int
    """Whole optimizer steps; rows of the plan beyond them are not taken."""

    digest: str
    """A hash of all its tokens and weights, in order."""

    @property
    def first_step(self) -> int:
        """Optimizer steps of the windows before it."""
        return int(self.start["steps"])

    @property
    def end_step(self) -> int:
        """Optimizer steps up to its end."""
        return self.first_step + self.num_steps


class StreamWindows:
    """The windows of a run, one after the other.

    Args:
        streams: The sources.
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
        self._shares = shares([stream.config for stream in streams], blend)
        self._unit = share_unit(blend)
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
        """Return where the next window begins, for a checkpoint: numbers and tensors alone."""
        carried = _joined(self._carried)
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
        """Continue at a window's beginning; the sources are read up to there, and not tokenized."""
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
        examples = flat_examples(_joined(drawn))
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
        """Take the examples of a window; return them, and what is left of the last one.

        Rows are cut or made of single examples so that they fill whole steps; only best-fit leaves rows over.
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
        """Take the next example of the source that is furthest behind its share."""
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


def _joined(drawn: Sequence[Drawn]) -> TokenizedBatch:
    examples = [each.example for each in drawn]
    return join_batches(
        [TokenizedBatch(e.input_ids, e.loss_weights, np.array([len(e.input_ids)], np.int64)) for e in examples]
    )


def _digest(examples: FlatExamples) -> str:
    digest = xxhash.xxh3_128()
    for array in (examples.input_ids, examples.loss_weights, examples.lengths):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
