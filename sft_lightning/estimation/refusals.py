"""What `fit` refuses before it reads a weight, refused by the same functions."""

from __future__ import annotations

from sft_lightning.estimation.sharding import Sharding
from sft_lightning.models.adapters.wrapping import check_adapter_on_quantized_base
from sft_lightning.strategies import refusals
from sft_lightning.training.module import CausalLMModule


def check_as_fit(module: CausalLMModule, sharding: Sharding) -> None:
    """Check that a configuration could be started.

    Args:
        module: The configuration.
        sharding: Its strategy.

    Raises:
        UserError: If PEFT cannot put the adapter on the quantized base, or the strategy cannot shard the model.
    """
    spec = module.spec
    if spec.quantization is not None and spec.adapter is not None:
        check_adapter_on_quantized_base(spec.adapter, spec.quantization, spec.dtype)
    if sharding.kind in ("fsdp2", "zero"):
        refusals.check_module(module, _as_strategy(sharding))


def _as_strategy(sharding: Sharding) -> refusals.Sharding:
    """Return what the strategy says of itself."""
    name, stage = ("fsdp2", 3) if sharding.kind == "fsdp2" else (f"deepspeed_stage_{sharding.stage}", sharding.stage)
    return refusals.Sharding(f"{name}{'_offload' if sharding.weights_on_host else ''}", stage)
