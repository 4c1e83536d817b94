"""Covers sft_lightning.cli.commands.plan and sft_lightning.estimation.report.

`plan` estimates steps, memory and time of a configuration without starting it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_lightning.__main__ import main
from sft_lightning.cli.commands.plan import parse_memory
from sft_lightning.errors import UserError
from sft_lightning.strategies import refusals

Plan = Callable[..., int]


@pytest.fixture
def plan(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> Plan:
    """Run `plan` on a folder with a configuration and a tokenizer, and no weights; the exit status."""
    folder = tmp_path / "no_weights"
    folder.mkdir()
    for file in model_dir.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())

    def run(*options: str) -> int:
        sources = json.dumps({"toy": {"path": str(alpaca_file), "format": "alpaca"}})
        base = [f"--model.model_name_or_path={folder}", f"--data.sources={sources}", "--data.template=alpaca"]
        return main(["plan", *base, "--data.max_length=256", *options])

    return run


def peak(capsys: pytest.CaptureFixture[str]) -> float:
    """The peak that was printed, GiB."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return next(float(words[1]) for words in lines if words[:1] == ["peak"])


@pytest.mark.end_to_end
def test_steps_memory_and_time_are_estimated_without_weights(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model.adapter.r=4", "--num_gpus=2", "--trainer.max_epochs=3") == 0
    shown = capsys.readouterr().out
    assert "tokens supervised; 0 dropped" in shown
    assert "a step is 1 rows × 1 micro-batches × 2 GPUs" in shown
    for part in ("weights", "adapter", "gradients", "optimizer", "activations", "temporary", "peak"):
        assert f"\n  {part}" in shown
    assert "GFLOP per token; an epoch takes" in shown


def test_a_plan_says_what_fits_and_which_changes_make_it_fit(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model.adapter.r=4", "--data.batch_size=64", "--gpu_memory=48GiB") == 0
    shown = capsys.readouterr().out
    assert "fits into 48.0 GiB" in shown
    assert "changes" not in shown
    assert "(GPU memory / 3): 17.2 B" in shown
    assert plan("--model.adapter.r=4", "--data.batch_size=64", "--gpu_memory=40MiB") == 0
    shown = capsys.readouterr().out
    assert "does not fit into 0.0 GiB" in shown
    assert "data.batch_size: 1 and 64 times" in shown
    assert shown.count(", fits") == 1


@pytest.mark.slow
def test_a_larger_batch_takes_more_and_checkpointing_less(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    small, large, recomputed = (
        (plan("--model.adapter.r=4", f"--data.batch_size={rows}", f"--model.gradient_checkpointing={on}"), peak(capsys))
        for rows, on in ((8, "false"), (64, "false"), (64, "true"))
    )
    assert small[1] < recomputed[1] < large[1]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--gpu_memory=much", "--gpu_memory: 'much' is not an amount of memory"),
        ("--num_gpus=0", "--num_gpus: must be at least 1"),
        ("--mfu=40", "--mfu: must be above 0 and at most 1"),
        ("--data.sources={}", "data.sources: no source given"),
    ],
)
def test_an_invalid_option_is_named(option: str, said: str, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model.adapter.r=4", option) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.adapter.r=4"], "reference model: adapter_off, a second forward pass in each step"),
        pytest.param(
            [], "reference model: precomputed, one forward pass over the data; 0.00 MiB", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--model.preference.loss=simpo"], "reference model: none, the loss is simpo", marks=pytest.mark.slow
        ),
    ],
)
def test_a_plan_of_preference_training_counts_pairs_and_names_the_reference(
    options: list[str], said: str, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(7)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    source = f"--data.sources={{toy: {{path: {tmp_path / 'pairs.json'}, format: preference}}}}"
    assert plan("--task=dpo", source, *options) == 0
    shown = capsys.readouterr().out
    assert "data: 7 pairs in " in shown
    assert said in shown


@pytest.mark.slow
def test_prompt_sharing_saves_time(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps([{"prompt": "q" * 20, "chosen": "good", "rejected": "bad"}] * 3))
    source = f"--data.sources={{toy: {{path: {tmp_path / 'pairs.json'}, format: preference}}}}"
    assert plan("--task=dpo", source, "--model.adapter.r=4") == 0
    shown = capsys.readouterr().out
    share = int(shown.split("prompt sharing: ")[1].split("%")[0])
    assert 20 < share < 50
    assert plan("--task=dpo", source, "--model.adapter.r=4", "--model.preference.share_prompts=false") == 0
    assert "prompt sharing: 0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.quantization.bits=4", "--model.adapter.init=pissa"], "PEFT cannot read in 4 bits"),
        (
            ["--model.quantization.bits=8", "--model.adapter.r=4", "--trainer.strategy=fsdp2"],
            "model.quantization.bits: 8 cannot be combined with trainer.strategy fsdp2",
        ),
        (
            ["--model.quantization.bits=8", "--model.adapter.r=4", "--trainer.strategy=deepspeed_stage_3_offload"],
            "model.quantization.bits: 8 cannot be combined with trainer.strategy deepspeed_stage_3_offload",
        ),
        (["--trainer.strategy=fsdp"], "trainer.strategy: 'fsdp' (FSDP1) is not supported"),
        (
            [
                "--trainer.strategy={class_path: sft_lightning.strategies.FSDP2, init_args: {replicas: 3}}",
                "--num_gpus=8",
            ],
            "trainer.strategy.replicas: 3 does not divide the number of processes, which is 8",
        ),
        (
            ["--model.optimizer=bitsandbytes.optim.AdamW8bit", "--trainer.strategy=fsdp2"],
            "model.optimizer: bitsandbytes' AdamW8bit cannot be combined with trainer.strategy fsdp2",
        ),
    ],
)
def test_a_configuration_that_fit_refuses_is_refused(
    options: list[str], said: str, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_float16_is_refused_only_when_planning_for_this_cpu(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(refusals, "cpu_has_float16", lambda: False)
    float16 = ("--model.adapter.r=4", "--trainer.strategy=deepspeed_stage_2", "--trainer.precision=16-mixed")
    assert plan(*float16) == 0
    assert plan(*float16, "--trainer.accelerator=cpu", "--num_gpus=2") == 0
    assert plan(*float16, "--trainer.accelerator=cpu") == 2
    assert "trainer.precision: 16-mixed is not supported by DeepSpeed on this CPU" in capsys.readouterr().err


def test_a_strategy_by_its_class_is_planned(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = "{class_path: sft_lightning.strategies.FSDP2, init_args: {offload: true}}"
    assert plan("--model.adapter.r=4", f"--trainer.strategy={strategy}", "--num_gpus=2") == 0
    assert "FSDP2, offloaded" in capsys.readouterr().out


def test_an_amount_of_memory_is_read_with_its_unit() -> None:
    assert parse_memory("48GiB") == parse_memory("48") == 48 * 2**30
    assert parse_memory("80 GB") == 80e9
    for wrong in ("1.2.3GB", "0GiB", "x"):
        with pytest.raises(UserError, match="--gpu_memory"):
            parse_memory(wrong)
