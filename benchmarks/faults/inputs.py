"""The model, tokenizer and data files of the scenarios: made once, then copied for each fault."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NUMBERS = range(24)
CHINESE = [
    {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": f"答案是{i}。"}]}
    for i in range(12)
]


def write_inputs(folder: Path) -> None:
    """Write random two-layer models and the data files.

    The models are two Llamas (`base`, `other_base`), one with a tokenizer like Llama 2's (`metaspace`), and a GPT-2.

    Args:
        folder: An empty folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    conftest = _tests_conftest()
    chats, pairs = [_chat(i) for i in NUMBERS], [_pair(i) for i in NUMBERS]
    tokenizer = conftest.train_tokenizer([*conftest.TEXTS, json.dumps(chats)], vocab_size=512)
    metaspace = _metaspace_tokenizer([*conftest.TEXTS, json.dumps([*chats, *CHINESE], ensure_ascii=False)])
    llama = conftest.tiny_config(640, initializer_range=0.1)
    gpt2 = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for seed, (name, config) in enumerate(
        {"base": llama, "other_base": llama, "gpt2": gpt2, "metaspace": llama}.items()
    ):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        (metaspace if name == "metaspace" else tokenizer).save_pretrained(folder / name)
    _write(folder / "chats.json", chats)
    _write(folder / "edited_chats.json", chats[::-1])
    _write(folder / "validation.json", [_chat(100 + i) for i in range(7)])
    _write(folder / "questions.json", [_question(i) for i in NUMBERS[:10]])
    _write(folder / "pairs.json", pairs)
    _write(folder / "chinese.json", CHINESE)
    _write(folder / "flagged.json", [_flagged(i) for i in NUMBERS])
    _write(folder / "texts.json", [{"text": f"Count: {', '.join(map(str, range(i)))}."} for i in NUMBERS])


def write_families(folder: Path) -> None:
    """Write a tiny random model of each family.

    Args:
        folder: Parent of the models' folders.
    """
    from benchmarks.family_models import FAMILIES, save_family

    for family in FAMILIES:
        save_family(family, folder)


def _metaspace_tokenizer(texts: list[str]) -> Any:
    """Return a tokenizer that writes a space as `▁` and puts one before a text, with bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, max_token_length=8))
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}  # not special, as Llama's are not
    backend = Tokenizer.from_str(json.dumps(content))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=4096
    )


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


def _flagged(i: int) -> dict[str, Any]:
    """A conversation whose messages say themselves whether they are trained, and with which weight."""
    first, second, third, fourth = _chat(2 * (i // 2) + 1)["messages"]
    return {"messages": [first, {**second, "train": bool(i % 2)}, third, {**fourth, "weight": 0.5}]}


def _question(i: int) -> dict[str, str]:
    return {"instruction": f"Count: {i}", "input": "", "output": f"{i}, {i + 1}, {i + 2}"}


def _pair(i: int) -> dict[str, str]:
    good = f"{i} and {i} is {2 * i}" + "." * (i % 5)
    return {"prompt": f"{i} and {i}?", "chosen": good, "rejected": "hot" + "!" * (i % 3)}


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
