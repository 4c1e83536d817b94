"""SFTDataModule: wires sources → examples → blend → plan → loaders."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.batches.collate import collate
from sft_lightning.data.batches.generation_prompts import PromptBatch, PromptLoader, make_prompts
from sft_lightning.data.batches.loader import Collate, EvaluationLoader, TrainLoader
from sft_lightning.data.batches.stream_source import SourceStream, check_streamed, describe_streamed, share_unit
from sft_lightning.data.batches.streaming import StreamLoader
from sft_lightning.data.batches.training_rows import PlannedRows, RunLength, StreamedRows, TrainingRows
from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_plan import EpochPlan, Packing, PackingSetting, Topology
from sft_lightning.data.plan.epoch_planner import EpochPlanner, plan_evaluation
from sft_lightning.data.plan.split_examples import Corpora, Corpus, LengthLimits, Overlong
from sft_lightning.data.plan.split_reader import Sources, Split, SplitOptions, SplitReader
from sft_lightning.data.plan.splits import Compat
from sft_lightning.data.sources.report import DataReport
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.templates.binding import bind_template, special_tokens, stop_token_id
from sft_lightning.data.templates.template import DocumentTemplate, Template
from sft_lightning.data.tokens.examples import ExampleBuilder, MalformedPolicy
from sft_lightning.data.tokens.store_cache import Prepared, default_store_dir
from sft_lightning.errors import UserError
from sft_lightning.tokenizer import load_tokenizer
from sft_lightning.types import Batch, LossOn, TokenizedExample

Task = Literal["sft", "pretrain", "dpo"]


class SFTDataModule(LightningDataModule):
    """The data of a run.

    Args:
        sources: Training sources by name; if one is `streaming`, all are read while training and `weight` is a share.
        val_sources: Validation sources by name; each has a loss of its own.
        val_fraction: Instead: the share of each training source to hold out.
        test_sources: Sources of the `test` command.
        predict_sources: Sources of the `predict` command; default: the validation data.
        blend: What the sources' weights mean.
        data_split: Proportions of the stages of training that share the data, such as `2,4,4`; a source with
            `sft_only` is exempt.
        data_split_part: The stage that this run is, from 0.
        compat: `deepspeed_chat`: divide as DeepSpeed-Chat does, validation sources too.
        template: A named template, `chat_template` (the tokenizer's own), or a `.jinja` file.
        loss_on: What is supervised: every answer, the last answer, or all tokens.
        max_length: Tokens per packed row.
        min_length: Tokens below which an example is dropped, and counted.
        overlong: What to do with an example longer than `max_length`; always counted.
        malformed: What to do with a record that does not fit its format; always counted.
        packing: `best_fit` packs whole examples; `concat` writes everything one after the other and cuts; `none` gives
            each example a row; `auto` is `best_fit` if the loaded model is proven to keep the documents of a row apart,
            else `none`. Documents of a row never see each other.
        batch_size: Rows per micro-batch and device.
        store_dir: Where tokenized sources are kept, for this run and the next; default: in the user's cache folder.
        task: Set by the top-level `task`.
        tokenizer_name_or_path: Set by the model's.
        add_tokens: Set by the model's.
        add_special_tokens: Set by the model's.
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
        blend: BlendConfig = BlendConfig(),  # noqa: B008 (frozen)
        data_split: str | None = None,
        data_split_part: int = 0,
        compat: Compat | None = None,
        template: str = "chat_template",
        loss_on: LossOn = "assistant",
        max_length: int = 2048,
        min_length: int = 0,
        overlong: Overlong = "error",
        malformed: MalformedPolicy = "error",
        packing: PackingSetting = "best_fit",
        batch_size: int = 1,
        store_dir: str | None = None,
        task: Task = "sft",
        tokenizer_name_or_path: str | None = None,
        add_tokens: list[str] | None = None,
        add_special_tokens: list[str] | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in {"max_length": max_length, "batch_size": batch_size}.items():
            if value < 1:
                raise UserError(f"data.{key}: must be at least 1 (got {value})")
        if val_sources and val_fraction:
            raise UserError(
                f"data: set val_sources or val_fraction, not both (got {sorted(val_sources)}, {val_fraction})"
            )
        self.sources: Sources = sources or {}
        self.val_sources: Sources = val_sources or {}
        self._other: dict[Split, Sources] = {
            "val": self.val_sources,
            "test": test_sources or {},
            "predict": predict_sources or {},
        }
        self._split_options = SplitOptions(
            val_fraction=val_fraction,
            data_split=data_split,
            data_split_part=data_split_part,
            compat=compat,
            seed=seed,
        )
        self.streams = check_streamed(self.sources, self._other, val_fraction=val_fraction, data_split=data_split)
        """Whether the training data is read while training."""
        self.template_setting = template
        self.loss_on = loss_on
        self.packing_is_open = packing == "auto"
        """Whether the model is still to decide about packing; until it does, rows are planned with `best_fit`."""
        self.limits = LengthLimits(
            max_length=max_length,
            min_length=min_length,
            overlong=overlong,
            packing="best_fit" if packing == "auto" else packing,
        )
        self.blend = blend
        self.malformed: MalformedPolicy = malformed
        self.batch_size = batch_size
        self.store_dir = Path(store_dir).expanduser() if store_dir else default_store_dir()
        self.task = task
        self.tokenizer_name_or_path = tokenizer_name_or_path
        self.add_tokens = add_tokens or []
        self.add_special_tokens = add_special_tokens or []
        self.trust_remote_code = trust_remote_code
        self.seed = seed
        self.report = DataReport(max_length=max_length)
        self.topology = Topology(batch_size=batch_size)
        """How rows are dealt out where there is no trainer to say so."""
        self._corpora: dict[Split, list[Corpus]] = {}
        self._streams: list[SourceStream] = []

    @property
    def max_length(self) -> int:
        """Tokens per packed row."""
        return self.limits.max_length

    # --- tokenizer and template ------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer; `template` makes itself its chat template."""
        return load_tokenizer(
            self.tokenizer_name_or_path,
            trust_remote_code=self.trust_remote_code,
            tokens=self.add_tokens,
            special_tokens=self.add_special_tokens,
        )

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
            loss_on=self.loss_on,
            malformed=self.malformed,
        )

    @functools.cached_property
    def reader(self) -> SplitReader:
        """What reads and tokenizes the splits."""
        return SplitReader(self.sources, self._other, self._split_options, self.builder, self.limits, self.store_dir)

    # --- reading ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read and tokenize what the stage needs; a second call does nothing."""
        if stage == "fit" and self.streams:
            self._open_streams()
        elif stage == "fit" and self._first_time("train"):
            if not sum(corpus.report.examples for corpus in self._corpora["train"]):
                drops = {corpus.name: dict(corpus.report.dropped) for corpus in self._corpora["train"]}
                raise UserError(f"data.sources: no example is left to train on; dropped were {drops}")
            self.planner.report(self.report)
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
            if not (split == "train" and self.streams)
            if not (split == "val" and self.reader.sources(split) is self.sources)  # held out of the training sources
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
            _ = self.num_optimizer_steps  # an error if the run has no end
        if not any(name.startswith("train/") for name in self.report.sources):
            rank_zero_info(describe_streamed(self.sources, self.blend))
            # Tokenizing runs beside training, where samples are tokenized: each needs a tokenizer of its own.
            builder = replace(self.builder, tokenizer=copy.deepcopy(self.tokenizer))
            self._streams = [SourceStream(name, config, builder, self.limits) for name, config in self.sources.items()]
            self.report.blend_unit = share_unit(self.blend)
            self.report.sources |= {f"train/{stream.name}": stream.report for stream in self._streams}

    # --- the plan --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def planner(self) -> EpochPlanner:
        """What plans the training epochs."""
        if self.streams:
            raise UserError("data.sources: streamed sources are planned while training, not ahead; nothing to plan on")
        corpora = self._corpora["train"]
        return EpochPlanner(
            corpora,
            [self.sources[corpus.name] for corpus in corpora],
            blend=self.blend,
            packing=self.limits.packing,
            max_length=self.limits.max_length,
            rows_per_step=self._topology.rows_per_step,
            seed=self.seed,
        )

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of a training epoch."""
        return self.planner.plan(epoch)

    def decide_packing(self, packing: Packing) -> None:
        """Settle `packing: auto`."""
        self.packing_is_open = False
        self._plan_with(packing)

    def _plan_with(self, packing: Packing) -> None:
        """Plan the epochs anew, and write into the report what they hold now."""
        if packing == self.limits.packing:
            return
        self.limits = replace(self.limits, packing=packing)
        if self.__dict__.pop("planner", None) is not None:
            self.planner.report(self.report)

    @property
    def rows(self) -> TrainingRows:
        """What is trained on, row by row, as the trainer is set now."""
        if self.streams:
            return StreamedRows(
                self._streams, self.sources, self.blend, self.limits, self._topology, self._run_length, self.seed
            )
        return PlannedRows(self.planner, self.sources, self._topology, self._run_length)

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
            batch_size=self.batch_size,
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
            "seed": self.seed,
            "packing": self.limits.packing,
            "max_length": self.limits.max_length,
            "global batch (rows)": self._topology.rows_per_step,
            "blend": f"{self.blend.by}, temperature {self.blend.temperature}",
            "weights": [(source.weight, source.max_epochs) for source in self.sources.values()],
            "tokens": self.rows.content if self.streams or "train" in self._corpora else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint's position means the same rows here.

        Raises:
            UserError: If it does not, with what changed.
        """
        if self.packing_is_open and state_dict.get("packing") in ("best_fit", "none"):
            self._plan_with(state_dict["packing"])  # as decided there; the proof is made again
        now = self.state_dict()
        changed = [f"{key}: {old} → {now[key]}" for key, old in state_dict.items() if now[key] != old]
        if changed and (self.streams or "train" in self._corpora):
            raise UserError(
                f"--ckpt_path: the checkpoint's position is one in other data ({'; '.join(changed)}); restore the old "
                "values, or start a new run from its weights with model.adapter.path (or model.model_name_or_path)"
            )

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
        if isinstance(loader, TrainLoader) and trainer is not None and not self.planner.repeats:
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
        return PromptLoader(prompts, self.batch_size, rank=topology.rank, world_size=topology.world_size)

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
        topology = replace(self._topology, accumulate=1)
        plan = plan_evaluation(
            corpus,
            packing="none" if self.packing_is_open else self.limits.packing,  # no model has decided: it is not trained
            max_length=self.limits.max_length,
            rows_per_step=topology.rows_per_step,
        )
        return EvaluationLoader(plan, topology, self._collate(Corpora([corpus]).example))

    def _collate(self, example: Callable[[int, int, int], TokenizedExample]) -> Collate:
        pad_token_id = self.pad_token_id

        def make(plan: EpochPlan, rows: Sequence[int], denominator: float) -> Batch:
            documents = [[example(*document) for document in plan.row(row).tolist()] for row in rows]
            return collate(documents, pad_token_id=pad_token_id, denominator=denominator)

        return make


_NO_SOURCES: Mapping[Split, str] = {
    "train": "data.sources: no source given, so there is nothing to train on",
    "val": "data: set val_sources or val_fraction; there is nothing to validate on",
    "test": "data.test_sources: no source given, so there is nothing to test on",
}
