"""A source's token store: found by what went into it, or built.

The key is made of everything that decides the tokens: the bytes of the files, the template, the tokenizer, the options
of reading and of the loss, and our own code. Nothing that only decides what is done with the tokens is in it
(`max_length`, packing, blend, seed, split), so changing those tokenizes nothing.

Whoever needs a store takes its file lock. Who gets it first builds; the others find the store when they get the lock.
That is how two runs, or all ranks of one, come to the same store: without a process group, however long it takes. The
lock of a process that died is free again, and what it left half-written is thrown away.
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers
import xxhash
from filelock import FileLock

from sft_lightning.data.formats.deepspeed_chat import dataset_format
from sft_lightning.data.formats.user_format import is_dotted_path, user_function
from sft_lightning.data.sources.source import SourceConfig, is_saved_dataset, load_dataset, read_records, source_files
from sft_lightning.data.templates.named import NamedTemplate
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.record_log import RecordLog
from sft_lightning.data.tokens.store import DamagedStoreError, StoreWriter, TokenStore, hash_file, open_store

logger = logging.getLogger(__name__)

TOKENIZATION_VERSION = 1
"""Part of every store's key: raise it with any change of this package that changes a record's tokens or weights."""


@dataclass(frozen=True)
class Prepared:
    """A source, tokenized."""

    folder: Path
    """Where it lies."""

    store: TokenStore
    facts: dict[str, Any]
    """The store's manifest: what it was made of, and what became of the records."""

    built: bool
    """Whether it was built now, not found."""

    moved: bool = False
    """Whether its files had other names when it was built, so that the places in `facts` are theirs."""

    @property
    def num_records(self) -> int:
        """Records that the source has."""
        return len(self.store.marks)


def default_store_dir() -> Path:
    """Return where token stores lie unless `data.store_dir` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft_lightning" / "stores"


def prepare_source(
    name: str, config: SourceConfig, builder: ExampleBuilder, root: Path, *, rebuild: bool = False
) -> Prepared:
    """Return a source's token store, built if there is none, or none that is whole.

    Args:
        name: The source's name in the YAML.
        config: The source.
        builder: What makes examples.
        root: Folder of token stores.
        rebuild: Build even if there is one.

    Raises:
        UserError: If the source cannot be read.
    """
    inputs = _inputs(name, config, builder)
    key = xxhash.xxh3_128(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = root / key
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{key}.lock"):
        if not rebuild:
            found = _find(name, config, folder)
            if found is not None:
                return found
        _build(name, config, builder, folder, inputs)
        store, facts = open_store(folder)
        return Prepared(folder, store, facts, built=True)


def _find(name: str, config: SourceConfig, folder: Path) -> Prepared | None:
    try:
        store, facts = open_store(folder)
    except FileNotFoundError:
        return None
    except DamagedStoreError as error:
        logger.warning("data.sources.%s: the token store %s is damaged (%s) and is built again", name, folder, error)
        return None
    return Prepared(folder, store, facts, built=False, moved=facts.get("places") != _places(name, config))


def _build(name: str, config: SourceConfig, builder: ExampleBuilder, folder: Path, inputs: dict[str, Any]) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed: we have its lock
    writer = StoreWriter(partial)
    log = RecordLog()
    # A full collection looks at every object of torch and transformers again; frozen, only at those of this build.
    gc.freeze()
    try:
        for batch, records in builder.build(read_records(name, config), config.format, config.path, log):
            writer.append(batch, records)
        writer.finish(log.marks_array(), {"inputs": inputs, "places": _places(name, config), **log.facts()})
    except BaseException:
        writer.abandon()
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        gc.unfreeze()
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _inputs(name: str, config: SourceConfig, builder: ExampleBuilder) -> dict[str, Any]:
    """Return everything that decides the tokens of a source."""
    return {
        "content": _content(name, config),
        "format": config.format or dataset_format(config.path),
        "user_format": _user_code(name, config.format),
        "columns": config.columns,
        "max_examples": config.max_examples,
        "template": _template(builder),
        "tokenizer": builder.tokenizer_checksum,
        "loss_on": builder.loss_on,
        "malformed": builder.malformed,
        "code": _versions(),
    }


def _content(name: str, config: SourceConfig) -> Sequence[str]:
    path = Path(config.path).expanduser()
    if _is_files(path):
        return [f"{''.join(file.suffixes)} {hash_file(file)}" for file in source_files(name, config)]
    if path.exists():
        return [str(config.split), *(hash_file(file) for file in sorted(path.rglob("*")) if file.is_file())]
    return [str(load_dataset(name, config)._fingerprint)]


def _places(name: str, config: SourceConfig) -> list[str]:
    """Return what the locations of a source's records begin with."""
    path = Path(config.path).expanduser()
    return [str(file) for file in source_files(name, config)] if _is_files(path) else [config.path]


def _is_files(path: Path) -> bool:
    return path.exists() and not is_saved_dataset(path)


def _user_code(name: str, format_name: str | None) -> str | None:
    """Return the source text of the module that a user's own format is in."""
    if format_name is None or not is_dotted_path(format_name):
        return None
    module = inspect.getmodule(user_function(format_name, name))
    return inspect.getsource(module) if module is not None else None


def _template(builder: ExampleBuilder) -> str:
    template = builder.template
    if isinstance(template, NamedTemplate):
        return f"{template.name} {template.tokens}"
    return f"{template.name} {builder.tokenizer.chat_template}"


@functools.cache
def _versions() -> str:
    libraries = [f"{library.__name__} {library.__version__}" for library in (tokenizers, jinja2, transformers)]
    return " ".join([f"tokenization {TOKENIZATION_VERSION}", *libraries])
