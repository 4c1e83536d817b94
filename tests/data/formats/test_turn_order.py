from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from sft_lightning.data.formats.fields import Malformed
from sft_lightning.data.formats.turn_order import settle
from sft_lightning.types import Message, Record

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
RECORD = Record({}, "s", "f.json, record 0")


def turns(letters: str) -> list[Message]:
    """Return turns by the first letters of their roles; each content is its index."""
    return [Message(ROLES[letter], str(i)) for i, letter in enumerate(letters)]  # type: ignore[arg-type]


def settled(letters: str, *, answered: bool = True) -> tuple[list[int], Counter[str]]:
    """Return the indices of the turns that stay, and the repairs."""
    repairs: Counter[str] = Counter()
    kept = settle(RECORD, turns(letters), answered=answered, repairs=repairs)
    return [int(turn.content) for turn in kept], repairs


@pytest.mark.parametrize("letters", ["ua", "sua", "uaua", "uata", "uattaua", "uatua", "suat"])
def test_turns_in_order_stay_as_they_are(letters: str) -> None:
    assert settled(letters) == (list(range(len(letters))), Counter())


@pytest.mark.parametrize(
    ("letters", "kept"), [("aua", [1, 2]), ("saua", [0, 2, 3]), ("asua", [1, 2, 3]), ("atua", [2, 3])]
)
def test_what_comes_before_the_first_question_is_left_out_and_counted(letters: str, kept: list[int]) -> None:
    assert settled(letters) == (kept, Counter(leading_answer=len(letters) - len(kept)))


def test_the_tools_stay_when_the_first_turn_is_left_out() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    first, *others = turns("aua")
    assert settle(RECORD, [replace(first, tools=tools), *others])[0].tools == tools


def test_a_user_turn_at_the_end_is_left_out_and_counted() -> None:
    assert settled("uau") == ([0, 1], Counter(trailing_user=1))
    assert settled("uatu") == ([0, 1, 2], Counter(trailing_user=1))


def test_a_user_turn_at_the_end_stays_where_it_is_what_is_asked_or_says_train() -> None:
    assert settled("uau", answered=False) == ([0, 1, 2], Counter())
    *others, last = turns("uau")
    assert settle(RECORD, [*others, replace(last, train=True)])[-1].train is True


def test_an_empty_answer_is_kept_unsupervised_and_counted() -> None:
    repairs: Counter[str] = Counter()
    found = settle(
        RECORD,
        [Message("user", ""), Message("assistant", " \n"), Message("user", "q"), Message("assistant", "a")],
        repairs=repairs,
    )
    assert [turn.train for turn in found] == [None, False, None, None]
    assert repairs == {"empty_turn": 2}


def test_an_answer_with_a_call_or_a_thought_is_not_empty() -> None:
    for extras in ({"tool_calls": [{"name": "add"}]}, {"reasoning_content": "hm"}):
        found = settle(RECORD, [Message("user", "q"), Message("assistant", "", extras=extras)])
        assert found[-1].train is None


def test_an_answer_that_says_itself_whether_it_is_supervised_is_obeyed() -> None:
    for answer in (Message("assistant", "", train=True), Message("assistant", "a", train=False)):
        assert settle(RECORD, [Message("user", "q"), answer])[-1] == answer


@pytest.mark.parametrize(
    ("letters", "reason", "said"),
    [
        ("uua", "consecutive_turns", "turns 0 and 1 are both the user's; join them"),
        ("uaa", "consecutive_turns", "turns 1 and 2 are both the assistant's; join them"),
        ("auaa", "consecutive_turns", "turns 2 and 3 are both the assistant's"),
        ("uauu", "consecutive_turns", "turns 2 and 3 are both the user's"),
        ("uasua", "misplaced_system", "turn 2 is a system turn; it must be the first"),
        ("ssua", "misplaced_system", "turn 1 is a system turn"),
        ("uta", "misplaced_tool", "turn 1 is what a tool answers"),
        ("sa", "no_question", "no user turn"),
        ("", "no_question", "no user turn"),
        ("u", "no_answer", "no assistant turn after a question"),
        ("au", "no_answer", "no assistant turn after a question"),
    ],
)
def test_turns_out_of_order_are_refused_with_place_and_reason(letters: str, reason: str, said: str) -> None:
    with pytest.raises(Malformed) as error:
        settled(letters)
    assert f"f.json, record 0: {said}" in str(error.value)
    assert error.value.reason == reason


def test_a_conversation_of_empty_answers_has_nothing_to_learn() -> None:
    with pytest.raises(Malformed, match="every assistant turn is empty"):
        settle(RECORD, [Message("user", "q"), Message("assistant", "")])


def test_a_document_passes_but_not_amid_turns() -> None:
    document = [Message("text", "once", train=False)]
    assert settle(RECORD, document) == document
    with pytest.raises(Malformed, match="do not go together"):
        settle(RECORD, [*document, *turns("ua")])
