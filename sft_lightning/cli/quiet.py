"""Messages of libraries that are not shown, each with the reason."""

from __future__ import annotations

import logging
import sys
import warnings

from transformers.utils.logging import disable_progress_bar

_LIGHTNING_TIP = "💡 Tip: For seamless cloud "
"""Lightning's two advertisements begin like this."""

_LEVELS = {
    "lightning.fabric.utilities.seed": logging.WARNING,  # the seed is in config.yaml
    "lightning.pytorch.strategies.deepspeed": logging.WARNING,  # one line per rank about the process group
    # LLM.int8 rounds float32 to float16 internally and warns at every matrix product.
    "bitsandbytes.autograd._functions": logging.ERROR,
}
"""Logger → the lowest level that it still shows."""

_WARNINGS = (
    r".*does not have many workers.*",  # tokens are already in memory: workers would only copy them
    r".*smaller than the logging interval.*",  # the first step is always logged
    r".*LeafSpec.*",  # Lightning's use of torch's pytrees
    r".*`is_gradient_checkpointing` is deprecated.*",  # PEFT's use of transformers
    r".*Total length of `list` across ranks is zero.*",  # a run without validation data
    r".*exists and is not empty.*",  # `check_run_folder` refuses to overwrite a run
    r".*there is no last checkpoint available.*",  # `instantiate_trainer` says so
    r".*LightningCLI's args parameter is intended.*",  # `sys.argv` must stay whole: other ranks are started with it
    r".*sync_dist=True.*",  # the logged values are already sums over all processes
    r".*DeepSpeed handles gradient clipping internally.*",  # the DeepSpeed config is given the clipping value
    r".*`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated.*",  # DeepSpeed's calls
)
"""Regular expressions of the warnings that are ignored."""


def quiet_libraries() -> None:
    """Silence messages about intended settings, and advertisements."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_not_lightnings_tip)
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    if not sys.stderr.isatty():
        disable_progress_bar()
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def is_not_lightnings_tip(record: logging.LogRecord) -> bool:
    """Whether a log record is anything but one of Lightning's advertisements."""
    return not record.getMessage().startswith(_LIGHTNING_TIP)
