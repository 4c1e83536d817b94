"""A few short rows of the user's data, for short runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_plan import Packing
from sft_lightning.data.sources.source import SourceConfig, read_records
from sft_lightning.errors import UserError

ROWS_WANTED = 4
"""Number of rows that an epoch of the short runs should have."""

_EXAMPLES_WANTED = 16
"""Number of examples, over all sources."""


@dataclass(frozen=True)
class SmallData:
    """The first records of each source, in short rows."""

    origin: SFTDataModule
    """The data of the configuration."""

    sources: Mapping[str, SourceConfig]
    """The sources by name, limited to their first records."""

    row_length: int
    """Most tokens per row; longer examples are truncated."""

    folder: Path
    """Folder for token stores."""

    def module(self, *, batch_size: int, packing: Packing) -> SFTDataModule:
        """Return the data of a run on these rows.

        Args:
            batch_size: Rows per micro-batch.
            packing: `data.packing` of the run.
        """
        return _data_module(self.origin, self.sources, self.row_length, self.folder, batch_size, packing)

    def num_rows(self, packing: Packing) -> int:
        """Return the number of rows of an epoch."""
        data = self.module(batch_size=1, packing=packing)
        data.setup("fit")
        return data.plan(0).num_rows


def small_data(origin: SFTDataModule, folder: Path, *, max_row_length: int) -> SmallData:
    """Return the first records of each source in rows so short that an epoch has about four rows.

    Args:
        origin: The data of the configuration.
        folder: Folder for token stores, and for the records of streamed sources.
        max_row_length: Most tokens per row; longer examples are truncated.

    Raises:
        UserError: If there are no sources, or no examples in their first records.
    """
    named = origin.spec.sources_of("train")
    if not named:
        raise UserError("data.sources: selftest needs at least one source; add one")
    each = max(1, _EXAMPLES_WANTED // len(named))
    sources = {name: _first_records(origin, name, config, each, folder) for name, config in named.items()}
    limit = min(max_row_length, origin.spec.max_length)
    probe = _data_module(origin, sources, limit, folder, 1, "none")
    probe.setup("fit")
    lengths = probe.plan(0).rows.lengths
    wanted = max(int(lengths.max()), math.ceil(int(lengths.sum()) / ROWS_WANTED))
    return SmallData(origin, sources, min(limit, wanted), folder)


def _first_records(origin: SFTDataModule, name: str, config: SourceConfig, limit: int, folder: Path) -> SourceConfig:
    limit = min(limit, config.max_examples or limit)
    few = replace(config, max_examples=limit, weight=1.0, max_epochs=1.0)
    if not config.streaming:
        return few
    records = list(read_records(name, few))
    if not records:
        raise UserError(f"data.sources.{name}.path: {config.path!r} holds no records; selftest needs at least one")
    file = folder / "records" / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dict(record.fields), ensure_ascii=False, default=str) for record in records]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return SourceConfig(path=str(file), format=origin.builder.format_of(records[0], config.format, config.path))


def _data_module(
    origin: SFTDataModule,
    sources: Mapping[str, SourceConfig],
    row_length: int,
    folder: Path,
    batch_size: int,
    packing: Packing,
) -> SFTDataModule:
    pair_keys: dict[str, Any] = (
        {"max_prompt_length": max(1, row_length // 4)} if isinstance(origin.spec, PairDataSpec) else {}
    )
    spec = replace(
        origin.spec,
        sources=dict(sources),
        val_sources=None,
        val_fraction=0.0,
        test_sources=None,
        predict_sources=None,
        blend=BlendConfig(),
        data_split=None,
        data_split_part=0,
        compat=None,
        max_length=row_length,
        min_length=0,
        overlong="truncate",
        packing=packing,
        batch_size=batch_size,
        store_dir=str(folder / "stores"),
        **pair_keys,
    )
    return origin.with_spec(spec)
