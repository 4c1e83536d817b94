from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sft_lightning.batch import DocumentLengths
from sft_lightning.models.attention import flash_versions, kernels
from sft_lightning.models.attention.flash_versions import (
    HeadShapes,
    attention_and_gradients,
    choose_version,
    head_shapes,
    installed_versions,
    share_heads,
    use_newest_version,
    use_shared_heads,
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
    assert said.startswith("FlashAttention-2, because FA4 changes the numbers by ")


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


@pytest.mark.parametrize(
    ("result", "said", "repeats"),
    [
        ("same", "are shared (verified, differs from repeated ones by 0.0e+00)", False),
        (
            "other",
            "are repeated, because sharing them changes the numbers by 1.0e+00 (at most 2e-02)",
            True,
        ),
        ("error", "are repeated, because sharing them failed (RuntimeError: 4 heads, 2 heads)", True),
    ],
)
def test_heads_are_shared_by_a_kernel_without_an_argument_for_it_if_the_numbers_stay(
    result: str, said: str, repeats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def varlen_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        if k.shape[1] == 4:
            return torch.ones(2)
        if result == "error":
            raise RuntimeError("4 heads, 2 heads")
        return torch.full((2,), 1.0 if result == "same" else 2.0)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(flash_versions, "KERNELS", kernels.KERNELS)
    monkeypatch.delitem(kernels.KERNELS, "torch", raising=False)
    q, k, documents = torch.ones(5, 4, 8), torch.ones(5, 2, 8), DocumentLengths([[5]])

    def attend() -> list[torch.Tensor]:
        return [kernels.KERNELS["torch"](q, k, k, documents, scale=1.0, window=0, softcap=0.0, dropout=0.0)]

    assert use_shared_heads(attend) == f"key/value heads {said}"
    if repeats:
        assert torch.equal(attend()[0], torch.ones(2))
    del kernels.KERNELS["torch"]


def test_sharing_is_tried_only_where_the_kernel_has_no_argument_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped, plain = (AutoConfig.for_model("llama", num_key_value_heads=each) for each in (8, 32))
    monkeypatch.setattr(flash_versions, "use_shared_heads", lambda attend: "tried")
    monkeypatch.setattr(flash_versions, "shares_key_value_heads", lambda: False)
    assert share_heads(grouped, torch.device("cuda")) == "tried"
    assert share_heads(plain, torch.device("cuda")) is None
    assert share_heads(grouped, torch.device("cpu")) is None
    monkeypatch.setattr(flash_versions, "shares_key_value_heads", lambda: True)
    assert share_heads(grouped, torch.device("cuda")) is None
