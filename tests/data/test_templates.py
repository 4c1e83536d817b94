from __future__ import annotations

from collections.abc import Sequence

import pytest

from sft_lightning.data.templates import (
    DocumentTemplate,
    SpecialTokens,
    jinja_template,
    named_template,
    supervision,
)
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


def test_braces_in_contents_stay_as_they_are() -> None:
    turns = [Message("user", "{content} {x}"), Message("assistant", "{}")]
    [segments] = named_template("alpaca", TOKENS).render(turns, "assistant")
    assert "### Instruction:\n{content} {x}\n\n" in text(segments)
    assert supervised(segments) == ["{}</s>"]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [("assistant", [False, True, False, True]), ("last_turn", [False, False, False, True]), ("all", [True] * 4)],
)
def test_loss_on_says_which_messages_are_supervised(loss_on: str, expected: list[bool]) -> None:
    assert supervision(TURNS, loss_on) == expected  # type: ignore[arg-type]


def test_a_messages_own_train_flag_wins() -> None:
    turns = [Message("user", "q", train=True), Message("assistant", "a", train=False)]
    assert supervision(turns, "assistant") == [True, False]


def test_a_document_is_supervised_with_its_end_token() -> None:
    [segments] = DocumentTemplate(TOKENS).render([Message("text", "Once.")], "assistant")
    assert segments == [Segment("<s>", False), Segment("Once.</s>", True)]


def test_a_completion_is_supervised_with_its_end_token_and_its_prompt_is_not() -> None:
    pieces = [Message("text", "2+2=", train=False), Message("text", "4", train=True)]
    [segments] = DocumentTemplate(TOKENS).render(pieces, "assistant")
    assert segments == [Segment("<s>", False), Segment("2+2=", False), Segment("4</s>", True)]


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'vicuna_v1\.1'"):
        named_template("vicuna_v1", TOKENS)


def chatml(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return turns + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def thinking(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """Like Qwen3: the thoughts of all turns but the last are left out."""
    shown = [
        {**m, "content": m["content"].split("</think>")[-1]} if i < len(messages) - 1 else m
        for i, m in enumerate(messages)
    ]
    return chatml(shown, add_generation_prompt)


CHATML_TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def test_a_jinja_templates_answers_are_supervised_up_to_the_stop_token() -> None:
    template = jinja_template("chatml", chatml, CHATML_TOKENS)
    assert (template.stop, template.trailer) == ("<|im_end|>", "\n")
    [segments] = template.render(TURNS, "assistant")
    assert text(segments) == chatml([{"role": m.role, "content": m.content} for m in TURNS], False)
    assert supervised(segments) == ["Hello there<|im_end|>", "See you<|im_end|>"]


def test_an_answer_that_contains_the_templates_own_markers_keeps_an_exact_mask() -> None:
    turns = [Message("user", "assistant\nx<|im_end|>"), Message("assistant", "user\nassistant\n<|im_end|>\n!")]
    [segments] = jinja_template("chatml", chatml, CHATML_TOKENS).render(turns, "assistant")
    assert supervised(segments) == ["user\nassistant\n<|im_end|>\n!<|im_end|>"]


def test_only_rewritten_turns_become_examples_of_their_own() -> None:
    turns = [
        Message("user", "1"), Message("assistant", "<think>a</think>A"),
        Message("user", "2"), Message("assistant", "B"),
        Message("user", "3"), Message("assistant", "<think>c</think>C"),
    ]  # fmt: skip
    first, whole = jinja_template("thinking", thinking, CHATML_TOKENS).render(turns, "assistant")
    assert supervised(first) == ["<think>a</think>A<|im_end|>"]
    assert supervised(whole) == ["B<|im_end|>", "<think>c</think>C<|im_end|>"]
    assert "<think>a" not in text(whole)


def test_a_template_without_a_stop_token_is_refused() -> None:
    def endless(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages)

    with pytest.raises(UserError, match="could not learn to stop"):
        jinja_template("endless", endless, CHATML_TOKENS)


def test_a_template_whose_prompt_is_not_how_it_renders_answers_is_refused() -> None:
    def drifting(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return chatml(messages, False) + ("<|im_start|>bot\n" if add_generation_prompt else "")

    with pytest.raises(UserError, match="generation prompt of turn 1"):
        jinja_template("drifting", drifting, CHATML_TOKENS).render(TURNS, "assistant")


def test_supervised_text_is_the_difference_that_the_weights_say() -> None:
    turns = [Message("user", "q"), Message("assistant", "a", weight=0.5)]
    [segments] = jinja_template("chatml", chatml, CHATML_TOKENS).render(turns, "assistant")
    assert [segment.weight for segment in segments if segment.supervised] == [0.5]


def test_a_system_messages_own_train_flag_wins() -> None:
    turns = [Message("system", "S", train=True, weight=0.5), *TURNS]
    [segments] = named_template("vicuna_v1.1", TOKENS).render(turns, "assistant")
    assert segments[1] == Segment("S ", True, 0.5)


def test_flags_that_a_jinja_template_cannot_keep_are_refused() -> None:
    turns = [Message("user", "q"), Message("assistant", "a", train=False)]
    with pytest.raises(UserError, match="do not go with loss_on: all"):
        jinja_template("chatml", chatml, CHATML_TOKENS).render(turns, "all")
