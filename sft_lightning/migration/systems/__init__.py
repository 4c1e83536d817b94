"""The fine-tuning systems whose command lines can be translated, by the name that `migrate` takes."""

from __future__ import annotations

from sft_lightning.migration.options import System
from sft_lightning.migration.systems import chinese_alpaca, deepspeed_chat, fastchat, firefly, vigogne

SYSTEMS: dict[str, System] = {
    module.SYSTEM.name: module.SYSTEM for module in (fastchat, deepspeed_chat, vigogne, firefly, chinese_alpaca)
}
