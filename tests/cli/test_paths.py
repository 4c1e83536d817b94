from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import Namespace

from sft_lightning.__main__ import main
from sft_lightning.cli.paths import expand_paths
from sft_lightning.errors import UserError


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("DATA", "/data")


def test_paths_are_expanded_wherever_they_are_nested() -> None:
    config = Namespace(
        ckpt_path="~/last.ckpt",
        model=Namespace(model_name_or_path="$DATA/llama", adapter=Namespace(path="${DATA}/adapter")),
        data=Namespace(sources={"a": Namespace(path="~/a.json"), "b": {"path": "b.json"}}),
        trainer=Namespace(callbacks=[{"init_args": {"dirpath": "~/checkpoints"}}]),
        finetuned=["~/one", "two"],
    )
    expand_paths(config)
    assert config == Namespace(
        ckpt_path="/home/ann/last.ckpt",
        model=Namespace(model_name_or_path="/data/llama", adapter=Namespace(path="/data/adapter")),
        data=Namespace(sources={"a": Namespace(path="/home/ann/a.json"), "b": {"path": "b.json"}}),
        trainer=Namespace(callbacks=[{"init_args": {"dirpath": "/home/ann/checkpoints"}}]),
        finetuned=["/home/ann/one", "two"],
    )


def test_text_that_is_no_path_stays() -> None:
    config = Namespace(callbacks=Namespace(system="What is $DATA? ~", format="~"))
    expand_paths(config)
    assert config.callbacks == Namespace(system="What is $DATA? ~", format="~")


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRATCH", raising=False)
    with pytest.raises(UserError, match=r"data\.sources\.a\.path: the environment variable SCRATCH of '\$SCRATCH/a'"):
        expand_paths(Namespace(data=Namespace(sources={"a": {"path": "$SCRATCH/a"}})))


def test_a_run_finds_what_lies_at_home(
    fit_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUN", "run")
    at_home = [arg.replace(f"{tmp_path}/run", "~/$RUN").replace(str(tmp_path), "~") for arg in fit_args]
    assert at_home != fit_args
    assert main(["fit", *at_home, "--trainer.max_steps=1"]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
