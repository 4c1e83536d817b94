from __future__ import annotations

import pickle

from sft_lightning.data.formats.fields import malformed
from sft_lightning.types import Record


def test_a_malformed_record_keeps_its_reason_when_it_is_pickled() -> None:
    error = malformed(Record({}, "s", "f.json, record 0"), "turn 1 is a system turn", "misplaced_system")
    back = pickle.loads(pickle.dumps(error))  # noqa: S301  # its own bytes
    assert (str(back), back.reason) == (str(error), "misplaced_system")
    assert str(back) == "f.json, record 0: turn 1 is a system turn; fix the record or set data.malformed: drop"
