from __future__ import annotations

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sft_lightning.compat.data_libraries import content_fingerprint, remember_words


def test_a_data_sets_fingerprint_tells_its_content_and_what_was_done_to_it() -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    found = content_fingerprint(Dataset.from_list(rows))
    assert found
    assert content_fingerprint(Dataset.from_list(rows)) == found
    assert content_fingerprint(Dataset.from_list(rows).select([0])) != found


def test_a_model_of_word_pieces_remembers_more_words_and_gives_the_same_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    before = backend.encode("What is the opposite of hot?").ids
    assert remember_words(backend, 1 << 12)
    assert backend.encode("What is the opposite of hot?").ids == before


def test_a_model_of_whole_words_has_no_memory() -> None:
    assert not remember_words(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), 10)
