"""Chat with a model in the terminal, or answer prompts from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from sft_lightning.cli.parsing import CommandParser
from sft_lightning.cli.quiet import quiet_libraries
from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.generation.conversation import HELP, AnswerStreamer, Conversation
from sft_lightning.models.generation.serving import Device, LoadOptions, ServedDType, ServedModel, load_served_model
from sft_lightning.models.inspection import base_model
from sft_lightning.terminal import printable

with contextlib.suppress(ImportError):  # line editing and history, where the platform has it
    import readline  # noqa: F401


def main(args: Sequence[str]) -> None:
    """Parse the options and run `chat`."""
    quiet_libraries()
    parser = CommandParser(prog="python -m sft_lightning chat", description=__doc__)
    parser.add_function_arguments(chat)
    chat(**parser.parse_args(list(args)).as_dict())


_DEFAULT_MAX_NEW_TOKENS = 512


def chat(
    model: str | None = None,
    adapter: str | None = None,
    system: str | None = None,
    history: bool | Literal["auto"] = "auto",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    quantization: int | None = None,
    dtype: ServedDType = "auto",
    device: Device = "auto",
    trust_remote_code: bool = False,
) -> None:
    r"""Chat with a model through its own chat template, until /quit or the end of the input.

    From a pipe, each line is a prompt and each answer is one line; a line break in an answer is written as \n.

    Args:
        model: Folder or Hub id of the model; default: the base that the adapter names.
        adapter: PEFT adapter folder to put on the model.
        system: System message.
        history: Whether a prompt continues the conversation; auto: yes in a terminal, no in a pipe.
        max_new_tokens: Most tokens in an answer; default: 512, or half of a shorter context.
        temperature: 0 always takes the most likely token; default: from generation_config.json, else 0.
        top_k: Sample from the k most likely tokens; 0: all; default: from generation_config.json, else all.
        top_p: Sample from the most likely tokens whose probabilities sum to this; default: from
            generation_config.json, else 1.
        repetition_penalty: Divides the logits of tokens that have occurred; default: from generation_config.json,
            else 1.
        seed: Random seed of sampling.
        quantization: Load the model in 4 or 8 bits per weight.
        dtype: Data type of the weights; auto: as stored.
        device: auto: the GPUs if there are any, else the CPU.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        UserError: If an option is out of range, the model cannot be loaded, or a line of the pipe is too long.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    given = {name: value for name, value in options.items() if value is not None}
    limit = _DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    GenerationConfig(max_new_tokens=limit, seed=seed, **given)  # type: ignore[arg-type]  # checked before loading
    load = LoadOptions(quantization, dtype, device, trust_remote_code)
    served = load_served_model("--model", model, adapter, load)
    if max_new_tokens is None and served.context_length is not None:
        limit = max(1, min(limit, served.context_length // 2))
    own = checkpoint_defaults(served)
    config = GenerationConfig(max_new_tokens=limit, seed=seed, **{**own, **given})
    conversation = Conversation(served, config, system)
    if sys.stdin.isatty():
        _talk(served, conversation, keep=history is not False)
    else:
        _answer_lines(sys.stdin, conversation, keep=history is True)


def checkpoint_defaults(served: ServedModel) -> dict[str, Any]:
    """Return the sampling parameters of a checkpoint's `generation_config.json`; greedy if it does not sample."""
    own = base_model(served.model).generation_config
    penalty = {"repetition_penalty": getattr(own, "repetition_penalty", None) or 1.0}
    if not getattr(own, "do_sample", None):
        return penalty
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return penalty | {name: getattr(own, name, None) or neutral for name, neutral in defaults.items()}


def _talk(served: ServedModel, conversation: Conversation, *, keep: bool) -> None:
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


def _answer_lines(lines: Iterable[str], conversation: Conversation, *, keep: bool) -> None:
    r"""Print one line per prompt; the commands of a conversation (`keep`) print nothing."""
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
