"""A configuration's memory, from its skeleton."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Literal

import torch

from sft_lightning.models.quantization import QuantizationConfig
from sft_lightning.planning.memory import Memory, Setup, StepBytes
from sft_lightning.planning.simulation import optimizer_bytes, simulate_step
from sft_lightning.planning.skeleton import Skeleton, stored_bytes
from sft_lightning.training.module import CausalLMModule


class Estimator:
    """Memory of setups of one model.

    A step is simulated at two lengths of one row; between and beyond them memory is a straight line in the tokens of a
    micro-batch, because attention keeps none of its scores.

    Args:
        module: The configuration.
        skeleton: Its model.
        precision: The trainer's.
        max_length: The configuration's.
        accumulates: Whether gradients wait for a later micro-batch.
    """

    def __init__(
        self, module: CausalLMModule, skeleton: Skeleton, *, precision: str, max_length: int, accumulates: bool
    ) -> None:
        self._module = module
        self._skeleton = skeleton
        self._precision = precision
        self._lengths = (max(1, max_length // 2), max_length)
        self._accumulates = accumulates
        self.trained_bytes = stored_bytes(skeleton, None)[1]
        found = optimizer_bytes(skeleton, module.optimizer)
        self.optimizer_is_counted = found is not None
        """Whether the optimizer's states were found by a step; else they are two of each trained parameter."""
        self.optimizer_bytes = 2 * self.trained_bytes if found is None else found

    def memory(self, setup: Setup) -> Memory:
        """Return the memory of one GPU."""
        quantization = self._quantization(setup.bits)
        frozen, trained = stored_bytes(self._skeleton, quantization)
        step, sharding = self.step(setup.batch_size * setup.max_length, setup.checkpointing), setup.sharding
        is_full = self._module.adapter is None
        gradients = trained / sharding.gradients
        made = 0.0 if self._accumulates else self.trained_bytes  # the simulated peak has them already
        temporary = max(0.0, step.peak - step.kept - made) + self._unpacked(quantization) + self._gathered(setup)
        return Memory(
            weights=(frozen + trained if is_full else frozen) / sharding.weights,
            adapter=0.0 if is_full else trained / sharding.weights,
            gradients=gradients,
            optimizer=self.optimizer_bytes / sharding.optimizer,
            activations=step.kept,
            temporary=temporary,
        )

    def step(self, num_tokens: int, checkpointing: bool) -> StepBytes:
        """Return the bytes of a micro-batch of some tokens, by the line through two simulated ones."""
        short, long = self._lengths
        low, high = self._simulated(short, checkpointing), self._simulated(long, checkpointing)
        if num_tokens == long or short == long:
            return high
        share = (num_tokens - short) / (long - short)
        return StepBytes(*(max(0.0, a + share * (b - a)) for a, b in zip(low, high, strict=True)))

    @functools.lru_cache(maxsize=8)  # noqa: B019 (one estimator a command)
    def _simulated(self, length: int, checkpointing: bool) -> StepBytes:
        step = simulate_step(
            self._skeleton,
            batch_size=1,
            max_length=length,
            gradient_checkpointing=checkpointing,
            precision=self._precision,
            has_gradients=self._accumulates,
        )
        return StepBytes(step.kept, step.peak)

    def _quantization(self, bits: int | None) -> QuantizationConfig | None:
        given = self._module.quantization
        if bits is None:
            return None
        return given if given is not None and given.bits == bits else QuantizationConfig(bits=bits)

    def _unpacked(self, quantization: QuantizationConfig | None) -> float:
        """Return the largest weight as it is while it is used, of which a quantized model stores no whole copy."""
        if quantization is None:
            return 0.0
        compute: Literal["float32", "bfloat16", "float16"] = quantization.compute_dtype or self._module.model_dtype
        weights = [p for p in self._skeleton.model.parameters() if id(p) in self._skeleton.linears]
        return float(max((weight.numel() for weight in weights), default=0) * getattr(torch, compute).itemsize)

    def _gathered(self, setup: Setup) -> float:
        """Return two layers' weights, which a sharded run has whole while they are used."""
        if setup.sharding.weights == 1:
            return 0.0
        num_layers: int = self._skeleton.base.config.get_text_config().num_hidden_layers
        alone = replace(setup, sharding=replace(setup.sharding, weights=1))
        frozen, trained = stored_bytes(self._skeleton, self._quantization(alone.bits))
        return 2 * (frozen + trained) / num_layers
