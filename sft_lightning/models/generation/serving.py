"""Load a checkpoint for answering prompts: the model with its adapter, tokenizer, chat template and stop tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation.streamers import BaseStreamer

from sft_lightning.errors import UserError, clear_load_errors
from sft_lightning.models.adapters.folder import AdapterError, read_config
from sft_lightning.models.adapters.quantized import keep_input_dtype
from sft_lightning.models.adapters.trained_base import TrainedBase, base_fingerprint, trained_base
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.quantization import load_quantized
from sft_lightning.models.base.vocabulary import grow_embeddings, num_embeddings, resize_embeddings
from sft_lightning.models.generation.config import GenerationConfig, LoadOptions
from sft_lightning.models.generation.generate import decode_answer, generate_ids
from sft_lightning.models.inspection import base_model
from sft_lightning.tokenizer import answer_ending, has_tokenizer

Messages = Sequence[Mapping[str, str]]
"""Messages as chat templates read them: `role` and `content`."""

_WRONG_FILES = (RuntimeError, KeyError)
"""Further exceptions that the libraries raise for files that do not fit each other."""


@dataclass(frozen=True)
class Answer:
    """An answer and how it ended."""

    text: str
    """The text, without special tokens."""

    token_ids: list[int]
    """The tokens, without the stop token."""

    stop_reason: Literal["stop", "length"]
    """`stop`: the model ended it with a stop token; `length`: `max_new_tokens` did."""


class ServedModel:
    """A loaded checkpoint that answers prompts.

    Args:
        model: The model.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_token_ids = _stop_token_ids(model, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = self.stop_token_ids[0] if pad is None else pad

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint has a chat template; without one it can only continue text."""
        return bool(self.tokenizer.chat_template)

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer that the model supports; `None` if its configuration does not say."""
        return getattr(base_model(self.model).config.get_text_config(), "max_position_embeddings", None)

    def render(self, messages: Messages) -> str:
        """Render messages with the chat template, up to where the answer begins.

        Raises:
            UserError: If the template rejects the messages, such as a system message.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} rejects the conversation: {error.message}"
            ) from error

    def encode_messages(self, messages: Messages) -> list[int]:
        """Return the tokens of rendered messages; the template writes the special tokens."""
        ids: list[int] = self.tokenizer(self.render(messages), add_special_tokens=False).input_ids
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a text to continue, with the tokenizer's BOS and without an EOS."""
        ids: list[int] = self.tokenizer(text).input_ids
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids or [self.stop_token_ids[0]]

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        num_return_sequences: int = 1,
        streamer: BaseStreamer | None = None,
    ) -> list[list[Answer]]:
        """Answer prompts, all in one batch.

        Args:
            prompts: Token ids of each prompt.
            config: How to generate.
            num_return_sequences: Answers per prompt, best first.
            streamer: Receives the tokens as they are generated; see `generate_ids`.

        Returns:
            The answers to each prompt.
        """
        found = generate_ids(
            self.model,
            prompts,
            stop_token_ids=self.stop_token_ids,
            pad_token_id=self.pad_token_id,
            config=config,
            num_return_sequences=num_return_sequences,
            streamer=streamer,
        )
        return [
            [
                Answer(decode_answer(self.tokenizer, ids), ids, "stop" if stopped else "length")
                for ids, stopped in answers
            ]
            for answers in found
        ]


def load_served_model(option: str, path: str | None, adapter: str | None, options: LoadOptions) -> ServedModel:
    """Load a model, an adapter on it, and the adapter's tokenizer, or else the model's.

    The base gets the RoPE scaling and the vocabulary size that the adapter was trained with.

    Args:
        option: The command's option that names the model, for messages, such as `--model`.
        path: Folder or Hub id of a model; `None`: the one that the adapter names.
        adapter: Folder of a PEFT adapter; `None` for none.
        options: How to load.

    Raises:
        UserError: If something cannot be loaded, or the adapter was trained on another base.
    """
    base = path or base_named_by_adapter(option, adapter)
    trained = None if adapter is None else _trained_base(adapter, base)
    where = adapter if adapter is not None and has_tokenizer(Path(adapter).expanduser()) else base
    with clear_load_errors(option, "tokenizer", where, also=_WRONG_FILES):
        tokenizer: Any = AutoTokenizer.from_pretrained(where, trust_remote_code=options.trust_remote_code)
    with clear_load_errors(option, "model", base, also=_WRONG_FILES):
        load: Any = AutoModelForCausalLM.from_pretrained if options.quantization is None else load_quantized
        model: Any = load(base, config=_config(base, trained, options), **_model_options(options))
    if adapter is not None and trained is not None:
        resize_embeddings(model, tokenizer, (), any_size=True)  # the adapter may have added tokens
        grow_embeddings(model, max(num_embeddings(model), trained.vocab_size or 0))
        with clear_load_errors("--adapter", "adapter", adapter, also=_WRONG_FILES):
            model = PeftModel.from_pretrained(model, adapter)
        keep_input_dtype(model)
    return ServedModel(model.eval(), tokenizer)


def _trained_base(adapter: str, base: str) -> TrainedBase:
    """Read what an adapter was trained on, and check that the base is that model."""
    try:
        trained = trained_base(Path(adapter).expanduser())
        unverified = trained.check(base, base_fingerprint(base))
    except AdapterError as error:
        raise UserError(f"--adapter: {error}") from error
    if unverified is not None:
        print(unverified, file=sys.stderr, flush=True)
    return trained


def _config(base: str, trained: TrainedBase | None, options: LoadOptions) -> PretrainedConfig:
    """Return the configuration of a model, as it was when the adapter was trained."""
    config: PretrainedConfig = AutoConfig.from_pretrained(base, trust_remote_code=options.trust_remote_code)
    for line in [] if trained is None else trained.apply_to(config):
        print(line, file=sys.stderr, flush=True)
    return config


def base_named_by_adapter(option: str, adapter: str | None) -> str:
    """Return the base model that an adapter's configuration names.

    Args:
        option: The command's option that names the model, for messages.
        adapter: Folder of a PEFT adapter.

    Raises:
        UserError: If there is no adapter, or its configuration names no base.
    """
    if adapter is None:
        raise UserError(f"{option}: required; name a model's folder or Hub id")
    try:
        base: str | None = read_config(Path(adapter).expanduser()).base_model_name_or_path
    except AdapterError as error:
        raise UserError(f"--adapter: {error}") from error
    if not base:
        raise UserError(f"{option}: required, because the adapter in {adapter!r} names no base model")
    return base


def _model_options(options: LoadOptions) -> dict[str, Any]:
    dtype: Any = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    found: dict[str, Any] = {"dtype": dtype, "trust_remote_code": options.trust_remote_code}
    if options.quantization is not None:
        if options.quantization not in (4, 8):
            raise UserError(f"--quantization: must be 4 or 8 (got {options.quantization})")
        own = torch.float16 if options.quantization == 8 else torch.bfloat16  # LLM.int8 casts its inputs to float16
        compute = own if options.dtype == "auto" else dtype
        found |= {"dtype": compute, "quantization": QuantizationConfig(bits=options.quantization)}
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda requires a GPU, and torch finds none; leave it out to use the CPU")
    if options.device != "cpu" and torch.cuda.is_available():
        found["device_map"] = "auto"  # spreads a model over several GPUs only if it is too large for one
    return found


def _stop_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the tokens that end an answer: those of the chat template, of the generation config, and EOS."""
    configured = getattr(base_model(model).generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    ids = dict.fromkeys(
        each for each in (_template_stop(tokenizer), *listed, tokenizer.eos_token_id) if each is not None
    )
    if not ids:
        raise UserError(
            f"{tokenizer.name_or_path}: neither the tokenizer nor generation_config.json has an EOS token, so answers "
            "would never end; set eos_token in tokenizer_config.json"
        )
    return list(ids)


def _template_stop(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the token that the chat template writes after an answer; `None` if it writes no single token."""
    if not tokenizer.chat_template:
        return None

    def apply(messages: list[dict[str, Any]], add_generation_prompt: bool, tools: object = None) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    try:
        stop = answer_ending("chat_template", apply, tokenizer.get_added_vocab()).stop
    except (UserError, TemplateError):
        return None  # such a template cannot be used for training, but for generation it can
    ids: list[int] = tokenizer(stop, add_special_tokens=False).input_ids
    return ids[0] if len(ids) == 1 else None
