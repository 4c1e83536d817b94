from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_lightning.data.plan.splits import Compat, deepspeed_chat_part, hold_out, parse_data_split, stage_records
from sft_lightning.errors import UserError

ALL = np.ones(20, bool)


def test_both_sides_are_disjoint_and_complete() -> None:
    train, held_out = hold_out(ALL, 0.25, seed=(0, 0))
    assert held_out.sum() == 5
    assert (train ^ held_out).all()


def test_the_draw_depends_on_the_seed_alone() -> None:
    def drawn(*seed: int) -> list[bool]:
        return hold_out(ALL, 0.25, seed=(seed[0], seed[1]))[1].tolist()  # type: ignore[no-any-return]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0)
    assert drawn(0, 0) != drawn(0, 1)


def test_only_members_are_divided() -> None:
    members = np.arange(20) % 2 == 0
    train, held_out = hold_out(members, 0.3, seed=(0, 0))
    assert held_out.sum() == 3
    assert (train | held_out).tolist() == members.tolist()


def test_a_small_fraction_still_holds_out_one_record() -> None:
    assert hold_out(ALL, 0.001, seed=(0, 0))[1].sum() == 1


def test_a_fraction_that_leaves_no_training_record_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.val_fraction: 0\.1 of 1 records leaves no record to train on"):
        hold_out(ALL[:1], 0.1, seed=(0, 0))


def stages(num_records: int, data_split: str, *, seed: int = 0, compat: Compat | None = None) -> list[list[int]]:
    """The records of every stage; none for one that is refused because it has none."""
    parts: list[list[int]] = []
    for part in range(data_split.count(",") + 1):
        try:
            parts.append(stage_records(num_records, data_split, part, seed=seed, compat=compat))
        except UserError:
            parts.append([])
    return parts


@pytest.mark.parametrize(
    ("num_records", "sizes"), [(10, [2, 4, 4]), (11, [3, 4, 4]), (7, [1, 3, 3]), (3, [1, 1, 1]), (1, [1, 0, 0])]
)
def test_stages_have_exactly_the_sizes_of_deepspeed_chat(num_records: int, sizes: list[int]) -> None:
    assert [len(part) for part in stages(num_records, "2,4,4", seed=1234, compat="deepspeed_chat")] == sizes


def test_stages_have_exactly_the_records_of_deepspeed_chat() -> None:
    assert stage_records(10, "2,4,4", 0, seed=1234, compat="deepspeed_chat") == [7, 2]


def by_deepspeed_chat(num_records: int, proportions: list[float], seed: int) -> list[list[int]]:
    """`get_raw_dataset_split_index` of dschat/utils/data/data_utils.py."""
    index = [0]
    for number, proportion in enumerate(proportions):
        index.append(index[number] + round(proportion / sum(proportions) * float(num_records)))
    diff = index[-1] - num_records
    index = [0, *(end - diff for end in index[1:])]
    shuffled = np.arange(num_records, dtype=np.uint32)
    np.random.RandomState(seed).shuffle(shuffled)
    return [shuffled[start:end].tolist() for start, end in pairwise(index)]


@given(num_records=st.integers(1, 300), seed=st.integers(0, 9), split=st.sampled_from(["2,4,4", "6,2,2", "10,0,0"]))
def test_stages_are_those_of_deepspeed_chat_for_any_number_of_records(num_records: int, seed: int, split: str) -> None:
    expected = by_deepspeed_chat(num_records, [float(part) for part in split.split(",")], seed)
    assert stages(num_records, split, seed=seed, compat="deepspeed_chat") == expected


def test_rounding_never_gives_one_record_to_two_stages() -> None:
    # DeepSpeed-Chat's first stage would end at -1 here, which Python takes for "all but the last".
    assert sorted(index for part in stages(3, "0,5,5", compat="deepspeed_chat") for index in part) == [0, 1, 2]


SPLIT = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@given(
    num_records=st.integers(1, 200),
    proportions=SPLIT,
    seed=st.integers(0, 9),
    compat=st.sampled_from([None, "deepspeed_chat"]),
)
def test_every_record_is_in_exactly_one_stage(
    num_records: int, proportions: list[int], seed: int, compat: Compat | None
) -> None:
    parts = stages(num_records, ",".join(map(str, proportions)), seed=seed, compat=compat)
    assert sorted(index for part in parts for index in part) == list(range(num_records))


@given(num_records=st.integers(1, 500), proportions=SPLIT)
def test_no_stage_is_off_by_more_than_one_record(num_records: int, proportions: list[int]) -> None:
    parts = stages(num_records, ",".join(map(str, proportions)))
    for part, proportion in zip(parts, proportions, strict=True):
        assert abs(len(part) - num_records * proportion / sum(proportions)) <= 1 + 1e-9


def test_a_first_stage_with_all_proportions_has_all_records() -> None:
    assert sorted(stage_records(9, "10,0,0", 0, seed=3)) == list(range(9))


def test_another_seed_draws_other_records() -> None:
    assert stage_records(50, "1,1", 0, seed=0) == stage_records(50, "1,1", 0, seed=0)
    assert set(stage_records(50, "1,1", 0, seed=0)) != set(stage_records(50, "1,1", 0, seed=1))


@pytest.mark.parametrize("compat", [None, "deepspeed_chat"])
def test_a_stage_without_records_is_refused_with_the_key(compat: Compat | None) -> None:
    with pytest.raises(UserError, match=r"data\.data_split: '9,1' gives stage 1 no record of 3"):
        stage_records(3, "9,1", 1, seed=0, compat=compat)


@pytest.mark.parametrize("part", [-1, 3])
def test_a_stage_that_does_not_exist_is_refused_with_those_that_do(part: int) -> None:
    with pytest.raises(
        UserError, match=rf"data\.data_split_part: must be 0 to 2 with data_split '2,4,4' \(got {part}\)"
    ):
        stage_records(10, "2,4,4", part, seed=0)


def test_proportions_are_numbers() -> None:
    assert parse_data_split("2,4, 4.5") == [2, 4, 4.5]


@pytest.mark.parametrize("text", ["", "a,b", "2,,4", "2;4", "-1,2", "0,0", "nan,1", "inf,1"])
def test_a_text_without_proportions_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"data\.data_split: .*; write '2,4,4' for three stages"):
        parse_data_split(text)


def test_deepspeed_chats_training_and_evaluation_records_are_nine_and_one_of_ten() -> None:
    order = np.random.RandomState(1234).permutation(23)  # as in its get_raw_dataset_split_index
    training = deepspeed_chat_part(23, evaluation=False, seed=1234)
    assert training == order[:21].tolist()
    assert deepspeed_chat_part(23, evaluation=True, seed=1234) == order[21:].tolist()
