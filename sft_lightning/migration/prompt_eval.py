"""DeepSpeed-Chat's `prompt_eval.py`, which `run_prompt.sh` runs, becomes a `compare` command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from sft_lightning.errors import UserError
from sft_lightning.migration.arguments import GivenOptions

PROGRAM = "prompt_eval.py"

_MODELS = {"model_name_or_path_baseline": "baseline", "model_name_or_path_finetune": "finetuned"}
_COPIED = {"max_new_tokens": "max_new_tokens", "num_return_sequences": "num_return_sequences"}
_LANGUAGES = {"English": "en", "Chinese": "zh", "Japanese": "ja"}
_UNUSED = ("num_beams", "num_beam_groups", "top_k", "penalty_alpha")
"""Options of decoding modes that the program has only in comments; `compare` has these modes."""


def compare_command(given: GivenOptions) -> str:
    """Return a shell script that compares the two models on the same prompts, decoded greedily.

    Args:
        given: The options of `prompt_eval.py`.

    Raises:
        UserError: If a model is not given, or the language is unknown.
    """
    missing = [f"--{name}" for name in _MODELS if not given.options.get(name)]
    if missing:
        raise UserError(f"migrate deepspeed_chat: {PROGRAM} needs {' and '.join(missing)}; add the model")
    options = list(_options(given))
    unknown = [
        name for name in given.options if name not in (*_MODELS, *_COPIED, *_UNUSED, "language", "add_eot_token")
    ]
    notes = [
        *(f"--{name}: {PROGRAM} does not use it; see --mode" for name in _UNUSED if name in given.options),
        *(f"--{name}: not a known option of {PROGRAM}" for name in unknown),
    ]
    if "add_eot_token" in given.options:
        notes.append("--add_eot_token: the tokenizer of each model has it, and each model uses its own")
    remarks = ["# Not migrated:", *(f"#   {note}" for note in notes)] if notes else []
    command = " \\\n    ".join(["python -m sft_lightning compare", *options])
    return "\n".join([f"# Migrated from DeepSpeed-Chat, {PROGRAM}.", command, *remarks]) + "\n"


def _options(given: GivenOptions) -> Iterator[str]:
    for name, ours in {**_MODELS, **_COPIED}.items():
        if given.options.get(name):
            yield f"--{ours} {shlex.quote(given.options[name][0])}"
    for language in given.options.get("language", []):
        if language not in _LANGUAGES:
            raise UserError(
                f"migrate deepspeed_chat: --language {language!r} is unknown. Known: {', '.join(_LANGUAGES)}."
            )
        yield f"--language {_LANGUAGES[language]}"
