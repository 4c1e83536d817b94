"""The chat templates of real models: what is trained is what `apply_chat_template` serves, token for token.

Their vocabularies are not here: Qwen2.5's stands in, with each model's own special tokens added.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.templates.binding import bind_template
from sft_lightning.data.templates.jinja import JinjaTemplate
from sft_lightning.data.tokens.example_checks import check_examples
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.tokenization import tokenize
from sft_lightning.errors import UserError
from sft_lightning.types import Message, Segment

STOPS = {
    "InternVL3-1B-hf": "<|im_end|>",
    "Llama-3.2-11B-Vision-Instruct": "<|eot_id|>",
    "Llama-4-Scout-17B-16E-Instruct": "<|eot|>",
    "Qwen2-VL-7B-Instruct": "<|im_end|>",
    "Qwen2.5-VL-7B-Instruct": "<|im_end|>",
    "Qwen3-VL-4B-Instruct": "<|im_end|>",
    "SmolVLM2-256M-Video-Instruct": "<end_of_utterance>",
    "gemma-3-4b-it": "<end_of_turn>",
    "llava-1.5-7b-hf": "</s>",
    "qwen2.5": "<|im_end|>",
}
FIRST_TURNS = [Message("user", "What's hot? "), Message("assistant", "The sun, <b>mostly</b>.")]
LAST_TURNS = [Message("user", "你好\n\n1 2"), Message("assistant", "Grüezi 🙂\n\n- a\n- b\n")]
CONVERSATIONS = {
    "single-turn": FIRST_TURNS,
    "multi-turn": [*FIRST_TURNS, Message("user", "And?"), Message("assistant", "Tea."), *LAST_TURNS],
    "system": [Message("system", "Be brief."), *FIRST_TURNS, *LAST_TURNS],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like outside",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}]}
WITH_TOOLS = [
    Message("user", "Weather?", tools=[TOOL]),
    Message("assistant", "", extras=CALL),
    Message("tool", '{"degrees": 3}'),
    Message("assistant", "3 degrees."),
    *LAST_TURNS,
]
CALLS = {
    "Llama-3.2-11B-Vision-Instruct": '{"name": "weather", "parameters": {"city": "Zürich"}}<|eot_id|>',
    "qwen2.5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>',
}
"""How the templates that know of tools write the call."""

REFUSALS = {"gemma-3-4b-it": "Conversation roles must alternate"}
"""Errors of templates that do more than leave the tools out."""


@functools.cache
def bound(name: str, real_data: Path) -> tuple[JinjaTemplate, PreTrainedTokenizerFast, TextEncoder]:
    folder = real_data / "tokenizer"
    config = json.loads(
        (folder / ("" if name == "qwen2.5" else "hf-configs") / name / "tokenizer_config.json").read_text()
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "qwen2.5" / "tokenizer.json"))
    if name != "qwen2.5":
        added = [token["content"] for token in config["added_tokens_decoder"].values()]
        added += re.findall(r"<\|\w+\|>|<\w+_of_\w+>", config["chat_template"])
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(added)])
    named = {key: config[key] for key in ("bos_token", "eos_token", "pad_token") if isinstance(config.get(key), str)}
    tokenizer.add_special_tokens(named)
    tokenizer.chat_template = config["chat_template"]
    template = bind_template("chat_template", tokenizer)
    assert isinstance(template, JinjaTemplate)
    return template, tokenizer, TextEncoder(tokenizer)


def served(name: str, real_data: Path, messages: list[Message], **options: Any) -> Any:
    template, tokenizer, _ = bound(name, real_data)
    tools: list[Any] = list(messages[0].tools)
    return tokenizer.apply_chat_template(template.chat(messages), tools=tools or None, return_dict=False, **options)


def text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def answers(examples: list[list[Segment]]) -> list[str]:
    return [segment.text for segments in examples for segment in segments if segment.supervised]


@pytest.mark.parametrize("name", STOPS)
def test_a_real_template_is_bound_with_its_stop_token(name: str, real_data: Path) -> None:
    template, _, _ = bound(name, real_data)
    assert template.stop == STOPS[name]
    assert template.typed_parts == (name == "SmolVLM2-256M-Video-Instruct")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", STOPS)
def test_what_is_trained_is_what_is_served(name: str, conversation: str, real_data: Path) -> None:
    template, tokenizer, encode = bound(name, real_data)
    messages = CONVERSATIONS[conversation]
    examples = template.render(messages, "assistant")
    num_answers = sum(message.role == "assistant" for message in messages)
    # LLaVA 1.5 writes the EOS at the end of a conversation only, so every answer is an example of its own.
    assert len(examples) == (num_answers if name == "llava-1.5-7b-hf" else 1)
    assert text(examples[-1]) == served(name, real_data, messages, tokenize=False)
    [last] = tokenize([examples[-1]], encode)
    assert last.input_ids.tolist() == served(name, real_data, messages, tokenize=True)
    check_examples(template, tokenizer, encode, [(conversation, messages)], "assistant")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", STOPS)
def test_every_answer_is_what_has_to_be_generated_after_its_prompt(
    name: str, conversation: str, real_data: Path
) -> None:
    template, _, encode = bound(name, real_data)
    messages = CONVERSATIONS[conversation]
    examples = template.render(messages, "assistant")
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    contents = [messages[turn].content for turn in turns]
    if name == "gemma-3-4b-it":
        contents = [content.strip() for content in contents]
    space = " " if name == "SmolVLM2-256M-Video-Instruct" else ""
    assert answers(examples) == [space + content + STOPS[name] for content in contents]
    tokenized = [example.input_ids.tolist() for example in tokenize(examples, encode)]
    for turn in turns:
        prompt = served(name, real_data, messages[:turn], tokenize=True, add_generation_prompt=True)
        assert any(ids[: len(prompt)] == prompt for ids in tokenized)


@pytest.mark.parametrize("name", CALLS)
def test_tools_their_calls_and_results_are_trained_as_they_are_served(name: str, real_data: Path) -> None:
    template, tokenizer, encode = bound(name, real_data)
    [segments] = template.render(WITH_TOOLS, "assistant")
    assert text(segments) == served(name, real_data, WITH_TOOLS, tokenize=False)
    assert "What it is like outside" in text(segments)
    stop = STOPS[name]
    assert answers([segments]) == [CALLS[name], f"3 degrees.{stop}", LAST_TURNS[1].content + stop]
    check_examples(template, tokenizer, encode, [("tools", WITH_TOOLS)], "assistant")


@pytest.mark.parametrize("name", sorted(STOPS.keys() - CALLS.keys()))
def test_a_template_that_knows_no_tools_says_so(name: str, real_data: Path) -> None:
    with pytest.raises(UserError, match=REFUSALS.get(name, "leaves out the tools;")):
        bound(name, real_data)[0].render(WITH_TOOLS, "assistant")


@pytest.mark.parametrize("name", sorted(STOPS.keys() - CALLS.keys() - REFUSALS.keys()))
def test_a_template_that_knows_no_calls_says_so(name: str, real_data: Path) -> None:
    turns = [Message("user", "Weather?"), *WITH_TOOLS[1:]]
    with pytest.raises(UserError, match=r"leaves out the call of 'weather'|leaves out .*the content of message"):
        bound(name, real_data)[0].render(turns, "assistant")


def test_llama_drops_what_is_said_beside_a_call_and_that_is_an_error(real_data: Path) -> None:
    turns = [WITH_TOOLS[0], Message("assistant", "Let me look.", extras=CALL), *WITH_TOOLS[2:]]
    with pytest.raises(UserError, match=r"leaves out 'Let me look\.'"):
        bound("Llama-3.2-11B-Vision-Instruct", real_data)[0].render(turns, "assistant")
    [segments] = bound("qwen2.5", real_data)[0].render(turns, "assistant")
    assert answers([segments])[0] == "Let me look.\n" + CALLS["qwen2.5"]
