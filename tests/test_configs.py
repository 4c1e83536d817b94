"""Every recipe runs: at least one optimizer step on a tiny model, with small data of its own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_lightning.__main__ import main

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))

ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": f"Name {i}.", "input": "", "output": f"It is {i}."} for i in range(40)],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"Hi {i}"}, {"from": "gpt", "value": "Hello!"}] * 2}
        for i in range(80)
    ],
    "preference": [{"prompt": f"Name {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(80)],
    "text": [{"text": f"Once upon a time there were {i} of them."} for i in range(80)],
}


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_a_recipe_runs_on_a_tiny_model(recipe: Path, model_dir: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(recipe.read_text())
    sources = {}
    for name, source in config["data"]["sources"].items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(ROWS[source["format"]]))
        sources[name] = {**source, "path": str(file)}
    model = ["--model.tokenizer_name_or_path", str(model_dir)]
    if "from_config" not in config["model"]:
        model += ["--model.model_name_or_path", str(model_dir)]
    run = [
        "--trainer.max_steps",
        "1",
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
        "--trainer.accelerator",
        "cpu",
    ]
    assert main(["fit", "--config", str(recipe), *model, "--data.sources", json.dumps(sources), *run]) == 0
    assert (tmp_path / "run" / "adapter").exists() or (tmp_path / "run" / "model").exists()


def test_a_recipe_is_short_and_opens_with_its_command(recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    assert len(lines) <= 40
    head = "\n".join(line for line in lines[:6] if line.startswith("#"))
    assert f"python -m sft_lightning fit --config configs/{recipe.name}" in head
    assert "Hardware" in head
