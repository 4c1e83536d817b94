from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft_lightning.__main__ import main


def test_answers_go_to_the_terminal_and_to_every_file(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("html", "markdown", "jsonl")}
    args = [f"--{name}={path}" for name, path in files.items()]
    models = [f"--baseline={model_dir}", f"--finetuned={model_dir}", f"--finetuned={model_dir}"]
    assert main(["compare", *models, "--mode=greedy", "--mode=contrastive", "--max_new_tokens=4", *args]) == 0
    assert "prompt 6 of 6  builtin en 6" in capsys.readouterr().out
    rows = [json.loads(line) for line in files["jsonl"].read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6 * 2 * 3
    assert files["html"].read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert files["markdown"].read_text(encoding="utf-8").startswith("# Comparison")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_beam_groups=2"], "add --mode diverse_beam"),
        (["--mode=gready"], "Did you mean 'greedy'"),
        (["--prompts=gone.jsonl"], "--prompts: 'gone.jsonl' does not exist"),
        (["--finetuned=./gone"], "--finetuned: the folder './gone' does not exist"),
        (["--adapter=./gone"], "--adapter: 'gone' is not an adapter folder"),
        (["--quantization=3"], "--quantization: must be 4 or 8"),
        (["--html=gone/page.html"], "--html: the folder of 'gone/page.html' does not exist"),
        (["--max_new_tokenz=3"], "Did you mean 'max_new_tokens'"),
    ],
)
def test_a_wrong_option_is_named(
    model_dir: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", f"--baseline={model_dir}", "--max_new_tokens=1", *options]) == 2
    assert message in capsys.readouterr().err
