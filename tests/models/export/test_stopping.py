from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GenerationConfig

from sft_lightning.models.export.stopping import generation_config_in, stop_tokens, write_stop_tokens


@pytest.mark.parametrize(("known", "written"), [(None, 7), (2, [7, 2]), ([2, 3], [7, 2, 3]), (7, 7), ([2, 7], [7, 2])])
def test_the_stop_token_comes_before_those_of_the_base(
    known: int | list[int] | None, written: int | list[int], tmp_path: Path
) -> None:
    base = GenerationConfig(eos_token_id=known, top_k=5)
    write_stop_tokens(tmp_path, base, [7])
    found = generation_config_in(tmp_path)
    assert found is not None
    assert (found.eos_token_id, found.top_k) == (written, 5)
    assert stop_tokens(base) == ([] if known is None else known if isinstance(known, list) else [known])


def test_a_base_without_a_configuration_gets_one_with_the_stop_token(tmp_path: Path) -> None:
    assert generation_config_in(tmp_path) is None
    write_stop_tokens(tmp_path, None, [7])
    assert stop_tokens(generation_config_in(tmp_path)) == [7]


def test_options_that_the_base_combines_wrongly_are_kept_as_they_are(tmp_path: Path) -> None:
    base = GenerationConfig(temperature=0.6, do_sample=False, eos_token_id=2)
    write_stop_tokens(tmp_path, base, [7])
    found = generation_config_in(tmp_path)
    assert found is not None
    assert (found.temperature, found.eos_token_id) == (0.6, [7, 2])
