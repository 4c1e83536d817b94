"""SFTDataModule: wires sources → examples → blend → plan → loaders."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.batches.collate import collate
from sft_lightning.data.batches.generation_prompts import PromptBatch, PromptLoader, make_prompts
from sft_lightning.data.batches.loader import Collate, EvaluationLoader, TrainLoader
from sft_lightning.data.batches.stream_source import SourceStream, describe_streamed, share_unit
from sft_lightning.data.batches.streaming import StreamLoader
from sft_lightning.data.batches.training_rows import PlannedRows, RunLength, StreamedRows, TrainingRows
from sft_lightning.data.plan.epoch_blend import EpochBlend
from sft_lightning.data.plan.epoch_plan import EpochPlan, Layout, Topology
from sft_lightning.data.plan.epoch_planner import EpochPlanner, plan_evaluation
from sft_lightning.data.plan.split_examples import Corpora, Corpus
from sft_lightning.data.plan.split_reader import Split, SplitReader
from sft_lightning.data.sources.report import DataReport
from sft_lightning.data.spec import DataSpec
from sft_lightning.data.templates.binding import bind_template, special_tokens, stop_token_id
from sft_lightning.data.templates.template import DocumentTemplate, Template
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.store_cache import Prepared
from sft_lightning.errors import UserError
from sft_lightning.tokenizer import load_tokenizer
from sft_lightning.types import Batch, TokenizedExample


class SFTDataModule(LightningDataModule):
    """The data of a run.

    Args:
        spec: The YAML's keys under `data`.
    """

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.spec = spec
        self.report = DataReport(max_length=spec.max_length)
        self.topology = Topology(batch_size=spec.batch_size)
        """How rows are dealt out without a trainer."""
        self._corpora: dict[Split, list[Corpus]] = {}
        self._streams: list[SourceStream] = []

    # --- tokenizer and template ------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer; `template` makes itself its chat template."""
        return load_tokenizer(
            self.spec.tokenizer_name_or_path,
            trust_remote_code=self.spec.trust_remote_code,
            tokens=self.spec.add_tokens or [],
            special_tokens=self.spec.add_special_tokens or [],
        )

    @functools.cached_property
    def template(self) -> Template:
        """The bound template; plain documents in pretraining."""
        if self.spec.task == "pretrain":
            return DocumentTemplate(special_tokens(self.tokenizer))
        return bind_template(self.spec.template, self.tokenizer)

    @property
    def stop_token_id(self) -> int:
        """The token that ends an answer."""
        return stop_token_id(self.template, self.tokenizer)

    @property
    def pad_token_id(self) -> int:
        """What fills rows up: the tokenizer's pad token, else its stop token; masked by position either way."""
        own: int | None = self.tokenizer.pad_token_id
        return self.stop_token_id if own is None else own

    @functools.cached_property
    def builder(self) -> ExampleBuilder:
        """What makes examples of records."""
        return ExampleBuilder(
            tokenizer=self.tokenizer,
            template=self.template,
            loss_on=self.spec.loss_on,
            malformed=self.spec.malformed,
        )

    @functools.cached_property
    def reader(self) -> SplitReader:
        """What reads and tokenizes the splits."""
        return SplitReader(
            self.spec.splits, self.spec.split_options, self.builder, self.spec.limits, self.spec.store_folder
        )

    # --- reading ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read and tokenize what the stage needs; a second call reads nothing again."""
        if stage == "fit" and self.spec.streams:
            self._open_streams()
        elif stage == "fit" and self._first_time("train"):
            if not sum(corpus.report.examples for corpus in self._corpora["train"]):
                drops = {corpus.name: dict(corpus.report.dropped) for corpus in self._corpora["train"]}
                raise UserError(f"data.sources: no example is left to train on; dropped were {drops}")
            _ = self.blend  # an error if a weight is too small
            if self._decided_layout is not None:
                _ = self.planner
        if stage in ("fit", "validate"):
            self._first_time("val", required=stage == "validate")
        if stage == "test":
            self._first_time("test")

    def prepare(self, *, rebuild: bool = False) -> dict[str, Prepared]:
        """Tokenize every split that has sources and plan the first epoch, without a trainer.

        Args:
            rebuild: Tokenize again what is stored already.

        Returns:
            The store of each source, by split and name: `train/alpaca`.
        """
        splits: tuple[Split, ...] = ("train", "val", "test")
        stores = {
            f"{split}/{name}": self.reader.prepare(split, name, rebuild=rebuild)
            for split in splits
            for name in self.reader.sources(split)
            if not (split == "train" and self.spec.streams)
            if not (split == "val" and self.spec.val_fraction)  # held out of the training sources
        }
        self.setup("fit")
        if self.reader.sources("test"):
            self.setup("test")
        return stores

    def _first_time(self, split: Split, *, required: bool = True) -> bool:
        """Tokenize a split, unless that was done before."""
        if split in self._corpora:
            return False
        if required and not self.reader.sources(split):
            raise UserError(_NO_SOURCES[split])
        self._corpora[split] = self.reader.corpora(split)
        self.report.sources |= {f"{split}/{corpus.name}": corpus.report for corpus in self._corpora[split]}
        return True

    def _open_streams(self) -> None:
        """Find the format of every streamed source; their records are read when they are trained on."""
        if self.trainer is not None:
            _ = self._run_length.steps_of_a_stream  # an error if the run has no end
        if not any(name.startswith("train/") for name in self.report.sources):
            rank_zero_info(describe_streamed(self.spec.sources_of("train"), self.spec.blend))
            # Tokenizing runs beside training, where samples are tokenized: each needs a tokenizer of its own.
            builder = replace(self.builder, tokenizer=copy.deepcopy(self.tokenizer))
            self._streams = [
                SourceStream(name, config, builder, self.spec.limits)
                for name, config in self.spec.sources_of("train").items()
            ]
            self.report.blend_unit = share_unit(self.spec.blend)
            self.report.sources |= {f"train/{stream.name}": stream.report for stream in self._streams}

    # --- the plan --------------------------------------------------------------------------------------------------

    @property
    def _decided_layout(self) -> Layout | None:
        """The layout; `None` while the trainer's model has not decided about `packing: auto`."""
        model = getattr(self.trainer, "lightning_module", None)
        decided: Layout | None = getattr(model, "layout", None)
        if decided is None and self.spec.packing != "auto":
            return Layout(packing=self.spec.packing)
        return decided if hasattr(model, "layout") else Layout(packing="best_fit")

    @property
    def layout(self) -> Layout:
        """How documents share rows; without a model, `packing: auto` counts as `best_fit`.

        Raises:
            RuntimeError: If the trainer's model has not decided about `packing: auto` yet.
        """
        if self._decided_layout is None:
            raise RuntimeError("data.packing: auto is decided once the model is loaded; nothing can be planned before")
        return self._decided_layout

    @functools.cached_property
    def blend(self) -> EpochBlend:
        """Chooses the examples of each training epoch.

        Raises:
            UserError: If the sources are streamed, or a weight leaves a source without an example.
        """
        if self.spec.streams:
            raise UserError("data.sources: streamed sources are planned while training, so there is no plan ahead")
        corpora, sources = self._corpora["train"], self.spec.sources_of("train")
        return EpochBlend(corpora, [sources[corpus.name] for corpus in corpora], self.spec.blend, self.spec.seed)

    @functools.cached_property
    def planner(self) -> EpochPlanner:
        """Plans the training epochs; made once, when the layout is decided. The report gets what the first one has."""
        planner = EpochPlanner(
            self.blend,
            packing=self.layout.packing,
            max_length=self.spec.max_length,
            rows_per_step=self._topology.rows_per_step,
            seed=self.spec.seed,
        )
        planner.report(self.report)
        return planner

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of a training epoch."""
        return self.planner.plan(epoch)

    @property
    def rows(self) -> TrainingRows:
        """What is trained on, row by row, as the trainer is set now."""
        if self.spec.streams:
            return StreamedRows(
                self._streams,
                self.spec.blend,
                self.layout.packing,
                self.spec.max_length,
                self._topology,
                self._run_length,
                self.spec.seed,
            )
        return PlannedRows(self.planner, self.spec.sources_of("train"), self._topology, self._run_length)

    @property
    def packs(self) -> bool:
        """Whether a row may hold more than one document; if rows are planned, whether one does."""
        return self.rows.packs

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps that the run will take."""
        return self.rows.num_optimizer_steps

    def describe_rows(self, optimizer_step: int, limit: int = 8) -> list[str]:
        """Return where the records of an optimizer step's rows stand; steps count from 1."""
        return self.rows.describe(optimizer_step, limit)

    @property
    def _topology(self) -> Topology:
        trainer = self.trainer
        if trainer is None:
            return self.topology
        return Topology(
            batch_size=self.spec.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            rank=trainer.global_rank,
        )

    @property
    def _run_length(self) -> RunLength:
        trainer = self.trainer
        if trainer is None:
            return RunLength()
        return RunLength(trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches)

    def state_dict(self) -> dict[str, Any]:
        """Return what the order of the rows depends on, for a checkpoint."""
        return {
            "seed": self.spec.seed,
            "packing": self.layout.packing,
            "max_length": self.spec.max_length,
            "global batch (rows)": self._topology.rows_per_step,
            "blend": f"{self.spec.blend.by}, temperature {self.spec.blend.temperature}",
            "weights": [(source.weight, source.max_epochs) for source in self.spec.sources_of("train").values()],
            "tokens": self._tokens,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint's position means the same rows here.

        Raises:
            UserError: If it does not, with what changed.
        """
        now = self.state_dict()
        changed = [f"{key}: {old} → {now[key]}" for key, old in state_dict.items() if now[key] != old]
        if changed and now["tokens"] is not None:
            raise different_data_error(changed)

    @property
    def _tokens(self) -> str | None:
        """What the training tokens are, for a checkpoint; `None` if they were not read.

        For streamed sources, what decides which examples are seen; the loader compares the tokens themselves.
        """
        if self.spec.streams:
            taken = [(name, config.max_examples) for name, config in self.spec.sources_of("train").items()]
            return f"streamed: {taken}, min_length {self.spec.min_length}, overlong {self.spec.overlong}"
        return self.blend.corpora.fingerprint if "train" in self._corpora else None

    # --- loaders ---------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainLoader | StreamLoader:
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
        loader = self.rows.loader(self._collate)
        if isinstance(loader, TrainLoader) and trainer is not None and not self.blend.repeats:
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # Lightning takes every epoch to be as long as the first
            loader.set_epoch(trainer.current_epoch)
        return loader

    def val_dataloader(self) -> list[EvaluationLoader]:
        """Return a loader for each validation source."""
        return [self._evaluation_loader(corpus) for corpus in self._corpora["val"]]

    def test_dataloader(self) -> list[EvaluationLoader]:
        """Return a loader for each test source."""
        return [self._evaluation_loader(corpus) for corpus in self._corpora["test"]]

    def predict_dataloader(self) -> PromptLoader:
        """Return this rank's prompts in batches."""
        prompts = self.prompts()
        if not prompts:
            raise UserError("data: set predict_sources, val_sources or val_fraction; there is nothing to predict on")
        topology = self._topology
        return PromptLoader(prompts, self.spec.batch_size, rank=topology.rank, world_size=topology.world_size)

    @property
    def val_names(self) -> list[str]:
        """Names of the validation sources, in the order of the loaders."""
        return [corpus.name for corpus in self._corpora["val"]]

    @property
    def test_names(self) -> list[str]:
        """Names of the test sources, in the order of the loaders."""
        return [corpus.name for corpus in self._corpora["test"]]

    def prompts(self) -> PromptBatch:
        """Return a prompt for each record that `predict` answers, with the record's last answer as its reference."""
        return self._prompts_of("predict" if self.reader.sources("predict") else "val")

    def sample_prompts(self, limit: int) -> PromptBatch:
        """Return the first prompts of the validation data, or of the training data where there is none."""
        return self._prompts_of("val" if self.reader.sources("val") else "train", limit)

    def _prompts_of(self, split: Split, limit: int | None = None) -> PromptBatch:
        prompts = (
            prompt
            for name, config in self.reader.sources(split).items()
            for prompt in make_prompts(self.builder, self.reader.records(split, name), config)
        )
        return list(islice(prompts, limit))

    def _evaluation_loader(self, corpus: Corpus) -> EvaluationLoader:
        topology, decided = replace(self._topology, accumulate=1), self._decided_layout
        plan = plan_evaluation(
            corpus,
            packing="none" if decided is None else decided.packing,
            max_length=self.spec.max_length,
            rows_per_step=topology.rows_per_step,
        )
        return EvaluationLoader(plan, topology, self._collate(Corpora([corpus]).example))

    def _collate(self, example: Callable[[int, int, int], TokenizedExample]) -> Collate:
        pad_token_id = self.pad_token_id

        def make(plan: EpochPlan, rows: Sequence[int], denominator: float) -> Batch:
            documents = [[example(*document) for document in plan.row(row).tolist()] for row in rows]
            return collate(documents, pad_token_id=pad_token_id, denominator=denominator)

        return make


def different_data_error(changed: Sequence[str]) -> UserError:
    """Return the error of a run that continues a checkpoint in other rows.

    Args:
        changed: Each setting that differs, as `packing: best_fit → none`.
    """
    return UserError(
        f"--ckpt_path: the checkpoint was saved with different data settings: {'; '.join(changed)}; restore the old "
        "values, or start a new run from its weights with model.adapter.path (or model.model_name_or_path)"
    )


_NO_SOURCES: Mapping[Split, str] = {
    "train": "data.sources: no source given, so there is nothing to train on",
    "val": "data: set val_sources or val_fraction; there is nothing to validate on",
    "test": "data.test_sources: no source given, so there is nothing to test on",
}


def data_from_keys(**keys: Any) -> SFTDataModule:
    """The data of a run."""  # heads its keys in the help of the command line
    return SFTDataModule(DataSpec(**keys))
