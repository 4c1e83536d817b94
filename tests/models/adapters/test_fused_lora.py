"""LoRA as one autograd function equals PEFT's own forward and backward pass."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model

from sft_lightning.models.adapters.fused_lora import describe_unfused, fuse_lora

SIZE, ROWS = 64, (2, 9)


class Block(torch.nn.Module):
    """Two linear layers whose second reads what the first writes, one with a bias."""

    def __init__(self, dtype: torch.dtype = torch.float32, linear: Callable[..., Any] = torch.nn.Linear) -> None:
        super().__init__()
        self.up, self.down = linear(SIZE, 96, bias=True), linear(96, SIZE, bias=False)
        for layer in (self.up, self.down):
            layer.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def adapted(base: torch.nn.Module, **options: Any) -> PeftModel:
    """PEFT's model with an update that is not zero."""
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=10, target_modules=["up", "down"], **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def run(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The output and every gradient of a forward and a backward pass."""
    torch.manual_seed(1)
    x = torch.randn(*ROWS, SIZE, dtype=dtype, requires_grad=True)
    y = model(x)
    y.float().square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **gradients}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two runs, relative to the largest value of each tensor."""
    assert one.keys() == other.keys()
    return max(((one[k].float() - other[k].float()).abs().max() / other[k].float().abs().max()).item() for k in one)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def quantized(kind: type[Linear4bit] | type[Linear8bitLt]) -> Callable[..., torch.nn.Module]:
    options = {"compute_dtype": torch.float32} if kind is Linear4bit else {"has_fp16_weights": False}
    return lambda *sizes, bias: kind(*sizes, bias=bias, **options)


@pytest.mark.parametrize("kind", [None, Linear4bit, Linear8bitLt])
def test_float32_is_pefts_own_on_every_kind_of_base(kind: Any) -> None:
    base = Block(linear=quantized(kind) if kind else torch.nn.Linear).to("cpu")
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = kind is Linear4bit, kind is Linear8bitLt
    model = adapted(base)
    assert type(model.base_model.model.up).__name__ == (kind or torch.nn.Linear).__name__
    assert kind is not Linear4bit or base.up.weight.quant_state is not None
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    assert describe_unfused(fused) is None
    assert distance(run(fused), run(model)) <= 1e-6


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@pytest.mark.parametrize("mixed", [False, True], ids=["bfloat16 base", "bf16-mixed"])
def test_bfloat16_is_as_near_to_float32_as_pefts_own(mixed: bool) -> None:
    exact = adapted(Block())
    model = copy.deepcopy(exact)
    if not mixed:
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.base_layer.to(torch.bfloat16)
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    truth, dtype = run(exact), torch.float32 if mixed else torch.bfloat16
    with autocast() if mixed else contextlib.nullcontext():
        peft, ours = run(model, dtype), run(fused, dtype)
    assert ours["y"].dtype == peft["y"].dtype
    assert distance(ours, truth) <= 1.5 * distance(peft, truth)


def test_masters_and_their_gradients_stay_float32_over_a_bfloat16_base() -> None:
    model = adapted(Block(torch.bfloat16))
    fuse_lora(model)
    found = run(model, torch.bfloat16)
    assert {tensor.dtype for name, tensor in found.items() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("kind", [torch.nn.Linear, Linear8bitLt])
def test_dropout_is_pefts_own_with_the_same_random_numbers_forward_and_backward(kind: Any) -> None:
    base = Block(linear=quantized(kind) if kind is Linear8bitLt else kind)
    base.is_loaded_in_8bit = kind is Linear8bitLt
    model = adapted(base.to("cpu"), lora_dropout=0.5)
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    assert distance(run(fused), run(model)) <= 1e-6
    after = torch.rand(())
    run(model)
    assert torch.rand(()) == after, "the generator goes on as after PEFT's forward pass"


def test_no_value_is_dropped_in_evaluation_mode() -> None:
    model = adapted(Block(), lora_dropout=0.5).eval()
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    assert distance(run(fused), run(model)) <= 1e-6


def test_less_is_saved_for_the_backward_pass_than_by_peft() -> None:
    model = adapted(Block(torch.bfloat16))
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    assert saved_bytes(fused) <= 0.6 * saved_bytes(model)


def saved_bytes(model: torch.nn.Module) -> int:
    """Bytes that a forward pass keeps, but those of parameters."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(torch.randn(*ROWS, SIZE, dtype=torch.bfloat16))
    assert y.requires_grad
    return sum(kept.values())


def test_names_and_state_dict_stay_pefts() -> None:
    model = adapted(Block())
    before = list(model.state_dict())
    fuse_lora(model)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("state", ["disabled", "merged", "two adapters"])
def test_other_states_of_a_layer_take_pefts_own_forward(state: str) -> None:
    model = adapted(Block())
    if state == "merged":
        model.merge_adapter()
    elif state == "two adapters":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    x = torch.randn(*ROWS, SIZE)
    with contextlib.ExitStack() as stack:
        for each in (model, fused):
            if state == "disabled":
                stack.enter_context(each.disable_adapter())
        assert torch.equal(fused(x), model(x))


def test_dora_keeps_pefts_own_forward_and_the_log_says_so() -> None:
    model = adapted(Block(), use_dora=True)
    fuse_lora(model)
    assert describe_unfused(model) == "LoRA: 2 layers keep PEFT's own forward pass (2 × variant of LoRA, such as DoRA)"


def test_a_base_whose_bias_trains_keeps_pefts_own_forward() -> None:
    model = adapted(Block(), bias="lora_only")
    fuse_lora(model)
    assert describe_unfused(model) == "LoRA: 1 layers keep PEFT's own forward pass (1 × base that trains too)"
    assert "base_model.model.up.base_layer.bias" in run(model)


def test_hooks_of_inner_modules_still_run() -> None:
    model = adapted(Block())
    fuse_lora(model)
    seen = []
    model.base_model.model.up.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(*ROWS, SIZE))
    assert seen


def test_a_compiled_layer_has_no_graph_break_and_the_same_gradients() -> None:
    model = adapted(Block())
    fuse_lora(model)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    got = {name.removeprefix("_orig_mod."): tensor for name, tensor in run(compiled).items()}
    assert distance(got, run(model)) <= 1e-6


def test_inference_mode_gives_the_same_output() -> None:
    model = adapted(Block())
    fuse_lora(model)
    x = torch.randn(*ROWS, SIZE)
    expected = model(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
