from __future__ import annotations

import re

import pytest

from sft_lightning.migration.options import System, combined, copied, omitted
from sft_lightning.migration.systems import SYSTEMS
from sft_lightning.migration.table import document
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS


def documented(text: str, title: str) -> set[str]:
    """Return the options in the table of a section."""
    section = text.partition(f"## {title}")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `--(\w+)`", section, re.MULTILINE))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_option_of_a_system_is_documented(name: str) -> None:
    text, system = document(SYSTEMS.values()), SYSTEMS[name]
    shared = documented(text, "transformers' `TrainingArguments`")
    assert shared == {option.name for option in TRAINING_ARGUMENTS}
    own = documented(text, f"{system.title}: `{name}`")
    takes_all = "It also takes the training arguments" in text.partition(f"## {system.title}")[2].partition("\n## ")[0]
    assert {option.name for option in system.options} == own | (shared if takes_all else set())


def test_a_row_has_the_keys_the_note_and_the_default() -> None:
    options = (
        copied("rank", "model.adapter.r", "number", default="8"),
        combined("dtype", "trainer.precision, model.dtype", "fp16 | bf16"),
        omitted("cache_dir", "set HF_HOME"),
    )
    system = System(name="own", title="Own", source="`own.py`", options=options, finish=lambda options, draft: None)
    text = document([system])
    assert "| `--rank` | `model.adapter.r` | default 8 |" in text
    assert "| `--dtype` | `trainer.precision`, `model.dtype` | fp16 \\| bf16 |" in text
    assert "| `--cache_dir` | – | not migrated: set HF_HOME |" in text
