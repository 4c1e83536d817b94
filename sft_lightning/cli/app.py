"""LightningCLI for this trainer: the keys, the links between them, and the objects that are built from them.

Help and errors must not wait for PEFT, bitsandbytes and the model code: keys are parsed into specs, and each property
imports what it builds from them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from sft_lightning.cli.arguments import GivenArguments, first_given
from sft_lightning.cli.parsing import CommandParser, clear_message
from sft_lightning.cli.saved_config import SavedConfig
from sft_lightning.compat.jsonargparse import is_about_a_value, known_keys
from sft_lightning.compat.lightning.cli import CommandLine
from sft_lightning.data.pairs.spec import PairDataSpec
from sft_lightning.data.plan.epoch_plan import Topology
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError
from sft_lightning.training.spec import PreferenceSpec, TrainingSpec

if TYPE_CHECKING:
    from sft_lightning.data.datamodule import SFTDataModule
    from sft_lightning.training.module import CausalLMModule

DEFAULT_OPTIMIZER: dict[str, Any] = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 2e-4, "weight_decay": 0.0, "fused": True},
}
TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}


class ConfigParser(CommandParser, LightningArgumentParser):
    """A parser of configurations whose errors are one message."""


class SFTCommandLine(CommandLine):
    """A configuration; for fit, validate, test and predict also the run that it describes.

    Args:
        command: A method of the trainer, which is run, or another command, which takes what it needs from the
            properties.
        args: What follows the command on the command line.
        add_options: Adds the options of such a command to the parser.

    Raises:
        UserError: If a key is unknown, or a value is wrong.
    """

    def __init__(
        self, command: str, args: list[str], add_options: Callable[[ArgumentParser], None] | None = None
    ) -> None:
        if not args:
            raise UserError(
                f"{command}: no configuration given; add --config FILE (examples are in configs/) or options such as "
                f"--model.model_name_or_path; python -m sft_lightning {command} --help lists them"
            )
        self._command = command
        self._add_options = add_options
        given = GivenArguments(args)
        self._names_another_optimizer = given.names_another_optimizer()
        self._specs = (PreferenceSpec, PairDataSpec) if given.value_of("task") == "dpo" else (TrainingSpec, DataSpec)
        if given.names_classes():
            import sft_lightning.cli.trainer  # noqa: F401 (our callbacks and strategies may be named without a package)
        # Reading the docstrings of keys takes a quarter of a second, and only help shows them.
        set_parsing_settings(docstring_parse_attribute_docstrings=given.shows_help())
        super().__init__(
            command,
            args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=ConfigParser,
            load_from_checkpoint_support=False,
            save_config_callback=SavedConfig if command == "fit" else None,
        )

    # --- the keys --------------------------------------------------------------------------------------------------

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `trainer`, `model` and `data`."""
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})
        for key, spec in zip(("model", "data"), self._specs, strict=True):
            parser.add_class_arguments(spec, key, fail_untyped=False, sub_configs=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `task` and the command's own options, and link the keys that model and data share."""
        parser.add_argument(
            "--task",
            type=Literal["sft", "pretrain", "dpo"],
            default="sft",
            help="sft: conversations through a template; pretrain: plain documents, every token supervised; dpo: pairs "
            "of a better and a worse answer.",
        )
        if self._add_options is not None:
            self._add_options(parser)
        parser.set_defaults({"model.optimizer": None if self._names_another_optimizer else DEFAULT_OPTIMIZER})
        parser.link_arguments("task", "data.task")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        for key in ("trust_remote_code", "add_tokens", "add_special_tokens"):
            parser.link_arguments(f"model.{key}", f"data.{key}")
        parser.link_arguments(
            ("model.tokenizer_name_or_path", "model.model_name_or_path"),
            "data.tokenizer_name_or_path",
            compute_fn=first_given,
        )

    # --- what is built from them -----------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Build the specs; for a trainer's method also the module, the data and the trainer."""
        try:
            self.config_init = self.parser.instantiate(self.config)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError) or not is_about_a_value(error):
                raise
            raise UserError(clear_message(str(error), known_keys(self.parser) or ())) from error
        if self.runs_trainer:
            self.model, self.datamodule = self.module, self.data_module
            self.trainer = self.instantiate_trainer()

    @property
    def spec(self) -> TrainingSpec:
        """The keys under `model`."""
        spec: TrainingSpec = self.setting(self.config_init, "model")
        return spec

    @cached_property
    def module(self) -> CausalLMModule:
        """The configured module; its weights are not loaded yet."""
        from sft_lightning.training.module import CausalLMModule

        return CausalLMModule(self.spec)

    @cached_property
    def data_module(self) -> SFTDataModule:
        """The configured data."""
        from sft_lightning.data.datamodule import SFTDataModule
        from sft_lightning.data.pairs.kind import Pairs

        spec: DataSpec = self.setting(self.config_init, "data")
        return SFTDataModule(spec, Pairs) if isinstance(spec, PairDataSpec) else SFTDataModule(spec)

    @cached_property
    def data(self) -> SFTDataModule:
        """The configured data, for commands without a trainer: planned for `trainer.devices` and `num_nodes`."""
        trainer, data = self.config_init["trainer"], self.data_module
        data.topology = Topology(
            batch_size=data.spec.batch_size,
            accumulate=trainer["accumulate_grad_batches"],
            world_size=_num_devices(trainer["devices"]) * trainer["num_nodes"],
        )
        return data

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with our defaults where the user has set nothing."""
        from sft_lightning.cli.trainer import complete_config, complete_trainer

        config = self.setting(self.config_init, "trainer")
        checkpoint = complete_config(
            config,
            trains=self._command == "fit",
            config_files=self.setting(self.config, "config"),
            ckpt_path=self.setting(self.config, "ckpt_path"),
        )
        if self.runs_trainer:  # else there is no subcommand, and no key: selftest
            self.config_init[self.subcommand]["ckpt_path"] = checkpoint
        # For config.yaml, which continues the run.
        self.setting(self.config, "trainer")["default_root_dir"] = config["default_root_dir"]
        trainer = super().instantiate_trainer(**kwargs)
        complete_trainer(trainer, config["precision"])
        return trainer


def _num_devices(devices: Any) -> int:
    """Return the number of devices that `trainer.devices` asks for; 1 if it depends on the machine (`auto`, -1)."""
    if isinstance(devices, str) and "," in devices:
        devices = [each for each in devices.split(",") if each.strip()]
    if isinstance(devices, list):
        return len(devices)
    known = isinstance(devices, int) or (isinstance(devices, str) and devices.strip().isdecimal())
    return max(int(devices), 1) if known else 1
