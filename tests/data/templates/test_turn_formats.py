"""The exact strings that models trained elsewhere were trained with."""

from __future__ import annotations

import pytest

from sft_lightning.data.templates.named import named_template
from sft_lightning.data.templates.template import SpecialTokens
from sft_lightning.types import Message

TURNS = [Message("user", "Q1"), Message("assistant", "A1"), Message("user", "Q2"), Message("assistant", "A2")]
WITH_SYSTEM = [Message("system", "S"), *TURNS]
EN = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
FR = (
    "Ci-dessous se trouve une instruction qui décrit une tâche à accomplir. Rédigez une réponse qui répond de manière "
    "précise à la demande."
)
CHATML = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
)

GOLDEN = {
    "chatml": (WITH_SYSTEM, CHATML),
    "qwen": (WITH_SYSTEM, CHATML),
    "llama2": (
        WITH_SYSTEM,
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>",
    ),
    "llama3": (
        WITH_SYSTEM,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>",
    ),
    "gemma": (
        TURNS,
        "<bos><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n",
    ),
    "zephyr": (WITH_SYSTEM, "<|system|>\nS</s>\n<|user|>\nQ1</s>\n<|assistant|>\nA1</s>\n<|user|>\nQ2</s>\n<|assistant|>\nA2</s>\n"),
    "human_assistant": (TURNS, "<s>\n\nHuman: Q1\n\nAssistant: A1</s>\n\nHuman: Q2\n\nAssistant: A2</s>"),
    "vigogne/instruct_en": (TURNS[:2], f"<s>### System:\n{EN}\n\n### Instruction:\nQ1\n\n### Response:\nA1</s>"),
    "vigogne/instruct_fr": (TURNS[:2], f"<s>### System:\n{FR}\n\n### Instruction:\nQ1\n\n### Response:\nA1</s>"),
    "vigogne/chat_v2": (
        WITH_SYSTEM,
        "<s><|system|>: S\n<|user|>: Q1\n<|assistant|>: A1</s>\n<|user|>: Q2\n<|assistant|>: A2</s>",
    ),
    "vigogne/chat_v3": (WITH_SYSTEM, "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1</s> [INST] Q2 [/INST] A2</s>"),
    "chinese_alpaca/1": (TURNS[:2], f"<s>{EN}\n\n### Instruction:\nQ1\n\n### Response: A1</s>"),
    "chinese_alpaca/2": (
        TURNS[:2],
        "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\nQ1 [/INST] A1</s>",
    ),
    "firefly/default": (WITH_SYSTEM, "System: S\n\nUser: Q1\nAssistant: A1 </s>User: Q2\nAssistant: A2 </s>"),
    "firefly/vicuna": (WITH_SYSTEM, "S\nUSER: Q1 ASSISTANT:A1</s>USER: Q2 ASSISTANT:A2</s>"),
    "firefly/llama2": (WITH_SYSTEM, "<<SYS>>\nS\n<</SYS>>\n\n[INST]Q1[/INST]A1 </s>[INST]Q2[/INST]A2 </s>"),
    "firefly/mistral": (TURNS, "<s>[INST]Q1[/INST]A1</s>[INST]Q2[/INST]A2</s>"),
    "firefly/gemma": (
        TURNS,
        "<bos><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\nA1<eos>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<eos>\n",
    ),
    "firefly/chatglm2": (TURNS, "[gMASK]sop[Round 1]\n\n问：Q1\n\n答：A1</s>[Round 2]\n\n问：Q2\n\n答：A2</s>"),
    "firefly/chatglm3": (WITH_SYSTEM, "[gMASK]sop<|system|>S<|user|>Q1<|assistant|>A1</s><|user|>Q2<|assistant|>A2</s>"),
    "firefly/orion": (TURNS[:2], "<s>Human: Q1\n\nAssistant: </s>A1</s>"),
    "firefly/mamba": (WITH_SYSTEM, "<|system|>\nS</s><|user|>\nQ1</s>\n<|assistant|>\nA1</s>\n<|user|>\nQ2</s>\n<|assistant|>\nA2</s>\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_a_template_renders_its_golden_string(name: str) -> None:
    turns, golden = GOLDEN[name]
    [segments] = named_template(name, SpecialTokens("<s>", "</s>")).render(turns, "assistant")
    assert "".join(segment.text for segment in segments) == golden


def test_vigogne_appends_the_input_to_the_instruction() -> None:
    turns = [Message("user", "Traduis ce mot ?!", context="chat"), Message("assistant", "cat")]
    [segments] = named_template("vigogne/instruct_fr", SpecialTokens("", "</s>")).render(turns, "assistant")
    assert "### Instruction:\nTraduis ce mot : chat\n\n### Response:\n" in segments[1].text


def test_chinese_alpaca_joins_the_input_with_a_line_feed() -> None:
    turns = [Message("user", "Q", context="I"), Message("assistant", "A")]
    [segments] = named_template("chinese_alpaca/1", SpecialTokens("", "</s>")).render(turns, "assistant")
    assert "### Instruction:\nQ\nI\n\n### Response: " in segments[0].text


def test_a_trailer_is_never_supervised() -> None:
    [segments] = named_template("chatml", SpecialTokens("", "</s>")).render(TURNS, "assistant")
    assert [segment.text for segment in segments if segment.supervised] == ["A1<|im_end|>", "A2<|im_end|>"]


FIREFLY = [
    "default", "internlm", "internlm2", "qwen", "yi", "orion", "deepseek", "chatglm2", "chatglm3", "ziya2", "xverse",
    "minicpm", "minicpm3", "zephyr", "mistral", "mixtral", "baichuan", "baichuan2", "vicuna", "llama2", "llama3", "gemma",
    "phi3", "mamba",
]  # fmt: skip


@pytest.mark.parametrize("name", FIREFLY)
def test_firefly_strips_contents_and_nothing_else(name: str) -> None:
    template = named_template(f"firefly/{name}", SpecialTokens("<s>", "</s>"))
    has_system = template.format.system is not None
    plain = [*([Message("system", "S")] if has_system else []), *TURNS]
    spaced = [Message(turn.role, f"\n {turn.content}\t") for turn in plain]
    assert template.render(spaced, "assistant") == template.render(plain, "assistant")


def test_the_placeholders_round_and_context_in_a_question_are_not_replaced() -> None:
    turns = [Message("user", "{round} {context}", context="{round}"), Message("assistant", "{round}")]
    [segments] = named_template("firefly/chatglm2", SpecialTokens("", "</s>")).render(turns, "assistant")
    assert [segment.text for segment in segments] == [
        "[gMASK]sop",
        "[Round 1]\n\n问：{round} {context}\n{round}\n\n答：",
        "{round}</s>",
    ]


def test_llama3_trims_a_system_text_and_llama2_does_not() -> None:
    turns = [Message("system", " S\n"), Message("user", "Q"), Message("assistant", "A")]
    texts = {
        name: "".join(
            segment.text for segment in named_template(name, SpecialTokens("<s>", "</s>")).render(turns, "assistant")[0]
        )
        for name in ("llama2", "llama3")
    }
    assert "<<SYS>>\n S\n\n<</SYS>>" in texts["llama2"]
    assert "<|end_header_id|>\n\nS<|eot_id|>" in texts["llama3"]
