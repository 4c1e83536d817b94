from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sft_lightning.compat import torch as compat


def test_the_loss_scale_is_the_scalers_own_and_none_before_the_first_step() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert compat.loss_scale(scaler) == (None, 8.0)
    scaler.scale(torch.ones(()))
    scale, first = compat.loss_scale(scaler)
    assert scale is not None
    assert (float(scale), first) == (scaler.get_scale(), 8.0)


@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_optimizer_unscales_in_its_step(fused: bool) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=fused)
    assert compat.unscales_in_step(optimizer) is fused


def test_without_the_scalers_attribute_the_optimizers_own_option_decides() -> None:
    optimizer: Any = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
    del optimizer._step_supports_amp_scaling
    assert compat.unscales_in_step(optimizer)


def test_fake_tensors_have_shapes_types_and_devices_and_mix_with_real_ones() -> None:
    with compat.fake_tensor_mode():
        made = torch.empty(1 << 40, 8, dtype=torch.bfloat16)
        assert (made + torch.ones(8, dtype=torch.bfloat16)).shape == (1 << 40, 8)
        assert made.device.type == "cpu"


def test_every_result_is_seen_those_of_the_backward_pass_too() -> None:
    x = torch.ones(3, 5, requires_grad=True)
    seen: list[tuple[int, ...]] = []
    with compat.watching_operations(lambda tensor: seen.append(tuple(tensor.shape))):
        y = (x * 2).sum()
        forward = len(seen)
        y.backward()
    x + 1
    assert (3, 5) in seen[:forward]
    assert (3, 5) in seen[forward:]


def test_views_share_the_key_of_their_storage() -> None:
    x, other = torch.ones(4), torch.ones(4)
    assert compat.storage_key(x.untyped_storage()) == compat.storage_key(x[1:].untyped_storage())
    assert compat.storage_key(x.untyped_storage()) != compat.storage_key(other.untyped_storage())


def test_a_copied_module_shares_its_tensors_and_keeps_changes_for_itself() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    hooked: list[int] = []
    module.register_forward_hook(lambda *_: hooked.append(1))

    def copy(child: nn.Module) -> nn.Module:
        return compat.copy_sharing_tensors(child, copy)

    copied: Any = copy(module)
    assert [id(p) for p in copied.state_dict(keep_vars=True).values()] == [
        id(p) for p in module.state_dict(keep_vars=True).values()
    ]
    copied[0] = nn.Identity()
    assert isinstance(module[0], nn.Linear)
    copied(torch.ones(3, 2))
    assert hooked == [1]


def test_a_replaced_forward_runs_between_the_modules_hooks_and_ends_with_the_context() -> None:
    layer = nn.Linear(2, 2)
    order: list[str] = []
    layer.register_forward_pre_hook(lambda *_: order.append("before"))
    layer.register_forward_hook(lambda *_: order.append("after"))

    def replaced(x: torch.Tensor) -> torch.Tensor:
        order.append("inside")
        return x

    x = torch.ones(1, 2)
    with compat.forward_replaced_by(layer, replaced):
        assert layer(x) is x
    assert order == ["before", "inside", "after"]
    with pytest.raises(TypeError), compat.forward_replaced_by(layer, replaced):
        layer()
    assert "forward" not in vars(layer)
    with compat.forward_replaced_by(layer, replaced), compat.forward_replaced_by(layer, lambda x: 2 * x):
        assert torch.equal(layer(x), 2 * x)


def test_a_module_of_another_class_keeps_what_it_holds() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(2, 2))
    x, before = torch.ones(1, 2), model(torch.ones(1, 2))
    parameters = list(model.parameters())
    compat.change_class(model[0], Doubling)
    assert torch.equal(model(x), 2 * before)
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))


def test_a_module_with_a_hook_or_another_forward_runs_more_than_its_forward() -> None:
    layer = nn.Linear(2, 2)
    assert not compat.runs_more_than_forward(layer)
    with compat.forward_replaced_by(layer, lambda x: x):
        assert compat.runs_more_than_forward(layer)
    handle = layer.register_forward_pre_hook(lambda *_: None)
    assert compat.runs_more_than_forward(layer)
    handle.remove()
    layer.register_forward_hook(lambda *_: None)
    assert compat.runs_more_than_forward(layer)


@pytest.mark.parametrize("shares_heads", [True, False])
def test_key_heads_are_shared_by_the_kernel_or_repeated_before_it(
    shares_heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def old(query: Any, key: Any, value: Any, *rest: Any, scale: float) -> torch.Tensor:
        seen.update(key=key, rest=rest, enable_gqa=None)
        return torch.as_tensor(query)

    def new(query: Any, key: Any, value: Any, *rest: Any, scale: float, enable_gqa: bool = False) -> torch.Tensor:
        seen.update(key=key, rest=rest, enable_gqa=enable_gqa)
        return torch.as_tensor(query)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new if shares_heads else old)
    starts = (torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5]))
    query, key = torch.ones(5, 4, 8), torch.ones(5, 2, 8)
    assert compat.variable_length_attention()(query, key, key, *starts, 3, 3, scale=1.0) is query
    assert seen["key"].shape[1] == (2 if shares_heads else 4)
    assert seen["enable_gqa"] is (True if shares_heads else None)
    assert seen["rest"] == (*starts, 3, 3)


def test_a_hidden_change_does_not_count_as_one() -> None:
    x = torch.ones(2)
    with compat.hidden_change(x):
        x.add_(1)
    assert x._version == 0
    assert x.tolist() == [2, 2]
    with torch.inference_mode():
        y = torch.ones(1)
        with compat.hidden_change(y):
            y.add_(1)
    assert y.item() == 2


def test_every_dropout_layer_calls_the_replaced_function() -> None:
    with compat.dropout_replaced_by(lambda input, p, training, inplace: input + p):
        assert nn.Dropout(0.25)(torch.zeros(1)).item() == 0.25
    assert nn.Dropout(0.25).eval()(torch.zeros(1)).item() == 0
