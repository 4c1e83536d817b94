"""The generation configuration of an exported folder: plain `generate` ends an answer where the template ends it.

A base knows only its own EOS. A Llama that was trained on a template whose answers end with `<|im_end|>` would write on
after its answer, until `max_new_tokens`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

_FILE = "generation_config.json"


def write_stop_tokens(folder: Path, config: GenerationConfig | None, stop_token_ids: Sequence[int]) -> None:
    """Write `generation_config.json` with tokens that end answers before those that end them already.

    Args:
        folder: The folder of an adapter or a model; its own file is replaced.
        config: The configuration to add the tokens to, which stays as it is; `None` for an empty one.
        stop_token_ids: The tokens that end an answer, at least one.
    """
    written = GenerationConfig() if config is None else copy.deepcopy(config)
    ids = list(dict.fromkeys([*stop_token_ids, *stop_tokens(config)]))
    written.eos_token_id = ids if len(ids) > 1 else ids[0]
    # `save_pretrained` refuses options that the base combines wrongly, such as a temperature without sampling.
    written.to_json_file(folder / _FILE, use_diff=True)


def stop_tokens(config: GenerationConfig | None) -> list[int]:
    """Return the tokens at which `generate` ends an answer; empty if the configuration names none."""
    ids = None if config is None else config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [int(ids)]


def generation_config_in(folder: Path) -> GenerationConfig | None:
    """Return the generation configuration of a folder; `None` if it has none."""
    return GenerationConfig.from_pretrained(folder) if (folder / _FILE).is_file() else None


def generation_config_of(model: PreTrainedModel) -> GenerationConfig | None:
    """Return the generation configuration of a loaded model; `None` if it has none."""
    config: GenerationConfig | None = getattr(model, "generation_config", None)
    return config
