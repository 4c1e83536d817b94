from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.formats.fields import Malformed
from sft_lightning.data.pairs.examples import PairBuilder, make_pair
from sft_lightning.data.templates.binding import bind_template
from sft_lightning.data.tokens.examples import ALWAYS_DROPPED
from sft_lightning.data.tokens.record_log import RecordLog
from sft_lightning.errors import UserError
from sft_lightning.types import Message, Record


def record(**fields: Any) -> Record:
    return Record(fields, "toy", "toy.json, record 0")


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def supervised(messages: list[Message]) -> list[str]:
    return [message.content for message in messages if message.train]


def test_only_the_answers_have_a_loss() -> None:
    pair = make_pair(record(chosen=turns("q1", "a1", "q2", "good"), rejected=turns("q1", "a1", "q2", "bad")))
    assert supervised(pair.chosen) == ["good"]
    assert supervised(pair.rejected) == ["bad"]
    assert [m.content for m in pair.rejected] == ["q1", "a1", "q2", "bad"]


def test_a_leading_system_message_belongs_to_the_prompt() -> None:
    system = {"role": "system", "content": "Be short."}
    pair = make_pair(record(chosen=[system, *turns("q", "good")], rejected=[system, *turns("q", "bad")]))
    assert [m.role for m in pair.chosen] == ["system", "user", "assistant"]
    assert supervised(pair.chosen) == ["good"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "input": "", "output": ["good", "bad"]},
        {"question": "q", "response_j": "good", "response_k": "bad"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
    ],
)  # fmt: skip
def test_every_preference_layout_gives_the_same_pair(fields: dict[str, Any]) -> None:
    pair = make_pair(record(**fields))
    assert [(m.role, m.content) for m in pair.chosen] == [("user", "q"), ("assistant", "good")]
    assert [(m.role, m.content) for m in pair.rejected] == [("user", "q"), ("assistant", "bad")]


def test_answers_are_supervised_from_the_first_turn_that_differs() -> None:
    fields = {"chosen": turns("q1", "a", "q2", "b"), "rejected": turns("q1", "x", "q2", "y")}
    pair = make_pair(record(**fields))
    assert (supervised(pair.chosen), supervised(pair.rejected)) == (["a", "b"], ["x", "y"])
    last = make_pair(record(**fields), loss_on="last_turn")
    assert (supervised(last.chosen), supervised(last.rejected)) == (["b"], ["y"])


def test_both_answers_can_follow_the_turns_of_the_chosen_conversation() -> None:
    fields = {"chosen": turns("q1", "a", "q2", "b"), "rejected": turns("p1", "x", "p2", "y")}
    with pytest.raises(Malformed, match=r"data\.pair_history: chosen") as caught:
        make_pair(record(**fields))
    assert caught.value.reason == "different_prompts"
    pair = make_pair(record(**fields), history="chosen")
    assert [m.content for m in pair.rejected] == ["q1", "a", "q2", "y"]
    assert (supervised(pair.chosen), supervised(pair.rejected)) == (["b"], ["y"])


def test_a_conversation_that_continues_the_other_is_refused() -> None:
    fields = {"chosen": turns("q1", "a", "q2", "b"), "rejected": turns("q1", "a")}
    with pytest.raises(Malformed, match=r"toy\.json, record 0"):
        make_pair(record(**fields))


def test_a_pair_of_equal_answers_is_refused() -> None:
    with pytest.raises(Malformed, match="both answers are the same") as caught:
        make_pair(record(prompt="q", chosen="a", rejected="a"))
    assert caught.value.reason == "same_answers"
    assert caught.value.reason in ALWAYS_DROPPED


def test_a_record_without_a_worse_answer_is_malformed() -> None:
    with pytest.raises(Malformed, match="rejected"):
        make_pair(record(prompt="q", chosen="a"))


def test_an_empty_answer_is_counted() -> None:
    repairs: Counter[str] = Counter()
    with pytest.raises(Malformed):
        make_pair(record(prompt="q", chosen="a", rejected=" "), repairs=repairs)


def test_the_weight_of_a_record_is_the_weight_of_its_answers() -> None:
    pair = make_pair(record(prompt="q", chosen="a", rejected="b", weight=2))
    assert pair.chosen[-1].weight == pair.rejected[-1].weight == 2.0


REWRITING = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% set past = m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] if past else m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Leaves out the thoughts of earlier answers, as Qwen3's does."""


@pytest.fixture
def builder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    def make(**options: Any) -> PairBuilder:
        (tmp_path / "own.jinja").write_text(REWRITING)
        own = copy.deepcopy(tokenizer)
        template = bind_template(str(tmp_path / "own.jinja"), own)
        return PairBuilder(tokenizer=own, template=template, **{"loss_on": "assistant", **options})

    return make


EARLY = {"chosen": turns("q", "<think>x</think>a", "r", "b"), "rejected": turns("q", "<think>y</think>a", "r", "c")}
"""A pair that differs from its first answers on, which the template rewrites."""


def test_a_record_makes_two_examples_the_chosen_one_first(builder: Any) -> None:
    log = RecordLog()
    [(batch, records)] = builder().build([record(prompt="q", chosen="good", rejected="bad")], None, "f", log)
    answers = [example.input_ids[example.loss_weights > 0] for example in batch]
    assert [builder().tokenizer.decode(answer) for answer in answers] == ["good</s>", "bad</s>"]
    assert (records.tolist(), log.format, log.marks_array().tolist()) == ([0, 0], "preference", [0])


def test_a_pair_that_the_template_renders_as_several_examples_is_refused_with_a_way_out(builder: Any) -> None:
    with pytest.raises(
        Malformed, match=r"as 2 examples.*; set data\.loss_on: last_turn, fix the record or set"
    ) as caught:
        list(builder().build([record(**EARLY)], None, "f", RecordLog()))
    assert caught.value.reason == "rewritten_pair"


def test_a_pair_that_the_template_renders_as_several_examples_can_be_dropped(builder: Any) -> None:
    log = RecordLog()
    rows = [record(prompt="q", chosen="good", rejected="bad"), record(**EARLY)]
    [(_, records)] = builder(malformed="drop").build(rows, None, "f", log)
    assert records.tolist() == [0, 0]
    assert log.dropped == ["rewritten_pair"]


def test_the_last_answers_of_such_a_pair_can_be_compared(builder: Any) -> None:
    [rendered] = builder(loss_on="last_turn").render_records([record(**EARLY)], None, "f")
    assert [conversation.name for conversation in rendered.conversations] == ["chosen", "rejected"]
    assert [len(conversation.examples) for conversation in rendered.conversations] == [1, 1]


def test_a_format_without_pairs_is_refused(builder: Any) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.toy\.format: 'alpaca' has no pairs"):
        list(builder().build([record(instruction="q", output="a")], None, "f", RecordLog()))
