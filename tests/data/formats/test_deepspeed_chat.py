"""The strings of DeepSpeed-Chat's `raw_datasets.py`, written out."""

from __future__ import annotations

from typing import Any

import pytest

from sft_lightning.data.formats.deepspeed_chat import DATASETS, dataset_format
from sft_lightning.data.formats.fields import Malformed
from sft_lightning.data.formats.registry import to_messages
from sft_lightning.types import Message, Record

WEBGPT = {"question": {"full_text": "q"}, "answer_0": "first [1] (2) end[3].", "answer_1": "second"}
SHP = {"history": "q", "human_ref_A": "A's", "human_ref_B": "B's"}

EXACT: list[tuple[str, dict[str, Any], str, str]] = [
    ("rm-static", {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a"}, "\n\nHuman: q\n\nAssistant:", " a"),
    ("full-hh-rlhf", {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a"}, "\n\nHuman: q\n\nAssistant:", " a"),
    ("synthetic-instruct-gptj-pairwise", {"prompt": "q", "chosen": "a"}, " Human: q Assistant:", " a"),
    ("rlhf-reward-datasets", {"prompt": "Human: q ", "chosen": "Assistant: a"}, "Human: q Assistant:", " a"),
    ("rlhf-reward-datasets", {"prompt": "Human: q", "chosen": "\nAssistant: a"}, "Human: q", "\nAssistant: a"),
    ("webgpt_comparisons", {**WEBGPT, "score_0": 1, "score_1": 0}, " Human: q Assistant:", " first end."),
    ("webgpt_comparisons", {**WEBGPT, "score_0": "0.5", "score_1": "0.5"}, " Human: q Assistant:", " first end."),
    ("webgpt_comparisons", {**WEBGPT, "score_0": -1, "score_1": 0}, " Human: q Assistant:", " second"),
    ("SHP", {**SHP, "labels": 1}, " Human: q Assistant:", " A's"),
    ("SHP", {**SHP, "labels": 0}, " Human: q Assistant:", " B's"),
    ("sharegpt_alpaca_oa_vicuna_format", {"prompt": "USER: q ASSISTANT:", "label": "a"}, "Human: q Assistant:", " a"),
    ("Zhihu-KOL", {"INSTRUCTION": "q", "RESPONSE": "a"}, " Human: q Assistant:", " a"),
    ("miracl-zh-queries-22-12", {"query": "q", "positive_passages": [{"text": "a"}]}, " Human: q Assistant:", " a"),
    ("miracl-ja-queries-22-12", {"query": "q", "positive_passages": [{"text": "a"}]}, " Human: q Assistant:", " a"),
    ("HC3-Chinese", {"question": "q", "human_answers": ["a", "b"]}, " Human: q Assistant:", " a"),
    ("mkqa-Chinese", {"queries": {"zh_cn": "q"}, "answers": {"zh_cn": [{"text": "a"}]}}, " Human: q Assistant:", " a"),
    ("mkqa-Japanese", {"queries": {"ja": "q"}, "answers": {"ja": [{"text": "a"}]}}, " Human: q Assistant:", " a"),
    ("qg_jaquad", {"question": "q", "sentence": "a"}, " Human: q Assistant:", " a"),
    ("qag_jaquad", {"questions": ["q", "r"], "paragraph": "a"}, " Human: q Assistant:", " a"),
    ("jsonfile", {"prompt": "Human: q Assistant:", "chosen": "a", "rejected": None}, " Human: q Assistant:", " a"),
]


def record(fields: dict[str, Any]) -> Record:
    return Record(fields, "s", "f.json, record 0")


@pytest.mark.parametrize(("name", "fields", "prompt", "answer"), EXACT)
def test_prompt_and_answer_are_deepspeed_chats_strings(
    name: str, fields: dict[str, Any], prompt: str, answer: str
) -> None:
    assert to_messages(record(fields), f"deepspeed_chat/{name}") == [
        Message("text", prompt),
        Message("text", answer),
    ]


def test_the_strings_of_every_data_set_are_written_out_here() -> None:
    assert {f"deepspeed_chat/{name}" for name, *_ in EXACT} == set(DATASETS)
    assert len(DATASETS) == 16


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Dahoas/rm-static", "deepspeed_chat/rm-static"),
        ("copies/stanfordnlp/SHP", "deepspeed_chat/SHP"),
        ("lmqg/qag_jaquad", "deepspeed_chat/qag_jaquad"),
        ("lmqg/qg_jaquad", "deepspeed_chat/qg_jaquad"),
        ("mkqa-Japanese", "deepspeed_chat/mkqa-Japanese"),
        ("local/jsonfile", "deepspeed_chat/jsonfile"),
        ("tatsu-lab/alpaca", None),
        ("", None),
    ],
)
def test_a_data_set_is_detected_by_its_hub_name_within_the_path(path: str, expected: str | None) -> None:
    assert dataset_format(path) == expected


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sharegpt_alpaca_oa_vicuna_format", {"prompt": "", "label": "a"}),
        ("sharegpt_alpaca_oa_vicuna_format", {"prompt": "USER: q", "label": None}),
        ("sharegpt_alpaca_oa_vicuna_format", {"prompt": "USER: q", "label": ""}),
        ("Zhihu-KOL", {"INSTRUCTION": "q", "RESPONSE": None}),
        ("HC3-Chinese", {"question": "q", "human_answers": [None]}),
        ("HC3-Chinese", {"question": "q", "human_answers": []}),
        ("mkqa-Chinese", {"queries": {"zh_cn": "q"}, "answers": {"zh_cn": [{"text": None}]}}),
        ("jsonfile", {"prompt": None, "chosen": "a"}),
        ("rm-static", {"prompt": "q", "chosen": " "}),
    ],
)
def test_a_record_that_deepspeed_chat_drops_has_no_answer(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(Malformed) as error:
        to_messages(record(fields), f"deepspeed_chat/{name}")
    assert error.value.reason == "no_answer"
    assert "f.json, record 0" in str(error.value)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("rm-static", {"prompt": "q"}, "`chosen` is missing"),
        ("rm-static", {"prompt": 1, "chosen": "a"}, "`prompt` must be a string (got int)"),
        ("webgpt_comparisons", {"question": "q"}, "`question.full_text` is missing"),
        ("webgpt_comparisons", {**WEBGPT, "score_0": "high", "score_1": 0}, "`score_0` must be a number (got 'high')"),
        ("SHP", SHP, "`labels` must be a number (got None)"),
        ("mkqa-Chinese", {"queries": {"zh_cn": "q"}, "answers": {"zh_cn": "a"}}, "`answers.zh_cn[0]` is missing"),
    ],
)
def test_a_broken_record_is_refused_with_its_key(name: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Malformed) as error:
        to_messages(record(fields), f"deepspeed_chat/{name}")
    assert f"f.json, record 0: {said}" in str(error.value)
    assert error.value.reason == "broken_record"
