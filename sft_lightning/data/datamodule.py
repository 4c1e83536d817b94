"""SFTDataModule: wires sources → examples → blend → plan → loaders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerFast

from sft_lightning.batch import Batch, pinned
from sft_lightning.data.batches.example_kind import Conversations, ExampleKind
from sft_lightning.data.batches.generation_prompts import PromptBatch, PromptLoader, prompts_of
from sft_lightning.data.batches.loader import Document, EvaluationLoader, TrainLoader, note_sums
from sft_lightning.data.batches.row_order import check_row_order, decided_layout, row_order
from sft_lightning.data.batches.stream_loader import StreamLoader
from sft_lightning.data.batches.stream_source import SourceStream, describe_streams, open_streams, stream_share_unit
from sft_lightning.data.batches.training_rows import PlannedRows, RunLength, StreamedRows, TrainingRows
from sft_lightning.data.plan.epoch_blend import EpochBlend
from sft_lightning.data.plan.epoch_plan import EpochPlan, Layout, Topology
from sft_lightning.data.plan.epoch_planner import EpochPlanner, plan_evaluation
from sft_lightning.data.plan.split_examples import SplitExamples
from sft_lightning.data.plan.split_reader import Split, SplitReader
from sft_lightning.data.sources.report import DataReport
from sft_lightning.data.spec import DataSpec
from sft_lightning.data.templates.binding import bind_template, special_tokens, stop_token_id
from sft_lightning.data.templates.template import DocumentTemplate, Template
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.store_cache import Prepared
from sft_lightning.errors import UserError
from sft_lightning.tokenizer import load_tokenizer

Spec = TypeVar("Spec", bound=DataSpec)


class SFTDataModule(LightningDataModule):
    """The data of a run.

    Args:
        spec: The YAML's keys under `data`.
        kind: What an example is.
    """

    def __init__(self, spec: Spec, kind: Callable[[Spec], ExampleKind] = Conversations) -> None:
        super().__init__()
        self.spec: DataSpec = spec
        self.kind = kind(spec)
        self.report = DataReport(max_length=spec.max_length)
        """Counts of what was read, and of the first training epoch's rows."""
        self.topology = Topology(batch_size=spec.batch_size)
        """How rows are dealt out without a trainer."""
        self._make_kind: Callable[[Any], ExampleKind] = kind
        self._streams: list[SourceStream] = []

    def with_spec(self, spec: DataSpec) -> SFTDataModule:
        """Return the data of other keys, with examples of the same kind."""
        return SFTDataModule(spec, self._make_kind)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer; the template becomes its chat template."""
        return load_tokenizer(
            self.spec.tokenizer_name_or_path,
            trust_remote_code=self.spec.trust_remote_code,
            tokens=self.spec.add_tokens or [],
            special_tokens=self.spec.add_special_tokens or [],
        )

    @functools.cached_property
    def template(self) -> Template:
        """The bound template; pretraining has plain documents."""
        if self.spec.task == "pretrain":
            return DocumentTemplate(special_tokens(self.tokenizer))
        return bind_template(self.spec.template, self.tokenizer)

    @property
    def stop_token_id(self) -> int:
        """The token that ends an answer."""
        return stop_token_id(self.template, self.tokenizer)

    @functools.cached_property
    def pad_token_id(self) -> int:
        """The tokenizer's pad token, else its stop token; padding is known by its position, not by this id."""
        own: int | None = self.tokenizer.pad_token_id
        return self.stop_token_id if own is None else own

    @functools.cached_property
    def builder(self) -> ExampleBuilder:
        """Makes examples from records."""
        return self.kind.make_builder(self.tokenizer, self.template)

    @functools.cached_property
    def reader(self) -> SplitReader:
        """Reads and tokenizes the splits."""
        return self.kind.make_reader(self.builder)

    def setup(self, stage: str) -> None:
        """Read and tokenize what the stage needs; a second call reads nothing again."""
        if stage == "fit":
            self._open_streams() if self.spec.streams else self._read_training_data()
        if stage == "validate" or (stage == "fit" and self.reader.sources("val")):
            self._read("val")
        if stage == "test":
            self._read("test")

    def prepare(self, *, rebuild: bool = False) -> dict[str, Prepared]:
        """Tokenize every split that has sources and plan the first epoch, without a trainer.

        Args:
            rebuild: Tokenize again what is stored already.

        Returns:
            The store of each source, by split and name: `train/alpaca`.
        """
        stores = self.reader.prepare_all(rebuild=rebuild)
        self.setup("fit")
        if self.reader.sources("test"):
            self.setup("test")
        return stores

    def _read(self, split: Split) -> None:
        """Tokenize a split, and write its counts into the report."""
        self.report.sources |= {f"{split}/{part.name}": part.report for part in self.reader.examples(split)}
        self.reader.check_left(split)

    def _read_training_data(self) -> None:
        self._read("train")
        _ = self.blend  # refuses a weight that leaves a source without an example
        if self.trainer is None or self.spec.packing != "auto":  # else the model has not decided yet in this run
            _ = self.planner

    def _open_streams(self) -> None:
        """Find the format of every streamed source; their records are read when they are trained on."""
        if self.trainer is not None:
            _ = self._run_length.steps_of_a_stream  # refuses a run without an end
        if not self._streams:
            sources = self.spec.sources_of("train")
            rank_zero_info(describe_streams(sources, self.spec.blend))
            self._streams = open_streams(sources, self.builder, self.spec.limits)
            self.report.blend_unit = stream_share_unit(self.spec.blend)
            self.report.sources |= {f"train/{stream.name}": stream.report for stream in self._streams}

    @property
    def _decided_layout(self) -> Layout | None:
        return decided_layout(getattr(self.trainer, "lightning_module", None), self.spec.packing)

    @property
    def layout(self) -> Layout:
        """How documents share rows; without a model, `packing: auto` counts as `best_fit`.

        Raises:
            RuntimeError: If the trainer's model has not decided about `packing: auto` yet.
        """
        if self._decided_layout is None:
            raise RuntimeError("data.packing: auto is decided when the model is loaded; no epoch can be planned before")
        return self._decided_layout

    @functools.cached_property
    def blend(self) -> EpochBlend:
        """Chooses the examples of each training epoch.

        Raises:
            UserError: If the sources are streamed, or a weight leaves a source without an example.
        """
        if self.spec.streams:
            raise UserError("data.sources: streamed sources are packed during training, so they have no epoch plan")
        parts, sources = self.reader.examples("train"), self.spec.sources_of("train")
        return EpochBlend(parts, [sources[part.name] for part in parts], self.spec.blend, self.spec.seed)

    @functools.cached_property
    def planner(self) -> EpochPlanner:
        """Plans the training epochs; made once, when the layout is decided. Writes the first epoch into the report."""
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
        """The training rows, as the trainer is set now."""
        if not self.spec.streams:
            return PlannedRows(self.planner, self.spec.sources_of("train"), self._topology, self._run_length)
        return StreamedRows(self._streams, self.spec, self.layout.packing, self._topology, self._run_length)

    @property
    def packs(self) -> bool:
        """Whether a row may hold more than one document; if rows of single documents are planned, whether one does."""
        if self.kind.documents_per_example > 1:
            return self.layout.packing != "none"
        return self.rows.packs

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps that the run will take."""
        return self.rows.num_optimizer_steps

    @property
    def _topology(self) -> Topology:
        run, alone = self.trainer, self.topology
        if run is None:
            return alone
        return replace(alone, accumulate=run.accumulate_grad_batches, world_size=run.world_size, rank=run.global_rank)

    @property
    def _run_length(self) -> RunLength:
        run = self.trainer
        return RunLength() if run is None else RunLength(run.max_epochs, run.max_steps, run.limit_train_batches)

    def state_dict(self) -> dict[str, Any]:
        """Return what the order of the rows depends on, for a checkpoint."""
        tokens = self.blend.examples.fingerprint if "train" in self.reader.read else None
        template, rows_per_step = str(self.tokenizer.chat_template), self._topology.rows_per_step
        return row_order(self.spec, self.layout, rows_per_step=rows_per_step, tokens=tokens, chat_template=template)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint's position means the same rows here."""
        check_row_order(state_dict, self.state_dict())

    def train_dataloader(self) -> TrainLoader | StreamLoader:
        """Return this rank's micro-batches.

        Raises:
            UserError: If the trainer would change the plan while it runs.
        """
        trainer = self.trainer
        if getattr(trainer, "overfit_batches", 0):
            raise UserError(
                "trainer.overfit_batches: not available, because the epoch plan decides the batches; remove it, and "
                "set max_examples of a source"
            )
        if any(isinstance(each, GradientAccumulationScheduler) for each in getattr(trainer, "callbacks", [])):
            raise UserError(
                "trainer.callbacks: GradientAccumulationScheduler cannot be used, because the epoch plan requires a "
                "constant trainer.accumulate_grad_batches; remove it"
            )
        loader = self.rows.loader(self._collate)
        if isinstance(loader, TrainLoader) and trainer is not None and not self.blend.repeats:
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # Lightning takes every epoch to be as long as the first
            loader.set_epoch(trainer.current_epoch)
        return loader

    def val_dataloader(self) -> list[EvaluationLoader]:
        """Return a loader for each validation source."""
        return [self.evaluation_loader(part) for part in self.reader.read.get("val", [])]

    def test_dataloader(self) -> list[EvaluationLoader]:
        """Return a loader for each test source."""
        return [self.evaluation_loader(part) for part in self.reader.examples("test")]

    def predict_dataloader(self) -> PromptLoader:
        """Return this rank's prompts in batches."""
        prompts = self.prompts()
        if not prompts:
            raise UserError("data: set predict_sources, val_sources or val_fraction; there is nothing to predict on")
        topology = self._topology
        return PromptLoader(prompts, self.spec.batch_size, rank=topology.rank, world_size=topology.world_size)

    def source_names(self, split: Split) -> list[str]:
        """Return the names of the sources of a split that was read, in the order of its loaders."""
        return [part.name for part in self.reader.read.get(split, [])]

    def prompts(self) -> PromptBatch:
        """Return a prompt for each record that `predict` answers, with the record's last answer as its reference."""
        split: Split = "predict" if self.reader.sources("predict") else "val"
        return prompts_of(self.reader, split, log=rank_zero_info)

    def sample_prompts(self, limit: int) -> PromptBatch:
        """Return the first prompts of the validation data, or of the training data if there is none."""
        return prompts_of(self.reader, "val" if self.reader.sources("val") else "train", limit)

    def evaluation_loader(self, part: SplitExamples) -> EvaluationLoader:
        """Return this rank's share of the examples of one source; packed only if the layout is decided."""
        topology, layout = replace(self._topology, accumulate=1), self._decided_layout
        plan = plan_evaluation(
            part,
            packing="none" if layout is None else layout.packing,
            max_length=self.spec.max_length,
            rows_per_step=topology.rows_per_step,
        )
        return EvaluationLoader(plan, topology, part.store, self._collate)

    def _collate(self, rows: Sequence[Sequence[Document]], denominator: float) -> Batch:
        """Return rows as a micro-batch, in page-locked memory if it is copied to a GPU."""
        batch = self.kind.collate(rows, layout=self.layout, pad_token_id=self.pad_token_id, denominator=denominator)
        note_sums(batch, rows, self.kind.weights(batch))
        strategy = getattr(self.trainer, "strategy", None)
        return pinned(batch) if strategy is not None and strategy.root_device.type == "cuda" else batch
