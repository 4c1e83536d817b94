"""A tiny Llama with an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter


@pytest.fixture
def adapted(model_dir: Path) -> Callable[..., PeftModel]:
    """Put an adapter with these keys of `model.adapter` on the tiny Llama."""

    def build(**config: Any) -> PeftModel:
        return add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), AdapterConfig(**config))

    return build
