"""Covers the key `model.adapter.peft_config` of sft_lightning.models.adapters.config on the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from sft_lightning.models.adapters.config import AdapterConfig


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AdapterConfig, "adapter")
    return parser


def test_another_method_of_peft_is_named_by_its_class_path(parser: ArgumentParser) -> None:
    args = ["--adapter.peft_config=peft.IA3Config", "--adapter.peft_config.target_modules=[k_proj]"]
    config = parser.instantiate(parser.parse_args(args))["adapter"].peft_config
    assert type(config).__name__ == "IA3Config"
    assert config.target_modules == {"k_proj"}


@pytest.mark.parametrize("value", ["peft.PeftModel", "torch.optim.AdamW", "{r: 4}", "5"])
def test_a_class_that_is_no_configuration_of_peft_is_refused(parser: ArgumentParser, value: str) -> None:
    with pytest.raises(ArgumentError, match="peft_config"):
        parser.parse_args([f"--adapter.peft_config={value}"])


def test_a_key_that_the_method_does_not_have_is_refused(parser: ArgumentParser) -> None:
    with pytest.raises(ArgumentError, match="target_modlues"):
        parser.parse_args(["--adapter.peft_config=peft.IA3Config", "--adapter.peft_config.target_modlues=[k_proj]"])


def test_the_key_does_not_import_peft() -> None:
    code = (
        "import sys; from jsonargparse import ArgumentParser; from sft_lightning.models.adapters.config import "
        "AdapterConfig; parser = ArgumentParser(); parser.add_class_arguments(AdapterConfig, 'adapter'); "
        "parser.parse_args(['--adapter.r=8']); print('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
