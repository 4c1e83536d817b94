from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from sft_lightning.__main__ import main
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.spec import TrainingSpec

Grads = dict[str, torch.Tensor]


class KeepGradients(Callback):
    """The gradient that each optimizer step sees."""

    def __init__(self) -> None:
        self.steps: list[Grads] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        named = pl_module.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None})


@pytest.fixture
def train(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> Callable[..., tuple[list[Grads], CausalLMModule]]:
    """Train one epoch at learning rate 0, and return every step's gradient."""

    def run(
        *, batch_size: int = 1, accumulate: int = 4, data: dict[str, Any] | None = None, **model: Any
    ) -> tuple[list[Grads], CausalLMModule]:
        torch.manual_seed(0)
        datamodule = SFTDataModule(
            DataSpec(
                sources={"toy": SourceConfig(path=str(alpaca_file))},
                **{
                    "template": "alpaca",
                    "max_length": 200,
                    "tokenizer_name_or_path": str(model_dir),
                    "batch_size": batch_size,
                    **(data or {}),
                },
            )
        )
        options: dict[str, Any] = {
            "model_name_or_path": str(model_dir),
            "dtype": "float32",
            "adapter": AdapterConfig(r=4, dropout=0.0),
        }
        optimizer = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0)}
        module = CausalLMModule(TrainingSpec(**{**optimizer, **options, **model}))
        keeper = KeepGradients()
        trainer = Trainer(
            max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[keeper], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, datamodule)
        return keeper.steps, module

    return run


def largest_difference(first: list[Grads], second: list[Grads]) -> float:
    """Largest difference of any gradient, relative to the largest gradient."""
    assert len(first) == len(second) > 1
    scale = max(float(g.abs().max()) for step in first for g in step.values())
    return (
        max(
            float((one[name] - other[name]).abs().max())
            for one, other in zip(first, second, strict=True)
            for name in one
        )
        / scale
    )


Train = Callable[..., tuple[list[Grads], CausalLMModule]]
MakeRun = Callable[..., tuple[Trainer, CausalLMModule, SFTDataModule]]


@pytest.mark.end_to_end
def test_the_packed_loss_is_the_token_weighted_loss_of_the_examples_alone(train: Train) -> None:
    means = []
    for packing in ("best_fit", "none"):
        _, module = train(batch_size=1, accumulate=100, data={"packing": packing})
        loader = module.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        with torch.no_grad():
            sums = [module(batch) for batch in loader]
        assert (len(sums) == 24) is (packing == "none")
        means.append(float(sum(s.loss for s in sums) / sum(s.weight for s in sums)))
    assert abs(means[0] - means[1]) <= 1e-6


def test_the_gradient_is_that_of_the_mean_loss_per_supervised_token(train: Train) -> None:
    steps, module = train(batch_size=4, accumulate=1, adapter=None)
    batch = next(iter(module.trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]
    module.zero_grad()
    out = module.language_model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        document_lengths=batch["document_lengths"],
    )
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    plain.backward()
    expected = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert largest_difference([steps[0]] * 2, [expected] * 2) <= 1e-6


@pytest.mark.parametrize(
    "model",
    [{}, {"adapter": None}, {"quantization": QuantizationConfig()}, {"quantization": QuantizationConfig(bits=8)}],
    ids=["lora", "full", "qlora", "int8"],
)
def test_gradient_checkpointing_changes_no_gradient(model: dict[str, Any], train: Train) -> None:
    plain, _ = train(**model, gradient_checkpointing=False)
    recomputed, module = train(**model, gradient_checkpointing=True)
    assert module.base_model.is_gradient_checkpointing
    assert largest_difference(plain, recomputed) <= 1e-6


@pytest.mark.end_to_end
def test_a_quantized_base_trains_only_its_adapter(train: Train) -> None:
    steps, module = train(quantization=QuantizationConfig())
    assert all(".lora_" in name for name in steps[0])
    assert any(type(m).__name__ == "Linear4bit" for m in module.modules())


def test_a_model_from_a_config_takes_the_tokenizers_vocabulary(train: Train, model_dir: Path) -> None:
    tiny = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    _, module = train(adapter=None, from_config=tiny, model_name_or_path=None)
    assert module.base_model.config.vocab_size == len(module.trainer.datamodule.tokenizer)  # type: ignore[attr-defined]


def test_a_micro_batch_waits_for_no_device(
    fit_args: list[str], waits: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, Any] = {}
    log = CausalLMModule.log

    def note(self: CausalLMModule, name: str, value: Any, **options: Any) -> None:
        logged[name] = value
        log(self, name, value, **options)

    monkeypatch.setattr(CausalLMModule, "log", note)
    args = [arg for arg in fit_args if "log_every" not in arg]
    assert main(["fit", *args, "--trainer.log_every_n_steps=1000", "--trainer.accumulate_grad_batches=2"]) == 0
    assert {"train/loss", "train/grad_norm", "train/lr", "throughput/tokens_per_second"} <= logged.keys()
    assert all(isinstance(value, torch.Tensor) for value in logged.values())
    assert len(waits) > 4
    assert not any(waits[2::2])  # the first step proves the head, and is logged
    # Python numbers are logged as tensors in CPU memory at the end of a step.
    assert {name for each in waits[3::2] for name in each} == {"lift_fresh"}


@pytest.mark.parametrize(
    "options",
    [
        {"neftune_alpha": 5.0, "trainer_precision": "bf16-mixed"},
        {"adapter": AdapterConfig(r=4), "gradient_checkpointing": True},
        {"head": None},
    ],
    ids=["noise", "recomputed", "own logits"],
)
def test_no_way_to_compute_the_loss_waits_for_a_device(
    options: dict[str, Any], make_run: MakeRun, waits: list[list[str]]
) -> None:
    given = {key: value for key, value in options.items() if key != "head"}
    trainer, module, data = make_run(
        packing="best_fit",
        trainer_max_steps=2,
        trainer_accumulate_grad_batches=3,
        trainer_log_every_n_steps=1000,
        **given,
    )
    if "head" in options:
        module.__dict__["head"] = None
    trainer.fit(module, data)
    assert len(waits) == 6
    assert waits[3:5] == [[], []]
    assert set(waits[5]) == {"lift_fresh"}  # the learning rate, logged


def test_a_run_whose_losses_are_not_finite_stops_and_names_the_records(make_run: MakeRun) -> None:
    trainer, module, data = make_run(max_nonfinite_losses=3, packing="none", trainer_log_every_n_steps=4)
    break_weights(module)
    with pytest.raises(UserError, match=r"in 3 optimizer steps in a row; the last one, step 3, trained on .*"):
        trainer.fit(module, data)
    assert trainer.global_step == 4  # checked at the logging interval
    (place,) = data.rows.describe(3)
    plan = data.plan(0)
    index = int(plan.row(2)[0, 0])
    assert place.endswith(f"alpaca.json, record {index} (toy)")


def test_losses_after_the_last_logging_interval_are_checked_too(make_run: MakeRun) -> None:
    trainer, module, data = make_run(packing="none", trainer_log_every_n_steps=100)
    break_weights(module)
    with pytest.raises(UserError, match="the last one, step 5, trained on"):
        trainer.fit(module, data)


def test_a_run_without_a_limit_of_nonfinite_losses_continues(make_run: MakeRun) -> None:
    trainer, module, data = make_run(max_nonfinite_losses=None, packing="none")
    break_weights(module)
    trainer.fit(module, data)
    assert trainer.global_step == 24


def test_the_records_of_a_later_epochs_step_are_found(make_run: MakeRun) -> None:
    trainer, module, data = make_run(packing="none", trainer_max_epochs=2, trainer_accumulate_grad_batches=5)
    trainer.fit(module, data)
    assert trainer.global_step == 10
    rows = [data.plan(1).row(row)[0, 0] for row in range(5)]
    assert [place.rsplit(" ", 2)[-2] for place in data.rows.describe(6)] == [str(int(row)) for row in rows]
    assert data.rows.describe(6, limit=2)[2] == "and 3 more records"
    assert len(data.rows.describe(10)) == 4


def break_weights(module: CausalLMModule) -> None:
    """Make every loss NaN once the model is loaded."""
    configure = module.configure_model

    def configure_and_break() -> None:
        configure()
        with torch.no_grad():
            module.base_model.get_input_embeddings().weight.fill_(float("nan"))

    module.configure_model = configure_and_break  # type: ignore[method-assign]
