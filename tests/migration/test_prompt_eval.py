from __future__ import annotations

import pytest

from sft_lightning.cli.commands.migrate import migrate
from sft_lightning.errors import UserError

SCRIPT = [
    "python",
    "prompt_eval.py",
    "--model_name_or_path_baseline",
    "opt",
    "--model_name_or_path_finetune",
    "my model",
]


def test_the_two_models_are_compared() -> None:
    text = migrate("deepspeed_chat", [*SCRIPT, "--language", "Chinese", "--max_new_tokens", "50"])
    assert text.splitlines()[1:] == [
        "python -m sft_lightning compare \\",
        "    --baseline opt \\",
        "    --finetuned 'my model' \\",
        "    --max_new_tokens 50 \\",
        "    --language zh",
    ]


def test_options_that_the_program_does_not_use_are_named() -> None:
    text = migrate("deepspeed_chat", [*SCRIPT, "--num_beams", "4", "--add_eot_token", "--colour", "red"])
    assert "#   --num_beams: prompt_eval.py does not use it; see --mode" in text
    assert "#   --colour: not a known option of prompt_eval.py" in text
    assert "#   --add_eot_token: " in text


def test_a_missing_model_and_an_unknown_language_are_user_errors() -> None:
    with pytest.raises(UserError, match="needs --model_name_or_path_finetune"):
        migrate("deepspeed_chat", SCRIPT[:4])
    with pytest.raises(UserError, match="--language 'French' is unknown"):
        migrate("deepspeed_chat", [*SCRIPT, "--language", "French"])
