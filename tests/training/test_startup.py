"""Covers sft_lightning.models.isolation and sft_lightning.training.module: what `data.packing: auto` decides."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from sft_lightning.cli.commands.run import fit
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.plan.epoch_plan import Layout
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError
from sft_lightning.models import isolation
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.spec import TrainingSpec

Make = Callable[..., tuple[Trainer, CausalLMModule, SFTDataModule]]


@pytest.fixture
def make(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> Make:
    def build(**changes: Any) -> tuple[Trainer, CausalLMModule, SFTDataModule]:
        torch.manual_seed(0)
        data = SFTDataModule(
            DataSpec(
                sources={"toy": SourceConfig(path=str(alpaca_file))},
                template="alpaca",
                max_length=200,
                tokenizer_name_or_path=str(model_dir),
                packing=changes.pop("packing", "auto"),
                store_dir=str(tmp_path / "stores"),
            )
        )
        options: dict[str, Any] = {"model_name_or_path": str(model_dir), "dtype": "float32"}
        module = CausalLMModule(
            TrainingSpec(
                optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-2),
                **{**options, **{key: changes.pop(key) for key in list(changes) if not key.startswith("trainer_")}},
            )
        )
        trainer = Trainer(
            **{
                "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
                "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path,
                **{key.removeprefix("trainer_"): value for key, value in changes.items()},
            }
        )  # fmt: skip
        return trainer, module, data

    return build


@pytest.fixture
def leaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model see a row as one document, whatever the row says."""
    logits = isolation._logits
    monkeypatch.setattr(isolation, "_logits", lambda model, ids, lengths: logits(model, ids, [sum(lengths)]))


def test_auto_packs_if_documents_do_not_see_each_other(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer, module, data = make()
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    assert module.layout == data.layout == Layout(packing="best_fit")
    assert data.packs
    assert trainer.global_step == data.report.optimizer_steps < 24
    assert "packing: best_fit (auto" in caplog.text


@pytest.mark.usefixtures("leaking")
def test_auto_gives_each_example_a_row_if_documents_see_each_other(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, module, data = make()
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    assert not data.packs
    assert data.num_optimizer_steps == trainer.global_step == 24
    assert (data.report.rows, data.report.optimizer_steps) == (24, 24)
    assert "packing: none (auto: packed documents see each other in this model" in caplog.text


@pytest.mark.usefixtures("leaking")
def test_the_schedule_ends_with_the_rows_that_are_trained(make: Make) -> None:
    trainer, module, data = make()
    trainer.fit(module, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.usefixtures("leaking")
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_a_leaking_model_stops_a_run_that_asks_for_packing(packing: str, make: Make) -> None:
    trainer, module, data = make(packing=packing)
    with pytest.raises(UserError, match=r"packed documents see each other.*data.packing: none"):
        trainer.fit(module, data)


@pytest.mark.usefixtures("leaking")
def test_an_evaluation_packs_only_if_documents_do_not_see_each_other(make: Make, alpaca_file: Path) -> None:
    for packing, proven in (("auto", True), ("none", True), ("best_fit", False)):
        trainer, module, data = make(packing=packing)
        data.reader._sources["val"] = {"toy": SourceConfig(path=str(alpaca_file))}
        if proven:
            trainer.validate(module, data, verbose=False)
        else:
            with pytest.raises(UserError, match="packed documents see each other"):
                trainer.validate(module, data, verbose=False)


def test_without_a_model_rows_are_planned_as_best_fit(make: Make) -> None:
    _, _, data = make()
    data.setup("fit")
    assert data.layout == Layout(packing="best_fit")
    assert data.report.rows < 24


def test_nothing_is_planned_before_the_model_has_decided(make: Make) -> None:
    trainer, module, data = make()
    data.trainer = trainer
    trainer.strategy._lightning_module = module
    data.setup("fit")
    assert data.report.rows == 0
    with pytest.raises(RuntimeError, match="decided once the model is loaded"):
        data.plan(0)
    module.layout = Layout(packing="none")
    assert data.plan(0).num_rows == data.report.rows == 24


@pytest.mark.usefixtures("leaking")
def test_a_run_that_had_packed_is_not_continued_on_a_model_that_leaks(make: Make, tmp_path: Path) -> None:
    trainer, module, data = make(packing="none")
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "packed.ckpt")
    checkpoint = torch.load(tmp_path / "packed.ckpt", weights_only=False)
    checkpoint["SFTDataModule"]["packing"] = "best_fit"
    torch.save(checkpoint, tmp_path / "packed.ckpt")
    trainer, module, data = make(trainer_max_epochs=2)
    with pytest.raises(UserError, match="different data settings: packing: best_fit → none"):
        trainer.fit(module, data, ckpt_path=str(tmp_path / "packed.ckpt"), weights_only=False)


@pytest.mark.usefixtures("leaking")
def test_the_report_of_a_run_is_of_the_packing_that_it_used(fit_args: list[str], tmp_path: Path) -> None:
    fit([*fit_args, "--data.packing=auto", "--trainer.max_steps=2"])
    assert json.loads((tmp_path / "run" / "data_report.json").read_text())["rows"] == 24


def test_a_continued_run_keeps_what_was_decided(fit_args: list[str], tmp_path: Path, leaking: None) -> None:
    args = [*fit_args, "--data.packing=auto"]
    fit([*args, "--trainer.max_steps=2"])
    fit([*args, "--trainer.max_steps=3", "--ckpt_path=last"])
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 3
    assert checkpoint["SFTDataModule"]["packing"] == "none"


def test_a_run_whose_losses_are_not_finite_stops_and_names_the_records(make: Make) -> None:
    trainer, module, data = make(max_nonfinite_losses=3, packing="none", trainer_log_every_n_steps=4)
    break_weights(module)
    with pytest.raises(UserError, match=r"in 3 optimizer steps in a row; the last, step 3, trained on .*"):
        trainer.fit(module, data)
    assert trainer.global_step == 4  # looked at where the log is written
    (place,) = data.rows.describe(3)
    plan = data.plan(0)
    index = int(plan.row(2)[0, 0])
    assert place.endswith(f"alpaca.json, record {index} (toy)")


def test_losses_after_the_last_logging_interval_are_looked_at_too(make: Make) -> None:
    trainer, module, data = make(packing="none", trainer_log_every_n_steps=100)
    break_weights(module)
    with pytest.raises(UserError, match="the last, step 5, trained on"):
        trainer.fit(module, data)


def test_a_run_without_a_limit_goes_on(make: Make) -> None:
    trainer, module, data = make(max_nonfinite_losses=None, packing="none")
    break_weights(module)
    trainer.fit(module, data)
    assert trainer.global_step == 24


def test_rows_of_a_later_epoch_are_found(make: Make) -> None:
    trainer, module, data = make(packing="none", trainer_max_epochs=2, trainer_accumulate_grad_batches=5)
    trainer.fit(module, data)
    assert trainer.global_step == 10
    rows = [data.plan(1).row(row)[0, 0] for row in range(5)]
    assert [place.rsplit(" ", 2)[-2] for place in data.rows.describe(6)] == [str(int(row)) for row in rows]
    assert data.rows.describe(6, limit=2)[2] == "and 3 more records"
    assert len(data.rows.describe(10)) == 4


@pytest.mark.slow
def test_compiled_layers_train_to_the_same_weights(make: Make) -> None:
    trained = []
    for compiled in (False, True):
        trainer, module, data = make(torch_compile=compiled, trainer_max_steps=3)
        trainer.fit(module, data)
        trained.append({name: p.detach() for name, p in module.named_parameters()})
    assert trained[0].keys() == trained[1].keys()
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, rtol=0, atol=1e-5)


def break_weights(module: CausalLMModule) -> None:
    """Make every loss NaN once the model is loaded."""
    configure = module.configure_model

    def configure_and_break() -> None:
        configure()
        with torch.no_grad():
            module.base_model.get_input_embeddings().weight.fill_(float("nan"))

    module.configure_model = configure_and_break  # type: ignore[method-assign]
