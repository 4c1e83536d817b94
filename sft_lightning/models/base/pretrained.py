"""transformers' `from_pretrained`, with every weight of the model read from the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from sft_lightning.errors import UserError, few

_KEY = "model.model_name_or_path"


def load_pretrained(name_or_path: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model whose weights are all in its files.

    transformers draws random weights for those that are missing, and goes on.

    Args:
        name_or_path: Folder or Hub id.
        options: Arguments of `from_pretrained`.

    Raises:
        UserError: If a weight is missing or has another shape, or a file is damaged.
    """
    load: Any = AutoModelForCausalLM.from_pretrained  # typed as if it never returned a report
    model: PreTrainedModel
    report: Mapping[str, Any]
    try:
        model, report = load(name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except SafetensorError as error:
        raise UserError(f"{_KEY}: a weight file of {name_or_path!r} is damaged ({error}); download it again") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{_KEY}: the files of {name_or_path!r} lack {len(missing)} weights of the model ({few(missing)}), which "
            "would be random; download the model again, or name another"
        )
    mismatched = sorted(report["mismatched_keys"], key=str)
    if mismatched:
        name, found, expected = mismatched[0]
        raise UserError(
            f"{_KEY}: {name} has the shape {tuple(found)} in the files of {name_or_path!r}, but config.json describes "
            f"{tuple(expected)}; use the config.json that belongs to the weights"
        )
    return model
