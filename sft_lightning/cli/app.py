"""LightningCLI for this trainer: the keys, the links between them, and how a run is built from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import class_from_function
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from sft_lightning.cli.arguments import names_another_optimizer, shows_help, value_of
from sft_lightning.cli.defaults import (
    DEFAULT_OPTIMIZER,
    TRAINER_DEFAULTS,
    default_run_folder,
    with_default_callbacks,
)
from sft_lightning.cli.parsing import CommandParser, clear_message
from sft_lightning.compat.jsonargparse import is_about_a_value, known_keys
from sft_lightning.compat.lightning.cli import CommandLine
from sft_lightning.data.datamodule import SFTDataModule, data_from_keys
from sft_lightning.data.pairs.kind import pair_data_from_keys
from sft_lightning.data.plan.epoch_plan import Topology
from sft_lightning.errors import UserError
from sft_lightning.strategies.names import check_name
from sft_lightning.strategies.registry import register_strategies
from sft_lightning.training.checkpoint import AtomicCheckpointIO, check_run_folder
from sft_lightning.training.module import CausalLMModule, model_from_keys
from sft_lightning.training.preference.module import preference_model_from_keys

register_strategies()


class SFTCommandLine(CommandLine):
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
        self._own_optimizer = names_another_optimizer(args)
        # Reading the sources for what they say of each key takes a quarter of a second, and only help shows it.
        set_parsing_settings(docstring_parse_attribute_docstrings=shows_help(args))
        is_preference = value_of(args, "task") == "dpo"  # decides which keys there are: known before parsing
        super().__init__(
            command,
            args,
            model_class=class_from_function(preference_model_from_keys if is_preference else model_from_keys),
            datamodule_class=class_from_function(pair_data_from_keys if is_preference else data_from_keys),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=CommandParser,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=TRAINER_DEFAULTS,
        )

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

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; a value that a config class refuses is the user's, not ours."""
        try:
            if self.runs_trainer:
                super().instantiate_classes()
            else:
                self.config_init = self.parser.instantiate(self.config)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError) or not is_about_a_value(error):
                raise
            raise UserError(clear_message(str(error), known_keys(self.parser) or ())) from error

    @property
    def module(self) -> CausalLMModule:
        """The configured module; its weights are not loaded yet.

        Raises:
            UserError: If the configuration trains something else.
        """
        module = self.setting(self.config_init, "model")
        if not isinstance(module, CausalLMModule):
            raise UserError(f"task: {self._command} works with a CausalLMModule (got {type(module).__name__})")
        return module

    @property
    def data(self) -> SFTDataModule:
        """The data of a command that runs no trainer, planned for the devices that the configuration speaks of."""
        data = self.setting(self.config_init, "data")
        if not isinstance(data, SFTDataModule):
            raise TypeError(f"expected an SFTDataModule, found a {type(data).__name__}")
        trainer = self.setting(self.config_init, "trainer")
        data.topology = Topology(
            batch_size=data.spec.batch_size,
            accumulate=trainer["accumulate_grad_batches"],
            world_size=_num_devices(trainer["devices"]) * trainer["num_nodes"],
        )
        return data

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with our defaults where the user has set nothing."""
        config = self.setting(self.config_init, "trainer")
        root = Path(config["default_root_dir"] or default_run_folder(self.setting(self.config, "config")))
        config["default_root_dir"] = str(root)
        if config["logger"] in (None, True):
            config["logger"] = TensorBoardLogger(root, name="", version="")
        self.setting(self.config, "trainer")["default_root_dir"] = str(root)  # for config.yaml, which can be run again
        if config["max_epochs"] is None and config["max_steps"] == -1 and config["max_time"] is None:
            config["max_epochs"] = 1
        leaves_results = self._command == "fit" and not config["fast_dev_run"]
        if leaves_results and check_run_folder(root, self.setting(self.config, "ckpt_path")):
            rank_zero_info(f"--ckpt_path last: {root} has no checkpoint yet; the run starts from the beginning")
        check_name(config["strategy"])
        config["callbacks"] = with_default_callbacks(
            config["callbacks"],
            progress_bar=config["enable_progress_bar"] is not False,
            checkpoints=config["enable_checkpointing"] is not False,
        )
        if self._command != "fit":
            self.save_config_callback = None
        trainer = super().instantiate_trainer(**kwargs)
        _check_precision(config["precision"], trainer.precision)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer


def _check_precision(asked: Any, found: Any) -> None:
    """Check that the trainer computes as the user says; on the CPU, Lightning takes bfloat16 for float16."""
    if str(asked) in ("16", "16-mixed") and found != "16-mixed":
        raise UserError(
            f"trainer.precision: {asked} scales the loss for float16, which needs a GPU, and there is none; set "
            "bf16-mixed, or 32-true"
        )


def _num_devices(devices: Any) -> int:
    """Return how many devices `trainer.devices` speaks of; 1 where only the machine could say (`auto`, -1)."""
    if isinstance(devices, str) and "," in devices:
        devices = [each for each in devices.split(",") if each.strip()]
    if isinstance(devices, list):
        return len(devices)
    known = isinstance(devices, int) or (isinstance(devices, str) and devices.strip().isdecimal())
    return max(int(devices), 1) if known else 1


def _first_given(*values: str | None) -> str | None:
    return next((value for value in values if value is not None), None)
