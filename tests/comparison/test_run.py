from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft_lightning.comparison.modes import DecodingOptions, decoding_configs, parse_modes
from sft_lightning.comparison.prompts import ComparisonPrompt, builtin_prompts
from sft_lightning.comparison.results import Comparison, summarize
from sft_lightning.comparison.run import RunOptions, compare_models, compared_models
from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import LoadOptions

PROMPTS = [
    *builtin_prompts("en")[:2],
    ComparisonPrompt([{"role": "user", "content": "Name a colour."}], "Name a colour.", "here", "Red"),
]


def compare(models: tuple[str, list[str], list[str]], *modes: str, several: int = 1, batch_size: int = 2) -> Comparison:
    configs = decoding_configs(parse_modes(modes), DecodingOptions(max_new_tokens=5))
    return compare_models(compared_models(*models), PROMPTS, configs, LoadOptions(), RunOptions(several, batch_size))


def test_the_same_weights_give_the_same_greedy_answers(model_dir: Path) -> None:
    comparison = compare((str(model_dir), [str(model_dir)], []), "greedy")
    first, second = (result.responses["greedy"] for result in comparison.models)
    assert first == second
    assert summarize(comparison)[1].changed == 0.0


@pytest.mark.slow
def test_batches_do_not_change_answers(model_dir: Path, tuned_dir: Path) -> None:
    models = (str(model_dir), [str(tuned_dir)], [])
    alone = compare(models, "greedy", "beam", "diverse_beam", "contrastive", batch_size=1)
    together = compare(models, "greedy", "beam", "diverse_beam", "contrastive", batch_size=3)
    assert [result.responses for result in alone.models] == [result.responses for result in together.models]


@pytest.mark.slow
def test_each_model_uses_its_own_chat_template(model_dir: Path, tuned_dir: Path, adapter_dir: Path) -> None:
    comparison = compare((str(model_dir), [str(tuned_dir)], [str(adapter_dir)]), "greedy")
    assert [(result.model.role, result.uses_template) for result in comparison.models] == [
        ("baseline", False),
        ("finetuned", True),
        ("adapter", True),
    ]
    answers = [result.responses["greedy"][0][0].text for result in comparison.models]
    assert len(set(answers)) == 3


def test_every_mode_answers_and_is_summarized(model_dir: Path) -> None:
    comparison = compare((str(model_dir), [], []), "all", several=2)
    counts = {mode: len(found[2]) for mode, found in comparison.models[0].responses.items()}
    assert counts == {
        "greedy": 1,
        "sampling": 2,
        "beam": 2,
        "beam_sampling": 2,
        "diverse_beam": 2,
        "contrastive": 1,
    }
    [summary, *_] = summarize(comparison)
    assert summary.num_answers == 3
    assert summary.mean_tokens <= 5
    assert summary.perplexity is not None
    assert summary.exact_match == 0
    assert comparison.models[0].references[:2] == [None, None]


def test_labels_have_as_many_parent_folders_as_needed_to_differ() -> None:
    models = compared_models("runs/base", ["runs/a/model", "runs/b/model", "runs/b/model"], ["x"])
    assert [model.label for model in models] == ["runs/base", "a/model", "b/model", "b/model (2)", "x"]
    assert (models[-1].path, models[-1].adapter) == ("runs/base", "x")


def test_an_adapter_of_another_base_is_reported(
    model_dir: Path, adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in adapter_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/base"}))
    compare((str(model_dir), [], [str(tmp_path)]), "greedy")
    assert "was trained on other/base, but is put on the baseline" in capsys.readouterr().err


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="--batch_size"):
        RunOptions(batch_size=0)
