"""Check that two checkouts train recipes to the same bits.

    python benchmarks/same_losses.py OTHER_CHECKOUT [--recipes NAME ...]

This is for changes that move or rename code. Each recipe, including those of the demo, runs a few optimizer steps on
the small model that the tests make for it, once with each checkout. The logged losses must be equal, and the exported
weights must have the same bytes. The exit status is 1 if a recipe differs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3


def main() -> int:
    """Run the recipes with both checkouts, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--recipes", nargs="*", help="names of recipes; default: all that do not continue another")
    args = parser.parse_args()
    recipes = _recipes_module()
    names = args.recipes or [path.stem for path in recipes.RECIPES if path.stem != recipes.CONTINUES]
    differing = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            inputs = Path(temporary) / name
            inputs.mkdir()
            recipe = ROOT / "configs" / f"{name}.yaml"
            recipes.write_inputs(recipe, inputs)
            here, there = (_trained(recipes, recipe, inputs, tree) for tree in (ROOT, args.other.resolve()))
            differing += here != there
            losses = " ".join(f"{loss:.9g}" for loss in here["losses"])
            print(f"{name:28} {'same bits' if here == there else f'DIFFERS {there}'}  {losses}", flush=True)
    print(f"{len(names) - differing} of {len(names)} recipes have the same losses and weights, bit for bit")
    return int(differing > 0)


def _recipes_module() -> Any:
    """Return the test module that makes the inputs of a recipe."""
    spec = importlib.util.spec_from_file_location("test_configs", ROOT / "tests" / "test_configs.py")
    if spec is None or spec.loader is None:
        raise SystemExit("run this from a checkout with its tests")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _trained(recipes: Any, recipe: Path, inputs: Path, tree: Path) -> dict[str, Any]:
    """Run a recipe with the code of a checkout; return its losses and a hash of each exported weight file."""
    run = inputs / f"run_{hashlib.sha1(str(tree).encode(), usedforsecurity=False).hexdigest()[:8]}"
    arguments = recipes.command(recipe, recipes.REPLACED_IN_THIS_PROCESS, devices=1)
    options = [f"--trainer.max_steps={STEPS}", "--trainer.log_every_n_steps=1", f"--trainer.default_root_dir={run}"]
    done = subprocess.run(
        [sys.executable, "-m", "sft_lightning", *arguments, *options],
        cwd=inputs, env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(run)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{recipe.stem} with {tree}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    files = sorted([*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")])
    return {
        "losses": _losses(run),
        "weights": {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files},
    }


def _losses(run: Path) -> list[float]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


if __name__ == "__main__":
    sys.exit(main())
