from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import GenerationConfig

from sft_lightning.cli.dialogue import answer_lines, checkpoint_defaults
from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import LoadOptions
from sft_lightning.models.generation.conversation import Conversation
from sft_lightning.models.generation.serving import load_served_model


class Echo:
    """A conversation whose answers are its prompts; `/clear` is its only command."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def command(self, line: str) -> str | None:
        return "cleared" if line == "/clear" else None

    def ask(self, prompt: str) -> tuple[Any, int]:
        if prompt == "too long":
            raise UserError("the prompt is too long")
        self.messages.append(prompt)
        return SimpleNamespace(text=prompt.upper() + "\\\n\x1b"), 0


def conversation() -> tuple[Echo, Conversation]:
    echo = Echo()
    return echo, cast(Conversation, echo)


def test_each_prompt_gets_one_line_with_escaped_line_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    echo, fake = conversation()
    answer_lines(["one\n", "\n", "/clear\n"], fake, keep=False)
    assert capsys.readouterr().out.splitlines() == ["ONE\\\\\\n␛", "", "/CLEAR\\\\\\n␛"]
    assert echo.messages == []


def test_a_conversation_keeps_its_messages_and_has_commands(capsys: pytest.CaptureFixture[str]) -> None:
    echo, fake = conversation()
    answer_lines(["one\n", "/clear\n", "two\n", "/quit\n", "three\n"], fake, keep=True)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert echo.messages == ["one", "two"]


def test_the_line_of_a_prompt_that_fails_is_named() -> None:
    with pytest.raises(UserError, match="line 2 of the input: the prompt is too long"):
        answer_lines(["one\n", "too long\n"], conversation()[1], keep=False)


def test_sampling_parameters_come_from_the_generation_config(model_dir: Path) -> None:
    served = load_served_model("--model", str(model_dir), None, LoadOptions())
    assert checkpoint_defaults(served) == {"repetition_penalty": 1.0}
    served.model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
    assert checkpoint_defaults(served) == {"temperature": 0.6, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.0}
