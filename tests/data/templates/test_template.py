from __future__ import annotations

import pytest

from sft_lightning.data.templates.template import DocumentTemplate, SpecialTokens, supervision
from sft_lightning.types import LossOn, Message, Segment

TOKENS = SpecialTokens(bos="<s>", eos="</s>")
TURNS = [Message("user", "1"), Message("assistant", "a"), Message("user", "2"), Message("assistant", "b")]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [("assistant", [False, True, False, True]), ("last_turn", [False, False, False, True]), ("all", [True] * 4)],
)
def test_loss_on_says_which_messages_are_supervised(loss_on: LossOn, expected: list[bool]) -> None:
    assert supervision(TURNS, loss_on) == expected


@pytest.mark.parametrize("loss_on", ["assistant", "last_turn", "all"])
def test_a_messages_own_train_is_kept(loss_on: LossOn) -> None:
    turns = [Message("user", "q", train=True), Message("assistant", "a", train=False)]
    assert supervision(turns, loss_on) == [True, False]


@pytest.mark.parametrize("loss_on", ["assistant", "last_turn", "all"])
def test_the_whole_of_a_document_is_supervised(loss_on: LossOn) -> None:
    assert supervision([Message("text", "a")], loss_on) == [True]


def test_a_completion_is_supervised_and_its_prompt_only_with_loss_on_all() -> None:
    pieces = [Message("text", "2+2="), Message("text", "4")]
    assert supervision(pieces, "assistant") == [False, True]
    assert supervision(pieces, "last_turn") == [False, True]
    assert supervision(pieces, "all") == [True, True]


def test_a_document_is_supervised_with_its_end_token() -> None:
    [segments] = DocumentTemplate(TOKENS).render([Message("text", "Once.")], "assistant")
    assert segments == [Segment("<s>", False), Segment("Once.</s>", True)]


def test_a_completion_is_supervised_with_its_end_token_and_its_prompt_is_not() -> None:
    pieces = [Message("text", "2+2=", train=False), Message("text", "4", train=True)]
    [segments] = DocumentTemplate(TOKENS).render(pieces, "assistant")
    assert segments == [Segment("<s>", False), Segment("2+2=", False), Segment("4</s>", True)]


def test_a_document_without_bos_begins_with_its_text() -> None:
    [segments] = DocumentTemplate(SpecialTokens(bos="", eos="</s>")).render([Message("text", "Once.")], "assistant")
    assert segments == [Segment("Once.</s>", True)]


def test_the_prompt_of_a_completion_is_continued_without_an_end_token() -> None:
    assert DocumentTemplate(TOKENS).generation_prompt([Message("text", "2+2=", train=False)]) == "<s>2+2="
