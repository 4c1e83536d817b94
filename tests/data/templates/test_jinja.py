from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from sft_lightning.data.templates.jinja import jinja_template
from sft_lightning.errors import UserError
from sft_lightning.tokenizer import ApplyTemplate, Chat
from sft_lightning.types import LossOn, Message, Segment

Tools = Sequence[Mapping[str, Any]]

TURNS = [
    Message("user", "Hi"),
    Message("assistant", "Hello there"),
    Message("user", "Bye"),
    Message("assistant", "See you"),
]
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>", "<|eom|>", "<|endoftext|>"]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]}


def text(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def supervised(segments: Sequence[Segment]) -> list[str]:
    return [segment.text for segment in segments if segment.supervised]


def chatml(chat: Chat, add_generation_prompt: bool, tools: Tools = ()) -> str:
    """Reads nothing but contents."""
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
    return turns + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def thinking(chat: Chat, add_generation_prompt: bool, tools: Tools = ()) -> str:
    """Like Qwen3: the thoughts of all turns but the last are left out."""
    last = len(chat) - 1
    shown = [{**m, "content": m["content"].split("</think>")[-1]} if i < last else m for i, m in enumerate(chat)]
    return chatml(shown, add_generation_prompt)


def calling(chat: Chat, add_generation_prompt: bool, tools: Tools = ()) -> str:
    """Like Llama 3.1: writes tools, calls (which end with a token of their own), and results in a row as one turn."""
    out = "".join(f"<|im_start|>tools\n{tool['function']['name']}<|im_end|>" for tool in tools)
    for i, m in enumerate(chat):
        calls = [call["function"] for call in m.get("tool_calls", ())]
        after_result = i > 0 and chat[i - 1]["role"] == m["role"] == "tool"
        out += "" if after_result else f"<|im_start|>{m['role']}\n"
        out += m["content"] + "".join(f"{call['name']}({call['arguments']})" for call in calls)
        more = m["role"] == "tool" and i + 1 < len(chat) and chat[i + 1]["role"] == "tool"
        out += ";" if more else "<|eom|>\n" if calls else "<|im_end|>"
    return out + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def typed(chat: Chat, add_generation_prompt: bool, tools: Tools = ()) -> str:
    """Like SmolVLM2: goes through the parts of a content, and leaves out a string."""
    contents = [m["content"] if isinstance(m["content"], list) else [] for m in chat]
    return chatml(
        [{**m, "content": "".join(part["text"] for part in c)} for m, c in zip(chat, contents, strict=True)],
        add_generation_prompt,
    )


def test_a_jinja_templates_answers_are_supervised_up_to_the_stop_token() -> None:
    template = jinja_template("chatml", chatml, CHATML_TOKENS)
    assert (template.stop, template.trailer, template.typed_parts) == ("<|im_end|>", "\n", False)
    [segments] = template.render(TURNS, "assistant")
    assert text(segments) == chatml([{"role": m.role, "content": m.content} for m in TURNS], False)
    assert supervised(segments) == ["Hello there<|im_end|>", "See you<|im_end|>"]


def test_an_answer_that_contains_the_templates_own_markers_keeps_an_exact_mask() -> None:
    turns = [Message("user", "assistant\nx<|im_end|>"), Message("assistant", "user\nassistant\n<|im_end|>\n!")]
    [segments] = jinja_template("chatml", chatml, CHATML_TOKENS).render(turns, "assistant")
    assert supervised(segments) == ["user\nassistant\n<|im_end|>\n!<|im_end|>"]


def test_only_rewritten_answers_become_examples_of_their_own() -> None:
    turns = [
        Message("user", "1"), Message("assistant", "<think>a</think>A"),
        Message("user", "2"), Message("assistant", "B"),
        Message("user", "3"), Message("assistant", "<think>c</think>C"),
    ]  # fmt: skip
    first, whole = jinja_template("thinking", thinking, CHATML_TOKENS).render(turns, "assistant")
    assert supervised(first) == ["<think>a</think>A<|im_end|>"]
    assert supervised(whole) == ["B<|im_end|>", "<think>c</think>C<|im_end|>"]
    assert "<think>a" not in text(whole)


def test_n_answers_cost_2n_renderings() -> None:
    calls: list[bool] = []

    def counted(chat: Chat, add_generation_prompt: bool, tools: Tools) -> str:
        calls.append(add_generation_prompt)
        return chatml(chat, add_generation_prompt)

    template = jinja_template("chatml", counted, CHATML_TOKENS)
    calls.clear()
    template.render(TURNS, "assistant")
    assert len(calls) == 4
    calls.clear()
    template.render(TURNS, "last_turn")
    assert len(calls) == 2


def test_a_template_without_a_stop_token_is_refused() -> None:
    def endless(chat: Chat, add_generation_prompt: bool, tools: Tools) -> str:
        return "".join(f"{m['role']}: {m['content']}\n" for m in chat)

    with pytest.raises(UserError, match="could not learn to stop"):
        jinja_template("endless", endless, CHATML_TOKENS)


def test_a_generation_prompt_that_is_not_the_beginning_of_the_answer_is_refused() -> None:
    def drifting(chat: Chat, add_generation_prompt: bool, tools: Tools) -> str:
        return chatml(chat, False) + ("<|im_start|>bot\n" if add_generation_prompt else "")

    with pytest.raises(UserError, match="generation prompt of message 1"):
        jinja_template("drifting", drifting, CHATML_TOKENS).render(TURNS, "assistant")


def test_a_supervised_segment_has_the_weight_of_its_message() -> None:
    turns = [Message("user", "q"), Message("assistant", "a", weight=0.5)]
    [segments] = jinja_template("chatml", chatml, CHATML_TOKENS).render(turns, "assistant")
    assert [segment.weight for segment in segments if segment.supervised] == [0.5]


def test_train_and_weight_of_a_message_are_refused_with_loss_on_all() -> None:
    turns = [Message("user", "q"), Message("assistant", "a", train=False)]
    with pytest.raises(UserError, match="loss_on: all does not support `train` and `weight`"):
        jinja_template("chatml", chatml, CHATML_TOKENS).render(turns, "all")


# --- tools ------------------------------------------------------------------------------------------------------------

TOOL_TURNS = [
    Message("user", "Weather?", tools=[WEATHER]),
    Message("assistant", "", extras=CALL),
    Message("tool", "3 degrees"),
    Message("tool", "rain"),
    Message("assistant", "Cold and wet."),
]


def test_a_tool_call_is_supervised_up_to_the_token_that_ends_calls() -> None:
    template = jinja_template("calling", calling, CHATML_TOKENS, call_stops=CHATML_TOKENS)
    [segments] = template.render(TOOL_TURNS, "assistant")
    assert supervised(segments) == ["weather({'city': 'Bern'})<|eom|>", "Cold and wet.<|im_end|>"]
    assert text(segments) == calling(template.chat(TOOL_TURNS), False, [WEATHER])


def test_consecutive_tool_results_that_the_template_merges_are_not_supervised() -> None:
    [segments] = jinja_template("calling", calling, CHATML_TOKENS, CHATML_TOKENS).render(TOOL_TURNS, "assistant")
    assert [s.text for s in segments if not s.supervised][1] == (
        "\n<|im_start|>tool\n3 degrees;rain<|im_end|><|im_start|>assistant\n"
    )


def test_a_tool_call_that_does_not_end_with_a_stop_token_is_refused() -> None:
    with pytest.raises(UserError, match=r"answer in message 1 does not end with '<\|im_end\|>'"):
        jinja_template("calling", calling, CHATML_TOKENS).render(TOOL_TURNS, "assistant")


def test_only_a_tool_call_may_end_with_another_token() -> None:
    def other_end(chat: Chat, add_generation_prompt: bool, tools: Tools) -> str:
        return chatml(chat, add_generation_prompt).replace("See you<|im_end|>", "See you<|eom|>")

    with pytest.raises(UserError, match="answer in message 3 does not end"):
        jinja_template("other_end", other_end, CHATML_TOKENS, CHATML_TOKENS).render(TURNS, "assistant")


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([Message("user", "q", tools=[WEATHER]), Message("assistant", "a")], "the tools"),
        ([Message("user", "q"), Message("assistant", "", extras=CALL)], "the call of 'weather' in message 1"),
    ],
)
def test_a_template_that_leaves_out_a_part_is_refused(turns: list[Message], what: str, loss_on: LossOn) -> None:
    with pytest.raises(UserError, match=f"chatml leaves out {what}"):
        jinja_template("chatml", chatml, CHATML_TOKENS).render(turns, loss_on)


def test_a_template_that_leaves_out_the_reasoning_is_refused() -> None:
    turns = [Message("user", "q"), Message("assistant", "a", extras={"reasoning_content": "because"})]
    with pytest.raises(UserError, match="leaves out `reasoning_content` of message 1"):
        jinja_template("chatml", chatml, CHATML_TOKENS).render(turns, "assistant")


def test_a_template_that_leaves_out_the_thoughts_of_the_answer_is_refused() -> None:
    def thoughtless(chat: Chat, add_generation_prompt: bool, tools: Tools) -> str:
        return chatml([{**m, "content": m["content"].split("</think>")[-1]} for m in chat], add_generation_prompt)

    turns = [Message("user", "q"), Message("assistant", "<think>because</think>a")]
    with pytest.raises(UserError, match="leaves out '<think>because"):
        jinja_template("thoughtless", thoughtless, CHATML_TOKENS).render(turns, "assistant")


def test_a_template_that_leaves_out_a_role_is_refused() -> None:
    def two_roles(chat: Chat, add_generation_prompt: bool, tools: Tools) -> str:
        return chatml([m for m in chat if m["role"] in ("user", "assistant")], add_generation_prompt)

    with pytest.raises(UserError, match=r"leaves out 'Be brief\.', the content of message 0 \(system\)"):
        jinja_template("two_roles", two_roles, CHATML_TOKENS).render([Message("system", "Be brief."), *TURNS], "all")


def test_contents_may_be_trimmed_or_quoted() -> None:
    def quoting(chat: Chat, add_generation_prompt: bool, tools: Tools) -> str:
        tidy = [
            json.dumps(m["content"], ensure_ascii=False) if m["role"] == "tool" else m["content"].strip() for m in chat
        ]
        return chatml([{**m, "content": c} for m, c in zip(chat, tidy, strict=True)], add_generation_prompt)

    turns = [
        Message("user", " q "),
        Message("assistant", "x"),
        Message("tool", '{"é": 1}\n'),
        Message("assistant", " y"),
    ]
    [segments] = jinja_template("quoting", quoting, CHATML_TOKENS).render(turns, "assistant")
    assert supervised(segments) == ["x<|im_end|>", "y<|im_end|>"]


@pytest.mark.parametrize(
    ("role", "message"),
    [("tool", "the model does not write the results of tools"), ("user", "requires a named template")],
)
def test_only_answers_can_be_supervised(role: Any, message: str) -> None:
    turns = [*TURNS[:2], Message(role, "r", train=True), Message("assistant", "a")]
    with pytest.raises(UserError, match=message):
        jinja_template("chatml", chatml, CHATML_TOKENS).render(turns, "assistant")


# --- typed parts ------------------------------------------------------------------------------------------------------


def test_a_template_that_reads_only_typed_parts_gets_them() -> None:
    template = jinja_template("typed", typed, CHATML_TOKENS)
    assert template.typed_parts
    [segments] = template.render(TURNS, "assistant")
    assert supervised(segments) == ["Hello there<|im_end|>", "See you<|im_end|>"]


def test_a_template_that_refuses_strings_gets_typed_parts() -> None:
    def strict(chat: Chat, add_generation_prompt: bool, tools: Tools) -> str:
        if isinstance(chat[0]["content"], str):
            raise UserError("no strings, please")
        return typed(chat, add_generation_prompt)

    assert jinja_template("strict", strict, CHATML_TOKENS).typed_parts


@pytest.mark.parametrize(("refuses", "message"), [(True, "never"), (False, "leaves out the answer")])
def test_a_template_that_never_writes_an_answer_is_refused(refuses: bool, message: str) -> None:
    def mute(chat: Chat, add_generation_prompt: bool, tools: Tools) -> str:
        if refuses:
            raise UserError("never")
        return "<|im_start|>"

    apply: ApplyTemplate = mute
    with pytest.raises(UserError, match=message):
        jinja_template("mute", apply, CHATML_TOKENS)
