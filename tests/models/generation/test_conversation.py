from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sft_lightning.data.templates.binding import bind_template
from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import GenerationConfig, LoadOptions
from sft_lightning.models.generation.conversation import AnswerStreamer, Conversation
from sft_lightning.models.generation.serving import ServedModel, load_served_model


@pytest.fixture
def served(model_dir: Path) -> ServedModel:
    model = load_served_model("--model", str(model_dir), None, LoadOptions())
    bind_template("vicuna_v1.1", model.tokenizer)
    return model


@pytest.fixture
def asked(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the model was given."""
    texts: list[str] = []
    answer = served.answer

    def record(prompts: Sequence[Sequence[int]], *args: object, **kwargs: object) -> object:
        texts.extend(served.tokenizer.decode(list(ids)) for ids in prompts)
        return answer(prompts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(served, "answer", record)
    return texts


SHORT = GenerationConfig(max_new_tokens=4)


def test_a_question_continues_the_conversation(served: ServedModel, asked: list[str]) -> None:
    conversation = Conversation(served, SHORT, "Be kind.")
    first, left_out = conversation.ask("One?")
    conversation.ask("Two?")
    assert left_out == 0
    assert asked[0] == "<s>Be kind. USER: One? ASSISTANT:"
    assert asked[1].startswith(f"<s>Be kind. USER: One? ASSISTANT: {first.text}")
    assert asked[1].endswith("</s>USER: Two? ASSISTANT:")


def test_commands_clear_the_conversation_and_set_the_system_message(served: ServedModel, asked: list[str]) -> None:
    conversation = Conversation(served, SHORT)
    conversation.ask("One?")
    assert conversation.command("/reset") == "conversation cleared"
    assert conversation.command("/system Be brief.") == "system: Be brief."
    conversation.ask("Two?")
    assert asked[1] == "<s>Be brief. USER: Two? ASSISTANT:"
    assert conversation.command("/system") == "no system message"
    assert conversation.command("One?") is None
    assert (conversation.system, conversation.messages) == (None, [])


def test_a_checkpoint_without_a_template_gets_plain_text(served: ServedModel, asked: list[str]) -> None:
    served.tokenizer.chat_template = None
    conversation = Conversation(served, SHORT, "Be kind.")
    first, _ = conversation.ask("One?")
    conversation.ask("Two?")
    assert asked[1] == f"<s>Be kind. Human: One? Assistant: {first.text} Human: Two? Assistant:"


def test_the_oldest_messages_are_left_out_to_fit_the_context_and_counted(served: ServedModel, asked: list[str]) -> None:
    conversation = Conversation(served, SHORT, "S.")
    conversation.ask("old " * 20)
    length = len(served.tokenizer(asked[0], add_special_tokens=False).input_ids)
    served.model.config.max_position_embeddings = length + 4
    _, left_out = conversation.ask("new " * 10)
    assert left_out == 2
    assert asked[1] == f"<s>S. USER: {'new ' * 10} ASSISTANT:"
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"together more than the model's context of \d+"):
        conversation.ask("long " * 100)
    assert conversation.messages == before


def test_a_streamed_answer_is_printed_without_its_stop_token_and_safely(
    served: ServedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = Conversation(served, GenerationConfig(max_new_tokens=8)).ask("One?")
    served.stop_token_ids = [whole.token_ids[5]]
    answer, _ = Conversation(served, GenerationConfig(max_new_tokens=8)).ask("One?", AnswerStreamer(served))
    shown = capsys.readouterr().out
    assert answer.stop_reason == "stop"
    assert shown.endswith("\n")
    assert served.tokenizer.decode([whole.token_ids[5]]) not in shown.strip()[-1:] or len(answer.token_ids) == 5
    assert "\x1b" not in shown
