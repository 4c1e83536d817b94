"""The model, tokenizer and data files of the scenarios: made once, then copied for each fault."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NUMBERS = range(24)


def write_inputs(folder: Path) -> None:
    """Write two random two-layer Llamas (`base`, `other_base`), a GPT-2 (`gpt2`), and the data files.

    Args:
        folder: An empty folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    conftest = _tests_conftest()
    chats, pairs = [_chat(i) for i in NUMBERS], [_pair(i) for i in NUMBERS]
    tokenizer = conftest.train_tokenizer([*conftest.TEXTS, json.dumps(chats)], vocab_size=512)
    llama = conftest.tiny_config(len(tokenizer), initializer_range=0.1)
    gpt2 = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for seed, (name, config) in enumerate({"base": llama, "other_base": llama, "gpt2": gpt2}.items()):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    _write(folder / "chats.json", chats)
    _write(folder / "edited_chats.json", chats[::-1])
    _write(folder / "validation.json", [_chat(100 + i) for i in range(7)])
    _write(folder / "questions.json", [_question(i) for i in NUMBERS[:10]])
    _write(folder / "pairs.json", pairs)


def _tests_conftest() -> Any:
    """Return the module with which the tests make tokenizers and models."""
    spec = importlib.util.spec_from_file_location("tests_conftest", ROOT / "tests" / "conftest.py")
    if spec is None or spec.loader is None:
        raise SystemExit("run this from a checkout with its tests")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _chat(i: int) -> dict[str, Any]:
    """A conversation of two turns: its user's and system's parts are to be left without a loss."""
    turns = [
        {"role": "user", "content": f"What is {i} and {i}?"},
        {"role": "assistant", "content": f"{i} and {i} is {2 * i}" + "." * (i % 5 + 1)},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red is a colour"},
    ]
    return {"messages": turns if i % 2 else [{"role": "system", "content": "Count."}, *turns[: 2 + i % 3]]}


def _question(i: int) -> dict[str, str]:
    return {"instruction": f"Count: {i}", "input": "", "output": f"{i}, {i + 1}, {i + 2}"}


def _pair(i: int) -> dict[str, str]:
    good = f"{i} and {i} is {2 * i}" + "." * (i % 5)
    return {"prompt": f"{i} and {i}?", "chosen": good, "rejected": "hot" + "!" * (i % 3)}


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
