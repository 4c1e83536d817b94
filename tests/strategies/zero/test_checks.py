"""Configurations that ZeRO cannot run with on these processes or this machine are refused."""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_lightning.__main__ import main
from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.spec import ModelSpec
from sft_lightning.strategies import refusals
from sft_lightning.strategies.refusals import RunFacts
from sft_lightning.strategies.zero import checks as zero_checks
from sft_lightning.strategies.zero.checks import (
    check_build_locks,
    check_config,
    check_nvme,
    check_nvme_weight_type,
)
from sft_lightning.strategies.zero.strategy import DeepSpeedZeRO
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.spec import TrainingSpec

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")
PLUS_PLUS = {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True, "zero_hpz_partition_size": 8}


FULL = ModelSpec(model_name_or_path="no/such/model")


def run_of(num_processes: int, *, on_gpu: bool) -> RunFacts:
    return RunFacts(model=FULL, num_processes=num_processes, on_gpu=on_gpu)


def of_zero(**zero: Any) -> dict[str, Any]:
    return {"zero_optimization": zero}


def on_nvme(folder: Path | str | None, **changes: Any) -> dict[str, Any]:
    return of_zero(stage=3, offload_param={"device": "nvme", "nvme_path": folder and str(folder)}, **changes)


def test_zero_plus_plus_is_accepted_on_gpus_of_full_nodes() -> None:
    check_config(of_zero(**PLUS_PLUS), run_of(16, on_gpu=True), source="ds.json")


def test_a_secondary_partition_needs_no_gpu() -> None:
    check_config(of_zero(stage=3, zero_hpz_partition_size=2), run_of(4, on_gpu=False), source="ds.json")


@pytest.mark.parametrize(
    ("config", "num_processes", "on_gpu", "said"),
    [
        (of_zero(**{**PLUS_PLUS, "stage": 2}), 16, True, "zero_quantized_weights requires stage 3 .got 2."),
        (of_zero(stage=2, zero_hpz_partition_size=2), 2, False, "zero_hpz_partition_size requires stage 3"),
        (of_zero(stage=2, offload_param={"device": "cpu"}), 2, True, "offload_param requires stage 3"),
        (
            of_zero(stage=0, offload_optimizer={"device": "cpu"}),
            2,
            True,
            "requires stage 1 or above .got 0.",
        ),
        (
            of_zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}),
            *(2, True, "offload_optimizer to nvme requires stage 3 .got 2."),
        ),
        (of_zero(**PLUS_PLUS), 12, True, "zero_hpz_partition_size 8 does not divide the 12 processes"),
        (
            of_zero(**PLUS_PLUS),
            16,
            False,
            "_weights requires CUDA, but this run is on the CPU; remove",
        ),
        (of_zero(stage=3, zero_quantized_nontrainable_weights=True), 2, False, "nontrainable_weights requires CUDA"),
        ({**of_zero(stage=3), "aio": {"use_gds": True}}, 2, False, "aio.use_gds requires CUDA"),
        (of_zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5}), 2, False, "ratio below 1 requires CUDA"),
        (
            of_zero(stage=3, offload_optimizer={"device": "cpu", "super_offload": True}),
            2,
            False,
            "super_offload requires",
        ),
        (of_zero(stage=2, cpu_offload=True), 2, True, '"offload_optimizer": {"device": "cpu"}'),
        (on_nvme(None), 2, True, "offload_param.nvme_path is missing; name a folder"),
        (
            of_zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/nvme", "pipeline_write": True}),
            *(2, True, "buffer_count must be at least 8 .got 4."),
        ),
    ],
)
def test_a_key_that_cannot_take_effect_is_refused_by_name(
    config: dict[str, Any], num_processes: int, on_gpu: bool, said: str
) -> None:
    with pytest.raises(UserError, match=rf"ds\.json: .*{said}"):
        check_config(config, run_of(num_processes, on_gpu=on_gpu), source="ds.json")


@pytest.mark.parametrize(
    ("dtype", "bits", "precision", "said"),
    [
        ("bfloat16", None, "32-true", r"model\.dtype is bfloat16; set trainer\.precision: bf16-true or"),
        ("bfloat16", 4, "bf16-true", r"model\.quantization\.bits is 4; offload them to cpu"),
        ("float32", None, "32-true", None),
        ("bfloat16", None, "bf16-true", None),
    ],
)
def test_weights_on_nvme_must_have_the_type_that_is_trained_in(
    dtype: Any, bits: Any, precision: str, said: str | None
) -> None:
    quantization = None if bits is None else QuantizationConfig(bits=bits)
    model = ModelSpec(model_name_or_path="none", dtype=dtype, quantization=quantization, adapter=AdapterConfig())
    run = RunFacts(model=model, precision=precision)
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        check_nvme_weight_type(on_nvme("/nvme"), run, source="ds.json")
    check_nvme_weight_type(of_zero(stage=3), run, source="ds.json")


@needs_deepspeed
@pytest.mark.parametrize("there", [True, False])
def test_nvme_without_libaio_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: there)
    with nullcontext() if there else pytest.raises(UserError, match=r"requires libaio.*or offload to cpu"):
        check_nvme(on_nvme(tmp_path), "ds.json")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_or_cannot_be_written_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"ds\.json: nvme_path '.*none' is not a folder; create it"):
        check_nvme(on_nvme(tmp_path / "none"), "ds.json")
    with pytest.raises(UserError, match=r"nvme_path '/proc' cannot be written with direct access \(.*\); name a"):
        check_nvme(on_nvme("/proc"), "ds.json")

    monkeypatch.setattr(zero_checks, "_DIRECT", os.O_DIRECTORY)  # a flag that every file refuses
    with pytest.raises(UserError, match=r"cannot be written with direct access"):
        check_nvme(on_nvme(tmp_path), "ds.json")


@needs_deepspeed
def test_float16_is_refused_with_exit_status_2_before_any_weight_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, alpaca_file: Path
) -> None:
    monkeypatch.setattr(refusals, "cpu_has_float16", lambda: False)
    options = {
        "trainer.strategy": "deepspeed_stage_2", "trainer.precision": "16-mixed", "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path, "model.model_name_or_path": "no/such/model",
        "model.tokenizer_name_or_path": "no/such/tokenizer", "data.template": "alpaca",
        "data.sources": f"{{toy: {{path: {alpaca_file}, format: alpaca}}}}",
    }  # fmt: skip
    assert main(["fit", *(f"--{key}={value}" for key, value in options.items())]) == 2
    said = capsys.readouterr().err
    assert "trainer.precision: 16-mixed is not supported by DeepSpeed on this CPU" in said
    assert "Traceback" not in said


@needs_deepspeed
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stage": 3, "quantized_weights": True}, "zero_quantized_weights requires CUDA"),
        ({"config": on_nvme(None)}, "offload_param.nvme_path is missing"),
        ({"stage": 3, "quantized_gradients": True}, "zero_quantized_gradients requires CUDA"),
        (
            {"stage": 3, "offload_optimizer": "nvme", "nvme_path": "/no/such/folder"},
            "such/folder' is not a folder",
        ),
    ],
)
def test_a_strategy_is_refused_before_anything_is_loaded(options: dict[str, Any], said: str) -> None:
    strategy = DeepSpeedZeRO(**options)
    strategy.parallel_devices = [torch.device("cpu")]
    adapter = AdapterConfig(target_modules="all-linear")
    module = CausalLMModule(TrainingSpec(model_name_or_path="no/such/model", adapter=adapter))
    with pytest.raises(UserError, match=rf"trainer\.strategy: .*{said}"):
        strategy.connect(module)


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock that was made an hour ago."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "deepspeed_shm_comm" / "lock"
    file.parent.mkdir()
    file.touch()
    an_hour_ago = file.stat().st_mtime - 3600
    os.utime(file, (an_hour_ago, an_hour_ago))
    return file


def test_a_lock_that_a_killed_build_left_is_named(lock: Path) -> None:
    with pytest.raises(UserError, match=r"deepspeed_shm_comm/lock' was left by a run that was killed .* delete"):
        check_build_locks()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="lists open files through /proc")
def test_a_lock_that_a_build_holds_open_is_waited_for(lock: Path) -> None:
    with lock.open():
        check_build_locks()


def test_a_new_lock_is_waited_for(lock: Path) -> None:
    os.utime(lock)
    check_build_locks()


@needs_deepspeed
def test_a_run_does_not_wait_for_the_lock_of_a_killed_build(
    lock: Path, fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *fit_args, "--trainer.accelerator=cpu", "--trainer.strategy=deepspeed_stage_2"]) == 2
    assert f"{lock}" in capsys.readouterr().err
