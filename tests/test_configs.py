"""Every recipe runs as it stands: an optimizer step on a tiny model of its own family, with small data of its formats.

The models, tokenizers and files lie where a recipe looks for them, in a folder of their own. Whatever is replaced all
the same is listed, with its reason, in `REPLACED`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft_lightning.__main__ import main
from sft_lightning.cli.app import SFTCommandLine
from sft_lightning.data.formats.deepspeed_chat import dataset_format
from sft_lightning.data.formats.registry import FORMATS
from sft_lightning.errors import UserError
from sft_lightning.strategies.refusals import RunFacts, check_float16
from sft_lightning.strategies.registry import check_strategy

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
ONE_OF_A_KIND = {
    "bloom_1b1_full",
    "dpo_qlora",
    "llama2_70b_qlora_fsdp2",
    "llama2_7b_qlora",
    "mamba_2.8b_lora",
    "opt_1.3b",
}
"""Recipes whose runs together take every path; the runs of the others are slow."""

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


def _benchmark(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def _family_models() -> Any:
    return _benchmark("family_models")


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


class Replaced(NamedTuple):
    """What is not run as it stands."""

    why: str
    applies: Callable[[dict[str, Any]], bool]
    instead: Callable[[dict[str, Any]], dict[str, Any]]
    """Options, by the keys of the YAML."""


def is_deepspeed(config: dict[str, Any]) -> bool:
    return "deepspeed" in str(config["trainer"].get("strategy")).lower()


def is_offloaded(config: dict[str, Any]) -> bool:
    return "offload_" in str(config["trainer"].get("strategy"))


FLOAT16_ON_THE_CPU = {
    "class_path": "lightning.pytorch.plugins.MixedPrecision",
    "init_args": {
        "precision": "16-mixed", "device": "cpu",
        "scaler": {"class_path": "torch.amp.GradScaler", "init_args": {"device": "cpu"}},
    },
}  # fmt: skip


def needs_float16(config: dict[str, Any]) -> bool:
    """Whether torch's autocast runs it in float16; DeepSpeed casts by itself, on the CPU too."""
    return config["trainer"].get("precision") == "16-mixed" and not is_deepspeed(config)


def is_float16_missing(config: dict[str, Any]) -> bool:
    """Whether DeepSpeed runs it in float16, which this CPU does not have."""
    try:
        check_float16(config["trainer"].get("precision", "32-true"))
    except UserError:
        return is_deepspeed(config)
    return False


def has_wandb(config: dict[str, Any]) -> bool:
    return "WandbLogger" in str(config["trainer"].get("logger"))


def other_loggers(config: dict[str, Any]) -> list[Any]:
    return [logger for logger in config["trainer"]["logger"] if "WandbLogger" not in logger["class_path"]]


REPLACED = [
    Replaced(
        "an epoch is more than a test has time for",
        lambda config: True,
        lambda config: {"trainer.accelerator": "cpu", "trainer.max_steps": 1},
    ),
    Replaced(
        "Lightning scales losses on GPUs alone: this is what it makes of 16-mixed there, with torch's scaler for CPUs",
        needs_float16,
        lambda config: {"trainer.precision": None, "trainer.plugins": FLOAT16_ON_THE_CPU},
    ),
    Replaced(
        "DeepSpeed computes in float16 on CPUs that have it (AVX512-FP16): on the others, bfloat16 stands for it",
        is_float16_missing,
        lambda config: {"trainer.precision": "bf16-mixed"},
    ),
    Replaced(
        "with bfloat16 in the place of float16, weights and output hooks of float16 do not go together",
        lambda config: config["model"]["dtype"] == "float16" and is_float16_missing(config),
        lambda config: {"model.dtype": "bfloat16"},
    ),
    Replaced(
        "wandb, an extra, is not installed",
        lambda config: has_wandb(config) and importlib.util.find_spec("wandb") is None,
        lambda config: {"trainer.logger": other_loggers(config)},
    ),
]
REPLACED_IN_THIS_PROCESS = [
    *REPLACED,
    Replaced(
        "samples at both ends take longer than the step between them: two tokens of one question do",
        lambda config: "SampleGeneration" not in str(config["trainer"].get("callbacks")),
        lambda config: {
            "trainer.callbacks+": "callbacks.SampleGeneration",
            "trainer.callbacks.num_prompts": 1,
            "trainer.callbacks.generation": {"max_new_tokens": 2},
        },
    ),
    Replaced(
        "DeepSpeed compiles its Adam for the host at first use, a minute and a half: the slow test has it",
        is_offloaded,
        lambda config: {"trainer.strategy": "deepspeed_stage_3"},
    ),
]


def write_model(recipe: Path, folder: Path) -> None:
    """Write a tiny model of a recipe's family, in float32, with its tokenizer."""
    folder.mkdir(parents=True)
    _family_models().save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<bos>", "<eos>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    values = {"vocab_size": _family_models().VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, **family(recipe)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    model.to(torch.float32).save_pretrained(folder)


def write_tokenizer(folder: Path, *, extended: bool) -> None:
    """Write a tokenizer, with more tokens than any stand-in embeds if it is extended."""
    folder.mkdir(parents=True)
    _family_models().save_tokenizer(folder)
    if extended:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"汉字{i}" for i in range(20)])
        tokenizer.save_pretrained(folder)


def write_source(source: dict[str, Any], folder: Path) -> None:
    """Write the records of a source where it looks for them."""
    kind = source.get("format") or dataset_format(source["path"])
    assert kind in FORMATS
    base = folder / source["path"].rstrip("/")
    file = base if base.suffix else base / f"{source.get('split', 'train')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(json.dumps(ROWS[kind]).replace("{i}", str(i))) for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)) if file.suffix == ".jsonl" else json.dumps(rows))


def write_inputs(recipe: Path, folder: Path) -> None:
    """Write everything that a recipe reads, where it reads it."""
    config = yaml.safe_load(recipe.read_text())
    model, data = config["model"], config["data"]
    if "model_name_or_path" in model and not (folder / model["model_name_or_path"]).exists():
        write_model(recipe, folder / model["model_name_or_path"])
    tokenizer = model.get("tokenizer_name_or_path")
    if tokenizer is not None and not (folder / tokenizer).exists():
        write_tokenizer(folder / tokenizer, extended=model.get("resize_vocabulary", False))
    for source in [*data["sources"].values(), *data.get("val_sources", {}).values()]:
        write_source(source, folder)


def command(recipe: Path, replaced: list[Replaced], *, devices: int) -> list[str]:
    """Return the command that runs a recipe here."""
    config = yaml.safe_load(recipe.read_text())
    options = {"trainer.devices": devices}
    for each in replaced:
        if each.applies(config):
            options |= each.instead(config)
    given = (f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items())
    return ["fit", "--config", str(recipe), *given]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, in which runs of this process leave no variables behind."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    os.environ["WANDB_MODE"] = "offline"
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    """Sharded runs of this process share its group of one, which DeepSpeed remembers, and leave none behind."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def assert_ran(recipe: Path, folder: Path) -> None:
    run = folder / "runs" / recipe.stem
    config = yaml.safe_load(recipe.read_text())
    root = folder / config["trainer"].get("default_root_dir", run)
    assert (root / ("adapter" if config["model"].get("adapter") else "model") / "run_manifest.json").exists()
    assert list(root.glob("events.out.tfevents.*")), "TensorBoard's events"
    if has_wandb(config) and importlib.util.find_spec("wandb") is not None:
        assert list((root / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in ONE_OF_A_KIND else [pytest.mark.slow])
        for path in RECIPES
        if path.stem != CONTINUES
    ],
)
def test_a_recipe_runs_on_a_tiny_model_of_its_family(recipe: Path, folder: Path) -> None:
    write_inputs(recipe, folder)
    assert main(command(recipe, REPLACED_IN_THIS_PROCESS, devices=1)) == 0
    assert_ran(recipe, folder)


@pytest.mark.slow
def test_the_recipe_that_continues_takes_the_adapter_of_the_one_before(folder: Path) -> None:
    first, then = (ROOT / "configs" / f"{name}.yaml" for name in ("chinese_alpaca", CONTINUES))
    for recipe in (first, then):
        write_inputs(recipe, folder)
        assert main(command(recipe, REPLACED_IN_THIS_PROCESS, devices=1)) == 0
        assert_ran(recipe, folder)
    saved = json.loads((folder / "runs" / CONTINUES / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["modules_to_save"]) == (8, ["embed_tokens", "lm_head"])


SHARDED = [path for path in RECIPES if "strategy" in yaml.safe_load(path.read_text())["trainer"]]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [path for path in SHARDED if path.stem != CONTINUES], ids=lambda path: path.stem)
def test_a_sharded_recipe_runs_in_two_processes(recipe: Path, folder: Path) -> None:
    write_inputs(recipe, folder)
    run_processes(command(recipe, REPLACED, devices=2), folder)
    assert_ran(recipe, folder)


def run_processes(arguments: list[str], folder: Path) -> None:
    """Run the command in processes of its own, and end all of them if they hang."""
    with subprocess.Popen(
        [sys.executable, "-m", "sft_lightning", *arguments], cwd=folder, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, said[-5000:]


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_a_recipe_as_it_stands_is_a_configuration_whose_strategy_takes_its_model(recipe: Path) -> None:
    config = yaml.safe_load(recipe.read_text())
    logger = [each.instead(config) for each in REPLACED if each.applies(config) and "wandb" in each.why]
    options = [f"--{key}={json.dumps(value)}" for options in logger for key, value in options.items()]
    cli = SFTCommandLine("plan", ["--config", str(recipe), *options])
    check_strategy(cli.config_init["trainer"]["strategy"], RunFacts(model=cli.module.spec))


def test_a_recipe_is_short_and_opens_with_its_command(recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    assert len(lines) <= 40
    head = "\n".join(line for line in lines[:6] if line.startswith("#"))
    assert f"python -m sft_lightning fit --config configs/{recipe.name}" in head
    assert "# Hardware: " in head


ON_THE_CPU = ("demo_pretrain", "demo_sft")


def test_a_recipe_says_how_many_gpus_of_what_size_it_needs_and_fits_them(recipe: Path) -> None:
    found = _benchmark("recipe_memory").claims(recipe)
    assert bool(found) == (recipe.stem not in ON_THE_CPU)
    for claim in found:
        assert 0 < claim.peak < 0.95 * claim.gib, "the CUDA context and fragmentation take some, too"


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if path.stem not in ON_THE_CPU], ids=lambda path: path.stem
)
def test_the_peak_that_a_recipe_names_is_the_planned_one_of_the_true_model(recipe: Path) -> None:
    for _, claim, gib in _benchmark("recipe_memory").planned([recipe]):
        assert claim.peak == pytest.approx(gib, abs=0.06), claim.options


def test_the_readme_lists_every_recipe(recipe: Path) -> None:
    assert f"`{recipe.name}`" in (ROOT / "README.md").read_text(encoding="utf-8")
