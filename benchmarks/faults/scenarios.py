"""What a user does with the packages: a few commands on tiny inputs, all of which succeed without a fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Command:
    """One command line, run in the folder of the inputs."""

    args: tuple[str, ...]
    """Arguments of `python -m sft_lightning`."""

    processes: int = 1
    """Processes that run it, as under a launcher."""


@dataclass(frozen=True)
class Scenario:
    """A tiny configuration, and what its user runs."""

    name: str
    """The name that faults refer to."""

    options: tuple[str, ...]
    """Options of the configuration, on top of those that all have."""

    more: tuple[tuple[str, ...], ...] = ()
    """Further commands after the first `fit`; one that begins with `fit` gets the same options."""

    processes: int = 1
    """Processes of `fit`."""

    without: tuple[str, ...] = ()
    """Options of all configurations that this one leaves out, by how they begin."""

    files: dict[str, str] = field(default_factory=dict)
    """File of the inputs → the one that replaces it before the last command."""

    def commands(self, last: Sequence[str] = ()) -> list[Command]:
        """Return what the user runs, one after the other.

        Args:
            last: More options of the last command.
        """
        lines = [("fit", *self.configuration, "--trainer.default_root_dir=run"), *map(self._complete, self.more)]
        lines[-1] = (*lines[-1], *last)
        return [Command(line, self.processes if line[0] == "fit" else 1) for line in lines]

    def selftest(self) -> Command:
        """Return `selftest` of the same configuration."""
        return Command(("selftest", *self.configuration, "--num_records=8", "--row_length=128"))

    @property
    def configuration(self) -> tuple[str, ...]:
        """All options of the configuration."""
        common = [option for option in _COMMON if not option.startswith(self.without or ("?",))]
        return (*common, *self.options)

    def _complete(self, line: tuple[str, ...]) -> tuple[str, ...]:
        return ("fit", *self.configuration, *line[1:]) if line[0] == "fit" else line


_CALLBACKS = "--trainer.callbacks"
_COMMON = (
    "--model.model_name_or_path=base",
    "--model.dtype=float32",
    "--model.adapter.r=4",
    "--model.adapter.alpha=16",
    "--model.adapter.dropout=0.05",
    "--model.optimizer=torch.optim.AdamW",
    "--model.optimizer.lr=1e-2",
    "--model.optimizer.weight_decay=0.1",
    "--model.lr_scheduler.warmup_steps=1",
    "--model.gradient_checkpointing=false",
    "--data.sources={chats: {path: chats.json, format: messages}}",
    "--data.template=vicuna_v1.1",
    "--data.max_length=160",
    "--data.batch_size=2",
    "--trainer.accelerator=cpu",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.gradient_clip_val=0.1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    f"{_CALLBACKS}+=callbacks.SampleGeneration",
    f"{_CALLBACKS}.num_prompts=1",
    f"{_CALLBACKS}.generation.max_new_tokens=2",
)
EVERY_2_STEPS = (
    f"{_CALLBACKS}+=lightning.pytorch.callbacks.ModelCheckpoint",
    f"{_CALLBACKS}.every_n_train_steps=2",
    f"{_CALLBACKS}.save_top_k=-1",
    f"{_CALLBACKS}.filename=s{{step}}",
    f"{_CALLBACKS}.auto_insert_metric_name=false",
)
CONTINUED = ("fit", "--trainer.default_root_dir=continued", "--ckpt_path=run/checkpoints/s2.ckpt")
_MERGE = ("merge", "--adapter=run/adapter", "--output_dir=merged")
PAIRS = ("--task=dpo", "--data.sources={pairs: {path: pairs.json, format: preference}}")
NO_ADAPTER = ("--model.adapter",)

SCENARIOS = {
    each.name: each
    for each in (
        Scenario("packed", ()),
        Scenario("separate", ("--data.packing=none",)),
        Scenario("concat", ("--data.packing=concat",)),
        Scenario("full", (), without=NO_ADAPTER),
        Scenario("learned_positions", ("--model.model_name_or_path=gpt2",)),
        Scenario("ddp", ("--trainer.devices=2", "--trainer.strategy=ddp"), processes=2),
        Scenario("checkpointed", ("--model.gradient_checkpointing=true", "--model.attn_implementation=sdpa",
                                  "--data.packing=none")),
        Scenario("qlora", ("--model.quantization.bits=4",)),
        Scenario("blend", (
            "--data.sources={chats: {path: chats.json, format: messages}, "
            "questions: {path: questions.json, format: alpaca, weight: 0.5}}", "--trainer.max_epochs=2")),
        Scenario("streamed", (
            "--data.sources={chats: {path: chats.json, format: messages, streaming: true}}", "--trainer.max_steps=4")),
        Scenario("validated", (
            "--data.val_sources={held_out: {path: validation.json, format: messages}}",
            "--trainer.val_check_interval=0.5")),
        Scenario("dpo", (*PAIRS, "--model.preference.reference=adapter_off")),
        Scenario("dpo_precomputed", (*PAIRS, "--model.preference.reference=precomputed")),
        Scenario("dpo_full", PAIRS, without=NO_ADAPTER),
        Scenario("dpo_resumed", (*PAIRS, "--model.preference.reference=precomputed", *EVERY_2_STEPS), (CONTINUED,)),
        Scenario("resumed", EVERY_2_STEPS, (CONTINUED,)),
        Scenario("edited", (), (("fit", "--trainer.default_root_dir=second"),),
                 files={"chats.json": "edited_chats.json"}),
        Scenario("merged", (), (_MERGE,)),
        Scenario("merged_qlora", ("--model.quantization.bits=4",), (_MERGE,)),
    )
}  # fmt: skip
