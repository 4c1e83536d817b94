"""What a plan is made of, and the configurations that it refuses because `fit` would."""

from __future__ import annotations

from dataclasses import dataclass

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.models.adapters.wrapping import check_adapter_on_quantized_base
from sft_lightning.strategies.refusals import RunFacts
from sft_lightning.strategies.registry import check_strategy
from sft_lightning.strategies.sharding import ShardingSpec
from sft_lightning.training.spec import TrainingSpec


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """What a plan is made of."""

    spec: TrainingSpec
    """The model and how it is trained; no weight is loaded."""

    data: SFTDataModule
    """Prepared, with the topology to plan for."""

    sharding: ShardingSpec
    """What `trainer.strategy` shards."""

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
