from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sft_lightning.models.attention import flash_versions, kernels
from sft_lightning.models.attention.flash_versions import (
    HeadShapes,
    attention_and_gradients,
    choose_version,
    head_shapes,
    installed_versions,
    use_newest_version,
    use_version,
)
from sft_lightning.models.attention.per_document import attend_each


@pytest.mark.parametrize(
    ("capability", "installed", "version"),
    [
        ((9, 0), ["FA3", "FA4"], "FA3"),
        ((10, 0), ["FA3", "FA4"], "FA4"),
        ((9, 0), ["FA4"], None),
        ((9, 0), [], None),
        ((8, 0), ["FA3", "FA4"], None),
        ((12, 0), ["FA3", "FA4"], None),
    ],
)
def test_a_version_is_chosen_for_the_device_it_is_made_for(capability: Any, installed: Any, version: Any) -> None:
    assert choose_version(capability, installed) == version


def test_versions_are_found_by_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed_versions() == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "flash_attn_interface" else None)
    assert installed_versions() == ["FA3"]


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the versions that are active, without any kernel."""
    versions: list[str] = []
    monkeypatch.setattr(flash_versions, "activate_flash_attention", versions.append)
    monkeypatch.setattr(flash_versions, "restore_flash_attention", versions.clear)
    return versions


def test_a_version_with_the_same_numbers_stays_active(active: list[str]) -> None:
    said = use_version("FA3", lambda: [torch.ones(2) + 1e-3 * len(active)])
    assert active == ["FA3"]
    assert said == "FlashAttention-3 (flash_attn_interface; verified, differs from 2 by 1.0e-03)"


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_version_with_other_numbers_is_not_used_and_said(wrong: float, active: list[str]) -> None:
    said = use_version("FA4", lambda: [torch.ones(2), torch.ones(2) * (wrong if active else 1.0)])
    assert active == []
    assert said.startswith("FlashAttention-2, because FA4 differs from it by ")


def test_a_version_that_fails_is_not_used_and_said(active: list[str]) -> None:
    def attend() -> list[torch.Tensor]:
        if active:
            raise RuntimeError("no kernel image\nis available")
        return [torch.ones(2)]

    assert use_version("FA3", attend) == "FlashAttention-2, because FA3 failed (RuntimeError: no kernel image)"
    assert active == []


def test_the_trial_has_the_shapes_and_the_gradients_of_the_models_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(q: Any, k: Any, v: Any, documents: Any, *, dropout: float, **options: Any) -> torch.Tensor:
        return attend_each(q, k, v, documents.lengths, **options)

    monkeypatch.setitem(kernels.KERNELS, "torch", kernel)
    shapes = head_shapes(AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=2, hidden_size=40))
    assert shapes == HeadShapes(heads=4, key_value_heads=2, width=16)
    found = attention_and_gradients(shapes, torch.device("cpu"), torch.bfloat16)
    assert [tuple(each.shape) for each in found] == [(512, 4, 16), (512, 4, 16), (512, 2, 16), (512, 2, 16)]
    again = attention_and_gradients(shapes, torch.device("cpu"), torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_nothing_is_tried_on_a_cpu_or_for_a_model_without_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_newest_version(AutoConfig.for_model("llama"), torch.device("cpu")) is None
    assert head_shapes(AutoConfig.for_model("mamba")) is None
    assert use_newest_version(AutoConfig.for_model("mamba"), torch.device("cuda")) is None


def test_an_installed_version_is_tried_on_the_device_with_the_models_heads(
    active: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def attend(shapes: HeadShapes, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        tried.append((shapes.width, device.type, dtype, list(active)))
        return [torch.ones(2)]

    monkeypatch.setattr(flash_versions, "attention_and_gradients", attend)
    monkeypatch.setattr(flash_versions, "installed_versions", lambda: ["FA3"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    said = use_newest_version(AutoConfig.for_model("llama"), torch.device("cuda"))
    assert said == "FlashAttention-3 (flash_attn_interface; verified, differs from 2 by 0.0e+00)"
    assert tried == [(128, "cuda", torch.bfloat16, active) for active in ([], ["FA3"])]
