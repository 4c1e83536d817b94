"""`selftest` passes on what is right, and says which promise is broken where one is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from sft_lightning.__main__ import main
from sft_lightning.models.attention.packed import PACKED, packed_attention
from sft_lightning.selftest.checks import export, masks, resume
from sft_lightning.selftest.checks.gradients import Gradient
from sft_lightning.selftest.evaluation import Answers
from sft_lightning.training import module as module_file
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.preference.module import DPOModule
from sft_lightning.types import Segment

Selftest = Callable[..., int]


@pytest.fixture
def selftest(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> Selftest:
    """Run `selftest` on a two-layer model; the exit status."""

    def run(*options: str) -> int:
        try:
            return main(
                [
                    "selftest",
                    f"--model.model_name_or_path={model_dir}",
                    "--model.dtype=float32",
                    f"--data.sources={{toy: {{path: {alpaca_file}, format: alpaca}}}}",
                    "--data.template=alpaca",
                    "--data.max_length=256",
                    f"--trainer.default_root_dir={tmp_path / 'run'}",
                    "--trainer.accelerator=cpu",
                    *options,
                ]
            )
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The checks that were printed: name → sign."""
    shown = [line for line in capsys.readouterr().out.splitlines() if line[:2] in ("✓ ", "✗ ", "– ")]
    return {line[2:28].strip(): line[0] for line in shown}


NAMES = {
    "masks of toy", "prompts of toy", "packing isolation", "packed loss", "gradient 2 × 2", "gradient 4 × 1",
    "gradient packed", "resume", "export",
}  # fmt: skip


def test_lora_passes_every_check_and_leaves_the_run_folder_alone(
    selftest: Selftest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert selftest("--model.adapter.r=4") == 0
    found = lines(capsys)
    assert set(found.values()) == {"✓"}
    assert len(found) == len(NAMES)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--model.optimizer.init_args.lr=1e-4"],
        ["--model.adapter.r=4", "--model.quantization.bits=4"],
        ["--model.adapter.r=4", "--model.dtype=bfloat16", "--data.packing=concat"],
        ["--model.adapter.r=4", "--model.gradient_checkpointing=true", "--trainer.precision=bf16-mixed"],
        ["--model.adapter={r: 4, use_dora: true, init: pissa}", "--model.neftune_alpha=5"],
    ],
)
def test_full_and_quantized_and_half_precision_runs_pass(
    options: list[str], selftest: Selftest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest(*options) == 0
    assert set(lines(capsys).values()) == {"✓"}


@pytest.mark.slow
def test_without_packing_and_with_another_attention_isolation_does_not_apply(
    selftest: Selftest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest("--model.adapter.r=4", "--data.packing=none", "--model.attn_implementation=sdpa") == 0
    found = lines(capsys)
    assert found["packing isolation"] == "–"
    assert "gradient packed" not in found


def test_a_loss_averaged_by_micro_batch_is_found(
    selftest: Selftest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean_of_means(self: CausalLMModule, batch: Any, batch_idx: int) -> torch.Tensor:
        sums = self(batch)
        self._step_loss = sums.loss.detach()
        return sums.loss / sums.weight  # type: ignore[no-any-return]

    monkeypatch.setattr(CausalLMModule, "training_step", mean_of_means)
    assert selftest("--model.adapter.r=4") == 1
    found = lines(capsys)
    assert found.pop("gradient packed") == "✗"
    assert "✗" in {sign for name, sign in found.items() if name.startswith("gradient")}
    assert {sign for name, sign in found.items() if not name.startswith("gradient")} == {"✓"}


def test_documents_that_see_each_other_are_found_and_the_rest_is_checked_all_the_same(
    selftest: Selftest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaky(*args: Any, document_lengths: Any = None, **kwargs: Any) -> Any:
        return packed_attention(*args, document_lengths=None, **kwargs)

    AttentionInterface.register(PACKED, leaky)
    try:
        assert selftest("--model.adapter.r=4") == 1
    finally:
        AttentionInterface.register(PACKED, packed_attention)
    found = lines(capsys)
    assert found.pop("packing isolation") == "✗"
    assert set(found.values()) == {"✓"}
    assert {"resume", "export"} <= found.keys()


def test_random_states_that_are_not_continued_are_found(
    selftest: Selftest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_file, "set_random_state", lambda state: None)
    assert selftest("--model.adapter={r: 4, dropout: 0.5}") == 1
    assert lines(capsys)["resume"] == "✗"


def test_masks_that_are_off_by_one_token_are_found(
    selftest: Selftest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = masks.tokenize
    monkeypatch.setattr(
        masks,
        "tokenize",
        lambda *args: [replace(e, loss_weights=np.roll(e.loss_weights, 1)) for e in exact(*args)],
    )
    monkeypatch.setattr("sft_lightning.selftest.run_checks.small_data", _stop)
    with pytest.raises(KeyboardInterrupt):
        selftest("--model.adapter.r=4")
    assert lines(capsys) == {"masks of toy": "✗", "prompts of toy": "✓"}


def _stop(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """Options of preference training."""
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad" * (i % 3 + 1)} for i in range(16)]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows))
    return ["--task=dpo", f"--data.sources={{toy: {{path: {file}, format: preference}}}}"]


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(["--model.adapter={r: 4, dropout: 0.3}"], id="lora"),
        pytest.param(["--model.preference.loss=ipo"], id="full", marks=pytest.mark.slow),
        pytest.param(["--model.adapter.r=4", "--model.quantization.bits=4"], id="qlora", marks=pytest.mark.slow),
        pytest.param(["--data.packing=none", "--model.preference.loss=orpo"], id="orpo", marks=pytest.mark.slow),
    ],
)
def test_preference_training_passes_with_checks_of_its_own(
    mode: list[str], pairs: list[str], selftest: Selftest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest(*pairs, *mode) == 0
    found = lines(capsys)
    assert found.pop("loss at step 0") == ("–" if "orpo" in mode[-1] else "✓")
    assert set(found.values()) == {"✓"}
    assert {"masks of toy", "packing isolation", "pair isolation", "gradient packed", "resume", "export"} <= set(found)


def test_a_reference_that_is_not_the_model_before_training_is_found(
    pairs: list[str], selftest: Selftest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = DPOModule._reference_log_probs

    def other(self: DPOModule, *args: Any, **kwargs: Any) -> Any:
        found = asked(self, *args, **kwargs)
        return None if found is None else found + torch.tensor([1.0, 0.0])

    monkeypatch.setattr(DPOModule, "_reference_log_probs", other)
    monkeypatch.setattr("sft_lightning.selftest.run_checks.check_isolation", _stop)
    with pytest.raises(KeyboardInterrupt):
        selftest(*pairs, "--model.adapter.r=4")
    assert lines(capsys)["loss at step 0"] == "✗"


@pytest.mark.parametrize("option", ["--num_records=0", "--row_length=0"])
def test_a_number_that_is_too_small_names_its_option(
    option: str, selftest: Selftest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest(option) == 2
    assert f"{option.partition('=')[0]}: must be at least 1 (got 0)" in capsys.readouterr().err


def test_supervised_segments_that_follow_each_other_are_one_text() -> None:
    segments = [Segment("a", False), Segment("b", True), Segment("c", True), Segment("d", False), Segment("", True)]
    assert masks.supervised_texts(segments) == ["bc"]
    assert masks.first_difference(["bc"], ["bc"]) is None
    assert "supervised text 1 is 'bc', its tokens say 'c'" in str(masks.first_difference(["bc"], ["c"]))
    assert "1 supervised texts, but 2 runs" in str(masks.first_difference(["bc"], ["bc", "d"]))


def test_gradients_are_compared_by_their_norms() -> None:
    one = Gradient([torch.tensor([3.0]), torch.tensor([0.0, 4.0])])
    other = Gradient([torch.tensor([3.0]), torch.tensor([0.5, 4.0])])
    assert one.difference(one) == 0
    assert one.difference(other) == pytest.approx(0.1)
    assert Gradient([torch.zeros(2)]).difference(one.__class__([torch.zeros(2)])) == float("inf")


def test_answers_that_differ_after_loading_fail_and_so_does_not_a_number() -> None:
    live = Answers(torch.tensor([[1.0, 8.0]]), 0.5)
    assert export.compare(live, live, 1e-4).passed
    assert not export.compare(live, Answers(torch.tensor([[1.0, 8.1]]), 0.5), 1e-4).passed
    assert not export.compare(live, Answers(torch.tensor([[1.0, float("nan")]]), 0.5), 1e-4).passed


def test_a_continued_run_must_have_moved() -> None:
    check = resume.compare({"weight a": "1"}, {"weight a": "1"}, {"weight a": "1"}, 4)
    assert not check.passed
    assert "no weight has moved" in check.figure
    assert resume.compare({"weight a": "1"}, {"weight a": "1"}, {"weight a": "0"}, 4).passed
    assert "weight a" in resume.compare({"weight a": "1"}, {"weight a": "2"}, {"weight a": "0"}, 4).figure
