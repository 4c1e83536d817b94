"""SFTDataModule: wires sources → examples → blend → plan → loaders."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.binding import bind_template, special_tokens, stop_token_id
from sft_lightning.data.blending import blend
from sft_lightning.data.collate import collate
from sft_lightning.data.examples import Corpus, ExampleBuilder, Overlong
from sft_lightning.data.loader import Collate, EvaluationLoader, TrainLoader
from sft_lightning.data.plan import EpochPlan, Packing, Topology, plan_epoch
from sft_lightning.data.prompts import PromptBatch, make_prompts
from sft_lightning.data.report import DataReport
from sft_lightning.data.sources import SourceConfig, read_records
from sft_lightning.data.splits import divide
from sft_lightning.data.store import TokenStore
from sft_lightning.data.templates import DocumentTemplate, Template
from sft_lightning.errors import UserError
from sft_lightning.models.loading import load_tokenizer
from sft_lightning.types import Batch, LossOn, Record

Task = Literal["sft", "pretrain"]

Sources = Mapping[str, SourceConfig]


class SFTDataModule(LightningDataModule):
    """The data of a run.

    Args:
        sources: Training sources by name.
        val_sources: Validation sources by name; each has a loss of its own.
        val_fraction: Instead: the share of each training source to hold out.
        test_sources: Sources of the `test` command.
        predict_sources: Sources of the `predict` command; default: the validation data.
        template: A named template, `chat_template` (the tokenizer's own), or a `.jinja` file.
        loss_on: What is supervised: every answer, the last answer, or all tokens.
        max_length: Tokens per packed row.
        overlong: What to do with an example longer than `max_length`; always counted.
        packing: `best_fit` packs whole examples; `concat` writes everything one after the other and cuts; `none` gives
            each example a row. Documents of a row never see each other.
        batch_size: Rows per micro-batch and device.
        task: Set by the top-level `task`.
        tokenizer_name_or_path: Set by the model's.
        trust_remote_code: Set by the model's.
        seed: Set by `seed_everything`.

    Raises:
        UserError: If a value is out of range, or both `val_sources` and `val_fraction` are set.
    """

    def __init__(
        self,
        sources: dict[str, SourceConfig] | None = None,
        val_sources: dict[str, SourceConfig] | None = None,
        val_fraction: float = 0.0,
        test_sources: dict[str, SourceConfig] | None = None,
        predict_sources: dict[str, SourceConfig] | None = None,
        template: str = "chat_template",
        loss_on: LossOn = "assistant",
        max_length: int = 2048,
        overlong: Overlong = "error",
        packing: Packing = "best_fit",
        batch_size: int = 1,
        task: Task = "sft",
        tokenizer_name_or_path: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in {"max_length": max_length, "batch_size": batch_size}.items():
            if value < 1:
                raise UserError(f"data.{key}: must be at least 1 (got {value})")
        if not 0 <= val_fraction < 1:
            raise UserError(f"data.val_fraction: must be in [0, 1) (got {val_fraction})")
        if val_sources and val_fraction:
            raise UserError(
                f"data: set val_sources or val_fraction, not both (got {sorted(val_sources)}, {val_fraction})"
            )
        self.sources: Sources = sources or {}
        self.val_sources: Sources = val_sources or {}
        self.val_fraction = val_fraction
        self.test_sources: Sources = test_sources or {}
        self.predict_sources: Sources = predict_sources or {}
        self.template_setting = template
        self.loss_on = loss_on
        self.max_length = max_length
        self.overlong = overlong
        self.packing = packing
        self.batch_size = batch_size
        self.task = task
        self.tokenizer_name_or_path = tokenizer_name_or_path
        self.trust_remote_code = trust_remote_code
        self.seed = seed
        self.report = DataReport(max_length=max_length)
        self._train: list[Corpus] = []
        self._val: list[Corpus] = []
        self._test: list[Corpus] = []
        self._records: dict[str, dict[str, list[Record]]] = {}

    # --- tokenizer and template ------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer; `template` makes itself its chat template."""
        return load_tokenizer(self.tokenizer_name_or_path, trust_remote_code=self.trust_remote_code)

    @functools.cached_property
    def template(self) -> Template:
        """The bound template; plain documents in pretraining."""
        if self.task == "pretrain":
            return DocumentTemplate(special_tokens(self.tokenizer))
        return bind_template(self.template_setting, self.tokenizer)

    @property
    def stop_token_id(self) -> int:
        """The token that ends an answer."""
        return stop_token_id(self.template, self.tokenizer)

    @functools.cached_property
    def builder(self) -> ExampleBuilder:
        """What makes examples of records."""
        return ExampleBuilder(
            tokenizer=self.tokenizer,
            template=self.template,
            loss_on=self.loss_on,
            max_length=self.max_length,
            overlong=self.overlong,
            packing=self.packing,
        )

    # --- reading ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read and tokenize what the stage needs; a second call does nothing."""
        if stage == "fit" and not self._train:
            if not self.sources:
                raise UserError("data.sources: no source given, so there is nothing to train on")
            self._train = self._build("train", self.sources)
            if not sum(corpus.report.examples for corpus in self._train):
                raise UserError("data.sources: no example is left to train on; see the drops in data_report.json")
            self._report_plan()
        if stage in ("fit", "validate") and not self._val:
            self._val = self._build("val", self._held_out)
            if stage == "validate" and not self._val:
                raise UserError("data: set val_sources or val_fraction; there is nothing to validate on")
        if stage == "test" and not self._test:
            if not self.test_sources:
                raise UserError("data.test_sources: no source given, so there is nothing to test on")
            self._test = self._build("test", self.test_sources)

    @property
    def _held_out(self) -> Sources:
        return self.sources if self.val_fraction else self.val_sources

    def records(self, split: str, sources: Sources) -> dict[str, list[Record]]:
        """Return the records of each source of a split; train and val never share a record.

        Args:
            split: train, val, test or predict.
            sources: The split's sources.
        """
        if split not in self._records:
            read = {name: read_records(name, config) for name, config in sources.items()}
            if self.val_fraction and sources is self.sources:
                sides = {
                    name: divide(rows, self.val_fraction, seed=(self.seed, number))
                    for number, (name, rows) in enumerate(read.items())
                }
                for i, side in enumerate(("train", "val")):  # both at once: the files are read a single time
                    self._records[side] = {name: both[i] for name, both in sides.items()}
            else:
                self._records[split] = read
        return self._records[split]

    def _build(self, split: str, sources: Sources) -> list[Corpus]:
        corpora = [
            self.builder.build(name, split, rows, sources[name].format)
            for name, rows in self.records(split, sources).items()
        ]
        for corpus in corpora:
            weight = sources[corpus.name].weight if split == "train" else 1.0
            if corpus.report.examples and not round(weight * corpus.report.examples):
                raise UserError(
                    f"data.sources.{corpus.name}.weight: {weight} of {corpus.report.examples} examples is none"
                )
            if split != "train" and not corpus.report.examples:
                raise UserError(
                    f"data: no example of the {split} source {corpus.name!r} is left: {corpus.report.dropped}"
                )
        self.report.sources |= {f"{split}/{corpus.name}": corpus.report for corpus in corpora}
        return corpora

    def _report_plan(self) -> None:
        plan = self.plan(0)
        self.report.rows, self.report.optimizer_steps = plan.num_rows, plan.num_steps
        tokens = int((plan.documents[:, 2] - plan.documents[:, 1]).sum())
        self.report.fill = tokens / (plan.num_rows * self.max_length)

    # --- the plan --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _store(self) -> TokenStore:
        return TokenStore.concatenate([corpus.store for corpus in self._train])

    @functools.cached_property
    def _lengths(self) -> Any:
        return np.concatenate([corpus.lengths for corpus in self._train])

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self._store.fingerprint(self._lengths)

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one data module a process)
    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of a training epoch."""
        usable = [np.flatnonzero(corpus.lengths) for corpus in self._train]
        firsts = np.cumsum([0, *(len(corpus.lengths) for corpus in self._train)])
        candidates = np.concatenate([indices + first for indices, first in zip(usable, firsts, strict=False)])
        weights = [self.sources[corpus.name].weight for corpus in self._train]
        chosen = candidates[blend([len(indices) for indices in usable], weights, seed=self.seed, epoch=epoch)]
        return plan_epoch(
            chosen,
            self._lengths,
            self._store.weigh,
            packing=self.packing,
            max_length=self.max_length,
            rows_per_step=self._topology.rows_per_step,
            shuffle=(self.seed, epoch),
        )

    @property
    def packs(self) -> bool:
        """Whether any row of the first epoch holds more than one document."""
        plan = self.plan(0)
        return len(plan.documents) > plan.num_rows

    @property
    def _topology(self) -> Topology:
        trainer = self.trainer
        if trainer is None:
            return Topology(batch_size=self.batch_size)
        return Topology(
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            rank=trainer.global_rank,
        )

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps that the run will take, from the plan and the trainer's limits."""
        trainer = self.trainer
        if trainer is None:
            return self.plan(0).num_steps
        if trainer.max_epochs == -1:
            if trainer.max_steps == -1:
                raise UserError("trainer: set max_steps or max_epochs; the learning-rate schedule needs an end")
            return trainer.max_steps
        steps = math.ceil(self._micro_batches_per_epoch / trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    @property
    def _micro_batches_per_epoch(self) -> int:
        """Micro-batches of an epoch within `trainer.limit_train_batches`, which must not cut a step in two."""
        whole = self.plan(0).num_micro_batches(self._topology)
        limit = self.trainer.limit_train_batches if self.trainer is not None else 1.0
        limited = min(whole, limit) if isinstance(limit, int) else int(whole * limit)
        if limited < whole and limited % self._topology.accumulate:
            raise UserError(
                f"trainer.limit_train_batches: {limit} stops in the middle of an optimizer step; "
                f"use a multiple of accumulate_grad_batches ({self._topology.accumulate})"
            )
        return limited

    def micro_batches_done(self, position: Mapping[str, int]) -> int:
        """Return the micro-batches of whole optimizer steps that a loader's position stands after."""
        return self.plan(position["epoch"]).micro_batches_done(position["rows"], self._topology)

    def state_dict(self) -> dict[str, Any]:
        """Return what the order of the rows depends on, for a checkpoint."""
        return {
            "seed": self.seed,
            "packing": self.packing,
            "max_length": self.max_length,
            "global batch (rows)": self._topology.rows_per_step,
            "weights": [self.sources[corpus.name].weight for corpus in self._train],
            "tokens": self._fingerprint if self._train else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint's position means the same rows here.

        Raises:
            UserError: If it does not, with what changed.
        """
        now = self.state_dict()
        changed = [f"{key}: {old} → {now[key]}" for key, old in state_dict.items() if now[key] != old]
        if changed and self._train:
            raise UserError(
                f"--ckpt_path: the checkpoint's position is one in other data ({'; '.join(changed)}); restore the old "
                "values, or start a new run from its weights with model.adapter.path (or model.model_name_or_path)"
            )

    # --- loaders ---------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainLoader:
        """Return this rank's micro-batches.

        Raises:
            UserError: If the trainer is to change, while it runs, what the plan was made for.
        """
        trainer = self.trainer
        callbacks = getattr(trainer, "callbacks", [])
        if getattr(trainer, "overfit_batches", 0):
            raise UserError("trainer.overfit_batches: not with planned epochs; use a source with max_examples instead")
        if any(isinstance(cb, GradientAccumulationScheduler) for cb in callbacks):
            raise UserError(
                "trainer.callbacks: GradientAccumulationScheduler would change the plan; use a fixed number"
            )
        return TrainLoader(self.plan, self._topology, self._collate(self._store))

    def val_dataloader(self) -> list[EvaluationLoader]:
        """Return a loader for each validation source."""
        return [self._evaluation_loader(corpus) for corpus in self._val]

    def test_dataloader(self) -> list[EvaluationLoader]:
        """Return a loader for each test source."""
        return [self._evaluation_loader(corpus) for corpus in self._test]

    def predict_dataloader(self) -> DataLoader[dict[str, str]]:
        """Return prompts in batches."""
        prompts = self.prompts()
        if not prompts:
            raise UserError("data: set predict_sources, val_sources or val_fraction; there is nothing to predict on")
        # A list is a data set too; typed as torch wants it.
        return DataLoader(cast("Dataset[dict[str, str]]", prompts), batch_size=self.batch_size, collate_fn=list)

    @property
    def val_names(self) -> list[str]:
        """Names of the validation sources, in the order of the loaders."""
        return [corpus.name for corpus in self._val]

    @property
    def test_names(self) -> list[str]:
        """Names of the test sources, in the order of the loaders."""
        return [corpus.name for corpus in self._test]

    def prompts(self) -> PromptBatch:
        """Return a prompt for each record that `predict` answers, with the record's last answer as its reference."""
        split, sources = ("predict", self.predict_sources) if self.predict_sources else ("val", self._held_out)
        return [prompt for name in sources for prompt in self._prompts_of(split, sources, name)]

    def sample_prompts(self, limit: int) -> PromptBatch:
        """Return the first prompts of the validation data, or of the training data where there is none."""
        split, sources = ("val", self._held_out) if self._held_out else ("train", self.sources)
        return [prompt for name in sources for prompt in self._prompts_of(split, sources, name, limit)][:limit]

    def _prompts_of(self, split: str, sources: Sources, name: str, limit: int | None = None) -> PromptBatch:
        return make_prompts(self.builder, self.records(split, sources)[name][:limit], sources[name].format)

    def _evaluation_loader(self, corpus: Corpus) -> EvaluationLoader:
        topology = Topology(batch_size=self.batch_size, world_size=self._topology.world_size, rank=self._topology.rank)
        plan = plan_epoch(
            np.flatnonzero(corpus.lengths),
            corpus.lengths,
            corpus.store.weigh,
            packing=self.packing,
            max_length=self.max_length,
            rows_per_step=topology.rows_per_step,
            shuffle=None,
        )
        return EvaluationLoader(plan, topology, self._collate(corpus.store))

    def _collate(self, store: TokenStore) -> Collate:
        pad = self.tokenizer.pad_token_id
        pad_token_id = self.stop_token_id if pad is None else pad

        def make(plan: EpochPlan, rows: Sequence[int], denominator: float) -> Batch:
            documents = [[store.example(*document) for document in plan.row(row).tolist()] for row in rows]
            return collate(documents, pad_token_id=pad_token_id, denominator=denominator)

        return make
