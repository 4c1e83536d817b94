"""A configuration's memory, from its skeleton."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from sft_lightning.estimation.memory import Memory, Setup, StepBytes
from sft_lightning.estimation.simulation import fake_optimizer, optimizer_bytes, simulate_step
from sft_lightning.estimation.skeleton import Skeleton, stored_bytes, stored_bytes_of
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.strategies.fsdp2.groups import shard_groups
from sft_lightning.training.spec import TrainingSpec

_ZERO_BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`, in elements; allocated whole, however few parameters train."""

_ZERO_LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: weights that ZeRO-3 keeps gathered, in elements."""


class Estimator:
    """Memory of setups of one model.

    A step is simulated at two lengths of one row; between and beyond them memory is a straight line in the tokens of a
    micro-batch, because attention keeps none of its scores.

    Args:
        spec: The model, and how it is trained.
        skeleton: That model without weights.
        precision: The trainer's.
        max_length: The configuration's.
        accumulates: Whether gradients wait for a later micro-batch.
        of_pairs: Whether a step is one of `task: dpo`.
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
    ) -> None:
        self._spec = spec
        self._of_pairs = of_pairs
        self.skeleton = skeleton
        """The model, without weights."""

        self._precision = precision
        longest = min(max_length, _longest_simulated(skeleton))
        self._lengths = (max(1, longest // 2), longest)
        self._accumulates = accumulates
        self.trained_bytes = stored_bytes(skeleton, None)[1]
        self.optimizer = fake_optimizer(skeleton, spec.optimizer)
        """The optimizer, over the model's fake tensors."""

        found = optimizer_bytes(skeleton, self.optimizer)
        self.optimizer_is_counted = found is not None
        """Whether the optimizer's states were found by a step; else they are two of each trained parameter."""
        self.optimizer_bytes = 2 * self.trained_bytes if found is None else found

    def memory(self, setup: Setup) -> Memory:
        """Return the memory of one GPU."""
        quantization = self._quantization(setup.bits)
        frozen, trained = stored_bytes(self.skeleton, quantization)
        gradients, optimizer = trained, self.optimizer_bytes
        sharding, shards = setup.sharding, setup.shards
        if sharding.kind == "zero":
            frozen, trained, gradients, optimizer = self._in_zero(quantization)
        # Gradients that are divided are gone, but for a part, as soon as they are made.
        waiting = self._accumulates or shards.gradients > 1 or sharding.offloads_optimizer
        step = self.step(setup.batch_size * setup.max_length, setup.checkpointing, setup.bits, has_gradients=waiting)
        made = 0.0 if waiting else self.trained_bytes  # the simulated peak has them already
        kept = max(0.0, min(step.kept, step.peak - made))  # in full fine-tuning most are gone when gradients are there
        weights, adapter = (frozen + trained, 0.0) if self._spec.adapter is None else (frozen, trained)
        on_gpu, stepping = not sharding.offloads_weights, not sharding.offloads_optimizer
        return Memory(
            weights=weights / shards.weights * on_gpu,
            adapter=adapter / shards.weights * on_gpu,
            gradients=gradients / shards.gradients * stepping,
            optimizer=optimizer / shards.optimizer * stepping,
            activations=kept,
            temporary=max(0.0, step.peak - kept - made) + self._unpacked(quantization),
            communication=communication_bytes(self.skeleton, setup, quantization, self._element_size),
        )

    def _in_zero(self, quantization: QuantizationConfig | None) -> tuple[float, float, float, float]:
        """Return the bytes of what is frozen, of what trains, its gradients and the optimizer's part in DeepSpeed.

        In half precision it casts the model, quantized weights excepted. Gradients wait in float32, and so are the
        optimizer's states, beside a float32 copy of what trains.
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
        """Bytes of an element of what ZeRO sends."""
        largest = max((parameter.element_size() for parameter in self.skeleton.trainable), default=0)
        return largest if self._cast_to is None else self._cast_to.itemsize

    @property
    def _cast_to(self) -> torch.dtype | None:
        """What DeepSpeed casts the model to; `None` leaves the types alone."""
        return getattr(torch, {"bf16": "bfloat16", "16": "float16"}.get(self._precision.partition("-")[0], ""), None)

    def step(self, num_tokens: int, checkpointing: bool, bits: int | None, *, has_gradients: bool) -> StepBytes:
        """Return the bytes of a micro-batch of some tokens, by the line through two simulated ones."""
        short, long = self._lengths
        low, high = (self._simulated(length, checkpointing, bits == 8, has_gradients) for length in (short, long))
        if num_tokens == long or short == long:
            return high
        share = (num_tokens - short) / (long - short)
        return StepBytes(*(max(0.0, a + share * (b - a)) for a, b in zip(low, high, strict=True)))

    @functools.lru_cache(maxsize=16)  # noqa: B019 (one estimator a command)
    def _simulated(self, length: int, checkpointing: bool, int8: bool, has_gradients: bool) -> StepBytes:
        step = simulate_step(
            self.skeleton,
            batch_size=1,
            max_length=length,
            gradient_checkpointing=checkpointing,
            precision=self._precision,
            has_gradients=has_gradients,
            int8="cuda" if int8 else None,
            of_pairs=self._of_pairs,
        )
        return StepBytes(step.kept, step.peak)

    def _quantization(self, bits: int | None) -> QuantizationConfig | None:
        given = self._spec.quantization
        if bits is None:
            return None
        return given if given is not None and given.bits == bits else QuantizationConfig(bits=bits)

    def _unpacked(self, quantization: QuantizationConfig | None) -> float:
        """Return the largest weight as it is while it is used, of which a 4-bit model stores no whole copy."""
        if quantization is None or quantization.bits == 8:  # of LLM.int8 the simulated step has it
            return 0.0
        compute: Literal["float32", "bfloat16", "float16"] = quantization.compute_dtype or self._spec.dtype
        weights = [p for p in self.skeleton.model.parameters() if id(p) in self.skeleton.linears]
        return float(max((weight.numel() for weight in weights), default=0) * getattr(torch, compute).itemsize)


def _longest_simulated(skeleton: Skeleton) -> int:
    """Return how many tokens a simulated row has at most: a state-space model's are scanned one by one."""
    config = skeleton.base.config.get_text_config()
    return 1 << 30 if getattr(config, "num_attention_heads", None) else 32


def communication_bytes(
    skeleton: Skeleton, setup: Setup, quantization: QuantizationConfig | None, element_size: int
) -> float:
    """Return the bytes that a strategy holds for communication.

    DDP copies gradients into buckets of their size. FSDP2 has two decoder layers whole, the one that runs and the next,
    what belongs to no layer for the whole step, and a layer's gradients while they are reduced. ZeRO has its buckets,
    two of them below stage 3, and in stage 3 gathered weights.

    Args:
        skeleton: The model.
        setup: The strategy, and the number of GPUs.
        quantization: Of the base.
        element_size: Bytes of an element of what ZeRO sends.
    """
    sharding = setup.sharding
    if sharding.kind == "ddp":
        copies = 0 if setup.num_gpus == 1 else 1
        return float(copies * sum(p.numel() * p.element_size() for p in skeleton.trainable))
    if sharding.kind == "fsdp2":
        return _fsdp2(skeleton, quantization)
    if sharding.stage == 0:
        return 0.0
    if sharding.stage < 3:
        return 2.0 * _ZERO_BUCKET * element_size
    num_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    gathered = sum(stored_bytes(skeleton, quantization)) * min(1.0, _ZERO_LIVE / num_parameters)
    return float(_ZERO_BUCKET * element_size) + gathered


def _fsdp2(skeleton: Skeleton, quantization: QuantizationConfig | None) -> float:
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
