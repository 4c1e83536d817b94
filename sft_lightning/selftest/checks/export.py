"""Whether what is exported answers like what was trained, loaded as others load it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.models.adapters.quantized import keep_input_dtype
from sft_lightning.models.assembly import load_base, resize_vocabulary
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.export.write import export_adapter, export_model
from sft_lightning.selftest.checks import Check, within
from sft_lightning.selftest.evaluation import Answers, answers, batch_of, documents_of_row
from sft_lightning.selftest.short_runs import Run
from sft_lightning.training.module import CausalLMModule

_TOLERANCE = 1e-4


def check_export(run: Run, folder: Path) -> Check:
    """Export a trained model, load it with PEFT or transformers alone, and compare its answers on a row.

    Args:
        run: Whose model to export. It is given up: two models at a time are more than a device may hold.
        folder: Where to write.
    """
    module, data, device, precision = run.module, run.data, run.device, run.trainer.precision_plugin.forward_context
    tolerance, model = max(_TOLERANCE, run.rounding), module.language_model
    module.to(device)
    try:
        if isinstance(model, PeftModel):
            report = export_adapter(model, data.tokenizer, folder, {"made_by": "selftest"}, precision=precision)
            if module.spec.from_config is not None:
                figure = f"logits under PEFT differ by {report.logit_difference or 0.0:.1e}; the base is from_config, "
                return Check("export", True, f"{figure}random at every start, so it was not loaded a second time")
        else:
            export_model(model, data.tokenizer, folder, {"made_by": "selftest"})
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return Check("export", False, str(error))
    batch = batch_of([documents_of_row(data, 0)], data, device)
    live = answers(model, batch, precision)
    is_adapter = isinstance(model, PeftModel)
    run.module = run.trainer = data.trainer = module.model = None  # type: ignore[assignment]  # given up
    module.__dict__.pop("_head", None)
    del model
    gc.collect()
    again = load_plainly(module, data, folder).to(device) if is_adapter else load_whole(module, folder).to(device)
    return compare(live, answers(again, batch, precision), tolerance)


def compare(live: Answers, again: Answers, tolerance: float) -> Check:
    """Compare the answers of the trained and of the loaded model.

    Args:
        live: Of the model that was trained.
        again: Of the model that was loaded.
        tolerance: Largest difference of two logits, relative to the largest logit.
    """
    scale = max(float(live.logits.abs().max()), 1.0)
    difference = float((live.logits - again.logits).abs().max())
    what = f"loss {live.loss:.6f} live, {again.loss:.6f} loaded again; logits differ by"
    return within("export", difference, tolerance * scale, what)


def load_plainly(module: CausalLMModule, data: SFTDataModule, folder: Path) -> torch.nn.Module:
    """Return the configuration's base, loaded anew, with the adapter in a folder on it through PEFT alone."""
    base = load_base(module.spec, len(data.tokenizer))
    resize_vocabulary(base, module.spec, data.tokenizer)
    wrapped: torch.nn.Module = PeftModel.from_pretrained(base, str(folder))
    keep_input_dtype(wrapped)
    return wrapped


def load_whole(module: CausalLMModule, folder: Path) -> torch.nn.Module:
    """Return the model in a folder, as transformers loads it."""
    spec = module.spec
    options: dict[str, Any] = {
        "dtype": "auto",
        "attn_implementation": PACKED if spec.attn_implementation == "auto" else spec.attn_implementation,
        "trust_remote_code": spec.trust_remote_code,
    }
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model
