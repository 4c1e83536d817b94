"""Predict the GPU memory of each recipe in `configs/` with `plan`, on models of the real sizes without weights.

    python benchmarks/recipe_memory.py [recipe …] [--write]

The «Hardware:» line of a recipe has the number of GPUs, their memory in GiB, and the planned peak. `--write` updates
the planned peaks in these lines. A recipe that does not fit its GPUs is an error. This needs no GPU and downloads
nothing: the sizes below are those of the published models.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from family_models import save_tokenizer
from markdown_table import markdown_row, markdown_table
from peft import LoraConfig
from transformers import AutoConfig

from sft_lightning.cli.commands.plan import plan_inputs
from sft_lightning.estimation.report import plan_memory
from sft_lightning.training.memory.parts import GIB

RECIPES = Path(__file__).parents[1] / "configs"


def _shape(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int) -> Any:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _opt(hidden: int, layers: int, heads: int) -> Any:
    return {
        "model_type": "opt", "hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "word_embed_proj_dim": hidden, "vocab_size": 50272,
    }  # fmt: skip


SIZES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {"model_type": "llama", **_shape(4096, 11008, 32, 32, 32, 32000)},
    "meta-llama/Llama-2-7b-chat-hf": {"model_type": "llama", **_shape(4096, 11008, 32, 32, 32, 32000)},
    "NousResearch/Llama-2-7b-chat-hf": {"model_type": "llama", **_shape(4096, 11008, 32, 32, 32, 32000)},
    "models/chinese-llama-7b": {"model_type": "llama", **_shape(4096, 11008, 32, 32, 32, 49953)},
    "meta-llama/Llama-2-13b-hf": {"model_type": "llama", **_shape(5120, 13824, 40, 40, 40, 32000)},
    "meta-llama/Llama-2-70b-chat-hf": {"model_type": "llama", **_shape(8192, 28672, 80, 64, 8, 32000)},
    "meta-llama/Llama-3.1-8B-Instruct": {
        "model_type": "llama", **_shape(4096, 14336, 32, 32, 8, 128256), "max_position_embeddings": 131072,
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3", **_shape(4096, 12288, 36, 32, 8, 151936), "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "google/gemma-2b-it": {
        "model_type": "gemma", **_shape(2048, 16384, 18, 8, 1, 256000), "head_dim": 256, "tie_word_embeddings": True,
    },
    "google/gemma-3-4b-it": {
        "model_type": "gemma3", "tie_word_embeddings": True, "mm_tokens_per_image": 256,
        "text_config": {
            **_shape(2560, 10240, 34, 8, 4, 262208), "head_dim": 256, "sliding_window": 1024,
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "image_size": 896, "patch_size": 14,
        },
    },
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "facebook/opt-66b": _opt(9216, 64, 72),
    "bigscience/bloom-1b1": {"model_type": "bloom", "hidden_size": 1536, "n_layer": 24, "n_head": 16,
                             "vocab_size": 250880},
    "state-spaces/mamba-2.8b-hf": {"model_type": "mamba", "hidden_size": 2560, "num_hidden_layers": 64,
                                   "intermediate_size": 5120, "state_size": 16, "time_step_rank": 160,
                                   "vocab_size": 50280},
}  # fmt: skip
"""The values of `config.json` for each model of a recipe."""

LINE = re.compile(r"(?P<gpus>\d+) GPUs? of (?P<gib>\d+) GiB \(plan: (?P<peak>[\d.]+) GiB(?: each)?\)")
ALTERNATIVE = re.compile(r"of (?P<gib>\d+) GiB with (?P<options>(?:--\S+ \S+ )+)\(plan: (?P<peak>[\d.]+) GiB\)")


class Claim(NamedTuple):
    """The hardware that a recipe says it needs."""

    text: str
    """The words of the recipe."""

    gpus: int
    """Number of GPUs."""

    gib: int
    """Memory per GPU, in GiB."""

    peak: float
    """The planned peak in the recipe, in GiB per GPU."""

    options: tuple[str, ...] = ()
    """Options that are needed on this hardware."""


def claims(recipe: Path) -> list[Claim]:
    """Return the claims of a recipe; none if it is for the CPU."""
    head = "\n".join(line for line in recipe.read_text().splitlines() if line.startswith("#"))
    found = [Claim(each[0], int(each["gpus"]), int(each["gib"]), float(each["peak"])) for each in LINE.finditer(head)]
    for each in ALTERNATIVE.finditer(head):
        options = tuple(each["options"].split())
        found.append(Claim(each[0], found[0].gpus, int(each["gib"]), float(each["peak"]), options))
    return found


def planned_gib(recipe: Path, claim: Claim, folder: Path) -> float:
    """Return the planned peak in GiB per GPU, on the hardware of a claim.

    Args:
        recipe: The recipe.
        claim: One of its claims.
        folder: Folder for the models' configurations.
    """
    name = re.search(r"(?m)^  model_name_or_path: (\S+)", recipe.read_text())
    if name is None:
        raise SystemExit(f"{recipe.name}: has no model.model_name_or_path")
    model = folder / name[1].replace("/", "_")
    if not model.exists():
        values = dict(SIZES[name[1]])
        AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(model)
        save_tokenizer(model)
    options = [f"--model.model_name_or_path={model}", f"--model.tokenizer_name_or_path={model}"]
    if "\n    path: runs/" in recipe.read_text():
        options.append(f"--model.adapter.path={_adapter(folder / 'adapter')}")
    options += [f"--num_gpus={claim.gpus}", f"--gpu_memory={claim.gib}GiB", "--trainer.logger=false"]
    estimator, setup = plan_memory(plan_inputs(["--config", str(recipe), *options, *claim.options]))
    return estimator.memory(setup).total / GIB


def _adapter(folder: Path) -> Path:
    """Write the adapter configuration of chinese_alpaca.yaml, which another recipe continues."""
    targets = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
    LoraConfig(
        r=8, lora_alpha=32, lora_dropout=0.05, target_modules=targets, modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def planned(recipes: list[Path]) -> Iterator[tuple[Path, Claim, float]]:
    """Yield each claim of some recipes with the planned peak in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes:
            for claim in claims(recipe):
                yield recipe, claim, planned_gib(recipe, claim, Path(folder))


def main() -> None:
    """Print the table; with `--write`, update the recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="Names of recipes (default: all).")
    parser.add_argument("--write", action="store_true", help="Update the planned peaks in the recipes.")
    args = parser.parse_args()
    wanted = [path for path in sorted(RECIPES.glob("*.yaml")) if not args.recipes or path.stem in args.recipes]
    too_large = []
    print(markdown_table(("recipe", "options", "GPUs", "GiB", "peak in the recipe", "planned peak"), []), flush=True)
    for recipe, claim, gib in planned(wanted):
        options = " ".join(claim.options)
        row = [recipe.stem, options, str(claim.gpus), str(claim.gib), str(claim.peak), f"{gib:.1f}"]
        print(markdown_row(row), flush=True)
        if gib > claim.gib:
            too_large.append(f"{recipe.stem} {options}: {gib:.1f} of {claim.gib} GiB")
        if args.write:
            text = re.sub(r"plan: [\d.]+", f"plan: {gib:.1f}", claim.text)
            recipe.write_text(recipe.read_text().replace(claim.text, text))
    if too_large:
        raise SystemExit("does not fit:\n" + "\n".join(too_large))


if __name__ == "__main__":
    main()
