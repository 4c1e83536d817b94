"""Short names of strategies, as `trainer.strategy` spells them; all other modules take them from here."""

from __future__ import annotations

from sft_lightning.errors import UserError

DDP = "ddp"
"""Every process holds the whole model; Lightning's."""

FSDP2 = "fsdp2"
FSDP2_OFFLOAD = "fsdp2_offload"
"""FSDP2, with its shards on the GPUs or on the CPU."""

_FSDP1 = {"fsdp": FSDP2, "fsdp_cpu_offload": FSDP2_OFFLOAD}
"""Lightning's names of the first FSDP → what to use instead."""


def deepspeed_name(stage: int, *, offload: bool = False) -> str:
    """Return the short name of a ZeRO stage.

    Args:
        stage: ZeRO stage, 1 to 3.
        offload: Whether the optimizer, and under stage 3 the weights too, are offloaded to the CPU.
    """
    return f"deepspeed_stage_{stage}{'_offload' if offload else ''}"


def check_name(strategy: object) -> None:
    """Check a value of `trainer.strategy`.

    Args:
        strategy: A short name, or a strategy object, which is always accepted.

    Raises:
        UserError: If it names FSDP1, which cannot clip sharded gradients by norm (Lightning#19235) nor shard weights of
            several types.
    """
    if isinstance(strategy, str) and strategy in _FSDP1:
        raise UserError(
            f"trainer.strategy: {strategy!r} (FSDP1) is not supported, because it neither clips gradients by norm nor "
            f"shards an adapter over a base of another type; use {_FSDP1[strategy]!r}"
        )
