from __future__ import annotations

from typing import get_args

from sft_lightning.data.formats.fields import Reason
from sft_lightning.data.tokens.record_log import REWRITTEN, RecordLog


def test_each_code_is_a_bit_in_the_order_of_its_first_use() -> None:
    log = RecordLog()
    for codes in (["trailing_user"], [], ["empty_turn", "trailing_user"], ["empty_turn"]):
        log.marks.append(0)
        for code in codes:
            log.mark(code)
    assert log.codes == ["trailing_user", "empty_turn"]
    assert log.marks_array().tolist() == [1, 0, 3, 2]


def test_the_first_twenty_locations_of_each_reason_are_kept_and_all_records_marked() -> None:
    log = RecordLog()
    for i in range(25):
        log.marks.append(0)
        log.drop("no_answer", f"line {i}")
    log.marks.append(0)
    log.drop("no_question", "line 25")
    assert log.dropped_at == {"no_answer": [(i, f"line {i}") for i in range(20)], "no_question": [(25, "line 25")]}
    assert log.marks_array().tolist() == [1] * 25 + [2]


def test_a_repair_is_no_drop() -> None:
    log = RecordLog()
    log.marks.append(0)
    log.mark("empty_turn")
    assert (log.dropped, log.dropped_at) == ([], {})


def test_facts_are_everything_except_the_marks() -> None:
    log = RecordLog(format="messages")
    log.marks.append(0)
    log.drop("no_answer", "line 1")
    log.mark(REWRITTEN)
    assert log.facts() == {
        "format": "messages",
        "codes": ["no_answer", "rewritten"],
        "dropped": ["no_answer"],
        "dropped_at": {"no_answer": [(0, "line 1")]},
    }


def test_all_codes_fit_into_the_bits_of_a_mark() -> None:
    assert len(get_args(Reason)) + len(("leading_answer", "trailing_user", "empty_turn", REWRITTEN)) <= 32
