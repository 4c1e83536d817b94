from __future__ import annotations

import copy

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.binding import bind_template, check_serving, special_tokens, stop_token_id
from sft_lightning.data.templates import NamedTemplate
from sft_lightning.data.turn_formats import TURN_FORMATS
from sft_lightning.errors import UserError
from sft_lightning.types import Message

CONVERSATIONS = [
    [Message("user", "Hi")],
    [Message("system", "Be brief."), Message("user", "Hi")],
    [Message("user", "Hi"), Message("assistant", 'Say "ho" \\n {x}'), Message("user", "Bye\n")],
]


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(tokenizer)


def bound(name: str, own: PreTrainedTokenizerFast) -> NamedTemplate:
    """Bind a template, with its stop token added to the tokenizer where it is another one's."""
    stop = TURN_FORMATS[name].stop
    if stop != "{eos}":
        own.add_special_tokens({"additional_special_tokens": [stop]})
    template = bind_template(name, own)
    assert isinstance(template, NamedTemplate)
    return template


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TURN_FORMATS)
def test_a_named_template_is_served_as_it_was_trained(
    name: str, conversation: list[Message], own: PreTrainedTokenizerFast
) -> None:
    template = bound(name, own)
    if conversation[0].role == "system" and template.format.system is None:
        with pytest.raises(UserError, match="no place for a system message"):
            template.render(conversation, "assistant")
        return
    check_serving(template, own, conversation)
    dicts = [{"role": m.role, "content": m.content} for m in conversation]
    served = own.apply_chat_template(dicts, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert served == own(template.generation_prompt(conversation), add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", TURN_FORMATS)
def test_the_whole_conversation_is_rendered_alike_too(name: str, own: PreTrainedTokenizerFast) -> None:
    template = bound(name, own)
    turns = [*CONVERSATIONS[2], Message("assistant", "See you")]
    dicts = [{"role": m.role, "content": m.content} for m in turns]
    trained = "".join(segment.text for segment in template.render(turns, "assistant")[0])
    assert own.apply_chat_template(dicts, tokenize=False) == trained


def test_a_drifted_export_is_found(own: PreTrainedTokenizerFast) -> None:
    template = bind_template("alpaca", own)
    own.chat_template = str(own.chat_template).replace("### Instruction", "### Question")
    with pytest.raises(RuntimeError, match="trained on"):
        check_serving(template, own, CONVERSATIONS[0])


def test_the_stop_token_is_one_id(own: PreTrainedTokenizerFast) -> None:
    assert stop_token_id(bind_template("vicuna_v1.1", own), own) == own.eos_token_id


def test_a_stop_text_of_several_tokens_is_refused(own: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate("</s>!a")}, []))
    gpt2_like = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")
    with pytest.raises(UserError, match="which this tokenizer splits into 4 tokens"):
        bind_template("vicuna_v1.1", gpt2_like)


def test_a_tokenizer_without_a_chat_template_asks_for_a_named_one(own: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="has no chat_template"):
        bind_template("chat_template", own)


def test_bos_is_the_tokenizers_own_habit(own: PreTrainedTokenizerFast) -> None:
    assert special_tokens(own) == ("<s>", "</s>")
