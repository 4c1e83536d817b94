"""Whether what is exported answers like what was trained, loaded as others load it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.models.adapters.quantized import keep_input_dtype
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.base.loading import load_model
from sft_lightning.models.base.vocabulary import resize_embeddings
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
            if module.from_config is not None:
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
    base = load_model(
        module.model_name_or_path,
        from_config=None,
        dtype=module.model_dtype,
        attn_implementation=module.attn_implementation,
        quantization=module.quantization,
        vocab_size=len(data.tokenizer),
        overrides=module.overrides,
        trust_remote_code=module.trust_remote_code,
    )
    _resize(base, module, data.tokenizer)
    wrapped: torch.nn.Module = PeftModel.from_pretrained(base, str(folder))
    keep_input_dtype(wrapped)
    return wrapped


def _resize(base: PreTrainedModel, module: CausalLMModule, tokenizer: PreTrainedTokenizerFast) -> None:
    resize_embeddings(
        base,
        tokenizer,
        module.added_tokens,
        pad_to_multiple_of=module.pad_to_multiple_of,
        any_size=module.resize_vocabulary,
    )


def load_whole(module: CausalLMModule, folder: Path) -> torch.nn.Module:
    """Return the model in a folder, as transformers loads it."""
    options: dict[str, Any] = {
        "dtype": "auto",
        "attn_implementation": PACKED if module.attn_implementation == "auto" else module.attn_implementation,
        "trust_remote_code": module.trust_remote_code,
    }
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model
