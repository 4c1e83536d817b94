"""What the cells train on: model shapes, a tokenizer whose tokens are numbers, random documents, configurations.

Nothing is downloaded: weights are drawn on the device from a configuration, and token ids are random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.cells import Cell

LR = 2e-4


def _llama(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int) -> Any:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "vocab_size": vocabulary,
        "max_position_embeddings": 8192, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
        "tie_word_embeddings": False,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "7b": _llama(4096, 11008, 32, 32, 32, 32000),  # Llama 2 7B
    "1.5b": {**_llama(1536, 8960, 28, 12, 2, 151936), "tie_word_embeddings": True},  # the widths of Qwen2.5 1.5B
    "8b-128k": _llama(4096, 14336, 32, 32, 8, 128256),  # Llama 3.1 8B
    "toy": _llama(64, 128, 2, 4, 2, 512),
}
"""Values of `model.from_config`."""


def toy(cell: Cell) -> Cell:
    """Return a cell small enough for a CPU: the same options on a model of two layers and rows of 128 tokens."""
    return Cell(**{**vars(cell), "shape": "toy", "max_length": 128, "batch_size": min(2, cell.batch_size)})


def write_inputs(cell: Cell, folder: Path, num_steps: int) -> Path:
    """Write tokenizer and documents of a cell, and its configuration; return the configuration's path.

    Args:
        cell: The cell.
        folder: An empty folder.
        num_steps: Optimizer steps that the documents must be enough for.
    """
    vocabulary = SHAPES[cell.shape]["vocab_size"]
    write_tokenizer(folder / "tokenizer", vocabulary)
    write_documents(folder / "rows.jsonl", cell, vocabulary, num_steps)
    config = folder / "config.yaml"
    config.write_text(json.dumps(configuration(cell, folder, num_steps)))  # JSON is YAML
    return config


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer whose tokens are the numbers from 2 on, so that random ids are a text."""
    words = {"<pad>": 0, "</s>": 1, **{str(index): index for index in range(2, vocab_size)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def document_lengths(cell: Cell, num_tokens: int) -> list[int]:
    """Return lengths of documents that add up to at least `num_tokens`, each with its EOS token.

    Short documents are log-normal with a mean of about 500 tokens, as in sets of conversations.
    """
    if cell.rows == "full":
        return [cell.max_length] * -(-num_tokens // cell.max_length)
    generator = np.random.default_rng(1)
    mean = min(500, cell.max_length // 4)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        length = int(generator.lognormal(np.log(mean) - 0.32, 0.8))
        lengths.append(min(max(length, 8), cell.max_length))
    return lengths


def write_documents(file: Path, cell: Cell, vocab_size: int, num_steps: int) -> None:
    """Write random documents for some optimizer steps, and a tenth more for what packing leaves over."""
    generator = np.random.default_rng(2)
    num_tokens = int(1.1 * (num_steps + 1) * cell.batch_size * cell.max_length)
    with file.open("w") as out:
        for length in document_lengths(cell, num_tokens):
            ids = generator.integers(2, vocab_size, length - 1).tolist()  # the EOS token is added
            out.write(json.dumps({"text": " ".join(map(str, ids))}) + "\n")


def configuration(cell: Cell, folder: Path, num_steps: int) -> dict[str, Any]:
    """Return the configuration of `fit`: what a recipe would have, and the cell's options.

    Args:
        cell: The cell.
        folder: Folder of its tokenizer and documents.
        num_steps: Optimizer steps to train.
    """
    full = cell.train == "full"
    adapter = None if full else {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
    optimizer = {"lr": LR / 20 if full else LR, "weight_decay": 0.0, "fused": True}
    config: dict[str, Any] = {
        "task": "pretrain",
        "seed_everything": 0,
        "model": {
            "from_config": SHAPES[cell.shape],
            "tokenizer_name_or_path": str(folder / "tokenizer"),
            "dtype": "float32" if full else "bfloat16",
            "adapter": adapter,
            "quantization": {"bits": 4} if cell.train == "qlora" else None,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": optimizer},
            "lr_scheduler": {"name": "constant"},
        },
        "data": {
            "sources": {"numbers": {"path": str(folder / "rows.jsonl"), "format": "text"}},
            "max_length": cell.max_length,
            "batch_size": cell.batch_size,
            "store_dir": str(folder / "stores"),
        },
        "trainer": {
            "precision": "bf16-mixed",
            "max_steps": num_steps,
            "devices": 1,
            "limit_val_batches": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder / "run"),
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}},
            "callbacks": [
                *(
                    {"class_path": f"benchmarks.gpu.ours.{each}"}
                    for each in ("Clock", "NoAdapterExport", "NoModelExport")
                ),
                {"class_path": "callbacks.SampleGeneration", "init_args": {"prompts": []}},
            ],
        },
    }
    for key, value in cell.options.items():
        _set(config, key, value)
    if full and config["trainer"]["precision"] == "bf16-true":
        config["model"]["dtype"] = "bfloat16"
    return config


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for each in path:
        config = config[each]
    config[last] = value
