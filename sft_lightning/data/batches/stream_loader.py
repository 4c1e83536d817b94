"""Micro-batches of one rank from streamed sources; the next window is made in a thread while one is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from sft_lightning.batch import Batch
from sft_lightning.data.batches.loader import Collate, Document, documents_of
from sft_lightning.data.batches.stream_windows import StreamWindows, Window
from sft_lightning.data.plan.epoch_plan import Topology
from sft_lightning.errors import UserError


class StreamLoader:
    """One rank's micro-batches of a whole run.

    Its length is that of the run: Lightning fetches one batch ahead from a loader of unknown length, and a checkpoint's
    position would be one micro-batch off.

    Args:
        windows: The windows of the run.
        topology: How rows are dealt to ranks and micro-batches.
        collate: Makes a batch of documents.
        num_steps: Optimizer steps of the run.
    """

    def __init__(self, windows: StreamWindows, topology: Topology, collate: Collate, num_steps: int) -> None:
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
        """Micro-batches of the run, the same number for every rank."""
        return self._num_steps * self._topology.accumulate

    def __iter__(self) -> Iterator[Batch]:
        while self._next < len(self):
            window = self._window_of(self._next // self._topology.accumulate)
            index = self._next - window.first_step * self._topology.accumulate
            self._next += 1
            denominator = window.plan.step_weight(index // self._topology.accumulate)
            rows = window.plan.micro_batch(index, self._topology)
            yield self._collate(documents_of(window.plan, rows, window.examples), denominator)

    def _window_of(self, step: int) -> Window:
        """Return the window of an optimizer step, and start to make the next one."""
        while self._window is None or step >= self._window.end_step:
            ahead = self._ahead or self._worker.submit(self._windows.next_window)
            self._ahead = None
            window = ahead.result()
            self._check(window)
            self._window, self._start = window, window.start
            if window.end_step < self._num_steps:
                self._ahead = self._worker.submit(self._windows.next_window)
        return self._window

    def documents_of_step(self, step: int) -> list[list[Document]] | None:
        """Return the documents of all rows of an optimizer step, over all ranks; waits for a window that is being made.

        Args:
            step: Number of the step in the run, from 0.

        Returns:
            `None` if the step is neither in the window that is trained on, nor in the next one.
        """
        window, ahead = self._window, self._ahead
        if window is not None and step >= window.end_step and ahead is not None and ahead.exception() is None:
            window = ahead.result()
        if window is None or not window.first_step <= step < window.end_step:
            return None
        first, size = (step - window.first_step), self._topology.rows_per_step
        return documents_of(window.plan, range(first * size, (first + 1) * size), window.examples)

    def _check(self, window: Window) -> None:
        """Refuse a window whose tokens are not those that the checkpoint was saved at."""
        if self._digest and window.digest != self._digest:
            raise UserError(
                "--ckpt_path: the streamed sources no longer hold the same tokens at the checkpoint's position; "
                "restore the files, the template and the tokenizer, or start a new run from the checkpoint's "
                "weights with model.adapter.path (or model.model_name_or_path)"
            )
        self._digest = ""

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the rows that all ranks together have taken, and the start of the last one's window."""
        return {
            "epoch": 0,
            "rows": self._next * self._topology.rows_per_micro_batch,
            "window": dict(self._start),
            "digest": self._window.digest if self._window is not None else self._digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position, from the first row of its optimizer step."""
        self._next = state["rows"] // self._topology.rows_per_step * self._topology.accumulate
        self._start, self._digest = state["window"], state["digest"]
        if self._ahead is not None:
            wait([self._ahead])  # the window under way moves the sources, and so does `seek`
        self._window = self._ahead = None
        self._windows.seek(self._start)
