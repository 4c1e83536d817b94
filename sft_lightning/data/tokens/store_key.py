"""What decides the tokens of a source: the parts of its store's key, and how the parts of two stores differ.

The parts are the bytes of the data, the template, the tokenizer, the options of reading and of the loss, the code of a
user's own format, and the versions of the software. What only decides how tokens are used (`max_length`, packing,
blend, seed, `val_fraction`, `data_split`) is not a part, so changing it tokenizes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers
import xxhash

from sft_lightning.compat.data_libraries import content_fingerprint
from sft_lightning.data.formats.deepspeed_chat import dataset_format
from sft_lightning.data.formats.user_format import is_dotted_path
from sft_lightning.data.formats.user_modules import source_hashes
from sft_lightning.data.sources.source import SourceConfig, is_saved_dataset, load_dataset, source_files
from sft_lightning.data.templates.jinja import JinjaTemplate
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.store import hash_file
from sft_lightning.errors import few

TOKENIZATION_VERSION = 2
"""Raise it with every change of this package that changes the tokens or loss weights of a record.

It is a part of every store's key. `tests/data/tokens/test_golden_tokens.py` fails when it should have been raised.
"""

Parts = dict[str, Any]
"""The parts of a key by name, as JSON values."""

_FORMAT, _TEMPLATE, _TOKENIZER, _SOFTWARE = "format", "template", "tokenizer", "software"
_CODE_OF_FORMAT, _TEXT_OF_TEMPLATE, _DATA = "format_code", "template_text", "data"


def key_parts(name: str, config: SourceConfig, builder: ExampleBuilder) -> Parts:
    """Return everything that decides the tokens of a source.

    Args:
        name: The source's name in the YAML, for messages.
        config: The source.
        builder: Turns records into examples.

    Raises:
        UserError: If the source cannot be read.
    """
    return {
        _DATA: _content(name, config),
        _FORMAT: config.format or dataset_format(config.path),
        _CODE_OF_FORMAT: _format_code(name, config.format),
        "columns": config.columns,
        "max_examples": config.max_examples,
        _TEMPLATE: builder.template.name,
        _TEXT_OF_TEMPLATE: _template_text(builder),
        _TOKENIZER: builder.tokenizer_checksum,
        "loss_on": builder.loss_on,
        "malformed": builder.malformed,
        _SOFTWARE: _versions(),
    }


def key_of(parts: Parts) -> str:
    """Return the hash that names a store, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def source_identity(name: str, config: SourceConfig) -> dict[str, str | None]:
    """Return what two stores of one source have in common although their keys differ.

    Args:
        name: The source's name in the YAML.
        config: The source.
    """
    path = Path(config.path).expanduser()
    where = str(path.resolve()) if path.exists() else config.path
    return {"name": name, "path": where, "subset": config.subset, "split": config.split}


def source_paths(name: str, config: SourceConfig) -> list[str]:
    """Return the paths that the locations of a source's records begin with: its files, or its own path.

    Args:
        name: The source's name in the YAML, for messages.
        config: The source.
    """
    path = Path(config.path).expanduser()
    return [str(file) for file in source_files(name, config)] if _is_files(path) else [config.path]


def differences(old: Parts, new: Parts, old_paths: Sequence[str], new_paths: Sequence[str]) -> list[str]:
    """Return what changed between two stores of one source: `template changed: alpaca → vicuna_v1.1`.

    Args:
        old: The parts of the earlier store.
        new: The parts now.
        old_paths: The `source_paths` of the earlier store.
        new_paths: The `source_paths` now.
    """
    changed = [part for part in new if old.get(part) != new[part]]
    if _TEMPLATE in changed or _TOKENIZER in changed:
        changed = [part for part in changed if part != _TEXT_OF_TEMPLATE]  # it follows from these
    if _FORMAT in changed:
        changed = [part for part in changed if part != _CODE_OF_FORMAT]
    found: list[str] = []
    for part in changed:
        before, now = old.get(part), new[part]
        if part == _DATA:
            found.append(_data_difference(before or [], now, old_paths, new_paths))
        elif part == _SOFTWARE:
            found += [f"{name} changed: {_shown(was)} → {_shown(is_)}" for name, was, is_ in _changes(before, now)]
        elif part == _CODE_OF_FORMAT:
            found.append(f"code of the format changed: {', '.join(name for name, _, _ in _changes(before, now))}")
        elif part in (_TOKENIZER, _TEXT_OF_TEMPLATE):
            found.append("tokenizer changed" if part == _TOKENIZER else f"text of template {new[_TEMPLATE]} changed")
        else:
            found.append(f"{part} changed: {_shown(before)} → {_shown(now)}")
    return found


def _data_difference(old: Sequence[str], new: Sequence[str], old_paths: Sequence[str], new_paths: Sequence[str]) -> str:
    if list(old_paths) != list(new_paths):
        return f"data changed: {', '.join(old_paths[:3])} → {', '.join(new_paths[:3])}"
    if len(old) != len(new) or len(new) != len(new_paths):  # a data set of `datasets`, in files of its own
        return "data changed"
    files = [path for path, was, is_ in zip(new_paths, old, new, strict=True) if was != is_]
    return f"data changed: {few(files)}"


def _changes(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """Return name, old and new value of what differs."""
    before, now = old or {}, new or {}
    names = sorted({*before, *now})
    return [(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value)


def _content(name: str, config: SourceConfig) -> list[str]:
    """Return a hash of each file of a source, or what tells its version on the Hub."""
    path = Path(config.path).expanduser()
    if _is_files(path):
        return [f"{''.join(file.suffixes)} {hash_file(file)}" for file in source_files(name, config)]
    if path.exists():
        return [str(config.split), *(hash_file(file) for file in sorted(path.rglob("*")) if file.is_file())]
    return [content_fingerprint(load_dataset(name, config))]


def _is_files(path: Path) -> bool:
    return path.exists() and not is_saved_dataset(path)


def _format_code(name: str, format_name: str | None) -> dict[str, str] | None:
    """Return hashes of the code of a user's own format."""
    if format_name is None or not is_dotted_path(format_name):
        return None
    return source_hashes(format_name, name)


def _template_text(builder: ExampleBuilder) -> str | None:
    """Return a hash of a Jinja template; a named template is identified by its name and `TOKENIZATION_VERSION`."""
    if not isinstance(builder.template, JinjaTemplate):
        return None
    return xxhash.xxh3_128_hexdigest(str(builder.tokenizer.chat_template).encode())


def _versions() -> dict[str, Any]:
    libraries = {library.__name__: library.__version__ for library in (tokenizers, jinja2, transformers)}
    return {"tokenization of sft_lightning": TOKENIZATION_VERSION, **libraries}
