"""Small tokenizers, models and data files, made here: nothing is downloaded."""

from __future__ import annotations

import os

# One thread a process, before torch is imported: for models this small two are slower, on a busy machine much so.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401 (now: its log handler must hold on to the real stderr, not to a test's)
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep token stores out of the user's cache, and what torch compiles, which takes minutes, in the environment."""
    compiled = str(Path(sys.prefix) / "torch_extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", compiled)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _process_stays() -> Iterator[None]:
    """Restore what a run in this process leaves behind: its rank in the environment, and ZeRO-3's `F.linear`.

    Later runs would read that rank, and that function keeps the input of every frozen layer.
    """
    environment, linear = dict(os.environ), torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)


TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,",
    "detailed, and polite answers to the user's questions. USER: ASSISTANT: ### Instruction: ### Input: ### Response:",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "What is the opposite of hot? The opposite of hot is cold. Name a colour. Red is a colour. Count: 1, 2, 3.",
]


def train_tokenizer(texts: list[str], vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts `<s>` before a text, as Llama's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=4096
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS)


def tiny_config(vocab_size: int, **changes: Any) -> LlamaConfig:
    values = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random two-layer Llama in float32, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


RECORDS = [
    {"instruction": f"What is {i} and {i}?", "input": "", "output": f"{i} and {i} is {2 * i}" + "." * (i % 7 + 1)}
    for i in range(24)
]


@pytest.fixture
def alpaca_file(tmp_path: Path) -> Path:
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(RECORDS))
    return path


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[str, Any], Path]:
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def few_samples() -> list[str]:
    """Options for two tokens of one answer at both ends: the default, 64 of three, takes half of a small run's time."""
    callbacks = "--trainer.callbacks"
    return [
        f"{callbacks}+=callbacks.SampleGeneration",
        f"{callbacks}.num_prompts=1",
        f"{callbacks}.generation.max_new_tokens=2",
    ]


@pytest.fixture
def fit_args(model_dir: Path, alpaca_file: Path, tmp_path: Path, few_samples: list[str]) -> list[str]:
    """Options of a small LoRA run in `tmp_path/run`."""
    return [
        f"--model.model_name_or_path={model_dir}",
        "--model.dtype=float32",
        "--model.adapter.r=4",
        "--model.adapter.dropout=0.05",  # so that random states matter
        f"--data.sources={{toy: {{path: {alpaca_file}, format: alpaca}}}}",
        "--data.template=alpaca",
        "--data.max_length=256",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.log_every_n_steps=1",
        *few_samples,
    ]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real files beside the checkout; tests that need them are skipped where they are absent."""
    folder = Path(os.environ.get("SFT_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set SFT_REAL_DATA)")
    return folder
