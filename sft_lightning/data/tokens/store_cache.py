"""A source's token store: found by its key, or built.

`store_key` says what the key is made of. A process that needs a store takes the store's file lock. The first process
builds the store; the others find it when they get the lock. So two runs, or all ranks of one, share one build without a
process group, however long it takes. When a process dies, its lock is free again, and the next one deletes what it left
half-written.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from sft_lightning.data.sources.source import SourceConfig, read_records
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.record_log import RecordLog
from sft_lightning.data.tokens.store import MANIFEST, DamagedStoreError, StoreWriter, TokenStore, open_store
from sft_lightning.data.tokens.store_key import differences, key_of, key_parts, source_identity, source_paths

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
"""Ending of the folder in which a store is being built."""


@dataclass(frozen=True)
class Prepared:
    """The token store of a source."""

    folder: Path
    """The store's folder."""

    store: TokenStore
    """The store, mapped into memory."""

    facts: dict[str, Any]
    """The store's manifest: what it was made of, and what happened to the records."""

    built: bool
    """Whether it was built now, not found."""

    moved: bool = False
    """Whether its files had other names when it was built, so that the locations in `facts` are out of date."""

    reason: str = ""
    """Why it was rebuilt; empty if it was found, or if there was no earlier store of the source."""

    @property
    def num_records(self) -> int:
        """Number of records of the source."""
        return len(self.store.marks)

    @property
    def origin(self) -> str:
        """Whether it was found or built, and why it was rebuilt."""
        if not self.built:
            return "found"
        return f"rebuilt because {self.reason}" if self.reason else "built now"


def default_store_dir() -> Path:
    """Return the folder of token stores that is used unless `data.store_dir` is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft_lightning" / "stores"


def prepare_source(
    name: str, config: SourceConfig, builder: ExampleBuilder, root: Path, *, rebuild: bool = False
) -> Prepared:
    """Return a source's token store; build it if there is none, or if it is damaged.

    Args:
        name: The source's name in the YAML.
        config: The source.
        builder: Turns records into examples.
        root: Folder of token stores.
        rebuild: Build the store even if there is one.

    Raises:
        UserError: If the source cannot be read.
    """
    parts = key_parts(name, config, builder)
    made_of = {
        "source": source_identity(name, config),
        "parts": parts,
        "paths": source_paths(name, config),
    }
    folder = root / key_of(parts)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        reason = "--rebuild was given"
        if not rebuild:
            try:
                store, facts = open_store(folder)
                return Prepared(folder, store, facts, built=False, moved=facts.get("paths") != made_of["paths"])
            except FileNotFoundError:
                reason = _changes(root, made_of)
            except DamagedStoreError as error:
                reason = f"the store is damaged: {error}"
            if reason:
                logger.warning("data.sources.%s: the token store is rebuilt because %s", name, reason)
        _build(name, config, builder, folder, made_of)
        store, facts = open_store(folder)
        return Prepared(folder, store, facts, built=True, reason=reason)


def _build(name: str, config: SourceConfig, builder: ExampleBuilder, folder: Path, made_of: dict[str, Any]) -> None:
    partial = folder.with_suffix(_PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # left by a build that was killed: this process has its lock
    writer = StoreWriter(partial)
    log = RecordLog()
    # A full collection would visit every object of torch and transformers again; frozen objects are not visited.
    gc.freeze()
    try:
        for batch, records in builder.build(read_records(name, config), config.format, config.path, log):
            writer.append(batch, records)
        writer.finish(log.marks_array(), {**made_of, **log.facts()})
    except BaseException:
        writer.abandon()
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        gc.unfreeze()
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _changes(root: Path, made_of: dict[str, Any]) -> str:
    """Return what changed since the most similar store of the same source was built; empty if there is none."""
    old_version = False
    nearest: list[str] = []
    for manifest in _manifests(root):
        if manifest.get("source") == made_of["source"]:
            changes = differences(manifest["parts"], made_of["parts"], manifest.get("paths", []), made_of["paths"])
            if changes and (not nearest or len(changes) < len(nearest)):
                nearest = changes
        elif "source" not in manifest and manifest.get("places") == made_of["paths"]:
            old_version = True
    if nearest:
        return "; ".join(nearest)
    return "the earlier store was built by an older version of sft_lightning" if old_version else ""


def _manifests(root: Path) -> Iterator[dict[str, Any]]:
    """Yield the manifests of all stores, the latest first."""
    files = [file for file in root.glob(f"*/{MANIFEST}") if file.parent.suffix != _PARTIAL]
    for file in sorted(files, key=_time, reverse=True):
        try:
            manifest = json.loads(file.read_bytes())
        except (OSError, ValueError):
            continue  # another store, deleted meanwhile or damaged: it says nothing about this one
        if isinstance(manifest, dict):
            yield manifest


def _time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
