from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.templates.binding import bind_template
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.store_cache import Prepared, prepare_source

BUILDER_OPTIONS = ("loss_on", "malformed")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "stores"


@pytest.fixture
def prepare(alpaca_file: Path, root: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Prepared]:
    """Prepare the Alpaca file, with other options of the source, the template or the builder."""

    def run(
        *,
        name: str = "toy",
        template: str = "alpaca",
        tokenizer: Any = tokenizer,
        rebuild: bool = False,
        **changes: Any,
    ) -> Prepared:
        tokenizer = copy.deepcopy(tokenizer)
        options = {"loss_on": "assistant", **{k: v for k, v in changes.items() if k in BUILDER_OPTIONS}}
        source = {"path": str(alpaca_file), **{k: v for k, v in changes.items() if k not in BUILDER_OPTIONS}}
        builder = ExampleBuilder(tokenizer=tokenizer, template=bind_template(template, tokenizer), **options)
        return prepare_source(name, SourceConfig(**source), builder, root, rebuild=rebuild)

    return run
