"""Check on the loaded model that packed documents do not influence each other's logits and loss."""

from __future__ import annotations

from collections.abc import Iterator

from sft_lightning.checks import Check, within
from sft_lightning.data.plan.epoch_plan import PackingSetting
from sft_lightning.errors import UserError
from sft_lightning.models.attention.isolation import describe_leak, measure_isolation
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.selftest.evaluation import documents_of_row, loss_sums
from sft_lightning.selftest.short_runs import Run
from sft_lightning.selftest.small_data import SmallData
from sft_lightning.training.forward import inputs_of_rows

_FLOAT32_TOLERANCE = 1e-5


def check_isolation(run: Run, small: SmallData, packing: PackingSetting) -> Iterator[Check]:
    """Check the logits, then the loss of packed documents.

    Args:
        run: A run whose model is loaded.
        small: Examples to pack.
        packing: `data.packing` of the configuration.
    """
    if not can_isolate(run, packing):
        yield Check(
            "packing isolation",
            None,
            "data.packing is none, and this attention implementation does not isolate documents",
        )
        return
    module = run.module.to(run.device)
    try:
        with run.trainer.precision_plugin.forward_context():
            isolation = measure_isolation(
                module.language_model,
                len(run.data.tokenizer),
                inputs_of_rows(run.device),
                batch_size=run.data.spec.batch_size,
            )
    except UserError as error:
        yield _not_isolated(str(error), packing)
        return
    if not isolation.verified:
        leak = describe_leak(module.language_model, isolation)
        yield _not_isolated(leak, packing)
        return
    figure = (
        f"logits change by {isolation.leak:.1e} with another neighbour, by {isolation.difference:.1e} alone "
        f"(at most {isolation.tolerance:.1e})"
    )
    yield Check("packing isolation", True, figure)
    yield _packed_loss(run, small)


def _not_isolated(reason: str, packing: PackingSetting) -> Check:
    """Return the check of a model whose documents see each other: a failure, unless training does not pack them."""
    if packing in ("auto", "none"):
        return Check("packing isolation", None, f"data.packing: {packing} leaves each row to one document; {reason}")
    return Check("packing isolation", False, f"{reason}; set data.packing: none")


def can_isolate(run: Run, packing: PackingSetting) -> bool:
    """Whether isolation applies: rows are packed, or the attention implementation supports packing.

    Args:
        run: A run whose model is loaded.
        packing: `data.packing` of the configuration.
    """
    return packing != "none" or run.module.spec.attn_implementation in ("auto", PACKED)


def _packed_loss(run: Run, small: SmallData) -> Check:
    data = small.module(batch_size=1, packing="best_fit")
    data.setup("fit")
    rows = [documents_of_row(data, row) for row in range(data.plan(0).num_rows)]
    together = max(rows, key=len)
    if len(together) < 2:
        return Check("packed loss", None, "no two of the examples fit into one row")
    packed = float(loss_sums(run, [together]).loss)
    separate = sum(float(loss_sums(run, [[document]]).loss) for document in together)
    if not separate:
        return Check("packed loss", None, "the truncated documents of the row have no supervised tokens")
    tolerance = max(_FLOAT32_TOLERANCE, run.rounding)
    what = f"{len(together)} documents: loss {packed:.4f} packed, {separate:.4f} separate; relative difference"
    return within("packed loss", abs(packed - separate) / separate, tolerance, what)
