from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sft_lightning.__main__ import main


def wrong(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end with status 2, and return its one message."""
    assert main(args) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.max_lenght=3"], ["data.max_lenght: no such key", "Did you mean 'data.max_length'?"]),
        (["--model.adapter.rr=3"], ["model.adapter.rr: no such key", "'r'"]),
        (["--data.max_length=abc"], ["data.max_length", "int", "abc"]),
        (["--data.max_length=0"], ["data.max_length", "at least 1", "got 0"]),
        (["--task=dop"], ["task", "'sft', 'pretrain'", "dop"]),
        (["--model.adapter.r=0"], ["model.adapter.r", "at least 1", "got 0"]),
        (["--model.quantization.bits=5"], ["model.quantization.bits", "4 or 8", "got 5"]),
        (["--data.template=vicuna"], ["data.template", "'vicuna'", "Did you mean 'vicuna_v1.1'?"]),
        (["--data.max_length=20"], ["data.max_length is 20", "overlong", "record"]),
        (["--data.val_fraction=1.5"], ["data.val_fraction", "1.5"]),
        (["--data.sources={a: {path: nowhere.json}}"], ["data.sources.a.path", "nowhere.json", "does not exist"]),
        (["--data.sources={a: {path: x, fromat: text}}"], ["data.sources.fromat: no such key", "'format'"]),
        (["--data.sources={}"], ["data.sources", "no source"]),
        (["--model.model_name_or_path=./nowhere"], ["./nowhere", "does not exist"]),
        (["--model.adapter.target_modules=[q_porj]"], ["target_modules", "q_porj", "Did you mean 'q_proj'?"]),
        (["--model.lr_scheduler.warmup_ratio=0.1", "--model.lr_scheduler.warmup_steps=3"], ["not both", "0.1 and 3"]),
        (["--config=nowhere.yaml"], ["config", "nowhere.yaml"]),
        (["--trainer.overfit_batches=2"], ["trainer.overfit_batches", "max_examples"]),
        (["--trainer.max_epochs=-1"], ["max_steps or max_epochs"]),
        (
            ["--trainer.limit_train_batches=3", "--trainer.accumulate_grad_batches=2"],
            ["trainer.limit_train_batches: 3", "multiple of accumulate_grad_batches (2)"],
        ),
        (["--model.adapter=null", "--model.quantization.bits=4"], ["model.quantization", "model.adapter"]),
    ],
)
def test_a_user_error_is_one_message_with_status_2(
    options: list[str], said: list[str], fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = wrong(["fit", *fit_args, *options], capsys)
    for part in said:
        assert part in message


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "prepare", "preview", "plan", "selftest"])
def test_a_command_without_a_configuration_asks_for_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = wrong([command], capsys)
    assert f"error: {command}: no configuration given; add --config FILE" in message


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["chat"], "--model: required"),
        (["compare"], "--baseline: required"),
        (["merge"], "--adapter, --output_dir: required"),
        (["migrate", "fastchat"], "migrate: after the name of the system, give"),
    ],
)
def test_a_command_without_its_required_options_names_them(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in wrong(args, capsys)


def test_a_config_file_without_its_option_is_recognized(capsys: pytest.CaptureFixture[str]) -> None:
    assert "mine.yaml: not an option" in wrong(["fit", "mine.yaml"], capsys)
    assert "--config: requires a value" in wrong(["fit", "--config"], capsys)


def test_a_callback_may_be_named_without_its_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--trainer.callbacks+=Throughput", "--print_config"])
    [callback] = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callback["class_path"].endswith("Throughput")


def test_a_folder_that_is_not_a_model_is_named(
    fit_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("no model here")
    message = wrong(["fit", *fit_args, f"--model.model_name_or_path={tmp_path / 'folder'}"], capsys)
    assert "is not a model" in message
    assert "notes.txt" in message


def test_debug_adds_the_traceback(fit_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *fit_args, "--data.max_length=0", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_broken_yaml_names_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.yaml").write_text("data:\n  sources: {a: [\n")
    message = wrong(["fit", f"--config={tmp_path / 'broken.yaml'}"], capsys)
    assert "broken.yaml', line 3" in message


def test_several_configs_and_options_are_merged_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("data: {max_length: 64, batch_size: 2}\nmodel: {adapter: {r: 4}}\n")
    (tmp_path / "b.yaml").write_text("data: {max_length: 128}\n")
    with pytest.raises(SystemExit) as done:
        main(
            [
                "fit",
                f"--config={tmp_path / 'a.yaml'}",
                f"--config={tmp_path / 'b.yaml'}",
                "--model.adapter.r=8",
                "--trainer.max_steps=5",
                "--print_config",
            ]
        )
    assert done.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["data"]["max_length"], config["data"]["batch_size"]) == (128, 2)
    assert config["model"]["adapter"]["r"] == 8
    assert config["trainer"]["max_steps"] == 5


def test_lists_are_appended_to_with_plus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(
        "trainer:\n  callbacks:\n  - class_path: callbacks.SampleGeneration\n    init_args: {prompts: []}\n"
    )
    with pytest.raises(SystemExit):
        main(["fit", f"--config={tmp_path / 'a.yaml'}", "--trainer.callbacks+=callbacks.Throughput", "--print_config"])
    names = [c["class_path"] for c in yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]]
    assert [name.rsplit(".", 1)[-1] for name in names] == ["SampleGeneration", "Throughput"]


def test_another_optimizer_inherits_nothing_from_the_default(
    fit_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lion.yaml"
    file.write_text("model: {optimizer: {class_path: bitsandbytes.optim.Lion, init_args: {lr: 1.0e-4}}}")
    for options in ([f"--config={file}"], ["--model.optimizer=bitsandbytes.optim.Lion", "--model.optimizer.lr=1e-4"]):
        with pytest.raises(SystemExit):
            main(["fit", *options, *fit_args, "--print_config"])
        optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]
        assert optimizer["class_path"] == "bitsandbytes.optim.Lion"
        assert list(optimizer["init_args"].get("betas") or (0.9, 0.99)) == [0.9, 0.99]
        assert optimizer["init_args"]["lr"] == 1e-4
