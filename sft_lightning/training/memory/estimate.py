"""The memory of a configuration, estimated from a model without weights."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.checkpointing import Recomputation
from sft_lightning.strategies.fsdp2.groups import shard_groups
from sft_lightning.training.memory.parts import Memory, Setup, StepBytes
from sft_lightning.training.memory.simulation import Device, fake_optimizer, optimizer_bytes, simulate_step
from sft_lightning.training.memory.skeleton import Skeleton, stored_bytes, stored_bytes_of
from sft_lightning.training.spec import TrainingSpec

_ZERO_BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`, in elements; allocated in full, however few parameters train."""

_ZERO_LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: parameters that ZeRO-3 keeps gathered, in elements."""


class Estimator:
    """Estimates the memory of different setups of one model.

    A step is simulated for one row of two lengths. For other numbers of tokens, memory is interpolated linearly:
    attention keeps no scores, so it grows linearly with the tokens of a micro-batch.

    Args:
        spec: The model, and how it is trained.
        skeleton: The model without weights.
        precision: `trainer.precision` in its long form, such as `bf16-mixed`.
        max_length: `data.max_length`.
        accumulates: Whether gradients are kept for a later micro-batch.
        of_pairs: Whether the loss is that of `task: dpo`.
        device: The device that is imitated.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        skeleton: Skeleton,
        *,
        precision: str,
        max_length: int,
        accumulates: bool,
        of_pairs: bool = False,
        device: Device = "cuda",
    ) -> None:
        self._spec = spec
        self._of_pairs = of_pairs
        self._device = device
        self.skeleton = skeleton
        """The model, without weights."""

        self._precision = precision
        longest = min(max_length, _longest_simulated(skeleton))
        self._lengths = (max(1, longest // 2), longest)
        self._accumulates = accumulates
        self.trained_bytes = stored_bytes(skeleton, None)[1]
        self.optimizer = fake_optimizer(skeleton, spec.optimizer)
        """The optimizer of the configuration, over the skeleton's fake tensors."""

        found = optimizer_bytes(skeleton, self.optimizer)
        self.optimizer_is_counted = found is not None
        """Whether a step has counted the optimizer's state; if not, it is two tensors per trained parameter."""
        self.optimizer_bytes = 2 * self.trained_bytes if found is None else found

    def memory(self, setup: Setup) -> Memory:
        """Return the memory of one GPU with a setup."""
        quantization = self._quantization(setup.bits)
        frozen, trained = stored_bytes(self.skeleton, quantization)
        gradients, optimizer = trained, self.optimizer_bytes
        sharding, shards = setup.sharding, setup.shards
        if sharding.kind == "zero":
            frozen, trained, gradients, optimizer = self._deepspeed_bytes(quantization)
        # Sharded gradients are freed as soon as they are reduced; the shards wait, and are counted at shard size.
        waiting = self._accumulates or shards.gradients > 1 or sharding.offloads_optimizer
        step = self.step(setup.batch_size * setup.max_length, setup.recomputation, setup.bits, has_gradients=waiting)
        made = 0.0 if waiting else self.trained_bytes  # the simulated peak includes them
        kept = max(0.0, min(step.kept, step.peak - made))  # in full fine-tuning most are freed before the peak
        weights, adapter = (frozen + trained, 0.0) if self._spec.adapter is None else (frozen, trained)
        on_gpu, stepping = not sharding.offloads_weights, not sharding.offloads_optimizer
        return Memory(
            weights=weights / shards.weights * on_gpu,
            adapter=adapter / shards.weights * on_gpu,
            gradients=gradients / shards.gradients * stepping,
            optimizer=optimizer / shards.optimizer * stepping,
            activations=kept,
            temporary=max(0.0, step.peak - kept - made) + self._largest_unpacked(quantization),
            communication=communication_bytes(self.skeleton, setup, quantization, self._element_size),
        )

    def _deepspeed_bytes(self, quantization: QuantizationConfig | None) -> tuple[float, float, float, float]:
        """Return the bytes of frozen weights, trained weights, gradients and optimizer state in DeepSpeed.

        In a 16-bit precision it casts all weights but the quantized ones. Gradients and the optimizer's state are
        float32, and a float32 copy of the trained weights is part of the state.
        """
        frozen, trained = stored_bytes(self.skeleton, quantization)
        num_trained = sum(parameter.numel() for parameter in self.skeleton.trainable)
        states = self.optimizer_bytes * 4 * num_trained / trained if trained else 0.0
        size = 0 if self._cast_to is None else self._cast_to.itemsize
        packed = self.skeleton.linears if quantization is not None else frozenset()
        for parameter in self.skeleton.model.parameters():
            if size and not parameter.requires_grad and id(parameter) not in packed:
                frozen -= parameter.numel() * (parameter.element_size() - size)
        return frozen, float(num_trained * size) or trained, 4.0 * num_trained, states + 4.0 * num_trained

    @property
    def _element_size(self) -> int:
        """Bytes of an element that ZeRO sends."""
        largest = max((parameter.element_size() for parameter in self.skeleton.trainable), default=0)
        return largest if self._cast_to is None else self._cast_to.itemsize

    @property
    def _cast_to(self) -> torch.dtype | None:
        """The type that DeepSpeed casts the model to; `None` if it keeps the types."""
        return getattr(torch, {"bf16": "bfloat16", "16": "float16"}.get(self._precision.partition("-")[0], ""), None)

    def step(self, num_tokens: int, how: Recomputation, bits: int | None, *, has_gradients: bool) -> StepBytes:
        """Return the bytes of a micro-batch, interpolated between two simulated ones.

        Args:
            num_tokens: Tokens of the micro-batch.
            how: What is recomputed in the backward pass.
            bits: Bits of the base's quantized weights; `None` if they are not quantized.
            has_gradients: Whether gradients of an earlier micro-batch exist already.
        """
        short, long = self._lengths
        low, high = (self._simulated(length, how, bits == 8, has_gradients) for length in (short, long))
        if num_tokens == long or short == long:
            return high
        share = (num_tokens - short) / (long - short)
        return StepBytes(*(max(0.0, a + share * (b - a)) for a, b in zip(low, high, strict=True)))

    @functools.lru_cache(maxsize=16)  # noqa: B019 (one estimator per command)
    def _simulated(self, length: int, how: Recomputation, int8: bool, has_gradients: bool) -> StepBytes:
        step = simulate_step(
            self.skeleton,
            batch_size=1,
            max_length=length,
            recomputation=how,
            precision=self._precision,
            has_gradients=has_gradients,
            int8=int8,
            of_pairs=self._of_pairs,
            device=self._device,
        )
        return StepBytes(step.kept, step.peak)

    def _quantization(self, bits: int | None) -> QuantizationConfig | None:
        given = self._spec.quantization
        if bits is None:
            return None
        return given if given is not None and given.bits == bits else QuantizationConfig(bits=bits)

    def _largest_unpacked(self, quantization: QuantizationConfig | None) -> float:
        """Return the bytes of the largest 4-bit weight while it is unpacked for a matrix product."""
        if quantization is None or quantization.bits == 8:  # the simulated step includes LLM.int8's
            return 0.0
        compute: Literal["float32", "bfloat16", "float16"] = quantization.compute_dtype or self._spec.dtype
        weights = [p for p in self.skeleton.model.parameters() if id(p) in self.skeleton.linears]
        return float(max((weight.numel() for weight in weights), default=0) * getattr(torch, compute).itemsize)


def _longest_simulated(skeleton: Skeleton) -> int:
    """Return the largest number of tokens to simulate; state-space models scan a row token by token."""
    config = skeleton.base.config.get_text_config()
    return 1 << 30 if getattr(config, "num_attention_heads", None) else 32


def communication_bytes(
    skeleton: Skeleton, setup: Setup, quantization: QuantizationConfig | None, element_size: int
) -> float:
    """Return the bytes that a strategy holds on a GPU for communication.

    They are counted from what the strategies' code allocates, not simulated; an upper bound where DeepSpeed decides at
    run time. DDP copies gradients into buckets of the same size. FSDP2 holds two gathered decoder layers (the one that
    runs and the next), the parameters outside the layers, and the gradients of a layer while they are reduced. ZeRO
    holds two buckets below stage 3; under stage 3, one bucket and gathered weights.

    Args:
        skeleton: The model without weights.
        setup: The strategy, and the number of GPUs.
        quantization: How the base is quantized.
        element_size: Bytes of an element that ZeRO sends.
    """
    sharding = setup.sharding
    if sharding.kind == "ddp":
        copies = 0 if setup.num_gpus == 1 else 1
        return float(copies * sum(p.numel() * p.element_size() for p in skeleton.trainable))
    if sharding.kind == "fsdp2":
        return _fsdp2_bytes(skeleton, quantization)
    if sharding.stage == 0:
        return 0.0
    if sharding.stage < 3:
        return 2.0 * _ZERO_BUCKET * element_size
    num_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    gathered = sum(stored_bytes(skeleton, quantization)) * min(1.0, _ZERO_LIVE / num_parameters)
    return float(_ZERO_BUCKET * element_size) + gathered


def _fsdp2_bytes(skeleton: Skeleton, quantization: QuantizationConfig | None) -> float:
    seen: set[int] = set()
    groups: list[tuple[float, float]] = []
    for module in shard_groups(skeleton.base):
        own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        groups.append(stored_bytes_of(own, skeleton.linears, quantization))
    *layers, rest = groups
    largest = max(frozen + trained for frozen, trained in layers)
    reduced = max(trained for _, trained in groups)
    return sum(rest) + 2 * largest + reduced
