from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.batches import stream_source, stream_windows
from sft_lightning.data.batches.loader import Document, documents_of
from sft_lightning.data.batches.stream_loader import StreamLoader
from sft_lightning.data.batches.stream_source import SourceStream
from sft_lightning.data.batches.stream_windows import StreamWindows
from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_plan import Packing, Topology
from sft_lightning.data.plan.split_examples import LengthLimits
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.templates.binding import bind_template
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.types import Record, TokenizedExample

Row = list[TokenizedExample]


class Streaming:
    """Makes streams, windows and loaders over sources without files; a window has 16 rows, a step 4."""

    rows_per_step = 4
    rows_per_window = 16
    limits = LengthLimits(max_length=128)

    def __init__(self, builder: ExampleBuilder) -> None:
        self.builder = builder

    @staticmethod
    def limits_of(packing: Packing, max_length: int = 128) -> LengthLimits:
        return LengthLimits(max_length=max_length, cuts_examples=packing == "concat")

    def streams(
        self,
        sizes: dict[str, int],
        limits: LengthLimits = limits,
        builder: ExampleBuilder | None = None,
        **weights: float,
    ) -> list[SourceStream]:
        """A stream of each source, by name and number of records."""
        return [
            SourceStream(
                name, SourceConfig(path=str(size), weight=weights.get(name, 1.0)), builder or self.builder, limits
            )
            for name, size in sizes.items()
        ]

    def windows(self, streams: list[SourceStream], packing: Packing = "best_fit", **changes: Any) -> StreamWindows:
        options = {"max_length": 128, "rows_per_step": self.rows_per_step, "seed": 0, **changes}
        return StreamWindows(streams, BlendConfig(by=options.pop("by", "epochs")), packing=packing, **options)

    def loader(self, windows: StreamWindows, num_steps: int, topology: Topology | None = None) -> StreamLoader:
        """A loader whose batches are the documents themselves, and the step's denominator."""

        def collate(rows: Sequence[Sequence[Document]], denominator: float) -> Any:
            return [[document.tokens for document in row] for row in rows], denominator

        return StreamLoader(windows, topology or Topology(batch_size=self.rows_per_step), collate, num_steps)

    @staticmethod
    def steps(loader: StreamLoader) -> list[list[Row]]:
        return [rows for rows, _ in loader]

    @staticmethod
    def ids(steps: list[list[Row]]) -> list[Any]:
        return [[[document.input_ids.tolist() for document in row] for row in step] for step in steps]

    def texts(self, steps: list[list[Row]]) -> list[str]:
        """The instruction of each example, in the order of training."""
        documents = [document for step in steps for row in step for document in row]
        decoded = [self.builder.tokenizer.decode(document.input_ids) for document in documents]
        return [text.partition("Instruction:\n")[2].partition("\n")[0] for text in decoded]

    def documents(self, windows: StreamWindows, num_windows: int) -> Row:
        """The documents of all steps of the next windows."""
        made = [windows.next_window() for _ in range(num_windows)]
        rows = [
            row
            for window in made
            for row in documents_of(window.plan, range(window.num_steps * self.rows_per_step), window.examples)
        ]
        return [document.tokens for row in rows for document in row]

    def taken(self, windows: StreamWindows, limits: LengthLimits) -> Row:
        """The examples up to where the first source stands."""
        (cursor,) = windows.position()["cursors"]
        taken = []
        for reached, example in self.streams({"a": 10_000}, limits)[0].examples():
            taken.append(example)
            if reached == cursor:
                break
        return taken


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Streaming.rows_per_window
    monkeypatch.setattr(stream_windows, "rows_per_window", lambda step, _: -(-wanted // step) * step)


@pytest.fixture
def streaming(tokenizer: PreTrainedTokenizerFast) -> Streaming:
    builder = ExampleBuilder(tokenizer=tokenizer, template=bind_template("alpaca", tokenizer), loss_on="assistant")
    return Streaming(builder)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Sources without files: `path` says how many records there are; counts the records read of each."""
    counts: Counter[str] = Counter()

    def records(name: str, config: SourceConfig) -> Iterator[Record]:
        for i in range(int(config.path)):
            counts[name] += 1
            fields = {"instruction": f"{name} {i}", "output": f"{i}" + "." * (i * 7 % 23)}
            yield Record(fields=fields, source=name, location=f"{name}, record {i}")

    monkeypatch.setattr(stream_source, "read_records", records)
    return counts
