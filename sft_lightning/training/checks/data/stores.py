"""A token store that was found, not built, has the tokens that its first records have now."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sft_lightning.checks import Check
from sft_lightning.data.batches.stream_source import join_batches
from sft_lightning.data.sources.source import SourceConfig, is_saved_dataset, read_records, source_files
from sft_lightning.data.tokens.record_log import RecordLog
from sft_lightning.training.checks.hooks import RunCheck

if TYPE_CHECKING:
    from sft_lightning.data.datamodule import SFTDataModule
    from sft_lightning.data.tokens.examples import ExampleBuilder
    from sft_lightning.data.tokens.store import TokenStore
    from sft_lightning.training.module import CausalLMModule

_RECORDS = 8
"""Records of each store to tokenize again."""

_LARGEST_JSON = 64 << 20
"""Bytes of a `.json` file that is read again: it is parsed as a whole, at about 100 MB a second."""


class FoundStores(RunCheck):
    """Tokenize the first records of every training store that was found."""

    def on_train_start(self, module: CausalLMModule) -> None:
        """Compare the stores with their sources."""
        module.checks.run(lambda: check_found_stores(module.data))


def check_found_stores(data: SFTDataModule) -> Check:
    """Check the stores of the training sources.

    Args:
        data: The data of the run, set up.
    """
    name = "token stores"
    if data.spec.streams:
        return Check(name, None, "streamed sources have no stores")
    if "strftime_now" in str(data.tokenizer.chat_template):
        return Check(name, None, "the template writes the date, which may be another one than when they were built")
    found = {
        key: each for key in data.spec.sources_of("train") if not (each := data.reader.prepare("train", key)).built
    }
    read = {key: config for key, config in data.spec.sources_of("train").items() if is_quick_to_read(key, config)}
    compared = [key for key in found if key in read]
    wrong = [key for key in compared if not has_first_records(found[key].store, key, read[key], data.builder)]
    if wrong:
        folder = found[wrong[0]].folder
        figure = f"data.sources.{wrong[0]}: the store {folder} has other tokens than its first records; delete it"
        return Check(name, False, figure)
    figure = f"{len(found)} found, {len(compared)} of them compared with their first {_RECORDS} records"
    return Check(name, True if compared else None, figure)


def has_first_records(store: TokenStore, name: str, config: SourceConfig, builder: ExampleBuilder) -> bool:
    """Whether a store begins with the tokens and loss weights of its source's first records, made again.

    Args:
        store: The store.
        name: The source's name in the YAML.
        config: The source.
        builder: Turns records into examples.
    """
    records = islice(read_records(name, config), _RECORDS)
    built = join_batches([batch for batch, _ in builder.build(records, config.format, config.path, RecordLog())])
    end = len(built.input_ids)
    return np.array_equal(store.input_ids[:end], built.input_ids) and np.array_equal(
        store.loss_weights[:end], built.loss_weights
    )


def is_quick_to_read(name: str, config: SourceConfig) -> bool:
    """Whether the first records of a source can be read again in about a second: not from the Hub or a large `.json`.

    Args:
        name: The source's name in the YAML.
        config: The source.
    """
    path = Path(config.path).expanduser()
    if not path.exists():
        return False
    if is_saved_dataset(path):
        return True
    return all(file.suffix != ".json" or file.stat().st_size <= _LARGEST_JSON for file in source_files(name, config))
