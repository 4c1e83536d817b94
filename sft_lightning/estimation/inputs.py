"""The inputs of a plan, and the configurations that it refuses because `fit` would."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.models.adapters.wrapping import check_adapter_on_quantized_base
from sft_lightning.strategies.refusals import RunFacts, check_optimizer
from sft_lightning.strategies.registry import check_strategy, sharding_of
from sft_lightning.strategies.sharding import ShardingSpec
from sft_lightning.strategies.zero.config import YamlSettings
from sft_lightning.strategies.zero.strategy import DeepSpeedZeRO
from sft_lightning.training.spec import TrainingSpec


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """The configuration to plan, and the hardware to plan for."""

    spec: TrainingSpec
    """The keys under `model`."""

    data: SFTDataModule
    """The data, with the topology to plan for. It must be prepared for all but the memory."""

    strategy: object
    """`trainer.strategy`: a short name, or a strategy object."""

    gradient_clip_val: float
    """`trainer.gradient_clip_val`; 0 for no clipping."""

    precision: str
    """`trainer.precision` in its long form, such as `bf16-mixed`."""

    num_epochs: int
    """`trainer.max_epochs`."""

    max_steps: int
    """Largest number of optimizer steps; -1 for no limit."""

    gpu_bytes: float | None
    """Memory of a GPU, in bytes; `None` if it is not given."""

    mfu: float
    """Share of the GPU's peak that training reaches, 0 to 1."""

    tflops: float
    """Peak of a GPU, in 10¹² floating-point operations per second."""

    @property
    def sharding(self) -> ShardingSpec:
        """What the strategy shards and offloads."""
        return sharding_of(self.strategy)


def check_as_fit(strategy: object, run: RunFacts) -> None:
    """Refuse what `fit` refuses before it reads any weight, by the same functions.

    Args:
        strategy: A value of `trainer.strategy`: a short name, or a strategy object.
        run: The model and the processes.

    Raises:
        UserError: If PEFT cannot put the adapter on the quantized base, or the strategy cannot train the model.
    """
    model = run.model
    if model.quantization is not None and model.adapter is not None:
        check_adapter_on_quantized_base(model.adapter, model.quantization, model.dtype)
    check_strategy(strategy, run)


def check_optimizer_as_fit(optimizer: Optimizer, inputs: PlanInputs) -> None:
    """Refuse an optimizer that `fit` refuses under the strategy, and a DeepSpeed JSON that contradicts the YAML.

    Args:
        optimizer: The optimizer of the configuration.
        inputs: The configuration.

    Raises:
        UserError: If `fit` would stop with the same error.
    """
    check_optimizer(optimizer, inputs.sharding)
    if isinstance(inputs.strategy, DeepSpeedZeRO):
        topology, schedule = inputs.data.topology, inputs.spec.lr_scheduler
        yaml = YamlSettings(
            schedule=schedule.name,
            warmup_steps=None if schedule.warmup_ratio is not None else schedule.num_warmup_steps(0),
            min_lr_ratio=schedule.min_lr_ratio,
            batch_size=topology.batch_size,
            accumulate=topology.accumulate,
            world_size=topology.world_size,
            gradient_clip_val=inputs.gradient_clip_val,
            precision=inputs.precision,
        )
        inputs.strategy.check_yaml(yaml.with_optimizer(optimizer))
