"""LightningCLI for the trainer's commands: links, defaults, run folder, and errors that say the way out.

The one module that may import `callbacks`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from transformers.utils.logging import disable_progress_bar

import callbacks as observers
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.errors import UserError, did_you_mean
from sft_lightning.training.checkpoint import AtomicCheckpointIO
from sft_lightning.training.module import CausalLMModule

set_parsing_settings(docstring_parse_attribute_docstrings=True)

DEFAULT_OPTIMIZER = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 2e-4, "weight_decay": 0.0, "fused": True},
}


def run_trainer(command: str, args: Sequence[str]) -> None:
    """Run one of the trainer's methods as YAML and options say.

    Args:
        command: fit, validate, test or predict.
        args: What follows the command on the command line.

    Raises:
        UserError: If the configuration or the data is wrong.
    """
    quiet_libraries()
    SFTCommandLine(command, list(args))


def quiet_libraries() -> None:
    """Silence what the libraries say of things that are so on purpose, or that are advertisements."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip" not in record.getMessage()
    )
    if not sys.stderr.isatty():
        disable_progress_bar()
    for message in (
        r".*does not have many workers.*",  # tokens are already in memory: workers would only copy them
        r".*smaller than the logging interval.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*LeafSpec.*",
        r".*`is_gradient_checkpointing` is deprecated.*",
        r".*Total length of `list` across ranks is zero.*",  # no validation data
        r".*exists and is not empty.*",  # we refuse to overwrite a run ourselves
    ):
        warnings.filterwarnings("ignore", message=message)


class CommandParser(LightningArgumentParser):
    """A parser whose errors are one message with the nearest valid key."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the message as a UserError."""
        raise UserError(clear_message(message, _keys(self))) from ex


class SFTCommandLine(LightningCLI):
    """One trainer command, from its arguments to the end of the run."""

    def __init__(self, command: str, args: list[str]) -> None:
        self._command = command
        argv, sys.argv = sys.argv, sys.argv[:1]  # LightningCLI warns of arguments that are not its own
        try:
            super().__init__(
                CausalLMModule,
                SFTDataModule,
                args=[command, *args],
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_class=CommandParser,
                load_from_checkpoint_support=False,
                save_config_callback=SaveConfigCallback,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={
                    "max_epochs": 1,
                    "gradient_clip_val": 1.0,
                    "log_every_n_steps": 10,
                    "num_sanity_val_steps": 0,
                    "use_distributed_sampler": False,
                },
            )
        finally:
            sys.argv = argv

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # Only the command that was asked for: building the other three parsers would triple the time to start.
        every = self.subcommands()
        self.subcommands = lambda: {self._command: every[self._command]}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `task`, and link what the model and the data must agree on."""
        parser.add_argument(
            "--task",
            type=Literal["sft", "pretrain"],
            default="sft",
            help="sft: conversations through a template; pretrain: plain documents, every token supervised.",
        )
        parser.set_defaults({"model.optimizer": DEFAULT_OPTIMIZER})
        parser.link_arguments("task", "data.task")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")
        parser.link_arguments(
            ("model.tokenizer_name_or_path", "model.model_name_or_path"),
            "data.tokenizer_name_or_path",
            compute_fn=_first_given,
        )

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint: what the user wrote wins."""

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; a value that a config class refuses is the user's, not ours."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError) or not re.search("Parser key|Does not validate", str(error)):
                raise
            raise UserError(clear_message(str(error), _keys(self.parser))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with our defaults where the user has set nothing."""
        config = self._get(self.config_init, "trainer")
        root = Path(config["default_root_dir"] or _default_run_folder(self._get(self.config, "config")))
        config["default_root_dir"] = str(root)
        if config["logger"] in (None, True):
            config["logger"] = TensorBoardLogger(root, name="", version="")
        resuming = self._get(self.config, "ckpt_path")
        if self._command == "fit" and not resuming and not config["fast_dev_run"]:
            _refuse_to_overwrite(root)
        config["callbacks"] = _with_default_callbacks(config)
        if self._command != "fit":
            self.save_config_callback = None
        trainer = super().instantiate_trainer(**kwargs)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer


def _with_default_callbacks(config: Any) -> list[Callback]:
    """Return the user's callbacks, and ours of every kind that the user did not bring."""
    given = config["callbacks"] or []
    given = list(given) if isinstance(given, Iterable) else [given]
    defaults: list[Callback] = [
        observers.DataSummary(),
        observers.SampleGeneration(),
        observers.AdapterExport(),
        observers.ModelExport(),
        observers.Throughput(),
        observers.PredictionWriter(),
    ]
    if config["enable_progress_bar"] is not False:
        defaults.append(observers.RunProgress())
    if config["enable_checkpointing"] is not False:
        defaults.append(ModelCheckpoint(filename="{step}", auto_insert_metric_name=True, save_last=True))
    kinds = (ProgressBar, ModelCheckpoint)
    for default in defaults:
        kind = next((kind for kind in kinds if isinstance(default, kind)), type(default))
        if not any(isinstance(callback, kind) for callback in given):
            given.append(default)
    return given


def _default_run_folder(config_files: Sequence[Any] | None) -> str:
    """`runs/` and the name of the first config file."""
    return f"runs/{Path(str(config_files[0])).stem if config_files else 'sft'}"


def _refuse_to_overwrite(root: Path) -> None:
    results = [name for name in ("checkpoints", "adapter", "model") if (root / name).exists()]
    if results:
        raise UserError(
            f"trainer.default_root_dir: {str(root)!r} holds the {' and '.join(results)} of an earlier run; "
            "continue it with --ckpt_path last, "
            "choose another folder, or remove it"
        )


def _first_given(*values: str | None) -> str | None:
    return next((value for value in values if value is not None), None)


# --- errors ----------------------------------------------------------------------------------------------------------

_UNKNOWN_KEY = re.compile(
    r"(?:does not accept option|Option) '(?P<quoted>[^']+)'|unrecognized arguments: --(?P<argument>[^\s=]+)"
)
_SAID_BEFORE = re.compile(r"(?P<key>[\w.]+): no such key\.(?P<near>( Did you mean '[^']+'\?)?)")
_OWNER = re.compile(r'Parser key "(?P<key>[^"]+)":\s*')
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes.*?Errors:\s*- (?P<first>.*?)\s+- Expected a .*", re.S
)
_CHOICES = re.compile(r"Expected a typing\.Literal\[(?P<choices>[^\]]*)\]\. Got value: (?P<value>.*)")
_TYPE = re.compile(r"Expected a <class '(?P<type>\w+)'>\. Got value: (?P<value>.*)")


def clear_message(message: str, keys: Sequence[str]) -> str:
    """Shorten what jsonargparse says to the key, the value and the way out.

    Args:
        message: As jsonargparse composed it.
        keys: The valid keys, dotted; the nearest to an unknown one is named.
    """
    owner = _OWNER.search(message)
    prefix = f"{owner['key']}." if owner else ""
    before = _SAID_BEFORE.search(message)
    if before:
        key = before["key"] if before["key"].startswith(prefix) else prefix + before["key"]
        return f"{key}: no such key.{before['near']}"
    unknown = _UNKNOWN_KEY.search(message)
    if unknown:
        key = unknown["quoted"] or unknown["argument"]
        endings = sorted({known.rsplit(".", 1)[-1] for known in keys})
        near = did_you_mean(key, keys) or did_you_mean(key.rsplit(".", 1)[-1], endings)
        return f"{key if key.startswith(prefix) else prefix + key}: no such key.{near}"
    text = _UNION.sub(lambda union: union["first"], message)
    if owner and text.replace(owner[0], "").lstrip().startswith(owner["key"]):
        text = text.replace(owner[0], "")  # our own message already names the key
    text = _OWNER.sub(lambda found: f"{found['key']}: ", text)
    text = _CHOICES.sub(lambda found: f"must be one of {found['choices']} (got {found['value']!r})", text)
    text = _TYPE.sub(lambda found: f"must be of type {found['type']} (got {found['value']!r})", text)
    return re.sub(r"\s*\n\s*", " ", text.strip())


def _keys(parser: ArgumentParser) -> list[str]:
    """Return the dotted keys that a parser knows, those of its subcommands and of nested dataclasses included."""
    keys: list[str] = []
    for action in parser._actions:
        choices = getattr(action, "_name_parser_map", None)
        if choices:
            for subparser in choices.values():
                keys += _keys(subparser)
        elif action.dest and action.dest != "==SUPPRESS==":
            keys.append(action.dest)
            keys += [f"{action.dest}.{name}" for name in _fields_in(getattr(action, "_typehint", None))]
    return keys


def _fields_in(typehint: Any) -> list[str]:
    """Return the field names of the dataclasses in a type such as `AdapterConfig | None`."""
    names = [field.name for field in dataclasses.fields(typehint)] if dataclasses.is_dataclass(typehint) else []
    for part in getattr(typehint, "__args__", ()):
        names += _fields_in(part)
    return names
