from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.quantized import check_quantized_base
from sft_lightning.models.adapters.wrapping import add_adapter, check_adapter_on_quantized_base, peft_config_of
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.loading import load_model
from sft_lightning.models.base.quantization import load_quantized

ON = ["q_proj", "down_proj"]
IDS = torch.arange(40)[None]


def by_class_path(name: str, **values: Any) -> AdapterConfig:
    return AdapterConfig(peft_config=getattr(peft, name)(task_type="CAUSAL_LM", target_modules=ON, **values))


METHODS: dict[str, Callable[[], AdapterConfig]] = {
    "pissa": lambda: AdapterConfig(r=2, init="pissa"),
    "mica": lambda: AdapterConfig(r=2, init="mica"),
    "orthogonal": lambda: AdapterConfig(r=2, init="orthogonal"),
    "olora": lambda: AdapterConfig(r=2, init="olora"),
    "dora": lambda: AdapterConfig(r=2, use_dora=True),
    "ia3": lambda: by_class_path("IA3Config", feedforward_modules=["down_proj"]),
    "adalora": lambda: by_class_path("AdaLoraConfig", init_r=4, target_r=2, total_step=9),
    "randlora": lambda: by_class_path("RandLoraConfig", r=2),
    "road": lambda: by_class_path("RoadConfig", group_size=16),
    "loha": lambda: by_class_path("LoHaConfig", r=2),
    "lokr": lambda: by_class_path("LoKrConfig", r=2),
    "hra": lambda: by_class_path("HRAConfig", r=2),
    "delora": lambda: by_class_path("DeloraConfig", r=2),
    "osf": lambda: by_class_path("OSFConfig"),
    "shira": lambda: by_class_path("ShiraConfig", r=2),
}
REFUSED = [
    ("pissa", 4, "float32", r"model\.adapter\.init: 'pissa' .* in 4 bits .*set model\.quantization: null"),
    ("pissa", 8, "float32", r"model\.adapter\.init: 'pissa' .* in 8 bits"),
    ("mica", 4, "float32", r"model\.adapter\.init: 'mica'"),
    ("mica", 8, "float32", r"model\.adapter\.init: 'mica'"),
    ("orthogonal", 8, "float32", r"model\.adapter\.init: 'orthogonal' .* in 8 bits"),
    ("loha", 4, "float32", r"peft_config: LOHA .* set model\.quantization\.bits: 8, "),
    ("lokr", 4, "float32", r"peft_config: LOKR .* in 4 bits"),
    ("hra", 4, "float32", r"peft_config: HRA .* in 4 bits"),
    ("delora", 4, "float32", r"peft_config: DELORA .* in 4 bits .*; set model\.quantization: null"),
    ("delora", 8, "float32", r"peft_config: DELORA .* in 8 bits"),
    ("osf", 4, "float32", r"peft_config: OSF .* in 4 bits"),
    ("osf", 8, "float32", r"peft_config: OSF .* in 8 bits"),
    ("shira", 8, "bfloat16", r"peft_config: PEFT's SHIRA .* set model\.dtype: float32, model\.quantization\.bits: 4"),
]
WORKS = [
    *(("dora", bits, dtype) for bits in (4, 8) for dtype in ("float32", "bfloat16")),
    *((name, bits, "bfloat16") for name in ("ia3", "adalora", "randlora", "road") for bits in (4, 8)),
    *((name, 8, "bfloat16") for name in ("loha", "lokr", "hra")),
    *(("olora", bits, "bfloat16") for bits in (4, 8)),
    *((name, 4, "bfloat16") for name in ("orthogonal", "shira")),
    ("shira", 8, "float32"),
]


@pytest.mark.parametrize(("name", "bits", "dtype", "said"), REFUSED)
def test_a_method_that_fails_on_a_quantized_base_is_refused_before_loading(
    name: str, bits: int, dtype: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check_adapter_on_quantized_base(METHODS[name](), QuantizationConfig(bits=bits), dtype)


def losses_of_three_steps(model: PeftModel) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(("name", "bits", "dtype"), [each[:3] for each in REFUSED])
def test_a_refused_method_does_fail_in_peft(name: str, bits: int, dtype: str, model_dir: Path) -> None:
    base = load_quantized(str(model_dir), QuantizationConfig(bits=bits), dtype=getattr(torch, dtype))
    config: Any = peft_config_of(METHODS[name]())
    config.target_modules = set(ON)
    try:
        model: Any = get_peft_model(base, config)
        works = all(loss == loss for loss in losses_of_three_steps(model))  # not-a-number
    except (RuntimeError, ValueError, TypeError):
        works = False
    assert not works


@pytest.mark.parametrize(("name", "bits", "dtype"), WORKS)
def test_an_accepted_method_learns_and_is_continued_with_the_same_logits(
    name: str, bits: int, dtype: Any, model_dir: Path, tmp_path: Path
) -> None:
    quantization = QuantizationConfig(bits=bits)
    check_adapter_on_quantized_base(METHODS[name](), quantization, dtype)

    def base() -> Any:
        return load_model(
            str(model_dir), from_config=None, dtype=dtype, attn_implementation="sdpa", quantization=quantization,
            vocab_size=320,
        )  # fmt: skip

    torch.manual_seed(0)
    model = add_adapter(base(), METHODS[name]())
    losses = losses_of_three_steps(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    continued = add_adapter(base(), AdapterConfig(path=str(tmp_path)))
    with torch.no_grad():
        logits = [each.eval()(input_ids=IDS, use_cache=False).logits.float() for each in (model, continued)]
    torch.testing.assert_close(*logits, atol=8e-3 * float(logits[0].abs().max()), rtol=0)


def test_a_continued_adapter_is_checked_by_its_own_configuration(model_dir: Path, tmp_path: Path) -> None:
    base = load_model(
        str(model_dir), from_config=None, dtype="float32", attn_implementation="sdpa", quantization=None, vocab_size=320
    )
    add_adapter(base, METHODS["lokr"]()).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="LOKR computes with the base's own weights"):
        check_adapter_on_quantized_base(AdapterConfig(path=str(tmp_path)), QuantizationConfig(), "float32")


def test_plain_lora_is_accepted_on_every_base() -> None:
    for bits in (4, 8):
        for dtype in ("float32", "bfloat16", "float16"):
            check_quantized_base(peft_config_of(AdapterConfig()), QuantizationConfig(bits=bits), dtype)
