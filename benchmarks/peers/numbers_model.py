"""A random Llama whose tokens are numbers, so that random ids are a text that every peer can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_model(folder: Path, *, vocab_size: int, hidden: int, intermediate: int, layers: int, heads: int) -> int:
    """Write the model with weights of seed 0, and its tokenizer; return the bytes of the weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocab_size, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "</s>": 1, **{str(index): index for index in range(2, vocab_size)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def text_of(ids: Sequence[int]) -> str:
    """Return the text that the tokenizer encodes as these ids."""
    return " ".join(map(str, ids))
