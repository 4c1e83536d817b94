from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.kind import Pairs, reference_folder
from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.optim import LRScheduleConfig
from sft_lightning.training.preference import reference_log_probs
from sft_lightning.training.preference.forward import answer_log_probs
from sft_lightning.training.preference.losses import PreferenceConfig
from sft_lightning.training.preference.objective import PreferenceObjective
from sft_lightning.training.preference.reference_log_probs import ReferenceLogProbs
from sft_lightning.training.spec import PreferenceSpec

PAIRS = [
    {"prompt": f"{i} and {i}?", "chosen": f"{i} and {i} is {2 * i}" + "." * (i % 5), "rejected": "No" + "!" * (i % 3)}
    for i in range(20)
]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "modules_to_save": {"adapter": AdapterConfig(r=4, dropout=0.1, modules_to_save=["lm_head"])},
    "qlora": {"quantization": QuantizationConfig()},
    "full": {"adapter": None},
}
Grads = dict[str, torch.Tensor]


class Watch(Callback):
    """What every optimizer step logs, and the gradient that it sees."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.grads: list[Grads] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        named = pl_module.named_parameters()
        self.grads.append({name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None})


class Watched(CausalLMModule):
    """Remembers what it logs of every optimizer step."""

    watch: Watch

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        super().log(name, value, **kwargs)
        if name == "train/loss":
            self.watch.logged.append({})
        if name.startswith("train/") and name not in ("train/lr", "train/grad_norm"):
            self.watch.logged[-1][name] = float(value)


class Run:
    def __init__(self, module: CausalLMModule, data: SFTDataModule, trainer: Trainer, watch: Watch) -> None:
        self.module, self.data, self.trainer, self.watch = module, data, trainer, watch

    @property
    def reference(self) -> ReferenceLogProbs:
        assert isinstance(self.module.objective, PreferenceObjective)
        return self.module.objective.reference


Train = Callable[..., Run]


@pytest.fixture
def train(model_dir: Path, tmp_path: Path) -> Train:
    """Train on pairs; every call with its own weights of the same kind."""
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(PAIRS))

    def run(
        *,
        lr: float = 0.0,
        data: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        ckpt_path: Path | None = None,
        **model: Any,
    ) -> Run:
        torch.manual_seed(0)
        datamodule = SFTDataModule(
            PairDataSpec(
                **{
                    "sources": {"toy": SourceConfig(path=str(file))},
                    "template": "alpaca",
                    "max_length": 400,
                    "tokenizer_name_or_path": str(model_dir),
                    **(data or {}),
                }
            ),
            Pairs,
        )
        options: dict[str, Any] = {
            "model_name_or_path": str(model_dir),
            "dtype": "float32",
            "adapter": AdapterConfig(r=4, dropout=0.1),
            "lr_scheduler": LRScheduleConfig(name="constant"),
            **model,
        }
        optimizer = {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)}
        module = Watched(PreferenceSpec(**optimizer, **options))
        watch = module.watch = Watch()
        settings: dict[str, Any] = {
            "max_epochs": 1, "accumulate_grad_batches": 2, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
            "default_root_dir": tmp_path, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **(trainer or {}),
        }  # fmt: skip
        fit = Trainer(callbacks=[watch], **settings)
        fit.fit(module, datamodule, ckpt_path=ckpt_path)
        return Run(module, datamodule, fit, watch)

    return run


def largest_difference(first: list[Grads], second: list[Grads]) -> float:
    """Largest difference of any gradient, relative to the largest gradient."""
    assert len(first) == len(second) > 0
    scale = max(float(g.abs().max()) for step in first for g in step.values())
    pairs = [(one[name], other[name]) for one, other in zip(first, second, strict=True) for name in one]
    return max(float((one - other).abs().max()) for one, other in pairs) / scale


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_starts_at_log_2(kind: str, train: Train) -> None:
    run = train(**KINDS[kind], trainer={"max_steps": 1})
    assert abs(run.watch.logged[0]["train/loss"] - math.log(2)) <= 1e-6
    assert abs(run.watch.logged[0]["train/rewards/margin"]) <= 1e-5


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "full"])
def test_the_reference_stays_what_it_was_while_the_model_learns(kind: str, train: Train) -> None:
    before = train(**KINDS[kind])
    after = train(**KINDS[kind], lr=1e-2, trainer={"max_epochs": 2})
    assert after.watch.logged[-1]["train/loss"] < 0.6 < before.watch.logged[-1]["train/loss"]
    assert after.watch.logged[-1]["train/rewards/accuracy"] > 0.5
    batch = next(iter(before.data.train_dataloader()))
    found = [run.reference.of(run.module, batch, "train") for run in (before, after)]  # type: ignore[arg-type]
    assert torch.equal(*found)
    now = answer_log_probs(after.module, batch).log_probs  # type: ignore[arg-type]
    assert float((now - found[0]).abs().max()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_is_the_same_after_the_reference_was_asked(kind: str, train: Train) -> None:
    run = train(**KINDS[kind], trainer={"max_steps": 1})
    names = {name for name, p in run.module.named_parameters() if p.requires_grad}
    assert names == set(run.watch.grads[0])
    if kind == "modules_to_save":
        assert any("lm_head" in name for name in names)
    if kind in ("lora", "qlora"):
        assert all(".lora_" in name for name in names)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    ("batch_size", "accumulate"),
    [(2, 1), (1, 2)],
)
def test_gradients_are_equal_however_a_step_is_split(kind: str, batch_size: int, accumulate: int, train: Train) -> None:
    model = {**KINDS[kind], **({"adapter": AdapterConfig(r=4, dropout=0.0)} if kind == "lora" else {})}
    # A packed row is a unit of the plan; so is a pair, that has two rows where nothing is packed.
    for data in ({}, {"packing": "none"}):
        reference = train(**model, data=data, trainer={"accumulate_grad_batches": 2})
        split = train(**model, data={**data, "batch_size": batch_size}, trainer={"accumulate_grad_batches": accumulate})
        assert largest_difference(reference.watch.grads, split.watch.grads) <= 1e-6
        losses = [[step["train/loss"] for step in run.watch.logged] for run in (reference, split)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_packed_and_unpacked_epochs_have_the_same_gradient(train: Train) -> None:
    model = {"adapter": AdapterConfig(r=4, dropout=0.0)}
    whole = {"accumulate_grad_batches": 100}
    packed, unpacked = train(**model, trainer=whole), train(**model, data={"packing": "none"}, trainer=whole)
    assert packed.data.plan(0).num_rows < unpacked.data.plan(0).num_rows == len(PAIRS)
    assert largest_difference(packed.watch.grads, unpacked.watch.grads) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_prompt_computed_once_gives_the_loss_and_the_gradient_of_two(kind: str, packing: str, train: Train) -> None:
    model = {**KINDS[kind]}
    if kind != "full":
        model["adapter"] = replace(model.get("adapter") or AdapterConfig(r=4), dropout=0.0)
    shared, separate = (
        train(**model, preference=PreferenceConfig(share_prompts=share), data={"packing": packing})
        for share in (True, False)
    )
    tokens = [next(iter(run.data.train_dataloader()))["num_tokens"] for run in (shared, separate)]
    assert tokens[0] < 0.8 * tokens[1]
    losses = [[step["train/loss"] for step in run.watch.logged] for run in (shared, separate)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert largest_difference(separate.watch.grads, shared.watch.grads) <= 1e-6


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"preference": PreferenceConfig(share_prompts=False)}, "model.preference.share_prompts is false"),
        ({"attn_implementation": "sdpa"}, "the model's attention is sdpa"),
        ({"neftune_alpha": 5.0}, "model.neftune_alpha adds noise to each conversation"),
    ],
)
def test_a_prompt_is_computed_twice_where_once_would_be_something_else(
    model: dict[str, Any], said: str, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run = train(**model, data={"packing": "none"}, trainer={"max_steps": 1})
    assert not run.data.layout.share_prompts
    assert f"prompt sharing: off ({said}" in caplog.text


def test_attention_that_lets_answers_see_each_other_is_found_out(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "sft_lightning.models.attention.packed.SharedPrompt", type(None)
    )  # one document, read to its end
    with caplog.at_level("INFO"):
        run = train(trainer={"max_steps": 1})
    assert not run.data.layout.share_prompts
    assert "from those of separate conversations" in caplog.text


def test_log_probabilities_are_those_of_each_conversation_alone(train: Train) -> None:
    run = train(adapter=None, preference=PreferenceConfig(share_prompts=False))
    batch = next(iter(run.data.train_dataloader()))
    found = answer_log_probs(run.module, batch).log_probs.flatten()  # type: ignore[arg-type]
    expected, start = [], 0
    for length in batch["document_lengths"][0]:
        part = slice(start, start + length)
        logits = run.module.language_model(input_ids=batch["input_ids"][:1, part]).logits[0, :-1]
        labels = batch["labels"][0, part][1:]
        if (labels != -100).any():
            expected.append(-torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        start += length
    assert len(expected) == len(found)
    assert float((torch.stack(expected) - found).abs().max()) <= 1e-4


def test_a_model_that_makes_its_logits_itself_says_the_same(train: Train) -> None:
    run = train()
    batch = next(iter(run.data.train_dataloader()))
    run.module.eval()
    with_head = answer_log_probs(run.module, batch).log_probs  # type: ignore[arg-type]
    run.module.__dict__["head"] = None
    assert torch.allclose(answer_log_probs(run.module, batch).log_probs, with_head, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["ipo", "hinge", "orpo", "simpo"])
def test_every_loss_learns_to_prefer(loss: str, train: Train) -> None:
    config = PreferenceConfig(loss=loss, beta=2.0 if loss == "simpo" else 0.1)  # type: ignore[arg-type]
    run = train(preference=config, lr=1e-2, trainer={"max_epochs": 4})
    first, last = run.watch.logged[0], run.watch.logged[-1]
    assert last["train/loss"] < first["train/loss"]
    assert last["train/rewards/margin"] > first["train/rewards/margin"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_continues_to_the_same_bits(kind: str, train: Train, tmp_path: Path) -> None:
    whole = train(**KINDS[kind], lr=1e-3, trainer={"max_epochs": 2})
    half = train(**KINDS[kind], lr=1e-3, trainer={"max_epochs": 2, "max_steps": 2})
    checkpoint = tmp_path / "half.ckpt"
    half.trainer.save_checkpoint(checkpoint)
    for file in reference_folder(half.data).glob("*.npy"):
        file.unlink()  # the checkpoint has all that is needed
    resumed = train(**KINDS[kind], lr=1e-3, trainer={"max_epochs": 2}, ckpt_path=checkpoint)
    assert len(half.watch.logged) + len(resumed.watch.logged) == len(whole.watch.logged)
    assert resumed.watch.logged[-1] == whole.watch.logged[-1]
    for name, parameter in whole.module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, resumed.module.get_parameter(name)), name


def test_reference_log_probabilities_are_found_again_on_the_disk(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(adapter=None, trainer={"max_steps": 1})

    def refuse(*_: Any) -> None:
        raise AssertionError("computed a second time")

    monkeypatch.setattr(reference_log_probs, "compute_table", refuse)
    second = train(adapter=None, trainer={"max_steps": 1})
    assert torch.equal(*(run.reference.split_tables["train"][0] for run in (first, second)))
    with pytest.raises(AssertionError, match="second time"):
        train(adapter=None, data={"loss_on": "last_turn"}, trainer={"max_steps": 1, "precision": "bf16-mixed"})


def test_validation_logs_loss_and_rewards_of_each_source(train: Train, tmp_path: Path) -> None:
    file = tmp_path / "val.json"
    file.write_text(json.dumps(PAIRS[:6]))
    sources = {"a": SourceConfig(path=str(file)), "b": SourceConfig(path=str(file))}
    for kind in ("lora", "full"):
        run = train(**KINDS[kind], data={"val_sources": sources}, trainer={"max_epochs": 1})
        logged = run.trainer.callback_metrics
        for name in ("val/loss", "val/loss/a", "val/loss/b"):
            assert abs(float(logged[name]) - math.log(2)) <= 1e-6
        assert {"val/rewards/margin", "val/rewards/accuracy/a", "val/log_probs/chosen/b"} <= logged.keys()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_checkpoint_is_validated_against_the_model_before_training(kind: str, train: Train, tmp_path: Path) -> None:
    file = tmp_path / "val.json"
    file.write_text(json.dumps(PAIRS[:6]))
    data = {"val_sources": {"held": SourceConfig(path=str(file))}}
    run = train(**KINDS[kind], lr=1e-2, data=data)
    during = float(run.trainer.callback_metrics["val/loss"])
    run.trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh = train(**KINDS[kind], trainer={"max_steps": 0}, data=data)
    for file in reference_folder(run.data).glob("*.npy"):
        file.unlink()
    model = {"adapter": AdapterConfig(r=4, dropout=0.1), **KINDS[kind]}
    module = CausalLMModule(replace(fresh.module.spec, **model))
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accumulate_grad_batches": 2}
    [found] = Trainer(accelerator="cpu", **settings).validate(
        module, fresh.data, ckpt_path=tmp_path / "end.ckpt", verbose=False
    )
    assert found["val/loss"] == pytest.approx(during, abs=1e-6)
    assert during < math.log(2) - 1e-3


def test_a_continued_adapter_is_compared_with_where_it_started(train: Train, tmp_path: Path) -> None:
    first = train(lr=1e-2, adapter=AdapterConfig(r=4, dropout=0.0))
    first.module.language_model.save_pretrained(tmp_path / "adapter")
    adapter = AdapterConfig(r=4, dropout=0.0, path=str(tmp_path / "adapter"))
    started = train(adapter=adapter, trainer={"max_steps": 1})
    assert abs(started.watch.logged[0]["train/loss"] - math.log(2)) <= 1e-6
    off = train(adapter=adapter, preference=PreferenceConfig(reference="adapter_off"), trainer={"max_steps": 1})
    assert abs(off.watch.logged[0]["train/loss"] - math.log(2)) > 1e-3


def test_what_cannot_be_switched_off_is_not_the_reference(train: Train) -> None:
    off = PreferenceConfig(reference="adapter_off")
    with pytest.raises(UserError, match="no adapter to switch off"):
        train(adapter=None, preference=off)
    with pytest.raises(UserError, match="weights of the base train too"):
        train(adapter=AdapterConfig(r=4, only_adapter=False), preference=off)


def test_a_shortened_pair_is_trained_and_reported(train: Train) -> None:
    run = train(data={"max_length": 100, "overlong": "truncate", "max_prompt_length": 20}, trainer={"max_steps": 1})
    report = run.data.report.sources["train/toy"]
    assert report.examples == report.truncated == len(PAIRS)
    assert report.longest > 100
    assert abs(run.watch.logged[0]["train/loss"] - math.log(2)) <= 1e-6
