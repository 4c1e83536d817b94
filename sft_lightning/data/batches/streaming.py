"""Sources larger than disk or memory → rows, read, tokenized and packed while training.

A *window* is a small epoch in memory: the next examples of the sources, shuffled and packed by `plan_epoch`. Only whole
optimizer steps are taken from it, and the examples of the rows that are left begin the next window, so none is lost and
none is seen twice. Every rank reads the same stream and takes its part of each step's rows, so denominators are known
without communication. A position is where each source stood when a window began, and the examples carried into it: the
window is built again from that, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from sft_lightning.data.batches.loader import Collate
from sft_lightning.data.batches.stream_source import Cursor, SourceStream, join_batches, share_unit, shares
from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_plan import EpochExamples, EpochPlan, Packing, Topology, plan_epoch
from sft_lightning.data.tokens.store import TokenStore
from sft_lightning.data.tokens.tokenization import TokenizedBatch
from sft_lightning.errors import UserError
from sft_lightning.types import Batch, TokenizedExample

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

    store: TokenStore
    plan: EpochPlan

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
        store = TokenStore.of(_joined(drawn), np.zeros(len(drawn), np.int64), np.zeros(0, np.uint32))
        chosen = EpochExamples(
            np.arange(len(drawn)),
            np.array([each.source for each in drawn]),
            store.lengths,
            np.array([self._amount(each.example) for each in drawn]),
        )
        plan = plan_epoch(
            chosen,
            store.weigh,
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
        return Window(start, store, plan, num_steps, _digest(store))

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


def _digest(store: TokenStore) -> str:
    digest = xxhash.xxh3_128()
    for array in (store.input_ids, store.loss_weights, store.lengths):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class StreamLoader:
    """One rank's micro-batches of a run that streams; the next window is made while one is trained on.

    It has a length, that of the run: Lightning would fetch a batch ahead from a loader of unknown length, and a
    checkpoint's position would be one micro-batch off.

    Args:
        windows: What is trained on.
        topology: How rows are dealt to ranks and micro-batches.
        collate: Window → what makes batches of its rows.
        num_steps: Optimizer steps of the run.
    """

    def __init__(
        self, windows: StreamWindows, topology: Topology, collate: Callable[[Window], Collate], num_steps: int
    ) -> None:
        self._windows = windows
        self._topology = topology
        self._collate = collate
        self._num_steps = num_steps
        self._next = 0  # micro-batch of the run that comes next
        self._start: Mapping[str, Any] = windows.position()
        self._digest = ""  # of the window at `_start`, as the checkpoint has it
        self._window: Window | None = None
        self._ahead: Future[Window] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream")

    def __len__(self) -> int:
        """Micro-batches of the run, for every rank the same."""
        return self._num_steps * self._topology.accumulate

    def __iter__(self) -> Iterator[Batch]:
        while self._next < len(self):
            window = self._window_of(self._next // self._topology.accumulate)
            index = self._next - window.first_step * self._topology.accumulate
            self._next += 1
            denominator = window.plan.step_weight(index // self._topology.accumulate)
            rows = window.plan.micro_batch(index, self._topology)
            yield self._collate(window)(window.plan, rows, denominator)

    def _window_of(self, step: int) -> Window:
        """Return the window that an optimizer step lies in."""
        while self._window is None or step >= self._window.end_step:
            ahead = self._ahead or self._worker.submit(self._windows.next_window)
            self._ahead = None
            window = ahead.result()
            self._check(window)
            self._window, self._start = window, window.start
            if window.end_step < self._num_steps:
                self._ahead = self._worker.submit(self._windows.next_window)
        return self._window

    def _check(self, window: Window) -> None:
        """Refuse a window whose tokens are not those that the checkpoint was saved at."""
        if self._digest and window.digest != self._digest:
            raise UserError(
                "--ckpt_path: the streamed sources no longer hold, at the checkpoint's position, what they held when "
                "it was saved; restore the files, template and tokenizer, or start a new run from the checkpoint's "
                "weights with model.adapter.path (or model.model_name_or_path)"
            )
        self._digest = ""

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the rows that all ranks together have taken, and where the window of the last began."""
        return {
            "epoch": 0,
            "rows": self._next * self._topology.rows_per_micro_batch,
            "window": dict(self._start),
            "digest": self._window.digest if self._window is not None else self._digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position, at the start of the optimizer step that it lies in."""
        self._next = state["rows"] // self._topology.rows_per_step * self._topology.accumulate
        self._start, self._digest = state["window"], state["digest"]
        if self._ahead is not None:
            wait([self._ahead])  # it moves what is to be moved now
        self._window = self._ahead = None
        self._windows.seek(self._start)
