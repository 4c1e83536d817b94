"""The model of a run: the base, resized to its tokenizer, with its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.continuation import describe_overrides
from sft_lightning.models.adapters.folder import AdapterError, embedding_rows
from sft_lightning.models.adapters.fused_lora import describe_unfused
from sft_lightning.models.adapters.trainable import kept_base_names, train_only
from sft_lightning.models.adapters.trained_base import TrainedBase, base_fingerprint, trained_base
from sft_lightning.models.adapters.wrapping import add_adapter, check_adapter_on_quantized_base
from sft_lightning.models.attention.document_mask import use_document_mask
from sft_lightning.models.base import loading
from sft_lightning.models.base.vocabulary import (
    check_new_tokens_train,
    embedding_names,
    grow_embeddings,
    num_embeddings,
    resize_embeddings,
)
from sft_lightning.models.spec import ModelSpec


def load_base(spec: ModelSpec, vocab_size: int, *, on_cpu: bool = False) -> PreTrainedModel:
    """Load the base model, or build it from scratch; without an adapter, as many rows as its files have.

    Under a continued adapter it has the RoPE that the adapter was trained with, unless `model.rope_scaling` is set.

    Args:
        spec: The model.
        vocab_size: Number of tokens of the tokenizer.
        on_cpu: Keep quantized and random weights in CPU memory, as all others are, for a strategy that shards them.

    Raises:
        UserError: If the model cannot be loaded, or a key does not apply to it.
    """
    trained = _continued(spec)
    return loading.load_model(
        spec.model_name_or_path,
        from_config=spec.from_config,
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        quantization=spec.quantization,
        vocab_size=vocab_size,
        overrides=replace(spec.overrides, trained_with=None if trained is None else trained.context),
        trust_remote_code=spec.trust_remote_code,
        on_cpu=on_cpu,
    )


def copies_weights(spec: ModelSpec) -> bool:
    """Whether loading the base makes its own tensors instead of mapping those in the files."""
    return loading.copies_weights(
        spec.model_name_or_path,
        dtype=spec.dtype,
        quantization=spec.quantization,
        trust_remote_code=spec.trust_remote_code,
    )


def resize_vocabulary(base: PreTrainedModel, spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Give the base a row for each token of the tokenizer, and return the ids of tokens that it did not embed before.

    The base of a continued adapter gets at least as many rows as the adapter was trained with, and knows its tokens.

    Args:
        base: The model, without an adapter.
        spec: What the base was loaded by.
        tokenizer: With the added tokens.

    Raises:
        UserError: If the tokenizer has more tokens than the base embeds, and the YAML did not ask for that.
    """
    unknown = resize_embeddings(
        base,
        tokenizer,
        spec.added_tokens,
        pad_to_multiple_of=spec.pad_to_multiple_of,
        any_size=spec.resize_vocabulary,
    )
    if (trained := _continued(spec)) is not None:
        known = _rows_in(trained.source) if unknown or trained.vocab_size is None else 0
        grow_embeddings(base, max(num_embeddings(base), trained.vocab_size or known))
        unknown = [index for index in unknown if index >= known and index != tokenizer.pad_token_id]
    return unknown


def assemble_model(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerFast, *, log: Callable[[str], None], on_cpu: bool = False
) -> PreTrainedModel | PeftModel:
    """Load a base, resize it to the tokenizer, and attach the adapter or freeze what does not train.

    Args:
        spec: The model.
        tokenizer: With the added tokens.
        log: Called with a line for each change that the user did not ask for by name.
        on_cpu: As for `load_base`.

    Raises:
        UserError: If keys contradict each other or the model.
    """
    if spec.quantization is not None and spec.adapter is not None:
        check_adapter_on_quantized_base(spec.adapter, spec.quantization, spec.dtype)
    if (trained := _continued(spec)) is not None:
        for line in _check_continued(trained, spec, len(tokenizer)):
            log(line)
    base = load_base(spec, len(tokenizer), on_cpu=on_cpu)
    rows, names = num_embeddings(base), embedding_names(base)
    unknown = resize_vocabulary(base, spec, tokenizer)
    if num_embeddings(base) != rows:
        log(f"vocabulary: {rows} → {num_embeddings(base)} rows; new rows start at the mean of the old ones")
    model = _choose_what_trains(base, spec, unknown, log)
    check_new_tokens_train(base, unknown, names)
    if on_cpu and kept_base_names(model):
        raise UserError(
            "model.adapter.path: the adapter was trained with weights of its base that do not train now, and a "
            "strategy that shards weights cannot export them; use ddp or deepspeed_stage_2, or merge the adapter first"
        )
    if spec.attn_implementation == "auto" and use_document_mask(model):
        log(f"attention: {base.config.model_type}'s own, with a mask that keeps documents apart")
    return model


def _continued(spec: ModelSpec) -> TrainedBase | None:
    """Return what the continued adapter was trained on; `None` if no adapter is continued."""
    if spec.adapter is None or spec.adapter.path is None:
        return None
    try:
        return trained_base(spec.adapter.path)
    except AdapterError as error:
        raise UserError(f"model.adapter.path: {error}") from error


def _rows_in(adapter: str) -> int:
    """Return the rows of the embeddings that an adapter saved, 0 if it saved none."""
    try:
        return embedding_rows(adapter, default=0)
    except AdapterError as error:
        raise UserError(f"model.adapter.path: {error}") from error


def _check_continued(trained: TrainedBase, spec: ModelSpec, vocab_size: int) -> Iterator[str]:
    """Check that the base is the one that an adapter was trained on; yield a line for each change that it brings."""
    name = str(spec.model_name_or_path or "model.from_config")
    try:
        unverified = trained.check(name, base_fingerprint(spec.model_name_or_path, spec.from_config))
    except AdapterError as error:
        raise UserError(f"model.adapter.path: {error}") from error
    if unverified is not None:
        yield f"model.adapter.path: {unverified}"
    config = loading.base_config(
        spec.model_name_or_path,
        from_config=spec.from_config,
        vocab_size=vocab_size,
        trust_remote_code=spec.trust_remote_code,
    )
    if spec.rope_scaling is None:
        yield from (f"model.rope_scaling: {line}" for line in trained.apply_to(config))
    else:
        spec.overrides.apply(config)
        for key, value in trained.changes(config).items():
            own = getattr(config.get_text_config(), key)
            yield f"model.rope_scaling: {key} {own} as set; the adapter in {trained.source} was trained with {value}"


def _choose_what_trains(
    base: PreTrainedModel, spec: ModelSpec, added_token_ids: list[int], log: Callable[[str], None]
) -> PreTrainedModel | PeftModel:
    """Attach the adapter to the base, or freeze what `trainable` does not name."""
    if spec.adapter is None:
        if spec.trainable is not None:
            train_only(base, spec.trainable)
        return base
    adapted = add_adapter(base, spec.adapter, added_token_ids=added_token_ids)
    unfused = describe_unfused(adapted)
    for line in [*describe_overrides(adapted, spec.adapter), *([unfused] if unfused else [])]:
        log(line)
    return adapted
