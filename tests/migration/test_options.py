from __future__ import annotations

import pytest

from sft_lightning.errors import UserError
from sft_lightning.migration.arguments import GivenOptions
from sft_lightning.migration.draft import Draft
from sft_lightning.migration.options import Options, System, as_number, combined, copied, omitted, translate

KNOWN = (
    copied("rank", "model.adapter.r", "number", default="8"),
    copied("targets", "model.adapter.target_modules", "commas"),
    copied("names", "model.adapter.modules_to_save", "words"),
    copied("checkpointing", "model.gradient_checkpointing", "flag"),
    combined("dtype", "model.dtype"),
    omitted("cache_dir", "set HF_HOME"),
)


def finish(options: Options, draft: Draft) -> None:
    draft.set("model.dtype", options.text("dtype") or "float32")


SYSTEM = System(name="own", title="Own", source="", options=KNOWN, finish=finish)


def test_values_are_read_as_their_kind() -> None:
    given = {"targets": ["q_proj,v_proj"], "names": ["a", "b"], "checkpointing": [], "rank": ["16"]}
    values = translate(SYSTEM, GivenOptions(given)).values
    assert values == {
        "model.adapter.r": 16,
        "model.adapter.target_modules": ["q_proj", "v_proj"],
        "model.adapter.modules_to_save": ["a", "b"],
        "model.gradient_checkpointing": True,
        "model.dtype": "float32",
    }


def test_a_default_of_the_system_is_written_out_with_a_comment() -> None:
    draft = translate(SYSTEM, GivenOptions({"dtype": ["bfloat16"]}))
    assert draft.values == {"model.adapter.r": 8, "model.dtype": "bfloat16"}
    assert draft.comments == {"model.adapter.r": "Own's default"}


def test_omitted_and_unknown_options_are_listed_with_a_reason() -> None:
    draft = translate(SYSTEM, GivenOptions({"cache_dir": ["cache"], "colour": ["red"]}))
    assert draft.omitted == [("--cache_dir cache", "set HF_HOME"), ("--colour red", "not a known option of Own")]


def test_an_unset_variable_is_no_number() -> None:
    draft = translate(SYSTEM, GivenOptions({"rank": ["$RANK"]}))
    assert "model.adapter.r" not in draft.values
    assert draft.omitted[0][0] == "--rank $RANK"


@pytest.mark.parametrize(("text", "number"), [("8", 8), ("1e-4", 1e-4), ("0.0", 0.0), ("1e3", 1000.0)])
def test_a_number_is_an_integer_if_it_is_written_like_one(text: str, number: float) -> None:
    assert repr(as_number("lr", text)) == repr(number)


def test_a_value_that_is_no_number_is_a_user_error() -> None:
    with pytest.raises(UserError, match="--lr: 'high' is not a number"):
        as_number("lr", "high")
