from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from sft_lightning.cli.commands.run import fit
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.plan.epoch_plan import Layout, PackingSetting
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.errors import UserError
from sft_lightning.models.checkpointing import recomputable_layers
from sft_lightning.models.compiling import compile_layers
from sft_lightning.training import forward, startup
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.startup import datamodule_of, layout_before_loading

MakeRun = Callable[..., tuple[Trainer, CausalLMModule, SFTDataModule]]


@pytest.fixture
def leaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the probe of isolation read each row as one document, as a model without packed attention does."""
    make = forward.inputs_of_rows

    def joined(device: torch.device) -> Any:
        inputs_of = make(device)
        return lambda rows: inputs_of([[torch.cat(list(row))] for row in rows])

    monkeypatch.setattr(startup, "inputs_of_rows", joined)


@pytest.mark.parametrize(
    ("packing", "stage", "known", "expected"),
    [
        ("best_fit", "fit", None, Layout(packing="best_fit")),
        ("none", "validate", Layout(packing="best_fit"), Layout(packing="none")),
        ("auto", "fit", Layout(packing="none"), None),
        ("auto", "validate", Layout(packing="best_fit"), Layout(packing="best_fit")),
        ("auto", "test", None, Layout(packing="none")),
    ],
)
def test_the_layout_is_known_before_loading_unless_the_model_decides(
    packing: PackingSetting, stage: str, known: Layout | None, expected: Layout | None
) -> None:
    assert layout_before_loading(packing, stage, known) == expected


def test_a_trainer_without_our_data_module_is_refused() -> None:
    with pytest.raises(UserError, match=r"the trainer needs an SFTDataModule .*got NoneType"):
        datamodule_of(SimpleNamespace())


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_the_kernel_of_the_attention_is_named_once_before_training(
    packing: str, make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, module, data = make_run(packing=packing, trainer_max_steps=1)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    assert [line for line in caplog.messages if line.startswith("attention:")] == [
        "attention: one call per document (variable-length kernels need a CUDA device, this is cpu)"
    ]
    assert any("packing isolation" in line for line in caplog.messages) is (packing == "best_fit")


def test_isolation_is_checked_in_the_precision_that_trains(make_run: MakeRun) -> None:
    seen = set()
    trainer, module, data = make_run(packing="best_fit", trainer_max_steps=1, trainer_precision="bf16-mixed")
    verify = startup.verify_isolation

    def noting(model: Any, *rest: Any, **options: Any) -> float:
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return verify(model, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "verify_isolation", noting)
        trainer.fit(module, data)
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (True, "every decoder layer (as set)"),
        (False, "off (as set)"),
        ("selective", "selective, keeping matrix products and attention (as set)"),
        ("auto", "off (auto: at most"),
    ],
)
def test_gradient_checkpointing_is_set_up_as_decided(
    setting: Any, words: str, make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, module, data = make_run(gradient_checkpointing=setting, trainer_max_steps=1)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    assert any(layer.gradient_checkpointing for layer in recomputable_layers(module.base_model)) is (words[:3] != "off")
    assert f"gradient checkpointing: {words}" in caplog.text


def test_auto_packs_if_documents_do_not_see_each_other(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    trainer, module, data = make_run()
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    assert module.layout == data.layout == Layout(packing="best_fit")
    assert data.packs
    assert trainer.global_step == data.report.optimizer_steps < 24
    assert "packing: best_fit (auto" in caplog.text


@pytest.mark.usefixtures("leaking")
def test_auto_gives_each_example_its_own_row_if_documents_see_each_other(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, module, data = make_run()
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    assert not data.packs
    assert data.num_optimizer_steps == trainer.global_step == 24
    assert (data.report.rows, data.report.optimizer_steps) == (24, 24)
    assert "packing: none (auto: packed documents see each other in this model" in caplog.text


@pytest.mark.usefixtures("leaking")
def test_the_schedule_ends_with_the_last_row_of_the_decided_packing(make_run: MakeRun) -> None:
    trainer, module, data = make_run()
    trainer.fit(module, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.usefixtures("leaking")
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_a_model_that_leaks_stops_a_run_that_asks_for_packing(packing: str, make_run: MakeRun) -> None:
    trainer, module, data = make_run(packing=packing)
    with pytest.raises(UserError, match=r"packed documents see each other.*data.packing: none"):
        trainer.fit(module, data)


@pytest.mark.usefixtures("leaking")
def test_an_evaluation_packs_only_if_documents_do_not_see_each_other(make_run: MakeRun, alpaca_file: Path) -> None:
    for packing, proven in (("auto", True), ("none", True), ("best_fit", False)):
        trainer, module, data = make_run(packing=packing)
        data.reader._sources["val"] = {"toy": SourceConfig(path=str(alpaca_file))}
        if proven:
            trainer.validate(module, data, verbose=False)
        else:
            with pytest.raises(UserError, match="packed documents see each other"):
                trainer.validate(module, data, verbose=False)


def test_an_evaluation_before_training_decides_nothing_about_training(make_run: MakeRun, alpaca_file: Path) -> None:
    trainer, module, data = make_run()
    data.reader._sources["val"] = {"toy": SourceConfig(path=str(alpaca_file))}
    trainer.validate(module, data, verbose=False)
    assert module.layout == Layout(packing="none")
    trainer.fit(module, data)
    assert module.layout == Layout(packing="best_fit")
    assert data.report.rows == data.plan(0).num_rows < 24


def test_without_a_model_rows_are_planned_as_best_fit(make_run: MakeRun) -> None:
    _, _, data = make_run()
    data.setup("fit")
    assert data.layout == Layout(packing="best_fit")
    assert data.report.rows < 24


def test_nothing_is_planned_before_the_model_has_decided(make_run: MakeRun) -> None:
    trainer, module, data = make_run()
    data.trainer = trainer
    trainer.strategy._lightning_module = module
    data.setup("fit")
    assert data.report.rows == 0
    with pytest.raises(RuntimeError, match="decided when the model is loaded"):
        data.plan(0)
    module.layout = Layout(packing="none")
    assert data.plan(0).num_rows == data.report.rows == 24


@pytest.mark.usefixtures("leaking")
def test_a_run_that_had_packed_is_not_continued_on_a_model_that_leaks(make_run: MakeRun, tmp_path: Path) -> None:
    trainer, module, data = make_run(packing="none")
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "packed.ckpt")
    checkpoint = torch.load(tmp_path / "packed.ckpt", weights_only=False)
    checkpoint["SFTDataModule"]["packing"] = "best_fit"
    torch.save(checkpoint, tmp_path / "packed.ckpt")
    trainer, module, data = make_run(trainer_max_epochs=2)
    with pytest.raises(UserError, match="different data settings: packing: best_fit → none"):
        trainer.fit(module, data, ckpt_path=str(tmp_path / "packed.ckpt"), weights_only=False)


@pytest.mark.usefixtures("leaking")
def test_the_data_report_counts_the_rows_of_the_decided_packing(fit_args: list[str], tmp_path: Path) -> None:
    fit([*fit_args, "--data.packing=auto", "--trainer.max_steps=2"])
    assert json.loads((tmp_path / "run" / "data_report.json").read_text())["rows"] == 24


def test_a_continued_run_keeps_the_decision(fit_args: list[str], tmp_path: Path, leaking: None) -> None:
    args = [*fit_args, "--data.packing=auto"]
    fit([*args, "--trainer.max_steps=2"])
    fit([*args, "--trainer.max_steps=3", "--ckpt_path=last"])
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 3
    assert checkpoint["SFTDataModule"]["packing"] == "none"


def test_layers_are_compiled_as_decided_for_the_tokens_of_the_whole_run(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(startup, "obstacle_to_compiling", lambda *args, **options: None)
    monkeypatch.setattr(startup, "compile_layers", lambda model, log, recomputation: compiled.append(recomputation))
    monkeypatch.setattr("sft_lightning.models.compile_decision.SECONDS_PER_GRAPH", 0.0)
    trainer, module, data = make_run(trainer_max_steps=1, gradient_checkpointing="selective")
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    assert compiled == ["selective"]
    assert data.layout.same_shape
    assert {batch["input_ids"].shape for batch in data.train_dataloader()} == {(1, 200)}
    assert "torch_compile: on (auto: predicted to save 0 s of this run" in caplog.text


@pytest.mark.parametrize("how", [False, pytest.param("selective", marks=pytest.mark.slow)])
def test_a_packed_run_compiles_in_its_first_micro_batch_and_never_again(
    how: Any, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(startup, "compile_layers", functools.partial(compile_layers, backend="eager"))
    trainer, module, data = make_run(
        packing="best_fit", torch_compile=True, gradient_checkpointing=how, trainer_max_epochs=2
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    lines = [line for line in caplog.messages if line.startswith("torch_compile:")]
    assert lines[0] == "torch_compile: on (as set)"
    assert [line.partition(" (")[0] for line in lines[1:]] == ["torch_compile: graphs of 2 decoder layers: 1"]
    assert trainer.global_step > 3


@pytest.mark.slow
def test_compiled_layers_train_to_the_same_weights(make_run: MakeRun) -> None:
    trained = []
    for compiled in (False, True):
        trainer, module, data = make_run(torch_compile=compiled, trainer_max_steps=3)
        trainer.fit(module, data)
        trained.append({name: p.detach() for name, p in module.named_parameters()})
    assert trained[0].keys() == trained[1].keys()
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, rtol=0, atol=1e-5)
