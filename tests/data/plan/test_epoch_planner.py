from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_blend import EpochBlend
from sft_lightning.data.plan.epoch_planner import EpochPlanner
from sft_lightning.data.plan.split_examples import SplitExamples
from sft_lightning.data.sources.report import DataReport, SourceReport
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.tokens.flat_examples import flat_examples
from sft_lightning.data.tokens.store import TokenStore
from sft_lightning.data.tokens.tokenization import TokenizedBatch


def part(name: str, count: int, *, seed: int = 0, longest: int = 60) -> SplitExamples:
    """Examples of random lengths, half of each supervised."""
    lengths = np.random.default_rng(seed).integers(4, longest, count)
    weights = np.concatenate([np.arange(n) >= n // 2 for n in lengths] or [np.zeros(0)]).astype(np.float32)
    batch = TokenizedBatch(np.zeros(int(lengths.sum()), np.int32), weights, lengths)
    store = TokenStore(**vars(flat_examples(batch)), records=np.arange(count), marks=np.zeros(count, np.uint32))
    return SplitExamples(name, store, lengths, SourceReport("train"), content=f"{name} {seed}")


def planner(parts: list[SplitExamples], weights: list[float], **options: Any) -> EpochPlanner:
    caps = options.pop("max_epochs", [1.0] * len(parts))
    sources = [SourceConfig(path="x", weight=w, max_epochs=m) for w, m in zip(weights, caps, strict=True)]
    blend = BlendConfig(by=options.pop("by", "epochs"), temperature=options.pop("temperature", 1.0))
    seed = options.pop("seed", 0)
    defaults = {"packing": "best_fit", "max_length": 64, "rows_per_step": 4, "seed": seed}
    return EpochPlanner(EpochBlend(parts, sources, blend, seed), **{**defaults, **options})


BIG, SMALL = part("big", 300), part("small", 40, seed=1)


def seen(made: EpochPlanner, epoch: int) -> list[Counter[int]]:
    """How often each example of each source is in an epoch."""
    examples = made.plan(epoch).documents[:, 0]
    sides = [examples[examples < 300], examples[examples >= 300] - 300]
    return [Counter(side.tolist()) for side in sides]


def test_by_epochs_weights_are_passes() -> None:
    big, small = seen(planner([BIG, SMALL], [1.0, 3.0]), 0)
    assert big == dict.fromkeys(range(300), 1)
    assert small == dict.fromkeys(range(40), 3)


@pytest.mark.parametrize("by", ["examples", "tokens", "supervised_tokens"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [9.0, 1.0]])
def test_the_first_epoch_has_the_shares_that_the_weights_ask_for(by: str, weights: list[float]) -> None:
    made = planner([BIG, SMALL], weights, by=by)
    report = DataReport(sources={"train/big": BIG.report, "train/small": SMALL.report}, max_length=64)
    made.report(report)
    assert (report.blend_unit, report.rows) == (by, made.plan(0).num_rows)
    assert report.optimizer_steps == made.plan(0).num_steps == -(-report.rows // 4)
    assert report.largest_deviation <= 1
    shares = np.array(weights) / sum(weights)
    for source, share in zip((BIG, SMALL), shares.tolist(), strict=True):
        assert source.report.wanted == pytest.approx(share)
        assert source.report.delivered == pytest.approx(share, abs=0.03)
    amounts = [each.amounts(by) for each in (BIG, SMALL)]  # type: ignore[arg-type]
    delivered = [
        sum(float(amount[i]) * times for i, times in each.items())
        for amount, each in zip(amounts, seen(made, 0), strict=True)
    ]
    assert BIG.report.delivered == pytest.approx(delivered[0] / sum(delivered))
    if by != "supervised_tokens":
        assert BIG.report.delivered == pytest.approx(shares[0], abs=max(a.max() for a in amounts) / sum(delivered))


def test_fill_is_the_tokens_over_rows_times_max_length() -> None:
    made = planner([BIG], [1.0])
    report = DataReport(sources={"train/big": BIG.report})
    made.report(report)
    assert report.fill == pytest.approx(BIG.kept.sum() / (made.plan(0).num_rows * 64))
    assert (BIG.report.wanted, BIG.report.delivered) == (1.0, 1.0)


def test_with_half_a_pass_two_epochs_have_each_example_once() -> None:
    made = planner([BIG, SMALL], [1.0, 0.5])
    first, second = seen(made, 0)[1], seen(made, 1)[1]
    assert first + second == dict.fromkeys(range(40), 1)
    assert not made.blend.repeats
    assert planner([BIG, SMALL], [1.0, 2.0]).blend.repeats


def test_each_epoch_has_its_own_order_which_the_seed_decides() -> None:
    made, again, other = (planner([BIG, SMALL], [1, 1], seed=seed) for seed in (0, 0, 1))
    assert made.plan(0).documents.tolist() == again.plan(0).documents.tolist()
    assert made.plan(0).documents.tolist() != made.plan(1).documents.tolist()
    assert made.plan(0).documents.tolist() != other.plan(0).documents.tolist()


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_the_weights_of_the_steps_add_up_to_the_weights_of_the_examples(packing: str) -> None:
    made = planner([BIG, SMALL], [1, 1], packing=packing)
    total = sum(made.plan(0).step_weight(step) for step in range(made.plan(0).num_steps))
    expected = BIG.store.weights.sum() + SMALL.store.weights.sum()
    if packing == "concat":  # a document's first token has no loss, so a cut inside an answer loses one
        assert expected - made.plan(0).num_rows <= total <= expected
    else:
        assert total == expected


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_a_source_without_examples_takes_no_part(packing: str) -> None:
    empty = part("empty", 0)
    made = planner([empty, BIG], [5.0, 1.0], by="tokens", packing=packing)
    assert made.blend.passes == [0.0, 1.0]
    report = DataReport(sources={"train/empty": empty.report, "train/big": BIG.report})
    made.report(report)
    assert (empty.report.delivered, BIG.report.delivered) == (0.0, 1.0)


def test_a_last_source_without_examples_takes_no_part() -> None:
    empty = part("empty", 0)
    made = planner([BIG, empty], [1.0, 5.0])
    report = DataReport(sources={"train/empty": empty.report, "train/big": BIG.report})
    made.report(report)
    assert (empty.report.delivered, BIG.report.delivered) == (0.0, 1.0)
