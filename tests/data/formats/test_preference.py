from __future__ import annotations

from typing import Any

import pytest

from sft_lightning.data.formats.fields import Malformed
from sft_lightning.data.formats.preference import preference_pair
from sft_lightning.data.formats.registry import to_messages
from sft_lightning.types import Message, Record

Q, GOOD, BAD = Message("user", "q"), Message("assistant", "good"), Message("assistant", "bad")
ASKED = {"role": "user", "content": "q"}
BETTER, WORSE = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


def record(**fields: Any) -> Record:
    return Record(fields, "s", "f.json, record 0")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [ASKED], "chosen": "good", "rejected": "bad"},
        {"prompt": [ASKED], "chosen": [BETTER], "rejected": [WORSE]},
        {"prompt": "q", "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
        {"chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
        {"context": [{"from": "user", "content": "q"}], "chosen": [BETTER], "rejected": [WORSE]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"instruction": "q", "input": "", "output": "x", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "history": [], "output": ["good", "bad", "worse"]},
        {"question": "q", "response_j": "good", "response_k": "bad"},
        {"system": "", "question": "q", "chosen": "good", "rejected": "bad"},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
    ],
)
def test_every_layout_gives_the_same_pair(fields: dict[str, Any]) -> None:
    assert preference_pair(record(**fields)) == ([Q, GOOD], [Q, BAD])
    assert to_messages(record(**fields), "preference") == [Q, GOOD]


def test_fine_tuning_needs_no_worse_answer() -> None:
    assert to_messages(record(prompt="q", chosen="good"), "preference") == [Q, GOOD]
    with pytest.raises(Malformed, match="`rejected` is missing"):
        preference_pair(record(prompt="q", chosen="good"))


def test_a_transcript_keeps_every_message_and_its_blank_lines() -> None:
    text = "\n\nHuman: one\n\ntwo\n\nAssistant: a\n\nHuman: r\n\nAssistant:  b "
    assert to_messages(record(chosen=text), "preference") == [
        Message("user", "one\n\ntwo"), Message("assistant", "a"), Message("user", "r"), Message("assistant", " b "),
    ]  # fmt: skip


def test_alpacas_input_history_and_system_come_before_the_pair() -> None:
    found = to_messages(
        record(system="S", history=[["h", "i"]], instruction="q", input="c", chosen="good", rejected="bad"),
        "preference",
    )
    assert [(m.role, m.content, m.context) for m in found] == [
        ("system", "S", None), ("user", "h", None), ("assistant", "i", None),
        ("user", "q", "c"), ("assistant", "good", None),
    ]  # fmt: skip


def test_a_records_system_text_comes_before_a_question_and_a_conversation() -> None:
    system = Message("system", "S")
    assert to_messages(record(system="S", question="q", chosen="good"), "preference") == [system, Q, GOOD]
    own = [{"role": "system", "content": "S"}, ASKED, BETTER]
    assert to_messages(record(prompt="q", chosen=own), "preference") == [system, Q, GOOD]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"chosen": "good", "rejected": "bad"}, "no prompt: the record has no question, and `chosen`"),
        ({"chosen": [BETTER]}, "no prompt: `chosen` begins with an answer"),
        ({"prompt": "other", "chosen": [ASKED, BETTER]}, "`chosen` is a whole conversation, but does not begin with"),
        (
            {"prompt": "q", "chosen": "\n\nHuman: q\n\nAssistant: a"},
            "`chosen` is a whole transcript, but does not begin",
        ),
        ({"prompt": "q"}, "`chosen` is missing"),
        ({"prompt": "q", "chosen": 1}, "`chosen` must be a list of messages (got int)"),
        ({"prompt": 1, "chosen": "good"}, "`prompt` must be a string (got int)"),
        ({"instruction": "q", "output": []}, "`chosen` is missing"),
    ],
)
def test_a_record_without_a_pair_is_refused_with_its_location(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Malformed) as error:
        to_messages(record(**fields), "preference")
    assert f"f.json, record 0: {said}" in str(error.value)
    assert error.value.reason == "broken_record"


def test_an_empty_better_answer_has_nothing_to_learn() -> None:
    with pytest.raises(Malformed) as error:
        to_messages(record(prompt="q", chosen="", rejected="bad"), "preference")
    assert error.value.reason == "no_answer"
