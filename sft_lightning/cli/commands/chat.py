"""Chat with a model in the terminal, or answer prompts from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from sft_lightning.cli.parsing import command_parser
from sft_lightning.models.generation.config import Device, GenerationConfig, LoadOptions, ServedDType


def main(args: Sequence[str]) -> None:
    """Parse the options and run `chat`."""
    parser = command_parser("chat", __doc__, args)
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
    from sft_lightning.cli.dialogue import answer_lines, checkpoint_defaults, talk
    from sft_lightning.cli.quiet import quiet_libraries
    from sft_lightning.models.generation.conversation import Conversation
    from sft_lightning.models.generation.serving import load_served_model

    quiet_libraries()
    load = LoadOptions(quantization, dtype, device, trust_remote_code)
    served = load_served_model("--model", model, adapter, load)
    if max_new_tokens is None and served.context_length is not None:
        limit = max(1, min(limit, served.context_length // 2))
    own = checkpoint_defaults(served)
    config = GenerationConfig(max_new_tokens=limit, seed=seed, **{**own, **given})
    conversation = Conversation(served, config, system)
    if sys.stdin.isatty():
        talk(served, conversation, keep=history is not False)
    else:
        answer_lines(sys.stdin, conversation, keep=history is True)
