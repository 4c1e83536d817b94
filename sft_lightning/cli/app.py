"""LightningCLI for the trainer's commands: links, defaults, run folder, and errors that say the way out.

The one module that may import `callbacks`.
"""

from __future__ import annotations

import atexit
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from transformers.utils.logging import disable_progress_bar

import callbacks as observers
from sft_lightning.cli.parsing import CommandParser, clear_message, known_keys
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.datamodule import PairDataModule
from sft_lightning.data.plan.epoch_plan import Topology
from sft_lightning.errors import UserError
from sft_lightning.strategies.names import check_name, register_strategies
from sft_lightning.strategies.preemption import Preemption
from sft_lightning.training.checkpoint import AtomicCheckpointIO, check_run_folder
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.preference.module import DPOModule

register_strategies()

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
    atexit.register(_leave_process_group)
    SFTCommandLine(command, list(args))


def _leave_process_group() -> None:
    """End gloo's threads before the interpreter ends, which may abort in them; NCCL's group is Lightning's affair."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def quiet_libraries() -> None:
    """Silence what the libraries say of things that are so on purpose, or that are advertisements."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip" not in record.getMessage()
    )
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # the seed stands in config.yaml
    logging.getLogger("lightning.pytorch.strategies.deepspeed").setLevel(logging.WARNING)  # it says so of each rank
    # LLM.int8 rounds float32 to float16 on its way and says so at every matrix product.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bar()
    for message in (
        r".*does not have many workers.*",  # tokens are already in memory: workers would only copy them
        r".*smaller than the logging interval.*",
        r".*LeafSpec.*",
        r".*`is_gradient_checkpointing` is deprecated.*",
        r".*Total length of `list` across ranks is zero.*",  # no validation data
        r".*exists and is not empty.*",  # we refuse to overwrite a run ourselves
        r".*there is no last checkpoint available.*",  # we say so ourselves
        r".*LightningCLI's args parameter is intended.*",  # `sys.argv` must stay whole: other ranks are started with it
        r".*sync_dist=True.*",  # what we log is of all processes already
        r".*DeepSpeed handles gradient clipping internally.*",  # as the configuration that it is given says
        r".*`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated.*",  # DeepSpeed's calls
    ):
        warnings.filterwarnings("ignore", message=message)


class SFTCommandLine(LightningCLI):
    """A configuration, and for a trainer's command the run that it describes.

    Args:
        command: A method of the trainer to run, or the name of a command that only wants what the configuration builds.
        args: What follows the command on the command line.
        add_options: Adds options of its own to the parser of such a command.
    """

    def __init__(
        self, command: str, args: list[str], add_options: Callable[[ArgumentParser], None] | None = None
    ) -> None:
        self._command = command
        self._add_options = add_options
        self._own_optimizer = _brings_an_optimizer(args)
        # Reading the sources for what they say of each key takes a quarter of a second, and only help shows it.
        set_parsing_settings(docstring_parse_attribute_docstrings=_shows_help(args))
        run = self._runs = command in self.subcommands()
        is_preference = _given(args, "task") == "dpo"  # decides which keys there are: known before parsing
        super().__init__(
            DPOModule if is_preference else CausalLMModule,
            PairDataModule if is_preference else SFTDataModule,
            args=[command, *args] if run else args,
            run=run,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=CommandParser,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "gradient_clip_val": 1.0,
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
            },
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # Only the command that was asked for: building the other three parsers would triple the time to start.
        every = self.subcommands()
        self.subcommands = lambda: {self._command: every[self._command]}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `task`, and link what the model and the data must agree on."""
        parser.add_argument(
            "--task",
            type=Literal["sft", "pretrain", "dpo"],
            default="sft",
            help="sft: conversations through a template; pretrain: plain documents, every token supervised; dpo: pairs "
            "of a better and a worse answer.",
        )
        if self._add_options is not None:
            self._add_options(parser)
        parser.set_defaults({"model.optimizer": None if self._own_optimizer else DEFAULT_OPTIMIZER})
        parser.link_arguments("task", "data.task")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        for key in ("trust_remote_code", "add_tokens", "add_special_tokens"):
            parser.link_arguments(f"model.{key}", f"data.{key}")
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
            if self._runs:
                super().instantiate_classes()
            else:
                self.config_init = self.parser.instantiate(self.config)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError) or not re.search("Parser key|Does not validate", str(error)):
                raise
            raise UserError(clear_message(str(error), known_keys(self.parser))) from error

    @property
    def module(self) -> CausalLMModule:
        """The configured module; its weights are not loaded yet.

        Raises:
            UserError: If the configuration trains something else.
        """
        module = self._get(self.config_init, "model")
        if not isinstance(module, CausalLMModule):
            raise UserError(f"task: {self._command} works with a CausalLMModule (got {type(module).__name__})")
        return module

    @property
    def data(self) -> SFTDataModule:
        """The data of a command that runs no trainer, planned for the devices that the configuration speaks of."""
        data = self._get(self.config_init, "data")
        if not isinstance(data, SFTDataModule):
            raise TypeError(f"expected an SFTDataModule, found a {type(data).__name__}")
        trainer = self._get(self.config_init, "trainer")
        data.topology = Topology(
            batch_size=data.batch_size,
            accumulate=trainer["accumulate_grad_batches"],
            world_size=_num_devices(trainer["devices"]) * trainer["num_nodes"],
        )
        return data

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with our defaults where the user has set nothing."""
        config = self._get(self.config_init, "trainer")
        root = Path(config["default_root_dir"] or _default_run_folder(self._get(self.config, "config")))
        config["default_root_dir"] = str(root)
        if config["logger"] in (None, True):
            config["logger"] = TensorBoardLogger(root, name="", version="")
        self._get(self.config, "trainer")["default_root_dir"] = str(root)  # for config.yaml, which can be run again
        if config["max_epochs"] is None and config["max_steps"] == -1 and config["max_time"] is None:
            config["max_epochs"] = 1
        leaves_results = self._command == "fit" and not config["fast_dev_run"]
        if leaves_results and check_run_folder(root, self._get(self.config, "ckpt_path")):
            rank_zero_info(f"--ckpt_path last: {root} has no checkpoint yet; the run starts from the beginning")
        check_name(config["strategy"])
        config["callbacks"] = _with_default_callbacks(config)
        if self._command != "fit":
            self.save_config_callback = None
        trainer = super().instantiate_trainer(**kwargs)
        _check_precision(config["precision"], trainer.precision)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer


def _with_default_callbacks(config: Any) -> list[Callback]:
    """Return the user's callbacks, and ours of every kind that the user did not bring."""
    given = config["callbacks"] or []
    given = list(given) if isinstance(given, Iterable) else [given]
    defaults: list[Callback] = [
        observers.HyperParameters(),
        observers.DataSummary(),
        observers.FirstStep(),
        observers.SampleGeneration(),
        observers.AdapterExport(),
        observers.ModelExport(),
        observers.Throughput(),
        observers.PredictionWriter(),
        Preemption(),
    ]
    if config["enable_progress_bar"] is not False:
        defaults.append(observers.RunProgress())
    for default in defaults:
        kind = ProgressBar if isinstance(default, ProgressBar) else type(default)
        if not any(isinstance(callback, kind) for callback in given):
            given.append(default)
    return given if config["enable_checkpointing"] is False else [*given, *_default_checkpoints(given)]


def _default_checkpoints(given: Sequence[Callback]) -> list[Callback]:
    """Return what saves at every epoch's end and, in long epochs, by the clock: nothing beside the user's own."""
    brought = [callback for callback in given if isinstance(callback, ModelCheckpoint)]
    if not all(isinstance(callback, observers.TimedCheckpoint) for callback in brought):
        return []
    timed = [] if brought else [observers.TimedCheckpoint()]
    # Both write `last.ckpt`: without a version counter, which would make it `last-v1.ckpt`.
    return [ModelCheckpoint(filename="{step}", save_last=True, enable_version_counter=False), *timed]


def _check_precision(asked: Any, found: Any) -> None:
    """Check that the trainer computes as the user says; on the CPU, Lightning takes bfloat16 for float16."""
    if str(asked) in ("16", "16-mixed") and found != "16-mixed":
        raise UserError(
            f"trainer.precision: {asked} scales the loss for float16, which needs a GPU, and there is none; set "
            "bf16-mixed, or 32-true"
        )


def _default_run_folder(config_files: Sequence[Any] | None) -> str:
    """`runs/` and the name of the first config file."""
    return f"runs/{Path(str(config_files[0])).stem if config_files else 'sft'}"


def _num_devices(devices: Any) -> int:
    """Return how many devices `trainer.devices` speaks of; 1 where only the machine could say (`auto`, -1)."""
    if isinstance(devices, str) and "," in devices:
        devices = [each for each in devices.split(",") if each.strip()]
    if isinstance(devices, list):
        return len(devices)
    known = isinstance(devices, int) or (isinstance(devices, str) and devices.strip().isdecimal())
    return max(int(devices), 1) if known else 1


def _given(args: Sequence[str], key: str) -> Any:
    """Return what options and config files set a key to, the last of them; the parser says what is wrong in them."""
    found: Any = None
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        option, given, value = arg.partition("=")
        value = value if given else following
        if option == f"--{key}":
            found = value
        elif option in ("--config", "-c"):
            in_file = _in_file(Path(value), key)
            found = found if in_file is None else in_file
    return found


def _in_file(config: Path, key: str) -> Any:
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _shows_help(args: Sequence[str]) -> bool:
    return any(arg == "-h" or arg.startswith(("--help", "--print_config=comments")) for arg in args)


def _brings_an_optimizer(args: Sequence[str]) -> bool:
    """Whether another optimizer than our default is named, which must not inherit the default's arguments."""
    named = [_given(args, f"model.optimizer{suffix}") for suffix in ("", ".class_path")]
    classes = [value["class_path"] if isinstance(value, dict) and "class_path" in value else value for value in named]
    return any(isinstance(each, str) and not each.endswith("torch.optim.AdamW") for each in classes)


def _first_given(*values: str | None) -> str | None:
    return next((value for value in values if value is not None), None)
