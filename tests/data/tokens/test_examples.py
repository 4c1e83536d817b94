from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.templates.binding import bind_template, special_tokens
from sft_lightning.data.templates.template import DocumentTemplate
from sft_lightning.data.tokens import examples
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.record_log import RecordLog
from sft_lightning.errors import UserError
from sft_lightning.types import Record

ALPACA = [{"instruction": f"What is {i}?", "output": f"It is {i}" + "!" * (i % 5)} for i in range(40)]


def records_of(rows: Sequence[dict[str, Any]]) -> list[Record]:
    return [Record(row, "s", f"f.json, record {i}") for i, row in enumerate(rows)]


def chat(*turns: str) -> dict[str, Any]:
    """A record of messages: `user: text`, `assistant: text`."""
    split = [turn.partition(": ") for turn in turns]
    return {"messages": [{"role": role, "content": content} for role, _, content in split]}


@pytest.fixture
def builder(tokenizer: PreTrainedTokenizerFast) -> Any:
    def make(template: str = "vicuna_v1.1", **options: Any) -> ExampleBuilder:
        own = copy.deepcopy(tokenizer)
        bound = DocumentTemplate(special_tokens(own)) if template == "text" else bind_template(template, own)
        return ExampleBuilder(tokenizer=own, template=bound, **{"loss_on": "assistant", **options})

    return make


Built = tuple[list[list[int]], list[list[float]], list[int], RecordLog]


def build(made: ExampleBuilder, rows: Sequence[dict[str, Any]], format_name: str | None = None) -> Built:
    """Token ids and weights of each example, the record of each, and the log."""
    log = RecordLog()
    batches = list(made.build(records_of(rows), format_name, "f.json", log))
    ids = [example.input_ids.tolist() for batch, _ in batches for example in batch]
    weights = [example.loss_weights.tolist() for batch, _ in batches for example in batch]
    return ids, weights, [index for _, records in batches for index in records.tolist()], log


@pytest.mark.parametrize("limit", [{"_EXAMPLES_AT_ONCE": 7}, {"_CHARACTERS_AT_ONCE": 300}, {"_EXAMPLES_AT_ONCE": 1}])
def test_small_batches_give_the_tokens_of_one_batch_in_the_order_of_the_records(
    limit: dict[str, int], builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(builder(), ALPACA)
    for name, value in limit.items():
        monkeypatch.setattr(examples, name, value)
    made = builder()
    log = RecordLog()
    assert len(list(made.build(records_of(ALPACA), None, "f.json", log))) >= 5
    assert build(made, ALPACA)[:3] == whole[:3]
    assert whole[2] == list(range(40))


def test_a_text_longer_than_a_batch_is_a_batch_of_its_own(builder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "_CHARACTERS_AT_ONCE", 10)
    assert build(builder(), ALPACA[:3])[2] == [0, 1, 2]


def test_supervised_tokens_are_the_answers(builder: Any) -> None:
    made = builder()
    ids, weights, _, _ = build(made, ALPACA[:3])
    answers = [np.array(each)[np.array(weight) > 0].tolist() for each, weight in zip(ids, weights, strict=True)]
    assert [made.tokenizer.decode(answer) for answer in answers] == [
        " It is 0</s>", " It is 1!</s>", " It is 2!!</s>",
    ]  # fmt: skip


def test_no_records_give_no_examples(builder: Any) -> None:
    assert build(builder(), [])[:3] == ([], [], [])


BROKEN = [chat("user: a", "assistant: b"), chat("user: a", "user: b"), chat("user: c", "assistant: d")]


def test_a_malformed_record_stops_the_build_with_its_location(builder: Any) -> None:
    with pytest.raises(UserError, match=r"f\.json, record 1: messages 0 and 1 are both from the user"):
        build(builder(), BROKEN)


def test_a_malformed_record_can_be_dropped_under_its_reason(builder: Any) -> None:
    _, _, records, log = build(builder(malformed="drop"), BROKEN)
    assert records == [0, 2]
    assert log.dropped == ["consecutive_turns"]
    assert log.dropped_at == {"consecutive_turns": [(1, "f.json, record 1")]}
    assert log.marks_array().tolist() == [0, 1 << log.codes.index("consecutive_turns"), 0]


def test_a_record_with_nothing_to_learn_is_dropped_although_malformed_is_error(builder: Any) -> None:
    rows = [chat("user: a", "assistant: b"), chat("user: a"), chat("assistant: b"), chat("user: a", "assistant: ")]
    _, _, records, log = build(builder(malformed="error"), rows)
    assert records == [0]
    assert log.dropped_at == {
        "no_answer": [(1, "f.json, record 1"), (3, "f.json, record 3")],
        "no_question": [(2, "f.json, record 2")],
    }


def test_the_log_keeps_the_first_locations_of_each_reason_and_marks_all_records(builder: Any) -> None:
    _, _, records, log = build(builder(), [chat("user: a")] * 50)
    assert records == []
    assert log.dropped_at["no_answer"] == [(i, f"f.json, record {i}") for i in range(20)]
    assert log.marks_array().tolist() == [1] * 50


def test_repairs_are_marked_and_the_record_kept(builder: Any) -> None:
    rows = [
        chat("user: a", "assistant: b", "user: c"),
        chat("assistant: hello", "user: a", "assistant: b", "user: c"),
        chat("user: a", "assistant: b"),
    ]
    _, _, records, log = build(builder(), rows)
    assert records == [0, 1, 2]
    assert set(log.codes) == {"trailing_user", "leading_answer"}
    assert log.dropped == []
    trailing, leading = (1 << log.codes.index(code) for code in ("trailing_user", "leading_answer"))
    assert log.marks_array().tolist() == [trailing, trailing | leading, 0]


REWRITING = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('|')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Drops what stands before `|` in earlier answers, as Qwen3 drops earlier thoughts."""


def test_a_conversation_that_the_template_rewrites_gives_one_example_per_answer_and_is_marked(
    builder: Any, tmp_path: Any
) -> None:
    (tmp_path / "own.jinja").write_text(REWRITING)
    made = builder(str(tmp_path / "own.jinja"))
    rows = [chat("user: a", "assistant: thought|b", "user: c", "assistant: thought|d"), chat("user: a", "assistant: b")]
    ids, weights, records, log = build(made, rows)
    assert records == [0, 0, 1]
    assert (log.codes, log.marks_array().tolist()) == (["rewritten"], [1, 0])
    answers = [np.array(each)[np.array(weight) > 0].tolist() for each, weight in zip(ids, weights, strict=True)]
    assert [made.tokenizer.decode(answer) for answer in answers] == ["thought|b</s>", "thought|d</s>", "b</s>"]


def test_the_detected_format_is_logged(builder: Any) -> None:
    assert build(builder(), ALPACA[:1])[3].format == "alpaca"
    assert build(builder(), ALPACA[:1], "alpaca")[3].format == "alpaca"
    assert build(builder("text"), [{"text": "a", "messages": 1}])[3].format == "text"


def test_a_format_that_the_log_has_is_used_for_records_that_look_like_another(builder: Any) -> None:
    rows = [{"text": "a", "instruction": "What?", "output": "That"}]
    log = RecordLog(format="text")
    [(batch, _)] = builder().build(records_of(rows), None, "f.json", log)
    assert log.format == "text"
    assert batch.counts.tolist() == [3]


def test_a_rendered_record_has_its_messages_segments_and_repairs(builder: Any) -> None:
    [rendered] = builder().render_records(records_of([chat("user: a", "assistant: b", "user: c")]), None, "f.json")
    [conversation] = rendered.conversations
    assert (rendered.format, rendered.repairs, rendered.dropped) == ("messages", ("trailing_user",), None)
    assert (conversation.name, [message.content for message in conversation.messages]) == ("", ["a", "b"])
    assert [[segment.text for segment in example if segment.supervised] for example in conversation.examples] == [
        [" b</s>"],
    ]  # fmt: skip


def test_a_dropped_record_is_rendered_as_its_reason_and_the_next_has_no_repairs_of_it(builder: Any) -> None:
    rows = [chat("user: a", "user: b", "assistant: c", "user: d"), chat("user: a", "assistant: b")]
    first, second = builder(malformed="drop").render_records(records_of(rows), None, "f.json")
    assert first.dropped.reason == "consecutive_turns"
    assert (first.conversations, first.repairs) == ((), ())
    assert (second.dropped, second.repairs) == (None, ())


def test_conversations_are_refused_in_pretraining(builder: Any) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.s: the format is alpaca, but task: pretrain requires text"):
        build(builder("text"), ALPACA[:1])


def test_documents_among_conversations_have_no_template(builder: Any) -> None:
    made = builder()
    ids, weights, _, _ = build(made, [{"prompt": "2+2=", "completion": "4"}])
    assert made.tokenizer.decode(ids[0]) == "<s>2+2=4</s>"
    assert [weight > 0 for weight in weights[0]][-2:] == [True, True]
    assert sum(weights[0]) == 2


def test_the_error_of_a_template_names_the_record(builder: Any, tmp_path: Any) -> None:
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('no such thing') }}{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    made = builder(str(tmp_path / "own.jinja"))
    rows = [chat("user: a", "assistant: b"), chat("user: forbidden", "assistant: b")]
    with pytest.raises(UserError, match=r"f\.json, record 1: .*no such thing"):
        build(made, rows)
