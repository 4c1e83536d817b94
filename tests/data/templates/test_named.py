from __future__ import annotations

from collections.abc import Sequence

import pytest

from sft_lightning.data.templates.named import named_template
from sft_lightning.data.templates.template import SpecialTokens
from sft_lightning.errors import UserError
from sft_lightning.types import Message, Segment

TOKENS = SpecialTokens(bos="<s>", eos="</s>")
TURNS = [
    Message("user", "Hi"),
    Message("assistant", "Hello there"),
    Message("user", "Bye"),
    Message("assistant", "See you"),
]
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def text(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def supervised(segments: Sequence[Segment]) -> list[str]:
    return [segment.text for segment in segments if segment.supervised]


def test_vicuna_renders_fastchats_golden_string() -> None:
    [segments] = named_template("vicuna_v1.1", SpecialTokens("", "</s>")).render(TURNS, "assistant")
    assert text(segments) == (f"{VICUNA_SYSTEM} USER: Hi ASSISTANT: Hello there</s>USER: Bye ASSISTANT: See you</s>")
    assert supervised(segments) == [" Hello there</s>", " See you</s>"]


def test_vicunas_generation_prompt_ends_without_a_space() -> None:
    prompt = named_template("vicuna_v1.1", TOKENS).generation_prompt(TURNS[:3])
    assert prompt.endswith("</s>USER: Bye ASSISTANT:")
    assert prompt.startswith("<s>A chat")


def test_alpaca_renders_stanfords_strings_with_and_without_input() -> None:
    template = named_template("alpaca", TOKENS)
    [plain] = template.render([Message("user", "Add."), Message("assistant", "3")], "assistant")
    assert text(plain) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:3</s>"
    )
    [with_input] = template.render([Message("user", "Add.", context="1, 2"), Message("assistant", "3")], "assistant")
    assert text(with_input) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:3</s>"
    )
    assert supervised(with_input) == ["3</s>"]


def test_a_system_message_replaces_the_default() -> None:
    [segments] = named_template("vicuna_v1.1", TOKENS).render([Message("system", "Be brief."), *TURNS], "assistant")
    assert text(segments).startswith("<s>Be brief. USER: Hi")


def test_braces_in_contents_are_not_changed() -> None:
    turns = [Message("user", "{content} {x}"), Message("assistant", "{}")]
    [segments] = named_template("alpaca", TOKENS).render(turns, "assistant")
    assert "### Instruction:\n{content} {x}\n\n" in text(segments)
    assert supervised(segments) == ["{}</s>"]


def test_an_unknown_template_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'vicuna_v1\.1'"):
        named_template("vicuna_v1", TOKENS)


def test_a_system_messages_own_train_is_kept() -> None:
    turns = [Message("system", "S", train=True, weight=0.5), *TURNS]
    [segments] = named_template("vicuna_v1.1", TOKENS).render(turns, "assistant")
    assert segments[1] == Segment("S ", True, 0.5)


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([Message("user", "q", tools=[{"name": "f"}]), Message("assistant", "a")], "tools"),
        ([Message("system", "S", tools=[{"name": "f"}]), *TURNS], "tools"),
        ([Message("user", "q"), Message("assistant", "", extras={"tool_calls": [{}]})], "tool_calls"),
        ([Message("user", "q"), Message("tool", "3"), Message("assistant", "a")], "a tool's result"),
        ([Message("user", "q"), Message("assistant", "a", extras={"reasoning_content": "r"})], "reasoning_content"),
    ],
)
@pytest.mark.parametrize("name", ["chatml", "vicuna_v1.1", "llama2"])
def test_parts_that_a_named_template_cannot_write_are_refused(name: str, turns: list[Message], what: str) -> None:
    with pytest.raises(UserError, match=rf"has no place for {what}; use chat_template"):
        named_template(name, TOKENS).render(turns, "assistant")


def test_empty_extras_are_accepted() -> None:
    turns = [Message("user", "q", extras={"name": "Ann"}), Message("assistant", "a", extras={"tool_calls": []})]
    [segments] = named_template("chatml", TOKENS).render(turns, "assistant")
    assert supervised(segments) == ["a<|im_end|>"]


def test_a_document_is_refused() -> None:
    with pytest.raises(UserError, match="is for conversations"):
        named_template("chatml", TOKENS).render([Message("text", "Once.")], "assistant")


def test_an_empty_system_message_replaces_the_default() -> None:
    [segments] = named_template("qwen", TOKENS).render([Message("system", ""), *TURNS], "assistant")
    assert text(segments).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi")
