from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.pairs.examples import PairBuilder
from sft_lightning.data.pairs.reader import PairReader
from sft_lightning.data.pairs.store import PairExample, Shortening
from sft_lightning.data.plan.split_examples import LengthLimits
from sft_lightning.data.plan.split_reader import SplitOptions
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.templates.binding import bind_template
from sft_lightning.errors import UserError

ROWS = [{"prompt": f"q{i}", "chosen": "good " * (i + 1), "rejected": "bad " * (2 * i + 1)} for i in range(8)]
Read = Callable[..., PairReader]


@pytest.fixture
def read(tokenizer: PreTrainedTokenizerFast, write_json: Any, tmp_path: Path) -> Read:
    """A reader of eight training pairs."""
    source = SourceConfig(path=str(write_json("pairs.json", ROWS)))

    def make(shortening: Shortening | None = None, max_length: int = 2000, **options: Any) -> PairReader:
        builder = PairBuilder(tokenizer=tokenizer, template=bind_template("alpaca", tokenizer), loss_on="assistant")
        limits = LengthLimits(max_length=max_length)
        return PairReader({"train": {"toy": source}}, SplitOptions(**options), builder, limits, tmp_path, shortening)

    return make


def test_an_example_is_a_pair_of_both_conversations(read: Read) -> None:
    [part] = read().examples("train")
    assert (part.report.records, part.report.examples) == (8, 8)
    pair = part.store.example(3, 0, int(part.kept[3]))
    assert isinstance(pair, PairExample)
    assert [half.document_length for half in pair.halves()] == [pair.num_chosen, int(part.kept[3]) - pair.num_chosen]


def test_the_length_of_a_pair_is_that_of_both_conversations(read: Read) -> None:
    [part] = read().examples("train")
    longest = int(part.kept.max())
    assert read(max_length=longest).examples("train")[0].report.examples == 8
    with pytest.raises(UserError, match=rf"{longest} tokens, but data\.max_length is {longest - 1}"):
        read(max_length=longest - 1).examples("train")


def test_shortened_pairs_are_counted_and_have_another_content(read: Read) -> None:
    [whole] = read().examples("train")
    [part] = read(Shortening(40, 10)).examples("train")
    assert 0 < part.report.truncated <= part.report.examples
    assert part.report.supervised_tokens < whole.report.supervised_tokens
    assert part.report.supervised_tokens_lost == whole.report.supervised_tokens - part.report.supervised_tokens
    assert part.report.longest == whole.report.longest  # before any cut
    assert part.content != whole.content


def test_held_out_pairs_share_the_store_of_the_training_pairs(read: Read) -> None:
    reader = read(val_fraction=0.25)
    [training], [held_out] = reader.examples("train"), reader.examples("val")
    assert (training.report.examples, held_out.report.examples) == (6, 2)
    assert training.store is held_out.store
    assert not set(training.indices) & set(held_out.indices)
