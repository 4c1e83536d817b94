"""Write the merged weights: tensor by tensor from the base's files to new ones, or from the whole model in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sft_lightning.compat.transformers import tensor_renamings
from sft_lightning.errors import UserError
from sft_lightning.merging.layers import LayerMerger, empty_model, reason_for_whole_model, tied_parameter_names
from sft_lightning.merging.peft_reference import merge_in_memory
from sft_lightning.merging.plan import MergePlan
from sft_lightning.merging.quantized import QuantizedBase
from sft_lightning.models.base.vocabulary import grow_rows
from sft_lightning.models.base.weight_files import ShardWriter, read_tensors, tensor_names, weight_files


@dataclass
class MergedWeights:
    """What was written."""

    config: PretrainedConfig
    """The merged model's configuration."""

    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """Written type of each floating-point weight."""

    left_out: list[str] = field(default_factory=list)
    """Tensors of the base's files that the model does not have."""

    whole_model_reason: str | None = None
    """Why the whole model had to be in memory; `None` if it was not."""

    untied: bool = False
    """Whether the head is no longer tied to the input embedding."""


def merge_weights(plan: MergePlan, folder: Path, quantized: QuantizedBase | None) -> MergedWeights:
    """Write the merged weights and `config.json`.

    Args:
        plan: The merge plan.
        folder: The folder to write to.
        quantized: Merge into the values that quantization left; default: into the stored ones.

    Raises:
        UserError: If an adapter does not fit the base, or a value does not fit the written type.
    """
    reason = next((why for adapter in plan.adapters if (why := reason_for_whole_model(adapter))), None)
    stream = _WeightStream(plan, quantized) if reason is None else None
    if stream is not None and stream.missing:
        reason = f"the base's files store its weights under other names than the model ({stream.missing[0]} …)"
        stream = None
    merged = stream.write(folder) if stream is not None else _write_from_memory(plan, folder, quantized)
    merged.whole_model_reason = reason
    return merged


class _WeightStream:
    """Merges the weights in the order of the base's files."""

    def __init__(self, plan: MergePlan, quantized: QuantizedBase | None) -> None:
        self._plan = plan
        self._quantized = quantized
        model = empty_model(plan.config, vocab_size=plan.vocab_sizes[0], trust_remote_code=plan.trust_remote_code)
        self._prefix = f"{model.base_model_prefix}."
        self._known = set(model.state_dict())
        self._renamings = tensor_renamings(model)
        self._ties = {name: group for group in tied_parameter_names(model) for name in group}
        self._embeddings = _embedding_parameters(model)
        self._keys = {name: key for key in tensor_names(plan.folder) if (name := self._name_of(key)) is not None}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.missing = sorted(
            name for name in parameters if not any(alias in self._keys for alias in self._ties.get(name, [name]))
        )
        """Names of the model's weights that the base's files do not have."""

        self._mergers = [] if self.missing else [self._merger(step) for step in range(len(plan.adapters))]

    def _merger(self, step: int) -> LayerMerger:
        plan = self._plan
        rows = plan.vocab_sizes[step + 1]
        model = empty_model(plan.config, vocab_size=rows, trust_remote_code=plan.trust_remote_code)
        return LayerMerger(model, plan.adapters[step])

    def _name_of(self, key: str) -> str | None:
        """Return the model's name of a tensor in a file; files of a decoder without a head lack the prefix."""
        renamed = key
        for renaming in self._renamings:
            renamed = renaming(renamed)
        return next((name for name in (key, renamed, self._prefix + key) if name in self._known), None)

    def write(self, folder: Path) -> MergedWeights:
        """Write all weights, with one shard in memory at a time."""
        merged = MergedWeights(copy.deepcopy(self._plan.config))
        with ShardWriter(folder, self._plan.max_shard_size) as writer:
            for file in weight_files(self._plan.folder):
                for key, tensor in read_tensors(file):
                    name = self._name_of(key)
                    if name is None:
                        merged.left_out.append(key)
                        continue
                    for written_name, weight in self._versions(name, tensor, merged):
                        writer.add(key if written_name == name else self._key_of(written_name, name, key), weight)
        _write_config(self._plan, merged, folder)
        return merged

    def _versions(self, name: str, tensor: torch.Tensor, merged: MergedWeights) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a merged weight, and every alias of a tied weight if the adapters changed them differently."""
        group = self._ties.get(name, [name])
        if name != next(alias for alias in group if alias in self._keys):
            return  # a stored copy of a tied weight; the first name counts
        weight = self._merge(name, tensor, merged)
        aliases = [alias for alias in group if alias != name]
        others = {alias: self._merge(alias, tensor, merged) for alias in aliases if not self._stays_tied(group)}
        apart = {alias: other for alias, other in others.items() if not torch.equal(other, weight)}
        yield name, weight
        if apart:
            merged.untied = True
            yield from others.items()

    def _stays_tied(self, group: list[str]) -> bool:
        return all(merger.ties or not merger.changed & set(group) for merger in self._mergers)

    def _key_of(self, alias: str, name: str, key: str) -> str:
        """Return the key for `alias`, when `name` is stored as `key`."""
        return alias if key == name else alias.removeprefix(self._prefix)

    def _merge(self, name: str, tensor: torch.Tensor, merged: MergedWeights) -> torch.Tensor:
        """Return one weight, merged in float32 and rounded once, to the written type."""
        stored = tensor.dtype
        if self._quantized is not None and name in self._quantized.names:
            tensor = self._quantized.dequantize(name)
        for merger, rows in zip(self._mergers, self._plan.vocab_sizes[1:], strict=True):
            if name in self._embeddings:
                tensor = grow_rows(tensor, rows)
            if name in merger.changed:
                tensor = merger.merge(name, tensor.float())
        return _rounded(name, tensor, self._plan.dtype or stored, merged)


def _rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype, merged: MergedWeights) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    merged.dtypes[name] = dtype
    rounded = tensor.to(dtype)
    if dtype == torch.float16 and not bool(rounded.isfinite().all()) and bool(tensor.isfinite().all()):
        raise UserError(f"merge --dtype: float16 cannot represent the values of {name}; use bfloat16 or float32")
    return rounded


def _embedding_parameters(model: PreTrainedModel) -> set[str]:
    modules = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    owned = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in owned}


def _write_from_memory(plan: MergePlan, folder: Path, quantized: QuantizedBase | None) -> MergedWeights:
    model = merge_in_memory(plan, quantized)
    dtype = plan.dtype or (plan.config.dtype if isinstance(plan.config.dtype, torch.dtype) else torch.float32)
    untied = (
        plan.config.get_text_config().tie_word_embeddings and not model.config.get_text_config().tie_word_embeddings
    )
    merged = MergedWeights(model.config, untied=bool(untied))
    for name, parameter in model.named_parameters():
        parameter.data = _rounded(name, parameter.data, dtype, merged)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=plan.max_shard_size)
    return merged


def _write_config(plan: MergePlan, merged: MergedWeights, folder: Path) -> None:
    config = merged.config
    config.get_text_config().vocab_size = plan.vocab_sizes[-1]
    if merged.untied:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    if plan.dtype is not None:
        config.dtype = plan.dtype
    config.save_pretrained(folder)
