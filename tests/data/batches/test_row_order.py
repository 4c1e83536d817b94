from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sft_lightning.data.batches.row_order import check_row_order, decided_layout, row_order, row_order_error
from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_plan import Layout
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError


def order(
    *,
    packing: Any = "best_fit",
    rows_per_step: int = 8,
    tokens: str | None = "abc",
    chat_template: str = "{{ messages }}",
    **keys: Any,
) -> dict[str, Any]:
    spec = DataSpec(**{"sources": {"toy": SourceConfig(path="toy.json")}, **keys})
    layout = Layout(packing=packing)
    return row_order(spec, layout, rows_per_step=rows_per_step, tokens=tokens, chat_template=chat_template)


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"seed": 1}, "seed: 0 → 1"),
        ({"packing": "none"}, "packing: best_fit → none"),
        ({"max_length": 300}, "max_length: 2048 → 300"),
        ({"rows_per_step": 4}, r"global batch \(rows\): 8 → 4"),
        ({"blend": BlendConfig(by="tokens")}, "blend: epochs, temperature 1.0 → tokens, temperature 1.0"),
        (
            {"sources": {"toy": SourceConfig(path="toy.json", weight=2.0)}},
            r"weights: \[\(1.0, 1.0\)\] → \[\(2.0, 1.0\)\]",
        ),
        ({"tokens": "xyz"}, "data.sources: other tokens: abc → xyz"),
        ({"seed": 1, "tokens": "xyz"}, "seed: 0 → 1; data.sources: other tokens: abc → xyz"),
        ({"template": "alpaca", "chat_template": "b", "tokens": "xyz"}, "data.template: chat_template → alpaca"),
        ({"chat_template": "b"}, "text of data.template: [0-9a-f]+ → [0-9a-f]+"),
        ({"loss_on": "all", "tokens": "xyz"}, "data.loss_on: assistant → all"),
    ],
)
def test_a_checkpoint_of_other_rows_is_refused_with_what_changed(changes: dict[str, Any], changed: str) -> None:
    with pytest.raises(UserError, match=f"^--ckpt_path: .* different data settings: {changed}; restore"):
        check_row_order(order(), order(**changes))


def test_the_same_settings_are_the_same_rows() -> None:
    check_row_order(order(), order(batch_size=2, loss_on="all", val_fraction=0.1, template="moved/own.jinja"))


def test_a_checkpoint_of_an_earlier_release_lacks_some_settings() -> None:
    now = order()
    check_row_order({key: value for key, value in now.items() if not key.startswith("data.")}, now)


def test_streamed_sources_have_no_tokens_to_compare_so_loss_on_is() -> None:
    streamed = {"toy": SourceConfig(path="toy.json", streaming=True)}
    with pytest.raises(UserError, match=r"data\.loss_on: assistant → all"):
        check_row_order(order(sources=streamed), order(sources=streamed, loss_on="all"))


def test_a_run_that_reads_no_training_data_checks_nothing() -> None:
    check_row_order(order(), order(seed=1, tokens=None))


def test_streamed_sources_are_told_apart_by_what_decides_which_examples_are_seen() -> None:
    streamed = {"toy": SourceConfig(path="toy.json", streaming=True)}
    first = order(sources=streamed, tokens=None)
    assert first["tokens"] == "streamed: [('toy', None)], min_length 0, overlong error"
    with pytest.raises(UserError, match=r"min_length 0.* → .*min_length 5"):
        check_row_order(first, order(sources=streamed, tokens=None, min_length=5))


def test_the_layout_is_what_the_yaml_or_else_the_model_says() -> None:
    undecided, decided = SimpleNamespace(layout=None), SimpleNamespace(layout=Layout(packing="none"))
    assert decided_layout(undecided, "concat") == Layout(packing="concat")
    assert decided_layout(undecided, "auto") is None
    assert decided_layout(decided, "auto") == Layout(packing="none")
    assert decided_layout(None, "auto") == Layout(packing="best_fit")


def test_the_error_names_each_change() -> None:
    assert "settings: packing: best_fit → none; restore" in str(row_order_error(["packing: best_fit → none"]))
