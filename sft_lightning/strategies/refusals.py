"""What a sharded strategy cannot do, said before any weight is read, with the nearest that works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitsandbytes.optim.optimizer import Optimizer8bit
from torch.optim import Optimizer

from sft_lightning.errors import UserError


@dataclass(frozen=True)
class Sharding:
    """What a strategy does with weights."""

    name: str
    """As in `trainer.strategy`."""

    stage: int
    """ZeRO's count (Rajbhandari et al., 2019, arXiv:1910.02054): 1 shards optimizer state, 2 gradients too, 3 weights
    too. FSDP2 is 3."""

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed does it."""
        return self.name.startswith("deepspeed")


@dataclass(frozen=True)
class Asked:
    """What a run asks of its model, as far as sharding cares."""

    quantization_bits: int | None = None
    """4, 8, or `None`."""

    dtype: str = "bfloat16"
    """`model.dtype`."""

    only_adapter: bool = True
    """`False` if base weights train beside an adapter."""

    prompt_learning: bool = False
    """Whether the adapter is made of virtual tokens, which are outside the base model."""


def refusal(asked: Asked, sharding: Sharding) -> str | None:
    """Return why the two do not go together, and the way out; `None` if they do."""
    bits, name = asked.quantization_bits, sharding.name
    if bits == 8 and sharding.stage == 3:
        return (
            f"model.quantization.bits: 8, but trainer.strategy {name} shards parameters, and the layers of LLM.int8 "
            "keep weights and row scales beside theirs, which would be lost or stay whole in every process; use bits: "
            "4 (QLoRA), or trainer.strategy: deepspeed_stage_2 or ddp"
        )
    if asked.prompt_learning and sharding.stage == 3:
        return (
            f"model.adapter.peft_config: virtual tokens are outside the model whose weights trainer.strategy {name} "
            "gathers when it runs; use trainer.strategy: ddp, or deepspeed_stage_2"
        )
    if not asked.only_adapter and asked.dtype != "float32" and sharding.stage == 3:
        return (
            f"model.adapter.only_adapter: false with model.dtype: {asked.dtype}, but trainer.strategy {name} reduces "
            "the gradients of a layer together, which must have one type, and the adapter's are float32; set "
            "model.dtype: float32 (with trainer.precision: bf16-mixed), or use ddp"
        )
    return None


def asked_of(module: Any) -> Asked:
    """Return what a `CausalLMModule` that has loaded nothing yet will ask."""
    spec = getattr(module, "spec", None)
    quantization, adapter = getattr(spec, "quantization", None), getattr(spec, "adapter", None)
    peft_config = getattr(adapter, "peft_config", None)
    return Asked(
        quantization_bits=None if quantization is None else quantization.bits,
        dtype=getattr(spec, "dtype", "float32"),
        only_adapter=True if adapter is None else adapter.only_adapter,
        prompt_learning=bool(getattr(peft_config, "is_prompt_learning", False)),
    )


def check_module(module: Any, sharding: Sharding) -> None:
    """Check that a module's model can be sharded so.

    Raises:
        UserError: If it cannot.
    """
    reason = refusal(asked_of(module), sharding)
    if reason is not None:
        raise UserError(reason)


def check_optimizer(optimizer: Optimizer, sharding: Sharding) -> None:
    """Check that an optimizer can step on shards.

    Raises:
        UserError: If it is one of bitsandbytes' that cannot.
    """
    if not isinstance(optimizer, Optimizer8bit):  # the base of all of them
        return
    name, way_out = type(optimizer).__name__, "use torch.optim.AdamW"
    if not sharding.is_deepspeed:
        raise UserError(
            f"model.optimizer: the kernels of bitsandbytes' {name} take plain tensors, and trainer.strategy "
            f"{sharding.name} shards weights; {way_out} (fsdp2_offload keeps its state in host memory), or ddp"
        )
    options: Any = vars(optimizer)["args"]
    if options.optim_bits == 8:
        raise UserError(
            f"model.optimizer: {name} quantizes its state in blocks, which trainer.strategy {sharding.name} would cut "
            f"apart; {way_out} (deepspeed_stage_2_offload keeps its state in host memory), or ddp"
        )
