from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from sft_lightning.__main__ import main

Prepare = Callable[..., int]


@pytest.fixture
def config(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": {"model_name_or_path": str(model_dir)},
        "data": {
            "sources": {"toy": {"path": str(alpaca_file)}},
            "template": "alpaca",
            "max_length": 256,
            "packing": "none",
            "store_dir": str(tmp_path / "stores"),
        },
    }


@pytest.fixture
def prepare(config: dict[str, Any], tmp_path: Path) -> Prepare:
    """Run `prepare` with the configuration as it then is."""

    def run(*options: str) -> int:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config))
        return main(["prepare", "--config", str(path), *options])

    return run


@pytest.mark.end_to_end
def test_the_data_is_tokenized_and_told_about(
    prepare: Prepare, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert prepare() == 0
    shown = capsys.readouterr().out
    assert "train/toy" in shown
    assert "alpaca" in shown
    assert "24 rows of 256 tokens" in shown
    assert "24 optimizer steps per epoch" in shown
    [store] = (tmp_path / "stores").glob("*/manifest.json")
    assert f"tokens in {store.parent}, built now" in shown


def test_the_second_time_the_store_is_found_unless_it_is_to_be_rebuilt(
    prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    endings = []
    for options in ([], [], ["--rebuild"], []):
        assert prepare(*options) == 0
        endings.append(capsys.readouterr().out.strip().rpartition(", ")[2])
    assert endings == ["built now", "found", "rebuilt because --rebuild was given", "found"]


def test_what_changed_is_told_when_a_source_is_tokenized_again(
    prepare: Prepare, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert prepare() == 0
    capsys.readouterr()
    assert prepare("--data.loss_on=all", "--data.template=vicuna_v1.1", "--data.max_length=200") == 0
    told = "rebuilt because template changed: alpaca → vicuna_v1.1; loss_on changed: assistant → all"
    assert f", {told}" in capsys.readouterr().out
    assert f"data.sources.toy: the token store is {told}" in caplog.text


def test_the_report_can_be_written_to_a_file(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    assert prepare(f"--report={path}") == 0
    report = json.loads(path.read_text())
    assert (report["rows"], report["optimizer_steps"], report["max_length"]) == (24, 24, 256)
    source = report["sources"]["train/toy"]
    assert (source["records"], source["examples"], source["format"]) == (24, 24, "alpaca")
    assert source["length_p50"] <= source["length_p90"] <= source["longest"]


def test_steps_are_counted_for_the_devices_of_the_configuration_without_having_them(
    prepare: Prepare, config: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("prepare asks for no device")

    monkeypatch.setattr(_AcceleratorConnector, "__init__", refuse)  # every trainer's first step
    config["trainer"] = {"accelerator": "gpu", "devices": 8, "precision": "bf16-true"}
    assert prepare() == 0
    assert "24 rows of 256 tokens" in (shown := capsys.readouterr().out)
    assert "; 3 optimizer steps per epoch" in shown
    config["trainer"] |= {"num_nodes": 2, "accumulate_grad_batches": 1}
    assert prepare() == 0
    assert "; 2 optimizer steps per epoch" in capsys.readouterr().out
    config["trainer"] |= {"num_nodes": 1, "devices": 2, "accumulate_grad_batches": 3}
    assert prepare("--data.batch_size=2") == 0
    assert "; 2 optimizer steps per epoch" in capsys.readouterr().out


@pytest.mark.parametrize(("devices", "steps"), [([0, 1], 12), ("0,1,2", 8), ("4", 6), ("auto", 24)])
def test_devices_may_be_written_in_every_way_that_the_trainer_knows(
    devices: Any, steps: int, prepare: Prepare, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["trainer"] = {"accelerator": "gpu", "devices": devices}
    assert prepare() == 0
    assert f"; {steps} optimizer steps per epoch" in capsys.readouterr().out


def test_no_model_is_loaded(
    prepare: Prepare, config: dict[str, Any], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model_dir.glob("tokenizer*"):
        target = tmp_path / "tokenizer_alone" / file.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    config["model"] = {
        "model_name_or_path": "nobody/has-this-model",
        "tokenizer_name_or_path": str(tmp_path / "tokenizer_alone"),
    }
    assert prepare() == 0
    assert "built now" in capsys.readouterr().out


def test_validation_and_test_sources_are_prepared_too(
    prepare: Prepare, config: dict[str, Any], alpaca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config["data"]["val_sources"] = {"held": {"path": str(alpaca_file), "max_examples": 4}}
    config["data"]["test_sources"] = {"last": {"path": str(alpaca_file), "max_examples": 3}}
    assert prepare() == 0
    shown = capsys.readouterr().out
    assert shown.count("built now") == 3
    assert all(name in shown for name in ("train/toy", "val/held", "test/last"))


def test_many_files_of_a_folder_and_a_share_to_validate_on(
    prepare: Prepare, config: dict[str, Any], write_json: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("a.json", "deep/b.json"):
        write_json(f"folder/{name}", [{"instruction": f"{name} {i}", "output": f"{i}"} for i in range(10)])
    config["data"] |= {"sources": {"all": {"path": str(tmp_path / "folder")}}, "val_fraction": 0.25}
    assert prepare(f"--report={tmp_path / 'report.json'}") == 0
    sources = json.loads((tmp_path / "report.json").read_text())["sources"]
    assert (sources["train/all"]["examples"], sources["val/all"]["examples"]) == (15, 5)


def test_drops_are_shown_with_their_reason_and_place(
    prepare: Prepare, config: dict[str, Any], write_json: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_json("c.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": ""}\n')
    config["data"]["sources"] = {"toy": {"path": str(path)}}
    assert prepare() == 0
    shown = capsys.readouterr().out
    assert "no_answer" in shown
    assert "line 2" in shown


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"sources": {}}, "data.sources: no source given"),
        ({"sources": {"toy": {"path": "nowhere.json"}}}, "data.sources.toy.path: 'nowhere.json' does not exist"),
        ({"max_length": 20}, "Set data.max_length to at least"),
        ({"template": "alpacca"}, "data.template: 'alpacca' is unknown. Did you mean 'alpaca'"),
        ({"packing": "best"}, "data.packing"),
        ({"data_split": "2;4"}, "data.data_split: '2;4'"),
        ({"soruces": {"toy": {"path": "a.json"}}}, "soruces"),
    ],
)
def test_what_is_wrong_with_the_configuration_is_said_once(
    data: dict[str, Any], said: str, prepare: Prepare, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["data"] |= data
    assert prepare() == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_a_report_that_cannot_be_written_names_the_option(
    prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert prepare(f"--report={tmp_path / 'file' / 'report.json'}") == 2
    assert "--report: cannot write" in capsys.readouterr().err
