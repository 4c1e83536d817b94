"""The model of a run: the base, loaded and as large as its tokenizer, and what trains on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.continuation import differences
from sft_lightning.models.adapters.trainable import train_only
from sft_lightning.models.adapters.wrapping import add_adapter, check_base_of_adapter
from sft_lightning.models.base.loading import DTypeName, load_model
from sft_lightning.models.base.overrides import ConfigOverrides
from sft_lightning.models.base.quantization import QuantizationConfig
from sft_lightning.models.base.vocabulary import check_new_tokens_train, embedding_names, num_rows, resize_embeddings


def assemble_model(
    name_or_path: str | None,
    tokenizer: PreTrainedTokenizerFast,
    *,
    from_config: dict[str, Any] | None,
    dtype: DTypeName,
    attn_implementation: str,
    trust_remote_code: bool,
    overrides: ConfigOverrides,
    quantization: QuantizationConfig | None,
    added_tokens: Sequence[str],
    pad_to_multiple_of: int | None,
    resize_vocabulary: bool,
    adapter: AdapterConfig | None,
    trainable: Sequence[str] | None,
    on_host: bool,
    say: Callable[[str], None],
) -> PreTrainedModel | PeftModel:
    """Load a base, embed the tokenizer's tokens, and put the adapter on it or freeze what does not train.

    Args:
        name_or_path: Folder or Hub id of the base.
        tokenizer: With the added tokens.
        from_config: Instead of a base: `model_type` and that model's configuration keys.
        dtype: Type of the weights that are not quantized.
        attn_implementation: `auto`, or a name that transformers knows.
        trust_remote_code: Run code that comes with the model.
        overrides: What to change in the model's configuration.
        quantization: How the base is stored; `None` as it is.
        added_tokens: What the tokenizer was given that the model may not embed.
        pad_to_multiple_of: What the number of embedded tokens is rounded up to.
        resize_vocabulary: Take a tokenizer that has more tokens than the model embeds.
        adapter: The adapter; `None` for none.
        trainable: Without an adapter: what trains; `None` for all.
        on_host: Leave quantized weights in host memory too, as all others are; for whoever shards them.
        say: Hears what was done that the user did not ask for by name.

    Raises:
        UserError: If keys contradict each other or the model.
    """
    if quantization is not None and adapter is not None:
        check_base_of_adapter(adapter, quantization, dtype)
    base = load_model(
        name_or_path,
        from_config=from_config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization=quantization,
        vocab_size=len(tokenizer),
        overrides=overrides,
        trust_remote_code=trust_remote_code,
        on_host=on_host,
    )
    rows, names = num_rows(base), embedding_names(base)
    unknown = resize_embeddings(
        base, tokenizer, added_tokens, pad_to_multiple_of=pad_to_multiple_of, any_size=resize_vocabulary
    )
    if num_rows(base) != rows:
        say(f"vocabulary: {rows} → {num_rows(base)} rows; the new ones are the mean of the old ones")
    model = _choose_what_trains(base, adapter, trainable, unknown, say)
    check_new_tokens_train(base, unknown, names)
    return model


def _choose_what_trains(
    base: PreTrainedModel,
    adapter: AdapterConfig | None,
    trainable: Sequence[str] | None,
    added_token_ids: list[int],
    say: Callable[[str], None],
) -> PreTrainedModel | PeftModel:
    """Put the adapter on the base, or freeze what `trainable` does not name."""
    if adapter is None:
        if trainable is not None:
            train_only(base, trainable)
        return base
    adapted = add_adapter(base, adapter, added_token_ids=added_token_ids)
    for line in differences(adapted, adapter):
        say(line)
    return adapted
