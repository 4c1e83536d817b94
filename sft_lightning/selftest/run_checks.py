"""Run all checks, one after the other, in a temporary folder."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sft_lightning.checks import Check
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.plan.epoch_plan import Packing
from sft_lightning.selftest.checks.export import check_export
from sft_lightning.selftest.checks.gradients import GradientSession, check_gradients, check_packed_gradient
from sft_lightning.selftest.checks.isolation import check_isolation
from sft_lightning.selftest.checks.masks import check_masks
from sft_lightning.selftest.checks.preferences import check_pairs, check_start
from sft_lightning.selftest.checks.resume import check_resume
from sft_lightning.selftest.short_runs import Configure, Runner
from sft_lightning.selftest.small_data import small_data
from sft_lightning.training.spec import PreferenceSpec


def run_checks(
    configure: Configure,
    data: SFTDataModule,
    *,
    num_records: int,
    max_row_length: int,
) -> Iterator[Check]:
    """Yield the outcome of each check of a configuration as soon as it is known.

    The model is loaded four times, one copy at a time.

    Args:
        configure: Parses the user's configuration; every run is built from it.
        data: The data of the configuration.
        num_records: Number of records per source whose masks are checked.
        max_row_length: Most tokens per row in the test's own runs.

    Raises:
        UserError: If the configuration or the data is wrong.
    """
    # Training refuses to pack if isolation fails: the later checks then use one example per row.
    packing = data.layout.packing
    yield from check_masks(data, num_records)
    with tempfile.TemporaryDirectory(prefix="sft_lightning_selftest_") as name:
        folder = Path(name)
        runner = Runner(configure, folder)
        small = small_data(data, folder, max_row_length=max_row_length)
        session = GradientSession(runner, small)
        separate, _ = session.gradient(1, "none")
        spec = session.loaded.module.spec
        if isinstance(spec, PreferenceSpec):
            yield check_start(session.loaded, spec.preference)
        isolation = list(check_isolation(session.loaded, small, data.spec.packing))
        yield from isolation
        if isinstance(spec, PreferenceSpec) and isolation[0].passed:
            yield check_pairs(session.loaded, small)
        isolated = isolation[0].passed
        rows: Packing = packing if isolated else "none"
        yield from check_gradients(session, rows)
        if isolated:
            yield check_packed_gradient(session, separate)
        session.run = None
        gc.collect()
        check, continued = check_resume(runner, small, rows, folder / "checkpoints")
        yield check
        if continued is not None:
            yield check_export(continued, folder / "export")
