"""Which messages of a conversation have a loss."""

from __future__ import annotations

from collections.abc import Sequence

from sft_lightning.types import LossOn, Message


def supervision(messages: Sequence[Message], loss_on: LossOn) -> list[bool]:
    """Return for each message whether it is supervised: its own `train`, else what `loss_on` says of its role."""
    chosen = [loss_on == "all" or message.role == "assistant" for message in messages]
    if loss_on == "last_turn" and any(chosen):
        last = len(chosen) - 1 - chosen[::-1].index(True)
        chosen = [i == last for i in range(len(chosen))]
    if not any(chosen) and messages[-1].role == "text":
        chosen[-1] = True  # a document, or the completion after its prompt
    return [flag if message.train is None else message.train for flag, message in zip(chosen, messages, strict=True)]
