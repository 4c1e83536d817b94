"""Check that the exported model, loaded by PEFT or transformers alone, has the logits of the trained one."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_lightning.checks import Check, within
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.models.adapters.quantized import keep_input_dtype
from sft_lightning.models.assembly import load_base, resize_vocabulary
from sft_lightning.models.attention.document_mask import choose_attention, use_document_mask
from sft_lightning.models.export.write import export_adapter, export_model
from sft_lightning.selftest.evaluation import Evaluation, batch_of, documents_of_row, evaluate
from sft_lightning.selftest.short_runs import Run
from sft_lightning.training.module import CausalLMModule

_TOLERANCE = 1e-4
"""Largest difference of two logits, relative to the largest logit; more if the run computes in a coarser type."""

_ROUNDINGS = 8
"""The same in rounding errors of the run's coarsest type: PEFT adds an update in other steps than the training does."""


def check_export(run: Run, folder: Path) -> Check:
    """Export a trained model, load the export with PEFT or transformers alone, and compare their logits on a row.

    Args:
        run: A finished run. Its model is deleted, because a device may not hold two models.
        folder: Folder to write the export to.
    """
    module, data, device, precision = run.module, run.data, run.device, run.trainer.precision_plugin.forward_context
    tolerance, model = max(_TOLERANCE, _ROUNDINGS * run.rounding), module.language_model
    module.to(device)
    try:
        if isinstance(model, PeftModel):
            report = export_adapter(
                model,
                data.tokenizer,
                folder,
                {"made_by": "selftest"},
                stop_token_id=data.stop_token_id,
                precision=precision,
            )
            if module.spec.from_config is not None:
                figure = f"logits under PEFT differ by {report.logit_difference or 0.0:.1e}; not loaded again, because "
                return Check("export", True, f"{figure}the base (model.from_config) is random at every start")
        else:
            export_model(model, data.tokenizer, folder, {"made_by": "selftest"}, stop_token_id=data.stop_token_id)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return Check("export", False, str(error))
    batch = batch_of([documents_of_row(data, 0)], data, device)
    trained = evaluate(model, batch, precision)
    is_adapter = isinstance(model, PeftModel)
    run.module = run.trainer = data.trainer = module.model = None  # type: ignore[assignment]  # frees the model
    module.__dict__.pop("head", None)
    del model
    gc.collect()
    loaded = load_adapter(module, data, folder) if is_adapter else load_full_model(module, folder)
    return compare(trained, evaluate(loaded.to(device), batch, precision), tolerance)


def compare(trained: Evaluation, loaded: Evaluation, tolerance: float) -> Check:
    """Compare the logits of the trained model with those of the loaded export.

    Args:
        trained: Evaluation of the trained model.
        loaded: Evaluation of the loaded export.
        tolerance: Largest difference of two logits, relative to the largest logit.
    """
    scale = max(float(trained.logits.abs().max()), 1.0)
    difference = float((trained.logits - loaded.logits).abs().max())
    what = f"loss {trained.loss:.6f} trained, {loaded.loss:.6f} loaded again; logits differ by"
    return within("export", difference, tolerance * scale, what)


def load_adapter(module: CausalLMModule, data: SFTDataModule, folder: Path) -> torch.nn.Module:
    """Load the configuration's base anew, and put an exported adapter on it with PEFT alone.

    Args:
        module: The module of the configuration.
        data: The data of the run, for its tokenizer.
        folder: The exported adapter.
    """
    base = load_base(module.spec, len(data.tokenizer))
    resize_vocabulary(base, module.spec, data.tokenizer)
    wrapped = PeftModel.from_pretrained(base, str(folder))
    keep_input_dtype(wrapped)
    if module.spec.attn_implementation == "auto":
        use_document_mask(wrapped)
    return wrapped


def load_full_model(module: CausalLMModule, folder: Path) -> torch.nn.Module:
    """Load an exported model with transformers alone.

    Args:
        module: The module of the configuration.
        folder: The exported model.
    """
    spec = module.spec
    config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    options: dict[str, Any] = {
        "dtype": "auto",
        "attn_implementation": choose_attention(spec.attn_implementation, config),
        "trust_remote_code": spec.trust_remote_code,
    }
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    if spec.attn_implementation == "auto":
        use_document_mask(model)  # as training did, for families that compute attention themselves
    return model
