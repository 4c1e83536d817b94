from __future__ import annotations

from typing import Any

import pytest

from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.data.pairs.store import Shortening
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.errors import UserError


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss_on": "all"}, r"^data\.loss_on: all"),
        ({"packing": "concat"}, r"^data\.packing: concat"),
        ({"overlong": "truncate"}, r"truncate requires data\.max_prompt_length"),
        ({"max_prompt_length": 20}, r"set data\.overlong: truncate"),
        ({"overlong": "truncate", "max_prompt_length": 200}, r"must be at least 1 and below 200.* \(got 200\)"),
        ({"overlong": "truncate", "max_prompt_length": 0}, r"must be at least 1 and below 200.* \(got 0\)"),
        ({"sources": {"toy": SourceConfig(path="toy.json", streaming=True)}}, r"^data\.sources: .*remove `streaming`"),
        ({"max_length": 0}, r"^data\.max_length: must be at least 1"),
    ],
)
def test_keys_that_cannot_be_used_with_pairs_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PairDataSpec(**{"max_length": 400, **keys})


def test_each_answer_with_its_prompt_gets_half_of_the_row() -> None:
    assert PairDataSpec(max_length=401, overlong="truncate", max_prompt_length=50).shortening == Shortening(200, 50)
    assert PairDataSpec(max_length=400).shortening is None


def test_the_task_of_pairs_is_dpo() -> None:
    assert PairDataSpec().task == "dpo"
