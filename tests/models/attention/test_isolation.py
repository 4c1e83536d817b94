from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_lightning.errors import UserError
from sft_lightning.models.attention.isolation import Isolation, measure_isolation, verify_isolation
from sft_lightning.models.attention.packed import PACKED, packed_attention
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.quantization import load_quantized
from sft_lightning.training.forward import inputs_of_rows

INPUTS = inputs_of_rows(torch.device("cpu"))


def load(folder: Path, implementation: str) -> PreTrainedModel:
    config = copy.deepcopy(AutoConfig.from_pretrained(folder))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation=implementation
    )
    return model.eval()


class Leaking(torch.nn.Module):
    """Passes neither positions nor lengths on, as a model without packed attention would."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.inner = load(folder, "sdpa")

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.inner(input_ids=input_ids)


def test_a_model_whose_documents_do_not_see_each_other_is_verified(model_dir: Path) -> None:
    assert verify_isolation(load(model_dir, PACKED), 300, INPUTS) < 1e-5


@pytest.mark.parametrize("max_length", [1, 32, 100, 4096])
def test_the_measured_document_is_at_the_end_of_the_row_within_the_models_context(
    max_length: int, model_dir: Path
) -> None:
    found = measure_isolation(load(model_dir, PACKED), 300, INPUTS, max_length=max_length)
    assert found.verified
    assert found.difference < 1e-5


def test_a_model_whose_documents_see_each_other_is_refused(model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"packed documents see each other.*data.packing: none.*data.packing: auto"):
        verify_isolation(Leaking(model_dir), 300, INPUTS)


def test_a_chosen_attention_that_leaks_is_named_with_what_to_set(model_dir: Path) -> None:
    class LeakingLlama(type(load(model_dir, "eager"))):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(input_ids=input_ids)

    model = load(model_dir, "eager")
    model.__class__ = LeakingLlama
    with pytest.raises(UserError, match=r"llama, attention eager.*model.attn_implementation: auto"):
        verify_isolation(model, 300, INPUTS)


def flash_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    position_ids: torch.Tensor | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Read the documents as transformers' `_flash_attention_forward` does: by position in a batch of one row only."""
    batch, _, width, _ = query.shape
    lengths = [[width]] * batch
    if all(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")):
        lengths = [kwargs["cu_seq_lens_q"].diff().tolist()]
    elif batch == 1 and position_ids is not None and not (position_ids.diff() > 0).all():
        starts = (position_ids[0] == 0).nonzero().flatten().tolist()
        lengths = [[end - start for start, end in zip(starts, [*starts[1:], width], strict=True)]]
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))  # rows one after the other
    documents = [[length for row in lengths for length in row]]
    kwargs.pop("document_lengths", None)
    out, _ = packed_attention(module, q, k, v, None, document_lengths=documents, scaling=kwargs["scaling"])
    return out.view(batch, width, *out.shape[2:]), None


@pytest.fixture
def flash_model(model_dir: Path) -> Iterator[PreTrainedModel]:
    AttentionInterface.register("by_position", flash_attention)
    yield load(model_dir, "by_position")
    del ALL_ATTENTION_FUNCTIONS._global_mapping["by_position"]


def test_attention_that_finds_documents_by_position_keeps_those_of_several_rows_apart(
    flash_model: PreTrainedModel,
) -> None:
    for batch_size in (1, 2, 3):
        assert measure_isolation(flash_model, 300, INPUTS, max_length=100, batch_size=batch_size).verified


def test_a_leak_in_batches_of_several_rows_is_found_under_the_runs_batch_size(flash_model: PreTrainedModel) -> None:
    def by_position(rows: Any) -> dict[str, Any]:
        return {key: value for key, value in INPUTS(rows).items() if not key.startswith("cu_seq_lens")}

    assert measure_isolation(flash_model, 300, by_position, max_length=100).verified
    found = measure_isolation(flash_model, 300, by_position, max_length=100, batch_size=8)
    assert not found.verified
    assert found.num_rows > 1
    with pytest.raises(UserError, match=r"attention by_position, in a batch of [23] rows.*or data.batch_size: 1"):
        verify_isolation(flash_model, 300, by_position, max_length=100, batch_size=2)


def test_rows_are_measured_at_unlike_lengths_with_padding(model_dir: Path) -> None:
    seen: list[list[list[int]]] = []

    def inputs(rows: Any) -> dict[str, Any]:
        made = INPUTS(rows)
        seen.append([list(row) for row in made["document_lengths"]])
        return dict(made)

    measure_isolation(load(model_dir, PACKED), 300, inputs, max_length=100, batch_size=8)
    assert seen[0] == [[16]]
    assert seen[1] == seen[2] == [[84, 16]]
    assert seen[3] == seen[4] == [[84, 16], [42, 16, 42]]
    assert seen[5] == seen[6] == [[84, 16], [42, 16, 42], [28, 16, 56]]


def test_a_measurement_that_is_not_a_number_is_not_verified() -> None:
    assert not Isolation(leak=float("nan"), difference=0.0, tolerance=1.0).verified
    assert not Isolation(leak=0.0, difference=float("nan"), tolerance=1.0).verified
    assert not Isolation(leak=0.0, difference=0.0, tolerance=float("nan")).verified


def test_the_measurement_does_not_change_the_models_mode(model_dir: Path) -> None:
    model = load(model_dir, PACKED).train()
    verify_isolation(model, 300, INPUTS)
    assert model.training


@pytest.fixture
def with_outliers(model_dir: Path, tmp_path: Path) -> PreTrainedModel:
    """In 8 bits, with activations above LLM.int8's threshold in some columns, as every real model has them."""
    plain = load(model_dir, "eager")
    for layer in plain.model.layers:
        layer.input_layernorm.weight.data *= 2  # some tokens exceed 6 in some columns
    plain.save_pretrained(tmp_path / "outliers")
    eight = QuantizationConfig(bits=8)
    return load_quantized(str(tmp_path / "outliers"), eight, dtype=torch.float32, attn_implementation=PACKED).eval()


def test_outlier_columns_of_an_8_bit_model_do_not_count_as_a_leak(with_outliers: PreTrainedModel) -> None:
    ids = torch.randint(300, (2, 1, 64), generator=torch.Generator().manual_seed(0))
    rows = [torch.cat([row[:, :32], ids[0][:, 32:]], 1) for row in ids]
    one, other = (with_outliers(row, document_lengths=[[32, 32]]).logits[:, 32:] for row in rows)
    assert not torch.equal(one, other), "there are no outliers to choose columns by"
    assert measure_isolation(with_outliers, 300, INPUTS, max_length=64).verified
    thresholds = {module.state.threshold for module in with_outliers.modules() if isinstance(module, Linear8bitLt)}
    assert thresholds == {6.0}


def test_an_8_bit_model_whose_documents_see_each_other_is_refused(with_outliers: PreTrainedModel) -> None:
    class LeakingLlama(type(with_outliers)):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(input_ids=input_ids)

    with_outliers.__class__ = LeakingLlama
    assert not measure_isolation(with_outliers, 300, INPUTS, max_length=64).verified
