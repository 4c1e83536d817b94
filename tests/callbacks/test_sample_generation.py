from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import SampleGeneration
from sft_lightning.errors import UserError

SAMPLES = "--trainer.callbacks=[{{class_path: callbacks.SampleGeneration, init_args: {{{0}}}}}]"


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_the_same_prompts_are_answered_at_the_start_every_n_steps_and_at_the_end(fit: Callable[..., Path]) -> None:
    rows = samples(fit("--trainer.max_steps=5", SAMPLES.format("every_n_steps: 2, num_prompts: 2")))
    assert [row["step"] for row in rows] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert len({row["prompt"] for row in rows}) == 2


def test_rows_of_an_adapter_have_the_answer_of_the_base_too(fit: Callable[..., Path]) -> None:
    rate = "--model.optimizer={class_path: torch.optim.AdamW, init_args: {lr: 0.5}}"
    first, *_, last = samples(fit("--trainer.max_steps=6", rate, SAMPLES.format("num_prompts: 1")))
    assert first["answer"] == first["base_answer"] == last["base_answer"]
    assert last["answer"] != last["base_answer"]


def test_given_prompts_are_rendered_with_the_runs_template(fit: Callable[..., Path]) -> None:
    rows = samples(fit("--trainer.max_steps=1", SAMPLES.format("prompts: [Who are you?]")))
    assert rows[0]["prompt"].endswith("### Instruction:\nWho are you?\n\n### Response:")


def test_an_empty_list_turns_samples_off(fit: Callable[..., Path]) -> None:
    assert not (fit("--trainer.max_steps=1", SAMPLES.format("prompts: []")) / "samples.jsonl").exists()


def test_samples_reach_tensorboard_as_text(fit: Callable[..., Path]) -> None:
    run = fit("--trainer.max_steps=1", SAMPLES.format("num_prompts: 1"))
    events = EventAccumulator(str(next(run.glob("events*")))).Reload()
    [start, end] = events.Tensors("samples/0/text_summary")
    assert (start.step, end.step) == (0, 1)
    assert b"base_answer" in start.tensor_proto.string_val[0]


@pytest.mark.parametrize("values", [{"num_prompts": -1}, {"every_n_steps": -1}])
def test_negative_numbers_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least 0"):
        SampleGeneration(**values)  # type: ignore[arg-type]
