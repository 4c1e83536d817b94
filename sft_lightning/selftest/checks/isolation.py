"""Whether packed documents see each other, in the loaded model and in the loss."""

from __future__ import annotations

from collections.abc import Iterator

from sft_lightning.data.plan.epoch_plan import Packing
from sft_lightning.errors import UserError
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.isolation import verify_isolation
from sft_lightning.selftest.checks import Check, within
from sft_lightning.selftest.evaluation import documents_of_row, loss_sums
from sft_lightning.selftest.short_runs import Run
from sft_lightning.selftest.small_data import SmallData

_FLOAT32_TOLERANCE = 1e-5


def check_isolation(run: Run, small: SmallData, packing: Packing) -> Iterator[Check]:
    """Check packing on a loaded model.

    Args:
        run: A run that has loaded it.
        small: Examples to pack.
        packing: The configuration's.
    """
    if not can_isolate(run, packing):
        yield Check("packing isolation", None, "data.packing is none, and this attention does not isolate documents")
        return
    module = run.module.to(run.device)
    try:
        with run.trainer.precision_plugin.forward_context():
            difference = verify_isolation(module.language_model, len(run.data.tokenizer), run.device)
    except UserError as error:
        yield Check("packing isolation", False, str(error))
        return
    figure = f"another document changes nothing; packed = separate logits to {difference:.1e}"
    yield Check("packing isolation", True, figure)
    yield _packed_loss(run, small)


def can_isolate(run: Run, packing: Packing) -> bool:
    """Whether documents of a row are to be isolated: rows are packed, or could be without another attention."""
    return packing != "none" or run.module.spec.attn_implementation in ("auto", PACKED)


def _packed_loss(run: Run, small: SmallData) -> Check:
    data = small.module(batch_size=1, packing="best_fit")
    data.setup("fit")
    rows = [documents_of_row(data, row) for row in range(data.plan(0).num_rows)]
    together = max(rows, key=len)
    if len(together) < 2:
        return Check("packed loss", None, "no two of the first examples fit into a row")
    packed = float(loss_sums(run, [together]).loss)
    separate = sum(float(loss_sums(run, [[document]]).loss) for document in together)
    if not separate:
        return Check("packed loss", None, "the documents of the row have no supervised token left")
    tolerance = max(_FLOAT32_TOLERANCE, run.rounding)
    what = f"{len(together)} documents, {packed:.4f} packed, {separate:.4f} separate: relative"
    return within("packed loss", abs(packed - separate) / separate, tolerance, what)
