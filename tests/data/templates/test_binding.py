from __future__ import annotations

import copy
import logging
from datetime import datetime
from pathlib import Path

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.templates.binding import bind_template, check_serving, special_tokens, stop_token_id
from sft_lightning.data.templates.jinja import JinjaTemplate
from sft_lightning.data.templates.named import NamedTemplate
from sft_lightning.data.templates.turn_formats import TURN_FORMATS
from sft_lightning.errors import UserError
from sft_lightning.types import Message

CONVERSATIONS = [
    [Message("user", "Hi")],
    [Message("system", "Be brief."), Message("user", "Hi")],
    [Message("user", "Hi"), Message("assistant", 'Say "ho" \\n {x}'), Message("user", "Bye\n")],
]


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    own = copy.deepcopy(tokenizer)
    own.chat_template = None  # another test may have bound one to the session's tokenizer
    return own


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
        with pytest.raises(TemplateError, match="no place for a system message"):
            own.apply_chat_template([{"role": m.role, "content": m.content} for m in conversation], tokenize=False)
        return
    check_serving(template, own, conversation)
    dicts = [{"role": m.role, "content": m.content} for m in conversation]
    served = own.apply_chat_template(dicts, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert served == own(template.generation_prompt(conversation), add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", TURN_FORMATS)
def test_a_named_template_and_its_export_render_the_same_conversation(name: str, own: PreTrainedTokenizerFast) -> None:
    template = bound(name, own)
    turns = [*CONVERSATIONS[2], Message("assistant", "See you")]
    dicts = [{"role": m.role, "content": m.content} for m in turns]
    trained = "".join(segment.text for segment in template.render(turns, "assistant")[0])
    assert own.apply_chat_template(dicts, tokenize=False) == trained


def test_an_export_that_differs_from_its_template_is_found(own: PreTrainedTokenizerFast) -> None:
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


def test_a_tokenizer_without_a_chat_template_requires_a_named_one(own: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="has no chat_template"):
        bind_template("chat_template", own)


def test_the_bos_is_empty_if_the_tokenizer_does_not_write_one(own: PreTrainedTokenizerFast) -> None:
    assert special_tokens(own) == ("<s>", "</s>")


def test_a_role_that_a_named_template_does_not_have_is_refused_at_serving(own: PreTrainedTokenizerFast) -> None:
    bind_template("alpaca", own)
    with pytest.raises(TemplateError, match="no place for a message of role tool"):
        own.apply_chat_template([{"role": "user", "content": "q"}, {"role": "tool", "content": "r"}], tokenize=False)


def test_a_stop_text_of_several_tokens_is_refused_with_the_templates_that_end_with_the_eos() -> None:
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate("</s>!a")}, []))
    mamba_like = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")
    with pytest.raises(UserError, match=r"the tokenizer's EOS '!': alpaca, human_assistant, .*firefly/default"):
        bind_template("firefly/mamba", mamba_like)


def test_a_tokenizer_without_an_eos_is_refused() -> None:
    backend = Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(UserError, match="but the tokenizer has none; set `eos_token`"):
        bind_template("alpaca", PreTrainedTokenizerFast(tokenizer_object=backend))


CHATML = (
    "{% for message in messages %}{{ '<s>' + message.role + '\\n' + message.content + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def jinja(tmp_path: Path, source: str) -> str:
    path = tmp_path / "mine.jinja"
    path.write_text(source)
    return str(path)


def test_a_jinja_file_becomes_the_tokenizers_chat_template(tmp_path: Path, own: PreTrainedTokenizerFast) -> None:
    template = bind_template(jinja(tmp_path, CHATML), own)
    assert own.chat_template == CHATML
    check_serving(template, own, CONVERSATIONS[2])
    assert isinstance(template, JinjaTemplate)
    assert template.generation_prompt(CONVERSATIONS[0]) == "<s>user\nHi</s>\n<s>assistant\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (CHATML.replace("{% endfor %}", ""), r"mine\.jinja, line 1 of the template: "),
        ("{{ raise_exception('Roles must alternate') }}", "refuses a conversation: Roles must alternate"),
        ("{{ messages[7].content + '!' }}", "refuses a conversation: "),
        ("{{ ().__class__.__mro__ }}", "refuses a conversation: .*unsafe"),
        ("{{ messages | length + 'a' }}", "fails on a conversation: TypeError: unsupported operand"),
        ("{{ 1 // (messages | length - messages | length) }}", "fails on a conversation: ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on a conversation: RecursionError"),
        ("{% for i in range(9 ** 6) %}x{% endfor %}", "fails on a conversation: OverflowError"),
    ],
)
def test_a_broken_jinja_file_is_refused(
    source: str, message: str, tmp_path: Path, own: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=message):
        bind_template(jinja(tmp_path, source), own)


def test_a_jinja_file_that_cannot_be_read_is_refused(tmp_path: Path, own: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"cannot read 'nowhere\.jinja': No such file"):
        bind_template("nowhere.jinja", own)
    path = tmp_path / "latin.jinja"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        bind_template(str(path), own)


def test_a_template_with_the_date_renders_one_date(
    tmp_path: Path, own: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sft_lightning"):
        template = bind_template(jinja(tmp_path, "{{ strftime_now('%Y %f') }}" + CHATML), own)
    assert "writes the current date into every conversation" in caplog.text
    prompts = {template.generation_prompt(CONVERSATIONS[0]) for _ in range(20)}
    assert len(prompts) == 1
    assert abs(int(prompts.pop()[:4]) - datetime.now().year) <= 1


def test_a_template_without_the_bos_that_the_tokenizer_writes_is_warned_about(
    own: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    own.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    with caplog.at_level(logging.WARNING, "sft_lightning"):
        bind_template("alpaca", own)
        assert not caplog.records
        bind_template("chatml", own)
    assert "chatml leaves out <s>" in caplog.text


def test_a_tokenizers_template_for_tools_renders_conversations_with_tools(
    own: PreTrainedTokenizerFast,
) -> None:
    own.chat_template = {"default": CHATML, "tool_use": "{{ tools[0].name }}" + CHATML}
    template = bind_template("chat_template", own)
    assert template.generation_prompt([Message("user", "q")]).startswith("<s>user")
    assert template.generation_prompt([Message("user", "q", tools=[{"name": "f"}])]).startswith("f<s>user")
