"""Covers sft_lightning.selftest.run_checks, sft_lightning.selftest.short_runs and sft_lightning.selftest.checks.

The checks pass on a correct trainer, and each fails on the defect that it is for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from sft_lightning.__main__ import main
from sft_lightning.models.attention.packed import PACKED, packed_attention
from sft_lightning.training.checkpoint import state
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.preference.reference_log_probs import ReferenceLogProbs
from sft_lightning.training.step import StepShare

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


@pytest.mark.end_to_end
def test_lora_passes_every_check_and_writes_nothing_to_the_run_folder(
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
def test_full_quantized_and_half_precision_runs_pass(
    options: list[str], selftest: Selftest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest(*options) == 0
    assert set(lines(capsys).values()) == {"✓"}


@pytest.mark.slow
def test_isolation_is_skipped_without_packing_and_packed_attention(
    selftest: Selftest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest("--model.adapter.r=4", "--data.packing=none", "--model.attn_implementation=sdpa") == 0
    found = lines(capsys)
    assert found["packing isolation"] == "–"
    assert "gradient packed" not in found


@pytest.mark.slow
def test_a_loss_averaged_per_micro_batch_fails_the_gradient_checks(
    selftest: Selftest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean_of_means(self: CausalLMModule, batch: Any, batch_idx: int) -> torch.Tensor:
        sums = self(batch)
        self.step.add(StepShare(sums.loss))
        return sums.loss / sums.weight  # type: ignore[no-any-return]

    monkeypatch.setattr(CausalLMModule, "training_step", mean_of_means)
    monkeypatch.setattr("sft_lightning.training.checks.run_checks.CHECKS", ())  # the run's own would stop it
    assert selftest("--model.adapter.r=4") == 1
    found = lines(capsys)
    assert found.pop("gradient packed") == "✗"
    assert "✗" in {sign for name, sign in found.items() if name.startswith("gradient")}
    assert {sign for name, sign in found.items() if not name.startswith("gradient")} == {"✓"}


@pytest.mark.slow
def test_leaking_documents_fail_isolation_and_the_other_checks_still_run(
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


@pytest.mark.slow
def test_random_states_that_are_not_restored_fail_the_resume_check(
    selftest: Selftest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "set_random_state", lambda found: None)
    assert selftest("--model.adapter={r: 4, dropout: 0.5}") == 1
    assert lines(capsys)["resume"] == "✗"


def _stop(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """Options of preference training."""
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad" * (i % 3 + 1)} for i in range(16)]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows))
    return ["--task=dpo", f"--data.sources={{toy: {{path: {file}, format: preference}}}}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(["--model.adapter={r: 4, dropout: 0.3}"], id="lora"),
        pytest.param(["--model.preference.loss=ipo"], id="full"),
        pytest.param(["--model.adapter.r=4", "--model.quantization.bits=4"], id="qlora"),
        pytest.param(["--data.packing=none", "--model.preference.loss=orpo"], id="orpo"),
    ],
)
def test_preference_training_passes_and_has_its_own_checks(
    mode: list[str], pairs: list[str], selftest: Selftest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest(*pairs, *mode) == 0
    found = lines(capsys)
    assert found.pop("loss at step 0") == ("–" if "orpo" in mode[-1] else "✓")
    assert set(found.values()) == {"✓"}
    assert {"masks of toy", "packing isolation", "pair isolation", "gradient packed", "resume", "export"} <= set(found)


def test_a_reference_that_differs_from_the_initial_model_fails_the_first_loss(
    pairs: list[str], selftest: Selftest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ReferenceLogProbs.log_probs

    def other(self: ReferenceLogProbs, *args: Any, **kwargs: Any) -> Any:
        found = asked(self, *args, **kwargs)
        return None if found is None else found + torch.tensor([1.0, 0.0])

    monkeypatch.setattr(ReferenceLogProbs, "log_probs", other)
    monkeypatch.setattr("sft_lightning.training.checks.run_checks.CHECKS", ())  # the run's own would stop it
    monkeypatch.setattr("sft_lightning.selftest.run_checks.check_isolation", _stop)
    with pytest.raises(KeyboardInterrupt):
        selftest(*pairs, "--model.adapter.r=4")
    assert lines(capsys)["loss at step 0"] == "✗"
