"""Make tiny random models of every family with a tokenizer and records, without downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GEMMA = {**_LLAMA, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"model_type": "llama", **_LLAMA},
    "Mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": 16},
    "Qwen2": {"model_type": "qwen2", **_LLAMA},
    "Qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 8},
    "Gemma 2": {"model_type": "gemma2", **_GEMMA, "final_logit_softcapping": 5.0},
    "Gemma 3 (text)": {"model_type": "gemma3_text", **_GEMMA, "final_logit_softcapping": 5.0},
    "Phi-3": {"model_type": "phi3", **_LLAMA, "pad_token_id": 0},
    "OPT": {
        "model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 16, "max_position_embeddings": 256,
    },
    "GPT-2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "GPT-Neo": {
        "model_type": "gpt_neo", "hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
        "num_heads": 4, "max_position_embeddings": 256, "window_size": 16,
    },
    "GPT-NeoX": {
        "model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256,
    },
    "BLOOM": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Falcon (ALiBi)": {
        "model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True,
        "multi_query": False, "parallel_attn": False, "bias": True,
    },
    "Mixtral": {"model_type": "mixtral", **_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mamba": {"model_type": "mamba", "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
}  # fmt: skip
"""Configuration of each family's model: two layers, a few thousand weights."""

RECORDS = [
    {"instruction": f"What is {i} and {i}?", "input": "", "output": f"{i} and {i} is {2 * i}" + "." * (i % 7 + 1)}
    for i in range(8)
]


VOCAB_SIZE = 320
"""Rows of the embeddings: more than the tokenizer has tokens, because transformers adds some for a few families."""


def save_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["Below is an instruction that describes a task. Write a response. ### Instruction: ### Response:"]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - 8, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    tokenizer.save_pretrained(folder)


def save_family(name: str, folder: Path) -> Path:
    """Write a random model of a family with its tokenizer and training records.

    Args:
        name: A key of `FAMILIES`.
        folder: Parent of the model's folder.

    Returns:
        The model's folder.
    """
    target = folder / name.replace(" ", "_").replace("(", "").replace(")", "")
    target.mkdir(parents=True)
    save_tokenizer(target)
    values = dict(FAMILIES[name])
    config = AutoConfig.for_model(
        values.pop("model_type"), vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, **values
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    (target / "records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    return target
