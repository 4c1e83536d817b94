"""The dialogue of `chat`: prompts from a terminal or a pipe, answers as they are generated."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.models.generation.conversation import HELP, AnswerStreamer, Conversation
from sft_lightning.models.generation.serving import ServedModel
from sft_lightning.models.inspection import base_model
from sft_lightning.terminal import printable

with contextlib.suppress(ImportError):  # line editing and history, where the platform has it
    import readline  # noqa: F401


def checkpoint_defaults(served: ServedModel) -> dict[str, Any]:
    """Return the sampling parameters of a checkpoint's `generation_config.json`; greedy if it does not sample."""
    own = base_model(served.model).generation_config
    penalty = {"repetition_penalty": getattr(own, "repetition_penalty", None) or 1.0}
    if not getattr(own, "do_sample", None):
        return penalty
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return penalty | {name: getattr(own, name, None) or neutral for name, neutral in defaults.items()}


def talk(served: ServedModel, conversation: Conversation, *, keep: bool) -> None:
    """Answer the prompts that are typed in the terminal, until /quit or the end of the input.

    Args:
        served: The model.
        conversation: The conversation, which the prompts continue.
        keep: Whether a prompt continues the conversation; else each starts a new one.
    """
    if not served.has_template:
        _note("the checkpoint has no chat template; it continues plain text")
    _note(HELP)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        reply = conversation.command(line)
        if reply is not None:
            _note(reply)
        elif line.startswith("/"):
            _note(f"{line.split()[0]} is not a command; {HELP}")
        elif line:
            _stream(served, conversation, line)
            if not keep:
                conversation.messages = []


def _stream(served: ServedModel, conversation: Conversation, line: str) -> None:
    try:
        answer, num_dropped = conversation.ask(line, AnswerStreamer(served))
    except KeyboardInterrupt:
        _note("\nstopped; the prompt is not part of the conversation")
    except UserError as error:
        _note(str(error))  # not the end of the chat: the next prompt may be shorter
    else:
        if answer.stop_reason == "length":
            _note("cut at --max_new_tokens")
        if num_dropped:
            _note(f"the context is full: the {num_dropped} oldest messages were left out")


def answer_lines(lines: Iterable[str], conversation: Conversation, *, keep: bool) -> None:
    r"""Print one line per prompt; a line break in an answer is written as \n.

    Args:
        lines: The prompts.
        conversation: The conversation.
        keep: Whether a prompt continues the conversation; then commands such as /clear work, and print nothing.

    Raises:
        UserError: If a prompt is too long; its line is named.
    """
    for number, line in enumerate(lines, start=1):
        prompt = line.strip()
        if keep and prompt == "/quit":
            return
        if keep and conversation.command(prompt) is not None:
            continue
        try:
            answer = conversation.ask(prompt)[0].text if prompt else ""
        except UserError as error:
            raise UserError(f"line {number} of the input: {error}") from error
        print(printable(answer).replace("\\", "\\\\").replace("\n", "\\n"), flush=True)
        if not keep:
            conversation.messages = []


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
