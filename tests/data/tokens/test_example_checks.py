from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.templates.binding import bind_template, special_tokens
from sft_lightning.data.templates.template import DocumentTemplate, Template
from sft_lightning.data.tokens.example_checks import check_examples
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.errors import UserError
from sft_lightning.types import LossOn, Message

TURNS = [Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "Bye"), Message("assistant", "Cheerio")]
TURN = "{% for message in messages %}{{ '<s>' + message.role + '\\n' + message.content + '</s>' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(tokenizer)


def check(
    template: Template, own: PreTrainedTokenizerFast, messages: Sequence[Message], loss_on: LossOn = "assistant"
) -> None:
    check_examples(template, own, TextEncoder(own), [("chat.jsonl, line 1", messages)], loss_on)


def of_jinja(own: PreTrainedTokenizerFast, source: str) -> Template:
    own.chat_template = source
    return bind_template("chat_template", own)


@pytest.mark.parametrize("loss_on", ["assistant", "last_turn", "all"])
@pytest.mark.parametrize("name", ["alpaca", "vicuna_v1.1", "vigogne/chat_v3"])
def test_correct_examples_pass(name: str, loss_on: LossOn, own: PreTrainedTokenizerFast) -> None:
    check(bind_template(name, own), own, TURNS, loss_on)
    check(bind_template(name, own), own, [Message("user", "Add", context="1, 2"), Message("assistant", "3")], loss_on)


@pytest.mark.parametrize("loss_on", ["assistant", "last_turn", "all"])
def test_correct_examples_of_a_jinja_template_pass(loss_on: LossOn, own: PreTrainedTokenizerFast) -> None:
    check(of_jinja(own, TURN + ASK), own, [Message("system", "S"), *TURNS], loss_on)


def test_documents_pass(own: PreTrainedTokenizerFast) -> None:
    documents = DocumentTemplate(special_tokens(own))
    check(documents, own, [Message("text", "Once upon a time.")])
    check(documents, own, [Message("text", "2+2=", train=False), Message("text", "4", train=True)])


def test_a_cut_before_an_earlier_answer_is_accepted(own: PreTrainedTokenizerFast) -> None:
    own.add_tokens([":)"])
    template = bind_template("alpaca", own)
    turns = [Message("user", "Smile"), Message("assistant", ") is half of one."), *TURNS]
    check(template, own, turns)


def test_two_bos_tokens_are_refused_with_the_location(own: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"chat\.jsonl, line 1: the example begins with two BOS tokens: '<s><s>user"):
        check(of_jinja(own, "{{ bos_token }}" + TURN + ASK), own, TURNS)


def test_a_text_with_a_bos_of_its_own_is_refused(own: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="begins with two BOS tokens"):
        check(DocumentTemplate(special_tokens(own)), own, [Message("text", "<s>Once upon a time.")])


def test_a_template_with_the_bos_of_another_tokenizer_is_refused(own: PreTrainedTokenizerFast) -> None:
    own.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    with pytest.raises(UserError, match=r"begins with '<\|begin_of_text\|>', which is not a special token"):
        check(bind_template("llama3", own), own, TURNS)


def test_an_answer_without_its_stop_token_is_refused(own: PreTrainedTokenizerFast) -> None:
    source = "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}</s>"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    template = of_jinja(own, source)
    with pytest.raises(UserError, match="ends 1 of 2 supervised answers with a stop token"):
        check(template, own, TURNS, "all")


def test_a_stop_token_that_the_tokenizer_merges_with_the_text_is_refused() -> None:
    def made() -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE({"<": 0, ">": 1, "a": 2, "b": 3, ":": 4, "a>": 5}, [("a", ">")]))
        backend.pre_tokenizer = pre_tokenizers.Split(":", "isolated")
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    joins, serving = made(), made()
    serving.add_tokens([">"])
    serving.chat_template = (
        "{% for m in messages %}{{ ':' + m.content + '>' }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    template = bind_template("chat_template", serving)
    turns = [Message("user", "b"), Message("assistant", "ba")]
    with pytest.raises(UserError, match="does not end with its stop token but with the tokens"):
        check_examples(template, serving, TextEncoder(joins), [("line 1", turns)], "assistant")


def test_spaces_at_the_end_of_a_prompt_are_trained_as_they_are_served() -> None:
    """Alone they are one token, before a digit two, and no token crosses the border."""
    backend = Tokenizer(models.BPE({" ": 0, "1": 1, "  ": 2, "q": 3, ":": 4, "|": 5, "a": 6}, [(" ", " ")]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+(?!\S)|\s+|[^\s]"), "isolated")
    spaces = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="|")
    spaces.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ ':  ' + m.content + '|' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ':  ' }}{% endif %}"
    )
    check(bind_template("chat_template", spaces), spaces, [Message("user", "q"), Message("assistant", "1")])


def test_an_example_without_a_supervised_token_is_refused(own: PreTrainedTokenizerFast) -> None:
    nothing = DocumentTemplate(special_tokens(own)._replace(eos="</s>"))
    with pytest.raises(UserError, match="no token of the example is supervised"):
        check(nothing, own, [Message("text", "", train=True), Message("text", "a", train=False)])


def test_an_example_without_any_supervised_message_is_accepted(
    own: PreTrainedTokenizerFast,
) -> None:
    check(bind_template("alpaca", own), own, [Message("user", "q"), Message("assistant", "a", train=False)])


def test_a_chat_template_that_differs_from_its_template_is_a_bug(own: PreTrainedTokenizerFast) -> None:
    template = bind_template("alpaca", own)
    own.chat_template = str(own.chat_template).replace("### Instruction", "### Question")
    with pytest.raises(RuntimeError, match="but its chat template serves"):
        check(template, own, TURNS)


def test_the_error_of_a_template_names_the_record(own: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"chat\.jsonl, line 1: .*has no place for a tool's result"):
        check(bind_template("alpaca", own), own, [*TURNS, Message("tool", "3"), Message("assistant", "4")])
