from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from sft_lightning.data.formats.fields import Malformed
from sft_lightning.data.formats.message_order import repair_order
from sft_lightning.types import Message, Record

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
RECORD = Record({}, "s", "f.json, record 0")


def messages(letters: str) -> list[Message]:
    """Return messages by the first letters of their roles; each content is its index."""
    return [Message(ROLES[letter], str(i)) for i, letter in enumerate(letters)]  # type: ignore[arg-type]


def repaired(letters: str, *, answered: bool = True) -> tuple[list[int], Counter[str]]:
    """Return the indices of the messages that are kept, and the repairs."""
    repairs: Counter[str] = Counter()
    kept = repair_order(RECORD, messages(letters), answered=answered, repairs=repairs)
    return [int(message.content) for message in kept], repairs


@pytest.mark.parametrize("letters", ["ua", "sua", "uaua", "uata", "uattaua", "uatua", "suat"])
def test_messages_in_a_valid_order_stay_as_they_are(letters: str) -> None:
    assert repaired(letters) == (list(range(len(letters))), Counter())


@pytest.mark.parametrize(
    ("letters", "kept"), [("aua", [1, 2]), ("saua", [0, 2, 3]), ("asua", [1, 2, 3]), ("atua", [2, 3])]
)
def test_messages_before_the_first_question_are_left_out_and_counted(letters: str, kept: list[int]) -> None:
    assert repaired(letters) == (kept, Counter(leading_answer=len(letters) - len(kept)))


def test_the_tools_stay_when_the_first_message_is_left_out() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    first, *others = messages("aua")
    assert repair_order(RECORD, [replace(first, tools=tools), *others])[0].tools == tools


def test_a_user_message_at_the_end_is_left_out_and_counted() -> None:
    assert repaired("uau") == ([0, 1], Counter(trailing_user=1))
    assert repaired("uatu") == ([0, 1, 2], Counter(trailing_user=1))


def test_a_user_message_at_the_end_is_kept_for_prediction_and_with_train() -> None:
    assert repaired("uau", answered=False) == ([0, 1, 2], Counter())
    *others, last = messages("uau")
    assert repair_order(RECORD, [*others, replace(last, train=True)])[-1].train is True


def test_an_empty_answer_is_kept_unsupervised_and_counted() -> None:
    repairs: Counter[str] = Counter()
    kept = repair_order(
        RECORD,
        [Message("user", ""), Message("assistant", " \n"), Message("user", "q"), Message("assistant", "a")],
        repairs=repairs,
    )
    assert [message.train for message in kept] == [None, False, None, None]
    assert repairs == {"empty_turn": 2}


def test_an_answer_with_a_call_or_a_thought_is_not_empty() -> None:
    for extras in ({"tool_calls": [{"name": "add"}]}, {"reasoning_content": "hm"}):
        kept = repair_order(RECORD, [Message("user", "q"), Message("assistant", "", extras=extras)])
        assert kept[-1].train is None


def test_an_answers_own_train_is_kept() -> None:
    for answer in (Message("assistant", "", train=True), Message("assistant", "a", train=False)):
        assert repair_order(RECORD, [Message("user", "q"), answer])[-1] == answer


@pytest.mark.parametrize(
    ("letters", "reason", "said"),
    [
        ("uua", "consecutive_turns", "messages 0 and 1 are both from the user; join them"),
        ("uaa", "consecutive_turns", "messages 1 and 2 are both from the assistant; join them"),
        ("auaa", "consecutive_turns", "messages 2 and 3 are both from the assistant"),
        ("uauu", "consecutive_turns", "messages 2 and 3 are both from the user"),
        ("uasua", "misplaced_system", "message 2 is a system message, which must be the first message"),
        ("ssua", "misplaced_system", "message 1 is a system message"),
        ("uta", "misplaced_tool", "message 1 is a tool's result, but message 0 is not the assistant's tool call"),
        ("sa", "no_question", "no user message"),
        ("", "no_question", "no user message"),
        ("u", "no_answer", "no assistant message follows the user's"),
        ("au", "no_answer", "no assistant message follows the user's"),
    ],
)
def test_messages_out_of_order_are_refused_with_location_and_reason(letters: str, reason: str, said: str) -> None:
    with pytest.raises(Malformed) as error:
        repaired(letters)
    assert f"f.json, record 0: {said}" in str(error.value)
    assert error.value.reason == reason


def test_a_conversation_of_empty_answers_has_nothing_to_learn() -> None:
    with pytest.raises(Malformed, match="every assistant message is empty"):
        repair_order(RECORD, [Message("user", "q"), Message("assistant", "")])


def test_a_document_passes_but_not_among_messages_of_a_conversation() -> None:
    document = [Message("text", "once", train=False)]
    assert repair_order(RECORD, document) == document
    with pytest.raises(Malformed, match="either documents or messages of a conversation, not both"):
        repair_order(RECORD, [*document, *messages("ua")])
