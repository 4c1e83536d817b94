from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.templates.binding import bind_template, special_tokens
from sft_lightning.data.templates.named import named_template
from sft_lightning.data.templates.template import DocumentTemplate, Template
from sft_lightning.data.templates.turn_formats import TURN_FORMATS
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.tokenization import tokenize
from sft_lightning.training.checks.data.expected_masks import expected_mask, find_contents
from sft_lightning.types import LossOn, Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CONVERSATION = [
    Message("system", "a"),
    Message("user", "user"),  # a word that templates write themselves
    Message("assistant", "assistant"),
    Message("user", " 1 "),
    Message("assistant", "ASSISTANT: 1", weight=0.5),
    Message("user", "user"),
    Message("assistant", "user"),
]


@pytest.fixture(scope="module")
def stops(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that has the stop token of every template."""
    found = copy.deepcopy(tokenizer)
    tokens = sorted({form.stop for form in TURN_FORMATS.values()} - {"{eos}"} | {"<|im_start|>", "<|im_end|>"})
    found.add_special_tokens({"additional_special_tokens": tokens})
    return found


def compare(
    messages: Sequence[Message], template: Template, tokenizer: PreTrainedTokenizerFast, loss_on: LossOn
) -> float:
    """Compare with the weights that training gives, and return the share of tokens whose weight is known."""
    known = []
    rendered = template.render(messages, loss_on)
    for segments in rendered:
        text = "".join(segment.text for segment in segments)
        mask = expected_mask(text, messages, template, tokenizer, loss_on, rewritten=len(rendered) > 1)
        assert mask is not None
        [example] = tokenize([segments], TextEncoder(tokenizer))
        if example.input_ids.tolist() == mask.ids:  # else the text was cut before an answer
            knows = ~np.isnan(mask.weights)
            knows[0] = False
            assert mask.weights[knows].tolist() == example.loss_weights[knows].tolist()
            known.append(knows[1:].mean())
    return float(np.mean(known)) if known else 1.0


@pytest.mark.parametrize("loss_on", ["assistant", "last_turn", "all"])
def test_every_named_template_has_the_weights_that_training_gives(
    loss_on: LossOn, stops: PreTrainedTokenizerFast
) -> None:
    messages = CONVERSATION if loss_on != "all" else [Message(each.role, each.content) for each in CONVERSATION]
    for name, form in TURN_FORMATS.items():
        template = named_template(name, special_tokens(stops))
        part = messages[1:] if form.system is None else messages
        assert compare(part, template, stops, loss_on) == 1.0, name


@pytest.mark.parametrize("loss_on", ["assistant", "last_turn", "all"])
def test_a_jinja_template_that_trims_contents_has_the_weights_that_training_gives(
    loss_on: LossOn, stops: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(stops)
    tokenizer.chat_template = CHATML
    template = bind_template("chat_template", tokenizer)
    messages = CONVERSATION if loss_on != "all" else [Message(each.role, each.content) for each in CONVERSATION]
    assert compare(messages, template, tokenizer, loss_on) == 1.0


def test_messages_that_say_themselves_whether_they_train(stops: PreTrainedTokenizerFast) -> None:
    template = named_template("vicuna_v1.1", special_tokens(stops))
    messages = [
        Message("user", "one", train=True, weight=2.0),
        Message("assistant", "two", train=False),
        Message("user", "three"),
        Message("assistant", "four", weight=0.0),
        Message("user", "five"),
        Message("assistant", "six"),
    ]
    assert compare(messages, template, stops, "assistant") > 0.3
    assert compare(messages, template, stops, "all") > 0.1


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_system_text_that_is_written_into_a_trained_users_message_is_not_known(
    loss_on: LossOn, stops: PreTrainedTokenizerFast
) -> None:
    template = named_template("llama2", special_tokens(stops))
    messages = [Message("system", "a"), Message("user", "one", train=loss_on != "all"), Message("assistant", "two")]
    assert compare(messages, template, stops, loss_on) > 0.1


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_documents_end_with_a_supervised_stop_token(loss_on: LossOn, stops: PreTrainedTokenizerFast) -> None:
    template = DocumentTemplate(special_tokens(stops))
    pieces = [Message("text", "prompt: ", train=False), Message("text", "completion")]
    assert compare(pieces, template, stops, loss_on) > 0.5
    assert compare([Message("text", "a document")], template, stops, loss_on) == 1.0


def test_a_context_is_a_content_of_its_own(stops: PreTrainedTokenizerFast) -> None:
    template = named_template("alpaca", special_tokens(stops))
    messages = [Message("user", "Count.", context="1"), Message("assistant", "1")]
    assert compare(messages, template, stops, "assistant") == 1.0


@pytest.mark.parametrize(
    ("written", "known"),
    [("{{ m.content | trim }}", 1.0), ("{% if m.content %}: {{ m.content }}{% endif %}", 0.2)],
)
def test_the_place_of_an_empty_content_is_found_or_not_known(
    written: str, known: float, stops: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(stops)
    tokenizer.chat_template = CHATML.replace("{{ m.content | trim }}", written)
    template = bind_template("chat_template", tokenizer)
    messages = [Message("user", ""), Message("assistant", "a"), Message("user", "a"), Message("assistant", "")]
    assert compare(messages, template, tokenizer, "assistant") >= known


def test_a_template_that_changes_contents_gives_no_answer(stops: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(stops)
    tokenizer.chat_template = CHATML.replace("trim", "replace('h', 'j')")
    template = bind_template("chat_template", tokenizer)
    messages = [Message("user", "hello"), Message("assistant", "bye")]
    text = "".join(f"<|im_start|>{each.role}\n{each.content.replace('h', 'j')}<|im_end|>\n" for each in messages)
    assert find_contents(text, messages, template) is None
