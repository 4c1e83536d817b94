"""DataSpec: the YAML's keys under `data`, checked when it is made and never changed afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_plan import PackingSetting
from sft_lightning.data.plan.split_examples import LengthLimits, Overlong
from sft_lightning.data.plan.split_reader import Sources, Split, SplitOptions
from sft_lightning.data.plan.splits import Compat
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.tokens.examples import MalformedPolicy
from sft_lightning.data.tokens.store_cache import default_store_dir
from sft_lightning.errors import UserError
from sft_lightning.types import LossOn

Task = Literal["sft", "pretrain", "dpo"]


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The data of a run: the keys under `data`.

    Raises:
        UserError: If a value is out of range, or two keys contradict each other.
    """

    sources: dict[str, SourceConfig] | None = None
    """Training sources by name. If one is `streaming`, all are read while training, and `weight` is a share."""

    val_sources: dict[str, SourceConfig] | None = None
    """Validation sources by name; each has its own loss in the logs."""

    val_fraction: float = 0.0
    """Share of each training source to hold out for validation, instead of `val_sources`."""

    test_sources: dict[str, SourceConfig] | None = None
    """Sources of the `test` command."""

    predict_sources: dict[str, SourceConfig] | None = None
    """Sources of the `predict` command; default: the validation data."""

    blend: BlendConfig = BlendConfig()  # noqa: RUF009 (frozen)
    """How the weights of the sources are read."""

    data_split: str | None = None
    """Proportions of the training stages that share the data, such as `2,4,4`; a source with `sft_only` is not
    divided."""

    data_split_part: int = 0
    """The stage that this run trains, from 0."""

    compat: Compat | None = None
    """`deepspeed_chat`: divide the records as DeepSpeed-Chat does, validation sources too."""

    template: str = "chat_template"
    """A named template, `chat_template` (the tokenizer's own), or a `.jinja` file."""

    loss_on: LossOn = "assistant"
    """Which tokens are supervised: those of every answer, of the last answer, or all."""

    max_length: int = 2048
    """Tokens per packed row."""

    min_length: int = 0
    """Examples with fewer tokens are dropped, and counted."""

    overlong: Overlong = "error"
    """What to do with an example longer than `max_length`: stop, drop it, or truncate it; always counted."""

    malformed: MalformedPolicy = "error"
    """What to do with a record that does not match its format: stop, or drop it; always counted."""

    packing: PackingSetting = "best_fit"
    """`best_fit` packs whole examples into rows. `concat` writes all examples one after the other and cuts every
    `max_length` tokens. `none` gives each example its own row. `auto` is `best_fit` if a check of the loaded
    model verifies that documents of a row do not see each other, else `none`. Packed documents never see each other."""

    batch_size: int = 1
    """Rows per micro-batch and device."""

    store_dir: str | None = None
    """Folder of tokenized sources, which later runs reuse; default: in the user's cache folder."""

    task: Task = "sft"
    """Set by the top-level `task`."""

    tokenizer_name_or_path: str | None = None
    """Set by the model's."""

    add_tokens: list[str] | None = None
    """Set by the model's."""

    add_special_tokens: list[str] | None = None
    """Set by the model's."""

    trust_remote_code: bool = False
    """Set by the model's."""

    seed: int = 0
    """Set by `seed_everything`."""

    def __post_init__(self) -> None:
        for key, value in {"max_length": self.max_length, "batch_size": self.batch_size}.items():
            if value < 1:
                raise UserError(f"data.{key}: must be at least 1 (got {value})")
        if self.val_sources and self.val_fraction:
            raise UserError(
                "data: set val_sources or val_fraction, not both "
                f"(got {sorted(self.val_sources)} and {self.val_fraction})"
            )
        _ = self.split_options
        self._check_streamed_sources()

    @property
    def splits(self) -> Mapping[Split, Sources]:
        """The sources of each split."""
        splits: tuple[Split, ...] = ("train", "val", "test", "predict")
        return {split: self.sources_of(split) for split in splits}

    def sources_of(self, split: Split) -> Sources:
        """Return the sources that the YAML gives for a split, by name."""
        named: Mapping[Split, dict[str, SourceConfig] | None] = {
            "train": self.sources,
            "val": self.val_sources,
            "test": self.test_sources,
            "predict": self.predict_sources,
        }
        return named[split] or {}

    @property
    def streams(self) -> bool:
        """Whether the training sources are read while training; if one is `streaming`, all are."""
        return any(source.streaming for source in self.sources_of("train").values())

    @property
    def split_options(self) -> SplitOptions:
        """How the records of each source are divided among splits and training stages."""
        return SplitOptions(
            val_fraction=self.val_fraction,
            data_split=self.data_split,
            data_split_part=self.data_split_part,
            compat=self.compat,
            seed=self.seed,
        )

    @property
    def limits(self) -> LengthLimits:
        """Which lengths of examples are kept."""
        return LengthLimits(
            max_length=self.max_length,
            min_length=self.min_length,
            overlong=self.overlong,
            cuts_examples=self.packing == "concat",
        )

    @property
    def store_folder(self) -> Path:
        """The folder of tokenized sources."""
        return Path(self.store_dir).expanduser() if self.store_dir else default_store_dir()

    def _check_streamed_sources(self) -> None:
        """Refuse what needs the number of records, which is unknown for a streamed source."""
        others: tuple[Split, ...] = ("val", "test", "predict")
        for split in others:
            for name, config in self.sources_of(split).items():
                if config.streaming:
                    raise UserError(
                        f"data.{split}_sources.{name}.streaming: true, but only training sources can be streamed; "
                        "remove it, and set max_examples if the source is large"
                    )
        streamed = [name for name, config in self.sources_of("train").items() if config.streaming]
        if not streamed:
            return
        conflict = f"cannot be combined with data.sources.{streamed[0]}.streaming: true"
        if self.val_fraction:
            raise UserError(f"data.val_fraction: {self.val_fraction} {conflict}; use data.val_sources instead")
        if self.data_split is not None:
            raise UserError(f"data.data_split: {self.data_split!r} {conflict}; divide the files instead")
        for name, config in self.sources_of("train").items():
            if config.max_epochs != 1.0:
                raise UserError(
                    f"data.sources.{name}.max_epochs: {config.max_epochs} {conflict}; set trainer.max_steps instead"
                )
