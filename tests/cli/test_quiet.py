from __future__ import annotations

import logging
import warnings

import pytest
from lightning.pytorch.utilities import rank_zero_info

from sft_lightning.cli.quiet import is_not_lightnings_tip, quiet_libraries


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("lightning", logging.INFO, "", 0, message, None, None)


def test_only_lightnings_own_advertisements_are_tips() -> None:
    assert not is_not_lightnings_tip(record("💡 Tip: For seamless cloud logging and experiment tracking, try …"))
    assert is_not_lightnings_tip(record("adapter: runs/Tipping/adapter (verified)"))


def test_a_run_folder_with_tip_in_its_name_is_still_reported(caplog: pytest.LogCaptureFixture) -> None:
    quiet_libraries()
    with caplog.at_level(logging.INFO):
        rank_zero_info("model: runs/Tipping/model")
        rank_zero_info("💡 Tip: For seamless cloud uploads and versioning, try installing …")
    assert "runs/Tipping/model" in caplog.text
    assert "seamless" not in caplog.text


def test_expected_warnings_are_silent_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
        warnings.warn("the tokenizer has no chat template", stacklevel=1)
    assert [str(each.message) for each in caught] == ["the tokenizer has no chat template"]
