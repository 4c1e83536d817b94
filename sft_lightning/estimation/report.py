"""The plan of a run, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from sft_lightning.data.pairs.kind import Pairs
from sft_lightning.estimation.fitting import (
    changes,
    largest_batch_size,
    largest_max_length,
    largest_model,
)
from sft_lightning.estimation.inputs import PlanInputs, check_optimizer_as_fit
from sft_lightning.estimation.speed import arithmetic, mean_document_length, num_matrix_entries
from sft_lightning.models.checkpointing import Recomputation, describe_recomputation
from sft_lightning.training.memory.decision import (
    check_recomputation,
    choices,
    decide_recomputation,
    given_recomputation,
)
from sft_lightning.training.memory.estimate import Estimator
from sft_lightning.training.memory.parts import GIB, Memory, Setup
from sft_lightning.training.memory.skeleton import Skeleton, build_skeleton
from sft_lightning.training.preference.reference import choose_reference
from sft_lightning.training.preference.sharing import shared_fraction
from sft_lightning.training.spec import PreferenceSpec, TrainingSpec

PARTS = tuple(part.name for part in fields(Memory))
"""Names of the parts of a GPU's memory."""


def plan_lines(inputs: PlanInputs) -> Iterator[str]:
    """Yield the lines of a plan.

    Raises:
        UserError: If the model's configuration cannot be read, or `fit` would refuse the optimizer.
    """
    yield from _data_lines(inputs)
    estimator, setup = plan_memory(inputs)
    skeleton = estimator.skeleton
    yield from _memory_lines(estimator, setup)
    if not estimator.optimizer_is_counted:
        yield "  (optimizer: counted as two tensors per trained parameter, because its step reads their values)"
    yield from _remarks(inputs, setup, skeleton)
    if inputs.gpu_bytes is not None:
        yield from _fit_lines(inputs, estimator, setup, skeleton)
    yield from _speed_lines(inputs, skeleton, setup)


def plan_memory(inputs: PlanInputs) -> tuple[Estimator, Setup]:
    """Return the estimator of a configuration's memory, and its setup; the data need not be prepared.

    Raises:
        UserError: If the model's configuration cannot be read, or `fit` would refuse the optimizer.
    """
    spec, data, topology = inputs.spec, inputs.data, inputs.data.topology
    skeleton = build_skeleton(spec, len(data.tokenizer), inputs.precision)
    estimator = Estimator(
        spec,
        skeleton,
        precision=inputs.precision,
        max_length=data.spec.max_length,
        accumulates=topology.accumulate > 1,
        of_pairs=isinstance(spec, PreferenceSpec),
    )
    check_optimizer_as_fit(estimator.optimizer, inputs)
    setup = Setup(
        batch_size=data.spec.batch_size,
        max_length=data.spec.max_length,
        recomputation=given_recomputation(spec.gradient_checkpointing) or 0,
        bits=None if spec.quantization is None else spec.quantization.bits,
        sharding=inputs.sharding,
        num_gpus=topology.world_size,
    )
    check_recomputation(setup.recomputation, setup.sharding)
    if spec.gradient_checkpointing == "auto" and inputs.gpu_bytes is not None:
        decision = decide_recomputation(
            estimator.memory, setup, choices(skeleton.base, setup.sharding), inputs.gpu_bytes
        )
        setup = replace(setup, recomputation=decision.how)
    return estimator, setup


def _data_lines(inputs: PlanInputs) -> Iterator[str]:
    data, report = inputs.data, inputs.data.report
    train = [source for name, source in report.sources.items() if name.startswith("train/")]
    supervised, tokens = sum(s.supervised_tokens for s in train), sum(s.tokens for s in train)
    dropped = sum(sum(source.dropped.values()) for source in train)
    pairs = f" {sum(source.examples for source in train):,} pairs in" if data.spec.task == "dpo" else ""
    epoch_tokens = int(data.plan(0).rows.lengths.sum())
    yield (
        f"data:{pairs} {report.rows:,} rows of {report.max_length:,} tokens, {report.fill:.1%} full; "
        f"{epoch_tokens:,} tokens per epoch; {supervised:,} of {tokens:,} tokens supervised; {dropped:,} dropped"
    )
    steps = report.optimizer_steps * inputs.num_epochs
    limited = steps if inputs.max_steps == -1 else min(steps, inputs.max_steps)
    topology = data.topology
    yield (
        f"steps: {report.optimizer_steps:,} optimizer steps per epoch, {limited:,} in total; "
        f"a step is {topology.batch_size} rows × {topology.accumulate} micro-batches × {topology.world_size} GPUs"
    )


def _memory_lines(estimator: Estimator, setup: Setup) -> Iterator[str]:
    how = describe_recomputation(setup.recomputation)
    yield f"memory of a GPU ({_sharding_label(setup)}, checkpointing: {how}), GiB:"
    memory = estimator.memory(setup)
    for part in PARTS:
        yield f"  {part:<13} {getattr(memory, part) / GIB:9.3f}"
    words: dict[Recomputation, str] = {0: "off", "selective": "selective", 1: "on"}
    others = [
        f"{words[other]}: {estimator.memory(replace(setup, recomputation=other)).total / GIB:.3f}"
        for other in choices(estimator.skeleton.base, setup.sharding)
        if other in words and other != setup.recomputation
    ]
    yield f"  {'peak':<13} {memory.total / GIB:9.3f}  (checkpointing {', '.join(others)})"


def _sharding_label(setup: Setup) -> str:
    """Name the strategy of a setup."""
    sharding = setup.sharding
    if sharding.kind == "ddp":
        return "one GPU" if setup.num_gpus == 1 else "DDP, the full model on each GPU"
    name = "FSDP2" if sharding.kind == "fsdp2" else f"ZeRO-{sharding.stage}"
    replicas = f", {sharding.replicas} replicas" if sharding.replicas > 1 else ""
    return f"{name}{replicas}{', offloaded' if sharding.offloads_weights or sharding.offloads_optimizer else ''}"


def _remarks(inputs: PlanInputs, setup: Setup, skeleton: Skeleton) -> Iterator[str]:
    """Yield which figures are not simulated, or not planned."""
    if setup.sharding.kind != "ddp":
        yield "  (communication: counted from the strategy's defaults; the other parts are simulated for one GPU)"
    if setup.sharding.offloads_weights or setup.sharding.offloads_optimizer:
        yield "  (offloaded parts take CPU memory, which is not planned)"
    spec = inputs.spec
    if isinstance(spec, PreferenceSpec):
        yield f"  ({_reference(spec, skeleton, inputs)})"
        yield f"  (prompt sharing: {_shared(inputs):.0%} of the tokens are saved; the memory is planned without it)"


def _reference(spec: PreferenceSpec, skeleton: Skeleton, inputs: PlanInputs) -> str:
    """Return a remark on where the reference's log-probabilities come from, and what they take."""
    if not spec.preference.has_reference:
        return f"reference model: none, the loss is {spec.preference.loss}"
    choice = choose_reference(spec.preference.reference, skeleton.model, spec.adapter)
    if choice.kind == "adapter_off":
        return "reference model: adapter_off, a second forward pass in each step, with less memory than the step"
    num_pairs = inputs.data.plan(0).documents.shape[0]
    return f"reference model: precomputed, one forward pass over the data; {8 * num_pairs / 2**20:.2f} MiB"


def _fit_lines(inputs: PlanInputs, estimator: Estimator, setup: Setup, skeleton: Skeleton) -> Iterator[str]:
    budget = inputs.gpu_bytes or 0.0
    memory = estimator.memory(setup)
    fits = memory.total <= budget
    yield f"{'fits' if fits else 'does not fit'} into {budget / GIB:.1f} GiB: peak {memory.total / GIB:.2f} GiB"
    limit = getattr(skeleton.base.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    rows = largest_batch_size(estimator.memory, setup, budget)
    length = largest_max_length(estimator.memory, setup, budget, limit)
    yield f"largest data.batch_size: {rows or 'none'}; largest data.max_length: {length or 'none'} (of {limit:,})"
    if not fits:
        yield from _change_lines(inputs, estimator, setup, budget)
    yield from _model_lines(inputs, memory, skeleton, budget)


def _change_lines(inputs: PlanInputs, estimator: Estimator, setup: Setup, budget: float) -> Iterator[str]:
    spec = inputs.spec
    yield "changes that save memory, cheapest first, each on top of the previous ones:"
    can_quantize = spec.from_config is None
    for change in changes(setup, has_adapter=spec.adapter is not None, can_quantize=can_quantize):
        total: Memory = estimator.memory(change.setup)
        fits = total.total <= budget
        yield f"  {change.words}: {total.total / GIB:.2f} GiB{', fits' if fits else ''}"
        if fits:
            return
    hint = "" if spec.adapter is not None else ", or train an adapter (model.adapter)"
    yield f"  none of these makes it fit; use a smaller model or a larger GPU{hint}"


def _model_lines(inputs: PlanInputs, memory: Memory, skeleton: Skeleton, budget: float) -> Iterator[str]:
    num_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    about = largest_model(memory, num_parameters, budget) / 1e9
    rule = budget * inputs.data.topology.world_size / 1e9 / 3
    yield (
        f"largest model of this kind: about {about:.1f} B parameters, scaled from this one "
        f"({num_parameters / 1e9:.2f} B); by DeepSpeed-Chat's rule for ZeRO-3, checkpointing and LoRA "
        f"(GPU memory / 3): {rule:.1f} B"
    )


def _speed_lines(inputs: PlanInputs, skeleton: Skeleton, setup: Setup) -> Iterator[str]:
    data, spec = inputs.data, inputs.spec
    rows = data.plan(0).rows
    lengths = rows.documents[:, 2] - rows.documents[:, 1]
    num_adapter = 0 if spec.adapter is None else sum(parameter.numel() for parameter in skeleton.trainable)
    per_token = arithmetic(
        skeleton.base.config,
        num_matmul=num_matrix_entries(skeleton.base),
        num_adapter=num_adapter,
        full=spec.adapter is None,
        document_length=mean_document_length(lengths),
    )
    tokens = int(rows.lengths.sum() * (1 - _shared(inputs)))
    if _asks_reference(spec, skeleton):
        per_token = replace(per_token, model=per_token.model + per_token.recomputed)
    share = 0.0 if setup.recomputation in (0, "selective") else 1 / float(setup.recomputation)
    seconds = per_token.seconds(
        tokens,
        mfu=inputs.mfu,
        tflops=inputs.tflops,
        num_gpus=data.topology.world_size,
        recomputed=share,
    )
    yield (
        f"arithmetic: {per_token.model / 1e9:.2f} GFLOP per token"
        + (f" and {share * per_token.recomputed / 1e9:.2f} for recomputation" if share else "")
        + f"; an epoch takes {_duration(seconds)} at {inputs.mfu:.0%} of {inputs.tflops:g} TFLOP/s per GPU"
    )


def _shared(inputs: PlanInputs) -> float:
    """Return the share of tokens that prompt sharing saves, provided that `fit` verifies it on the model."""
    spec, data = inputs.spec, inputs.data
    shares = isinstance(spec, PreferenceSpec) and spec.preference.share_prompts
    return shared_fraction(data) if shares and isinstance(data.kind, Pairs) else 0.0


def _asks_reference(spec: TrainingSpec, skeleton: Skeleton) -> bool:
    """Whether each step has a second forward pass, for the reference."""
    if not isinstance(spec, PreferenceSpec) or not spec.preference.has_reference:
        return False
    return choose_reference(spec.preference.reference, skeleton.model, spec.adapter).kind == "adapter_off"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
