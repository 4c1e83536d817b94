"""What is decided and checked on the loaded model before the first step: packing, gradient checkpointing, compiling."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from transformers import PreTrainedModel

from sft_lightning.compat.bitsandbytes import store_4bit_as_bytes
from sft_lightning.compat.transformers import attention_of
from sft_lightning.data.batches.row_order import row_order_error
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.plan.epoch_plan import Layout, PackingSetting
from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.trainable import trainable_base_names
from sft_lightning.models.assembly import assemble_model
from sft_lightning.models.attention.flash_versions import share_heads, use_newest_version
from sft_lightning.models.attention.isolation import describe_leak, measure_isolation, run_once, verify_isolation
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.attention.paths import noting_paths
from sft_lightning.models.base.rope import check_packing
from sft_lightning.models.checkpointing import Recomputation, enable_gradient_checkpointing
from sft_lightning.models.compile_decision import CompileDecision, decide_compiling, obstacle_to_compiling
from sft_lightning.models.compiling import compile_layers
from sft_lightning.models.inspection import base_model, computing_device
from sft_lightning.models.neftune import EmbeddingNoise
from sft_lightning.strategies.registry import sharding_of
from sft_lightning.strategies.services import services_of
from sft_lightning.training.forward import inputs_of_rows
from sft_lightning.training.memory.decision import RecomputationDecision, check_recomputation, given_recomputation
from sft_lightning.training.memory.run_decision import decide_for_run
from sft_lightning.training.optim import parameter_groups

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule


def datamodule_of(trainer: Any) -> SFTDataModule:
    """Return the data module of a trainer, which has the tokenizer and the plan.

    Raises:
        UserError: If it has none, or another kind.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, SFTDataModule):
        raise UserError(f"the trainer needs an SFTDataModule for tokenizer and plan (got {type(datamodule).__name__})")
    return datamodule


def load_model(module: CausalLMModule) -> PreTrainedModel | PeftModel:
    """Return the model of the configuration, with its adapter and its noise on the embeddings."""
    spec, trainer = module.spec, module.trainer
    on_cpu = services_of(trainer.strategy).shards_weights
    model = assemble_model(spec, module.data.tokenizer, log=rank_zero_info, on_cpu=on_cpu)
    if trainer.precision.endswith("-true"):
        store_4bit_as_bytes(model)  # the trainer casts everything else
    if spec.neftune_alpha is not None:
        EmbeddingNoise(spec.neftune_alpha).attach(base_model(model))
    return model


def layout_before_loading(packing: PackingSetting, stage: str, layout: Layout | None) -> Layout | None:
    """Return how documents share rows as far as it is known before the model is loaded; `None` if it is not.

    Args:
        packing: `data.packing`. `auto` means `none` if there was no training.
        stage: Lightning's: `fit`, `validate`, `test` or `predict`.
        layout: The layout of an earlier stage of the same module.
    """
    if packing != "auto":
        return Layout(packing=packing)
    return None if stage == "fit" else layout or Layout(packing="none")


def decide_layout(module: CausalLMModule) -> Layout:
    """Return how documents share rows; called before the number of optimizer steps is needed.

    Raises:
        UserError: If `data.packing` is `auto`, and the run that is continued had packed its rows differently.
    """
    data, known = module.data, module.layout
    if known is not None and (data.spec.packing != "auto" or known.packing == "none"):
        return known
    packing, reason = choose_packing(module)
    rank_zero_info(f"packing: {packing} (auto: {reason})")
    if known is not None and known.packing != packing:
        raise row_order_error([f"packing: {known.packing} → {packing}"])
    return Layout(packing=packing)


def choose_packing(module: CausalLMModule) -> tuple[Literal["best_fit", "none"], str]:
    """Decide `data.packing: auto` on the loaded model.

    Returns:
        The packing, and the reason.
    """
    model, data, rope_scaling = module.language_model, module.data, module.spec.rope_scaling
    inputs_of = inputs_of_rows(computing_device(model))  # DeepSpeed moves the model only later
    try:
        if rope_scaling is not None:
            check_packing(module.base_model.config, rope_scaling, data.spec.max_length)
        with module.trainer.precision_plugin.forward_context():
            found = measure_isolation(
                model,
                len(data.tokenizer),
                inputs_of,
                max_length=data.spec.max_length,
                batch_size=data.spec.batch_size,
            )
    except UserError as error:
        return "none", str(error)
    if not found.verified:
        return "none", describe_leak(model, found)
    return "best_fit", "packed documents do not see each other"


def optimizer_groups(module: CausalLMModule) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimizer, with the learning rates that the adapter asks for."""
    model, adapter = module.language_model, module.spec.adapter or AdapterConfig()
    return parameter_groups(
        model.named_parameters(),
        base_names=trainable_base_names(model),
        base_lr=adapter.base_lr,
        lora_plus_ratio=adapter.lora_plus_ratio,
    )


def check_attention(module: CausalLMModule, *, packs: bool) -> None:
    """Check packing isolation if rows hold several documents, and name in the log what computes the attention.

    Args:
        module: The model, on its device.
        packs: Whether a row may hold more than one document.
    """
    config, device = module.base_model.config, module.device
    packed = attention_of(config) == PACKED
    chosen = [use_newest_version(config, device), share_heads(config, device)] if packed else []
    for line in filter(None, chosen):
        rank_zero_info(f"attention: {line}")
    with module.trainer.precision_plugin.forward_context(), noting_paths() as paths:
        if packs:
            check_isolation(module)
        elif packed:
            run_once(module.language_model, len(module.data.tokenizer), inputs_of_rows(module.device))
    for path in paths:
        rank_zero_info(f"attention: {path}")


def check_isolation(module: CausalLMModule) -> None:
    """Check on the loaded model that packed documents do not see each other.

    Raises:
        UserError: If they do, or the model's rotary scaling cannot be packed.
    """
    data, rope_scaling = module.data, module.spec.rope_scaling
    if rope_scaling is not None:
        check_packing(module.base_model.config, rope_scaling, data.spec.max_length)
    difference = verify_isolation(
        module.language_model,
        len(data.tokenizer),
        inputs_of_rows(module.device),
        max_length=data.spec.max_length,
        batch_size=data.spec.batch_size,
    )
    rank_zero_info(f"packing isolation: verified; packed and separate logits differ by at most {difference:.1e}")


def set_up_layers(module: CausalLMModule) -> None:
    """Decide on gradient checkpointing, and compile the decoder layers if asked to."""
    how = given_recomputation(module.spec.gradient_checkpointing)
    decision = decide_for_run(module) if how is None else RecomputationDecision(how, "as set")
    check_recomputation(decision.how, sharding_of(module.trainer.strategy))
    rank_zero_info(f"gradient checkpointing: {decision}")
    if decision.how:
        enable_gradient_checkpointing(module.base_model, decision.how)
    compiling = _decide_compiling(module, decision.how)
    if compiling.enabled or module.device.type == "cuda":
        rank_zero_info(f"torch_compile: {compiling}")
    if compiling.enabled:
        module.layout = replace(module.data.layout, same_shape=True)
        compile_layers(module.base_model, rank_zero_info, recomputation=decision.how)


def _decide_compiling(module: CausalLMModule, recomputation: Recomputation) -> CompileDecision:
    spec, data = module.spec, module.data
    setting, config = spec.torch_compile, module.base_model.config
    if setting != "auto":
        return decide_compiling(setting, config, num_tokens=0, num_graphs=0, obstacle=None)
    rows = data.num_optimizer_steps * module.trainer.accumulate_grad_batches * data.spec.batch_size
    return decide_compiling(
        setting,
        config,
        num_tokens=rows * data.spec.max_length,
        num_graphs=1 if spec.adapter is None or recomputation else 2,  # the first layer's input has no gradient
        obstacle=obstacle_to_compiling(
            module.device,
            strategy=sharding_of(module.trainer.strategy).kind,
            bits=None if spec.quantization is None else spec.quantization.bits,
        ),
    )
