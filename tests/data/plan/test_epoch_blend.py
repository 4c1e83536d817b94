from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_blend import EpochBlend
from sft_lightning.data.plan.split_examples import SplitExamples
from sft_lightning.data.sources.report import SourceReport
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.tokens.flat_examples import flat_examples
from sft_lightning.data.tokens.store import TokenStore
from sft_lightning.data.tokens.tokenization import TokenizedBatch
from sft_lightning.errors import UserError


def part(name: str, kept: list[int]) -> SplitExamples:
    """Examples of 10 tokens, of which `kept` are kept; all but the first token are supervised."""
    lengths = np.full(len(kept), 10)
    batch = TokenizedBatch(np.zeros(10 * len(kept), np.int32), np.ones(10 * len(kept), np.float32), lengths)
    store = TokenStore(**vars(flat_examples(batch)), records=np.arange(len(kept)), marks=np.zeros(len(kept), np.uint32))
    return SplitExamples(name, store, np.array(kept, np.int64), SourceReport("train"), content=name)


BIG, SMALL = part("big", [10] * 12), part("small", [10, 0, 5, 10])


def blend_of(weights: list[float], max_epochs: tuple[float, float] = (1.0, 1.0), **options: Any) -> EpochBlend:
    sources = [SourceConfig(path="x", weight=w, max_epochs=m) for w, m in zip(weights, max_epochs, strict=True)]
    return EpochBlend([BIG, SMALL], sources, BlendConfig(**options), seed=0)


def counts(blend: EpochBlend, epoch: int = 0) -> dict[int, int]:
    return dict(Counter(blend.epoch_examples(epoch).examples.tolist()))


def test_examples_are_numbered_through_the_sources_and_only_kept_ones_are_chosen() -> None:
    chosen = blend_of([1.0, 2.0]).epoch_examples(0)
    assert chosen.examples.tolist() == [*range(12), 12, 12, 14, 14, 15, 15]
    assert chosen.sources.tolist() == [0] * 12 + [1] * 6
    assert chosen.lengths[-6:].tolist() == [10, 10, 5, 5, 10, 10]


def test_with_half_a_pass_two_epochs_have_each_example_once() -> None:
    blend = blend_of([0.5, 1.0])
    first, second = (set(counts(blend, epoch)) & set(range(12)) for epoch in (0, 1))
    assert (len(first), len(second), first | second) == (6, 6, set(range(12)))
    assert not blend.repeats
    assert blend_of([1.0, 2.0]).repeats


def test_max_epochs_lets_a_small_source_be_seen_again() -> None:
    once, thrice = (blend_of([1, 1], (1.0, cap), by="tokens") for cap in (1.0, 3.0))
    assert once.passes == pytest.approx([25 / 120, 1.0])
    assert thrice.passes == pytest.approx([75 / 120, 3.0])


@pytest.mark.parametrize(
    ("by", "unit", "amounts"),
    [
        ("epochs", "tokens", [10, 0, 5, 10]),
        ("tokens", "tokens", [10, 0, 5, 10]),
        ("supervised_tokens", "supervised_tokens", [9, 0, 4, 9]),
        ("examples", "examples", [1, 0, 1, 1]),
    ],
)
def test_amounts_are_in_the_unit_of_the_shares(by: Any, unit: str, amounts: list[int]) -> None:
    blend = blend_of([1, 1], by=by)
    assert blend.unit == unit
    assert blend.all_examples.amounts[12:].tolist() == amounts


def test_the_wanted_shares_are_those_of_the_weights() -> None:
    assert blend_of([3, 1], by="tokens").wanted_shares() == pytest.approx([0.75, 0.25])
    assert blend_of([1, 1]).wanted_shares() == pytest.approx([120 / 145, 25 / 145])


def test_a_source_without_examples_takes_no_part() -> None:
    sources = [SourceConfig(path="x", weight=5.0), SourceConfig(path="x")]
    blend = EpochBlend([part("empty", [0, 0]), BIG], sources, BlendConfig(by="tokens"), seed=0)
    assert blend.passes == [0.0, 1.0]
    assert blend.epoch_examples(0).examples.tolist() == list(range(2, 14))


def test_a_weight_that_leaves_a_source_without_an_example_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.sources\.small\.weight: 0\.001 of 3 examples is less than one"):
        blend_of([1.0, 0.001])
