from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.data.formats.registry import FORMATS, Malformed, find_format, to_messages
from sft_lightning.data.sources.files import read_file
from sft_lightning.errors import UserError
from sft_lightning.types import Message, Record


def record(**fields: Any) -> Record:
    return Record(fields, "s", "f.json, record 0")


def test_alpaca_keeps_the_input_as_context() -> None:
    assert to_messages(record(instruction="Add", input="1, 2", output="3"), "alpaca") == [
        Message("user", "Add", context="1, 2"),
        Message("assistant", "3"),
    ]


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input_has_no_context(empty: dict[str, Any]) -> None:
    assert to_messages(record(instruction="Hi", output="Ho", **empty), "alpaca")[0].context is None


def test_alpaca_reads_a_system_text_and_a_history() -> None:
    found = to_messages(record(system="S", history=[["q", "a"]], instruction="Hi", output="Ho"), "alpaca")
    assert [(m.role, m.content) for m in found] == [
        ("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "Hi"), ("assistant", "Ho"),
    ]  # fmt: skip


def test_alpaca_reads_response_as_output_and_context_as_a_missing_input() -> None:
    dolly = record(instruction="Who?", context="Ada did.", response="Ada", category="closed_qa")
    assert to_messages(dolly, "alpaca") == [Message("user", "Who?", context="Ada did."), Message("assistant", "Ada")]
    both = record(instruction="Hi", input="", context="another column", output="Ho", response="Ho")
    assert to_messages(both, "alpaca") == [Message("user", "Hi"), Message("assistant", "Ho")]


@pytest.mark.parametrize("system", [None, ""])
def test_alpaca_without_a_system_text_has_no_system_message(system: str | None) -> None:
    assert to_messages(record(instruction="Hi", output="Ho", system=system), "alpaca")[0].role == "user"


def test_messages_keep_train_and_weight() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False, "weight": 2}]
    assert to_messages(record(messages=turns), "messages")[1] == Message("assistant", "a", train=False, weight=2.0)


def test_a_null_weight_counts_as_missing() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": None, "weight": None}]
    assert to_messages(record(messages=turns), "messages")[1] == Message("assistant", "a")


def test_a_records_weight_multiplies_each_messages() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0.5, "train": True}]
    found = to_messages(record(conversations=turns, weight=4), "sharegpt")
    assert found == [Message("user", "q", weight=4.0), Message("assistant", "a", weight=2.0, train=True)]
    assert to_messages(record(text="once", weight=0), "text") == [Message("text", "once", weight=0.0)]
    assert to_messages(record(text="once", weight=None), "text") == [Message("text", "once")]
    assert to_messages(record(text="once", weight="0.5"), "text") == [Message("text", "once", weight=0.5)]


def test_sharegpt_maps_roles_and_leaves_out_an_answer_before_the_question() -> None:
    turns = [{"from": "gpt", "value": "?"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert to_messages(record(conversations=turns), "sharegpt") == [Message("user", "q"), Message("assistant", "a")]


def test_prompt_and_completion_are_not_changed() -> None:
    assert to_messages(record(prompt="2+2=", completion="4"), "prompt_completion") == [
        Message("text", "2+2="),
        Message("text", "4"),
    ]


def test_each_segment_has_its_own_train_and_weight() -> None:
    pieces = [{"text": "Q ", "train": False}, {"text": "A", "train": True, "weight": 0.5}]
    assert to_messages(record(segments=pieces), "segments") == [
        Message("text", "Q ", train=False),
        Message("text", "A", train=True, weight=0.5),
    ]


def test_firefly_pairs_become_messages() -> None:
    pairs = [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]
    found = to_messages(record(conversation=pairs, system="S", source="lima"), "firefly")
    assert [(m.role, m.content) for m in found] == [
        ("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"),
    ]  # fmt: skip


def test_firefly_keeps_an_empty_system_text() -> None:
    pairs = [{"human": "q", "assistant": "a"}]
    assert to_messages(record(conversation=pairs, system=""), "firefly")[0] == Message("system", "")
    assert to_messages(record(conversation=pairs, system=None), "firefly")[0].role == "user"


def test_text_is_one_document() -> None:
    assert to_messages(record(text="once"), "text") == [Message("text", "once")]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"instruction": ""}, "alpaca"),
        ({"text": ""}, "text"),
        ({"conversation": []}, "firefly"),
        ({"segments": []}, "segments"),
        ({"prompt": "", "completion": ""}, "prompt_completion"),
        ({"prompt": "", "chosen": "", "rejected": ""}, "preference"),
        ({"instruction": "", "output": "", "chosen": "", "rejected": ""}, "preference"),
        ({"instruction": "", "output": ["better", "worse"]}, "preference"),
        ({"question": "", "response_j": "", "response_k": ""}, "preference"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "preference"),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, "firefly"),
        ({"conversation": [{"role": "user", "content": "q"}]}, "messages"),
        ({"messages": None, "text": ""}, "text"),
    ],
)
def test_the_format_is_detected_from_the_keys(fields: dict[str, Any], expected: str) -> None:
    assert find_format(None, record(**fields)) == expected


def test_a_deepspeed_chat_data_set_is_detected_by_its_hub_name_unless_a_format_is_set() -> None:
    row = record(prompt="", chosen="", rejected="")
    assert find_format(None, row, "Dahoas/rm-static") == "deepspeed_chat/rm-static"
    assert find_format(None, row, path="copies/Dahoas/rm-static/train.jsonl") == "deepspeed_chat/rm-static"
    assert find_format("preference", row, "Dahoas/rm-static") == "preference"
    assert find_format("deepspeed_chat/SHP", row) == "deepspeed_chat/SHP"


def test_a_single_message_in_a_row_is_not_taken_for_a_document() -> None:
    with pytest.raises(UserError, match="cannot detect the format"):
        find_format(None, record(text="?", role="prompter", parent_id=None))


def test_an_unknown_format_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'alpaca'"):
        find_format("alpacca", record())


def test_a_record_whose_format_cannot_be_detected_is_refused_with_its_keys() -> None:
    with pytest.raises(UserError, match=r"keys \['question'\]"):
        find_format(None, record(question="?"))


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("alpaca", {"instruction": "q"}, [Message("user", "q")]),
        ("alpaca", {"instruction": "q", "output": ""}, [Message("user", "q")]),
        ("prompt_completion", {"prompt": "q"}, [Message("text", "q", train=False)]),
        ("preference", {"prompt": "q", "chosen": None}, [Message("user", "q")]),
        ("messages", {"messages": [{"role": "user", "content": "q"}]}, [Message("user", "q")]),
        ("deepspeed_chat/jsonfile", {"prompt": "q", "chosen": None}, [Message("text", " q", train=False)]),
    ],
)
def test_a_question_to_predict_on_needs_no_answer(name: str, fields: dict[str, Any], expected: list[Message]) -> None:
    assert to_messages(record(**fields), name, answered=False) == expected


def test_a_question_to_predict_on_keeps_its_answer() -> None:
    assert to_messages(record(instruction="q", response="a"), "alpaca", answered=False)[-1].content == "a"
    local = to_messages(record(prompt="q", chosen="a"), "deepspeed_chat/jsonfile", answered=False)
    assert local[-1] == Message("text", " a")


def test_repairs_are_counted_only_for_records_that_are_kept() -> None:
    repairs: Counter[str] = Counter()
    to_messages(record(**turns("assistant", "user", "assistant", "user")), "messages", repairs=repairs)
    assert repairs == {"leading_answer": 1, "trailing_user": 1}
    with pytest.raises(Malformed):
        to_messages(record(**turns("assistant", "user", "user", "assistant")), "messages", repairs=repairs)
    assert repairs == {"leading_answer": 1, "trailing_user": 1}


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("fields", "name", "said"),
    [
        ({"instruction": "Hi"}, "alpaca", "`output` is missing"),
        ({"instruction": "Hi", "output": None}, "alpaca", "`output` must be a string (got NoneType)"),
        ({"instruction": "Hi", "output": "x", "input": 3}, "alpaca", "`input` must be a string"),
        ({"instruction": "Hi", "output": "x", "history": [["q"]]}, "alpaca", "`history` must be"),
        ({"messages": "x"}, "messages", "must be a list of messages (got str)"),
        ({"message": []}, "messages", "the record's keys are: message"),
        ({"messages": ["x"]}, "messages", "messages[0] must be an object"),
        (turns("user", "robot"), "messages", "messages[1].role: 'robot' is unknown"),
        (turns("user", "user", "assistant"), "messages", "messages 0 and 1 are both from the user"),
        (turns("assistant", "user"), "messages", "no assistant message follows the user's"),
        (turns("system", "assistant"), "messages", "no user message"),
        (turns("user", "system", "assistant"), "messages", "message 1 is a system message"),
        (turns("user"), "messages", "no assistant message follows"),
        ({"messages": [{"role": "user", "content": "x", "train": 1}]}, "messages", "train must be true or false"),
        ({"messages": [{"role": "user", "content": "x", "weight": -1}]}, "messages", "weight must be a number"),
        ({"messages": [{"role": "user", "content": "x", "weight": float("nan")}]}, "messages", "weight must be"),
        ({"conversation": [{"human": "q"}]}, "firefly", "`conversation[0].assistant` is missing"),
        ({"conversation": "q"}, "firefly", "`conversation` must be a list"),
        ({"prompt": "q"}, "prompt_completion", "`completion` is missing"),
        ({"segments": [{"text": 1}]}, "segments", "`segments[0].text` must be a string"),
        ({"segments": ["x"]}, "segments", "segments[0] must be an object"),
        ({"segments": "x"}, "segments", "`segments` must be a list of objects with `text` and `train` (got str)"),
        ({"messages": [{"role": "user"}]}, "messages", "`messages[0].content` is missing"),
        ({"instruction": "Hi", "output": "x", "response": "y"}, "alpaca", "both hold the answer, but they differ"),
        ({"instruction": "Hi", "output": ""}, "alpaca", "every assistant message is empty"),
        ({"prompt": "Hi", "completion": " "}, "prompt_completion", "`completion` is empty"),
        ({"text": "once", "weight": -1}, "text", "weight must be a number of at least 0 (got -1)"),
        ({"text": "once", "weight": "much"}, "text", "weight must be a number of at least 0 (got 'much')"),
        ({"text": "once", "weight": True}, "text", "weight must be a number of at least 0 (got True)"),
    ],
)
def test_a_broken_record_is_refused_with_its_location(fields: dict[str, Any], name: str, said: str) -> None:
    with pytest.raises(Malformed) as error:
        to_messages(record(**fields), name)
    assert "f.json, record 0" in str(error.value)
    assert said in str(error.value)
    assert "set data.malformed: drop" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "name", "reason"),
    [
        ({"instruction": "Hi"}, "alpaca", "broken_record"),
        (turns("user", "robot"), "messages", "unknown_role"),
        (turns("user", "system", "assistant"), "messages", "misplaced_system"),
        (turns("user", "tool", "assistant"), "messages", "misplaced_tool"),
        (turns("user", "assistant", "assistant"), "messages", "consecutive_turns"),
        (turns("system", "assistant"), "messages", "no_question"),
        (turns("user"), "messages", "no_answer"),
        ({"prompt": "Hi", "completion": ""}, "prompt_completion", "no_answer"),
    ],
)
def test_a_malformed_record_has_a_reason(fields: dict[str, Any], name: str, reason: str) -> None:
    with pytest.raises(Malformed) as error:
        to_messages(record(**fields), name)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("file", "expected", "num_malformed"),
    [
        ("chat/axolotl_conversation_missingturns.json", "sharegpt", 0),
        ("chat/colossalchat_test_sft.jsonl", "messages", 0),
        ("chat/fastchat_dummy_conversation.json", "sharegpt", 0),
        ("chat/lf_glaive_toolcall_en_demo.json", "sharegpt", 0),
        ("chat/oasst_sft_zh.json", "alpaca", 0),
        ("chat/torchtune_chat_tiny.json", "sharegpt", 0),
        ("chat/xtuner_multi_turn_1.json", "messages", 2),
        ("chat/xtuner_multi_turn_2.json", "messages", 0),
        ("instruct/litgpt_dolly_fixture.json", "alpaca", 0),
        ("preference/colossalchat_test_dpo.jsonl", "preference", 0),
        ("preference/hh_rlhf_harmless_base_test.jsonl.gz", "preference", 11),
        ("preference/oasst_rm_zh.json", "preference", 0),
        ("preference/rasbt_instruction_preference.json", "preference", 0),
        ("preference/torchtune_hh_rlhf_tiny.json", "preference", 0),
        ("preference/torchtune_stack_exchange_paired_tiny.json", "preference", 0),
    ],
)
def test_real_files_are_read(real_data: Path, file: str, expected: str, num_malformed: int) -> None:
    records = [Record(row, "s", location) for location, row in read_file(real_data / file)]
    assert find_format(None, records[0]) == expected
    malformed = 0
    for row in records:
        try:
            to_messages(row, expected)
        except Malformed:
            malformed += 1
    assert malformed == num_malformed


def test_every_format_refuses_an_empty_record() -> None:
    for name in FORMATS:
        with pytest.raises(Malformed, match=r"f\.json, record 0"):
            to_messages(record(), name)


def test_half_of_a_surrogate_pair_is_malformed() -> None:
    with pytest.raises(Malformed, match=r"an unpaired surrogate \('\\ud83d' at character 4\)") as error:
        to_messages(record(instruction="ends\ud83d", output="a"), "alpaca")
    assert error.value.reason == "broken_record"
