"""What a strategy cannot train, refused before any weight is read, with the nearest combination that works."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from sft_lightning.compat.bitsandbytes import state_bits
from sft_lightning.compat.deepspeed import cpu_has_float16
from sft_lightning.errors import UserError
from sft_lightning.models.spec import ModelSpec
from sft_lightning.strategies.names import DDP, FSDP2_OFFLOAD, deepspeed_name
from sft_lightning.strategies.sharding import ShardingSpec


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What decides whether a strategy can run; known before any weight is read."""

    model: ModelSpec
    """The keys under `model`."""

    precision: str = "32-true"
    """`trainer.precision` in its long form, such as `bf16-mixed`."""

    num_processes: int = 1
    """`trainer.devices` × `trainer.num_nodes`."""

    on_gpu: bool = True
    """Whether the processes compute on GPUs; otherwise, on this machine's CPU."""


def check_run(run: RunFacts, sharding: ShardingSpec) -> None:
    """Check that a strategy can train a model; for `fit`, before any weight is read, and for `plan`.

    Args:
        run: The model and the processes.
        sharding: What the strategy shards.

    Raises:
        UserError: If it cannot; the message names the nearest combination that works.
    """
    reason = sharding_refusal(run.model, sharding)
    if reason is not None:
        raise UserError(reason)
    if run.num_processes % sharding.replicas:
        raise UserError(
            f"trainer.strategy.replicas: {sharding.replicas} does not divide the number of processes, which is "
            f"{run.num_processes} (trainer.devices × trainer.num_nodes); set it to a divisor"
        )
    if sharding.kind == "zero" and not run.on_gpu:
        check_float16(run.precision)


def sharding_refusal(model: ModelSpec, sharding: ShardingSpec) -> str | None:
    """Return why a model cannot be sharded, with the nearest combination that works; `None` if it can.

    Args:
        model: The keys under `model`.
        sharding: What the strategy shards.
    """
    if not sharding.shards_weights:
        return None
    name, adapter = sharding.name, model.adapter
    if model.quantization is not None and model.quantization.bits == 8:
        return (
            f"model.quantization.bits: 8 cannot be combined with trainer.strategy {name}, because an LLM.int8 layer "
            "keeps its weights and row scales outside the parameters that are sharded; use bits: 4 (QLoRA), or "
            f"trainer.strategy: {deepspeed_name(2)} or {DDP}"
        )
    if adapter is not None and getattr(adapter.peft_config, "is_prompt_learning", False):
        return (
            f"model.adapter.peft_config: prompt learning cannot be combined with trainer.strategy {name}, because the "
            "virtual tokens are outside the modules whose weights it gathers; use trainer.strategy: "
            f"{DDP} or {deepspeed_name(2)}"
        )
    if adapter is not None and not adapter.only_adapter and model.dtype != "float32":
        return (
            f"model.adapter.only_adapter: false with model.dtype: {model.dtype} cannot be combined with "
            f"trainer.strategy {name}, which reduces all gradients of a layer in one type, and the adapter's are "
            f"float32; set model.dtype: float32 (with trainer.precision: bf16-mixed), or use trainer.strategy: {DDP}"
        )
    return None


def check_float16(precision: str) -> None:
    """Check that DeepSpeed can train in a precision on this CPU.

    Args:
        precision: `trainer.precision` in its long form, such as `16-mixed`.

    Raises:
        UserError: If it is float16, and the CPU has no float16 arithmetic (x86: AVX512-FP16).
    """
    if precision not in ("16-mixed", "16-true") or cpu_has_float16():
        return
    raise UserError(
        f"trainer.precision: {precision} is not supported by DeepSpeed on this CPU, which has no float16 arithmetic "
        f"(AVX512-FP16); set trainer.precision: {precision.replace('16', 'bf16')} or 32-true, or train on a GPU"
    )


def check_optimizer(optimizer: Optimizer, sharding: ShardingSpec) -> None:
    """Check that an optimizer can step on shards, and on the CPU if it is offloaded.

    Args:
        optimizer: The optimizer of the run.
        sharding: What the strategy shards and offloads.

    Raises:
        UserError: If it cannot.
    """
    bits = state_bits(optimizer)
    if bits is not None:
        _check_bitsandbytes(optimizer, sharding, bits)
    name = type(optimizer).__name__
    if sharding.kind == "zero" and sharding.offloads_optimizer and name not in ("Adam", "AdamW"):
        raise UserError(
            f"model.optimizer: {name} cannot be offloaded to the CPU by DeepSpeed; use torch.optim.AdamW, or turn "
            f"offloading off (trainer.strategy: {deepspeed_name(sharding.stage)})"
        )


def _check_bitsandbytes(optimizer: Optimizer, sharding: ShardingSpec, bits: int) -> None:
    combination = f"{type(optimizer).__name__} cannot be combined with trainer.strategy {sharding.name}"
    if sharding.kind == "fsdp2":
        raise UserError(
            f"model.optimizer: bitsandbytes' {combination}, because its kernels take plain tensors, not shards; use "
            f"torch.optim.AdamW ({FSDP2_OFFLOAD} keeps its state on the CPU), or trainer.strategy: {DDP}"
        )
    if sharding.kind == "zero" and bits == 8:
        raise UserError(
            f"model.optimizer: bitsandbytes' {combination}, because shards would cut through the blocks in which its "
            f"state is quantized; use torch.optim.AdamW ({deepspeed_name(2, offload=True)} keeps its state on the "
            f"CPU), or trainer.strategy: {DDP}"
        )
