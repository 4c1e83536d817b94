from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from sft_lightning.__main__ import main
from sft_lightning.merging.report import MergeReport
from sft_lightning.models.base.weight_files import weight_files


@pytest.fixture
def fit(fit_args: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Run `fit` for two steps with further options, and return the adapter's folder."""

    def run(*options: str) -> Path:
        assert main(["fit", *fit_args, "--trainer.max_steps=2", *options]) == 0
        return tmp_path / "run" / "adapter"

    return run


@pytest.mark.end_to_end
def test_an_adapter_is_merged_and_the_measured_difference_is_printed(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, merged = fit(), tmp_path / "merged"
    options = ["--dtype", "bfloat16", "--max_shard_size", "30KB"]
    assert main(["merge", "--adapter", str(adapter), "--output_dir", str(merged), *options]) == 0
    out = capsys.readouterr().out
    assert f"merged model: {merged} (bfloat16)" in out
    assert "logits differ from the adapted model's by at most" in out
    assert AutoConfig.from_pretrained(merged).dtype is not None
    assert len(weight_files(merged)) > 1
    assert "| train/toy | 24 | 24 |" in (merged / "README.md").read_text()


def test_several_adapters_are_merged(fit: Callable[..., Path], tmp_path: Path) -> None:
    adapter = str(fit())
    assert main(["merge", "--adapter", adapter, "--adapter", adapter, "--output_dir", str(tmp_path / "merged")]) == 0


@pytest.mark.end_to_end
def test_a_quantized_base_is_compared_on_the_data_of_the_run(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = fit("--model.quantization.bits=4")
    assert main(["merge", "--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")]) == 0
    out = capsys.readouterr().out
    assert "KL(trained ‖ merged into the original base) on 8 examples of the run's data" in out
    assert "KL(trained ‖ merged into the dequantized base) on 8 examples of the run's data" in out
    assert out.count("(written)") == 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["config.yaml", "the data"])
def test_without_the_data_of_the_run_built_in_texts_are_used_and_the_reason_is_printed(
    lost: str, fit: Callable[..., Path], alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = fit("--model.quantization.bits=4")
    (adapter.parent / "config.yaml" if lost == "config.yaml" else alpaca_file).unlink()
    assert main(["merge", "--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")]) == 0
    out = capsys.readouterr().out
    assert "comparing on a few built-in texts" in out
    assert "on a few built-in texts:" in out


CODE = "def records(fields):\n    open('ran', 'w').close()\n    return fields\n"


def test_code_that_the_runs_config_names_does_not_run_unless_trusted(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = fit("--model.quantization.bits=4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("strange.py").write_text(CODE)
    file = adapter.parent / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["model"]["trust_remote_code"] = True
    config["model"]["optimizer"] = {"class_path": "strange.Optimizer"}
    config["data"]["sources"]["toy"]["format"] = "strange.records"
    file.write_text(yaml.safe_dump(config))
    assert main(["merge", "--adapter", str(adapter), "--output_dir", "merged"]) == 0
    assert "its format 'strange.records' is Python code, which runs only with --trust_remote_code true" in (
        capsys.readouterr().out
    )
    assert not Path("ran").exists()
    assert main(["merge", "--adapter", str(adapter), "--output_dir", "again", "--trust_remote_code", "true"]) == 0
    assert Path("ran").exists()


def test_only_an_earlier_merge_is_overwritten(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = fit()
    command = ["merge", "--adapter", str(adapter), "--verify", "false", "--output_dir"]
    assert main([*command, str(adapter.parent), "--overwrite", "true"]) == 2
    assert "which the command reads" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "merged")]) == 0
    assert main([*command, str(tmp_path / "merged")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "merged"), "--overwrite", "true"]) == 0


def test_every_special_case_of_the_report_has_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = MergeReport(
        output_dir=tmp_path,
        base="original",
        dtype="float32",
        difference=None,
        divergences={},
        whole_model_reason="PiSSA",
        left_out=["inv_freq"],
        untied=True,
        format="pth",
    )

    def merged(*args: Any, **options: Any) -> MergeReport:
        return report

    monkeypatch.setattr("sft_lightning.cli.commands.merge.merge_adapters", merged)
    assert main(["merge", "--adapter", "a", "--output_dir", "b"]) == 0
    out = capsys.readouterr().out
    assert "(float32, in Meta's layout)" in out
    for said in (
        "not verified",
        "the whole model in memory: PiSSA",
        "no longer tied",
        "left out 1 tensors",
        "inv_freq",
    ):
        assert said in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output_dir", "out"], "adapter"),
        (["--adapter", "nowhere", "--output_dir", "out"], "'nowhere' is not an adapter folder"),
        (
            ["--adapter", "a", "--output_dir", "out", "--base", "models/mine"],
            "must be one of 'auto', 'original', 'dequantized'",
        ),
        (
            ["--adapter", "a", "--output_dir", "out", "--max_shard_size", "big"],
            "must be a size such as 5GB or 500MB (got 'big')",
        ),
        (["--adapter", "a", "--output_dir", "out", "--max_shards_size", "5GB"], "Did you mean 'max_shard_size'?"),
    ],
)
def test_a_user_error_is_one_message_and_writes_nothing(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["merge", *options]) == 2
    captured = capsys.readouterr()
    assert said in captured.err + captured.out
    assert not list(tmp_path.iterdir())
