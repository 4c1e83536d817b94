"""Undocumented parts of transformers that we use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from sft_lightning.compat.names import uses

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

_CONVERSION = "transformers.conversion_mapping"
_FALCON = "transformers.models.falcon.modeling_falcon"
_BITSANDBYTES = "transformers.integrations.bitsandbytes"


@uses(
    "transformers.utils.chat_template_utils:_compile_jinja_template",
    feature="data.template: chat_template and .jinja files",
    since="4.46",
    replacement="`tokenizer.apply_chat_template`, which compiles at every call and cannot fix the date",
)
def compile_chat_template(source: str) -> Any:
    """Compile a chat template in the environment that serving uses: its sandbox, filters and `generation` blocks.

    Returns:
        A `jinja2.Template`.

    Raises:
        jinja2.TemplateSyntaxError: If the template is wrong.
    """
    return importlib.import_module("transformers.utils.chat_template_utils")._compile_jinja_template(source)


@uses(
    "transformers:PretrainedConfig._attn_implementation",
    feature="model.attn_implementation",
    since="4.36",
    replacement="a getter beside `model.set_attn_implementation`, which has none yet",
)
def attention_of(config: PretrainedConfig) -> str | None:
    """Return the registered name of the attention that a model was loaded with."""
    return cast("str | None", config._attn_implementation)


@uses(
    "transformers:PretrainedConfig._attn_implementation",
    feature="data.packing with a model that does its own attention",
    since="4.36",
    replacement="`model.set_attn_implementation`, once it accepts names that only select a mask",
)
def set_attention(config: PretrainedConfig, name: str) -> None:
    """Set the registered attention, and with it the mask function, that a model looks up.

    Args:
        config: The model's configuration, changed in place.
        name: A registered name.
    """
    config._attn_implementation = name


@uses(
    "transformers:PreTrainedModel._supports_attention_backend",
    feature="model.attn_implementation: auto",
    since="4.50",
    replacement="loading the model with a registered attention, and checking whether it is called",
)
def calls_registered_attention(model: PreTrainedModel | type[PreTrainedModel]) -> bool:
    """Whether a model, or its class, calls the attention functions that are registered with transformers."""
    return bool(model._supports_attention_backend)


@uses(
    f"{_CONVERSION}:get_checkpoint_conversion_mapping",
    feature="loading a model in several processes under a sharding trainer.strategy",
    since="5.0",
    replacement="loading one process at a time always, which is slower and safe",
)
def stores_other_tensors(model_type: str) -> bool:
    """Whether transformers converts the tensors of a family's files while it loads them, such as single experts."""
    return importlib.import_module(_CONVERSION).get_checkpoint_conversion_mapping(model_type) is not None


@uses(
    f"{_CONVERSION}:get_model_conversion_mapping",
    "transformers.core_model_loading:WeightRenaming.rename_source_key",
    feature="merge",
    since="5.0",
    replacement="merging on the whole model in memory",
)
def tensor_renamings(model: PreTrainedModel) -> list[Callable[[str], str]]:
    """Return functions from tensor names in a family's files to those in the model, if only names differ (GPT-NeoX)."""
    renaming = importlib.import_module("transformers.core_model_loading").WeightRenaming
    rules = importlib.import_module(_CONVERSION).get_model_conversion_mapping(model)

    def renamed_by(rule: Any) -> Callable[[str], str]:
        return lambda key: str(rule.rename_source_key(key)[0])

    return [renamed_by(rule) for rule in rules if type(rule) is renaming]


@contextmanager
@uses(
    f"{_BITSANDBYTES}:Bnb4bitQuantize.convert",
    feature="model.quantization",
    since="5.0",
    replacement="an option of `from_pretrained` for the device to quantize on, which it does not have yet",
)
def quantizing_on(device: torch.device) -> Iterator[None]:
    """Patch transformers to quantize 4-bit weights on one device, whichever device stores them.

    A CPU takes minutes for what a GPU does in seconds. The patch ends with the context.
    """
    operation: Any = importlib.import_module(_BITSANDBYTES).Bnb4bitQuantize
    own = operation.convert

    def convert(self: Any, weights: dict[str, Any], **rest: Any) -> dict[str, torch.Tensor]:
        [(name, found)] = weights.items()
        weight: torch.Tensor = found[0] if isinstance(found, list) else found
        quantized = own(self, {name: weight.to(device)}, **rest)
        return {key: value.to(weight.device) for key, value in quantized.items()}

    operation.convert = convert
    try:
        yield
    finally:
        operation.convert = own


@uses(
    "transformers.quantizers:AutoHfQuantizer.from_config",
    feature="model.from_config with model.quantization",
    since="4.38",
    replacement="`from_pretrained` of a folder with the random weights",
)
def quantizer_of(config: BitsAndBytesConfig) -> Any:
    """Return the quantizer that `from_pretrained` uses: it replaces the layers, then their weights.

    Args:
        config: How to quantize.
    """
    return importlib.import_module("transformers.quantizers").AutoHfQuantizer.from_config(config, pre_quantized=False)


@uses(
    "transformers:PreTrainedModel._init_weights",
    attributes=("_init_weights",),
    feature="model.from_config with model.quantization",
    since="5.0",
    replacement="`initialize_weights` before quantizing, which needs memory for the full model",
)
def initialize_module(model: PreTrainedModel, module: torch.nn.Module) -> None:
    """Initialize a module's weights at random, as the model initializes its own modules.

    Args:
        model: The model.
        module: Changed in place; it need not be part of the model.
    """
    import torch

    with torch.no_grad():
        model._init_weights(module)


@contextmanager
@uses(
    f"{_FALCON}:FalconLinear",
    feature="model.quantization of a Falcon model",
    since="4.33",
    replacement="not needed once Falcon uses `torch.nn.Linear`",
)
def plain_falcon_layers() -> Iterator[None]:
    """Patch transformers so that Falcon is built of `torch.nn.Linear`, the only type that gets quantized.

    Its own type differs in nothing else. The patch ends with the context.
    """
    import torch

    module: Any = importlib.import_module(_FALCON)
    own = module.FalconLinear
    module.FalconLinear = torch.nn.Linear
    try:
        yield
    finally:
        module.FalconLinear = own


@uses(
    "transformers.models.mixtral.modeling_mixtral:load_balancing_loss_func",
    feature="the load-balancing loss of a mixture of experts",
    since="4.36",
    replacement="the same equation in `models/head/routers.py`",
)
def balancing_loss_of(model: PreTrainedModel) -> Callable[..., torch.Tensor] | None:
    """Return `load_balancing_loss_func` of the module that defines a model's class or a base class of it.

    Each family has its own copy. FSDP2 derives a class of its own, whose base classes are therefore searched too.
    """
    modules = [sys.modules[each.__module__] for each in type(model).__mro__]
    found = (getattr(each, "load_balancing_loss_func", None) for each in modules)
    return next((function for function in found if function is not None), None)


@uses(
    "transformers:PreTrainedModel.get_expanded_tied_weights_keys",
    attributes=("all_tied_weights_keys",),
    feature="merge of an adapter that changes one of two tied matrices",
    since="5.0",
    replacement="setting `tie_word_embeddings: false` alone",
)
def untie_head(model: PreTrainedModel) -> None:
    """Give a model's head a copy of the matrix that it shares with the input embedding."""
    import torch

    head: Any = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for part in (model.config, model.config.get_text_config()):
        part.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


@uses(
    feature="model.gradient_checkpointing",
    since="5.17",
    replacement="`activation_checkpointing_enable` alone; transformers 6 removes the older name",
)
def recompute_activations(
    model: PreTrainedModel, every: int, contexts: Callable[[], tuple[Any, Any]] | None = None
) -> None:
    """Turn on gradient checkpointing of decoder layers, non-reentrant, by the installed version's method.

    Args:
        model: The transformers model.
        every: Recompute every n-th decoder layer, starting with the first.
        contexts: `context_fn` of `torch.utils.checkpoint`: makes the contexts that keep some outputs.
    """
    options: dict[str, Any] = {"use_reentrant": False} | ({} if contexts is None else {"context_fn": contexts})
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs=options, every_n_layers=every)
    else:
        enable = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs=options, every_n_layers=every)


@uses(
    feature="plan",
    since="5.17",
    replacement="`activation_checkpointing_disable` alone; transformers 6 removes the older name",
)
def keep_activations(model: PreTrainedModel) -> None:
    """Undo `recompute_activations`."""
    disable: Any = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
