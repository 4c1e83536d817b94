"""Every recipe runs: one optimizer step on a tiny model of its own family, with small data of its own formats.

Replaced are only names of models and files, and what needs a GPU: half precision, paged optimizers, several processes
(`tests/strategies` has those), and W&B.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import StrategyRegistry
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft_lightning.__main__ import main
from sft_lightning.cli import SFTCommandLine
from sft_lightning.data.formats.deepspeed_chat import dataset_format
from sft_lightning.data.formats.registry import FORMATS
from sft_lightning.strategies.refusals import check_module

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
TORCH_COMPILE = "llama2_7b_instruct_int8"
CONTINUES = "chinese_alpaca_continue"

FAMILIES = {
    "llama2": "Llama", "llama3.1": "Llama", "chinese": "Llama", "dpo": "Llama", "demo": "Llama", "opt": "OPT",
    "bloom": "BLOOM", "mamba": "Mamba", "qwen3": "Qwen3", "gemma": "Gemma", "gemma3": "Gemma 3",
}  # fmt: skip
"""First word of a recipe's name → what stands in for its model."""

QUESTION, ANSWER = "Name a number.", "It is one."
PAIR = {"chosen": ANSWER, "rejected": "No."}
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}] * 2},
    "messages": {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
    "firefly": {"source": "lima", "conversation": [{"human": QUESTION, "assistant": ANSWER}]},
    "preference": {"prompt": QUESTION, **PAIR},
    "text": {"text": "Once upon a time there were {i} of them."},
    "deepspeed_chat/rm-static": {"prompt": "\n\nHuman: {i}?\n\nAssistant:", **PAIR},
    "deepspeed_chat/full-hh-rlhf": {"prompt": "\n\nHuman: {i}?\n\nAssistant:", **PAIR},
    "deepspeed_chat/synthetic-instruct-gptj-pairwise": {"prompt": QUESTION, **PAIR},
    "deepspeed_chat/rlhf-reward-datasets": {"prompt": "\n\nHuman: {i}?", "chosen": "\n\nAssistant: One."},
    "deepspeed_chat/webgpt_comparisons": {
        "question": {"full_text": QUESTION}, "answer_0": ANSWER, "score_0": 1, "answer_1": "No.", "score_1": 0,
    },
    "deepspeed_chat/SHP": {"history": QUESTION, "human_ref_A": ANSWER, "human_ref_B": "No.", "labels": 1},
}  # fmt: skip
"""A record of each format."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _family_models() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("family_models")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def family(recipe: Path) -> dict[str, Any]:
    """The configuration of what stands in for a recipe's model."""
    known = _family_models().FAMILIES
    llama, vision = known["Llama"], {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    gemma3 = {**known["Gemma 3 (text)"], "vocab_size": _family_models().VOCAB_SIZE, "final_logit_softcapping": None}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    more = {
        "Gemma": {**llama, "model_type": "gemma", "head_dim": 8},
        "Gemma 3": {
            "model_type": "gemma3", "text_config": gemma3, "vision_config": vision, "mm_tokens_per_image": 1,
            "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302,
        },
    }  # fmt: skip
    values: dict[str, Any] = {**known, **more}[FAMILIES[recipe.stem.split("_")[0]]]
    return values


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """The folder of a tiny model of a recipe's family, with its tokenizer."""

    def make(recipe: Path) -> Path:
        folder = tmp_path_factory.mktemp(recipe.stem)
        _family_models().save_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<bos>", "<eos>"], special_tokens=True)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
        values = {"vocab_size": _family_models().VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, **family(recipe)}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        model.to(torch.float32).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with more tokens than any stand-in embeds."""
    folder = tmp_path_factory.mktemp("extended")
    _family_models().save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"汉字{i}" for i in range(20)])
    tokenizer.save_pretrained(folder)
    return folder


def write_sources(sources: dict[str, Any], folder: Path) -> str:
    """Write each source where a part of its path still tells what it is; return the sources with their new paths."""
    written = {}
    for name, source in sources.items():
        kind = source.get("format") or dataset_format(source["path"])
        assert kind in FORMATS
        base = folder / source["path"].rstrip("/")
        file = base if base.suffix else base / f"{source.get('split', 'train')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(json.dumps(ROWS[kind]).replace("{i}", str(i))) for i in range(40)]
        file.write_text("\n".join(map(json.dumps, rows)) if file.suffix == ".jsonl" else json.dumps(rows))
        written[name] = {**source, "path": str(base)}
    return json.dumps(written)


def command(recipe: Path, model: Path, folder: Path, extended: Path) -> list[str]:
    """Return the command that runs a recipe here."""
    config = yaml.safe_load(recipe.read_text())
    asked = config["model"]
    tokenizer = extended if "tokenizer_name_or_path" in asked and asked.get("resize_vocabulary") else model
    options = {
        "model.tokenizer_name_or_path": str(tokenizer),
        "model.dtype": "float32",
        "data.sources": write_sources(config["data"]["sources"], folder),
        "trainer.max_steps": "1",
        "trainer.default_root_dir": str(folder / "run"),
        "trainer.accelerator": "cpu",
        "trainer.strategy": "auto",
        "trainer.precision": "32-true",
        "trainer.logger": "true",
    }
    if "from_config" not in asked:
        options["model.model_name_or_path"] = str(model)
    if "val_sources" in config["data"]:
        options["data.val_sources"] = write_sources(config["data"]["val_sources"], folder)
    if asked["optimizer"]["class_path"].startswith("bitsandbytes.optim.Paged"):
        options["model.optimizer"] = "torch.optim.AdamW"
        options["model.optimizer.lr"] = str(asked["optimizer"]["init_args"]["lr"])
    return ["fit", "--config", str(recipe), *(f"--{key}={value}" for key, value in options.items())]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem == TORCH_COMPILE else [])
        for path in RECIPES
        if path.stem != CONTINUES
    ],
)
def test_a_recipe_runs_on_a_tiny_model_of_its_family(
    recipe: Path, stand_in: Callable[[Path], Path], extended: Path, tmp_path: Path
) -> None:
    assert main(command(recipe, stand_in(recipe), tmp_path, extended)) == 0
    assert (tmp_path / "run" / "adapter").exists() or (tmp_path / "run" / "model").exists()


def test_the_recipe_that_continues_takes_the_adapter_of_the_one_before(
    stand_in: Callable[[Path], Path], extended: Path, tmp_path: Path
) -> None:
    first, then = (ROOT / "configs" / f"{name}.yaml" for name in ("chinese_alpaca", CONTINUES))
    model = stand_in(first)
    assert main(command(first, model, tmp_path / "first", extended)) == 0
    adapter = f"--model.adapter.path={tmp_path / 'first' / 'run' / 'adapter'}"
    assert main([*command(then, model, tmp_path / "then", extended), adapter]) == 0
    saved = json.loads((tmp_path / "then" / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["modules_to_save"]) == (8, ["embed_tokens", "lm_head"])


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_a_recipe_as_it_stands_is_a_configuration_whose_strategy_takes_its_model(recipe: Path) -> None:
    cli = SFTCommandLine("plan", ["--config", str(recipe), *no_wandb(recipe)])
    strategy = cli.config_init["trainer"]["strategy"]
    if isinstance(strategy, str) and strategy != "auto":
        strategy = StrategyRegistry.get(strategy)
    if strategy != "auto":
        check_module(cli.config_init["model"], strategy.sharding)


def no_wandb(recipe: Path) -> list[str]:
    try:
        importlib.import_module("wandb")
    except ImportError:
        return ["--trainer.logger=true"] if "WandbLogger" in recipe.read_text() else []
    return []


def test_a_recipe_is_short_and_opens_with_its_command(recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    assert len(lines) <= 40
    head = "\n".join(line for line in lines[:6] if line.startswith("#"))
    assert f"python -m sft_lightning fit --config configs/{recipe.name}" in head
    assert "Hardware" in head


def test_the_readme_lists_every_recipe(recipe: Path) -> None:
    assert f"`{recipe.name}`" in (ROOT / "README.md").read_text(encoding="utf-8")
