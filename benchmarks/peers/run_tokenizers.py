"""Run `encode_batch_fast` of `tokenizers` on the rendered rows, in one call or in several."""

from __future__ import annotations

from pathlib import Path

from job import SYSTEM, Answer, Job, question, records, run, seconds_of, versions
from tokenizers import Tokenizer

_SYSTEM = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"


def measure(job: Job) -> Answer:
    """Tokenize all texts; rendering them is not timed.

    The job's `at_once` is the number of texts per call; 0: all.
    """
    tokenizer = Tokenizer.from_file(str(Path(job["tokenizer"]) / "tokenizer.json"))
    texts = [
        f"{_SYSTEM}<|im_start|>user\n{question(record)}<|im_end|>\n<|im_start|>assistant\n{record['output']}<|im_end|>\n"
        for record in records(job)
    ]
    size = job["at_once"] or len(texts)

    def encode() -> int:
        tokens = 0
        for start in range(0, len(texts), size):
            encodings = tokenizer.encode_batch_fast(texts[start : start + size], add_special_tokens=False)
            tokens += sum(map(len, encodings))
        return tokens

    seconds, tokens = seconds_of(encode)
    return {"seconds": seconds, "tokens": tokens, "at_once": job["at_once"], "versions": versions("tokenizers")}


if __name__ == "__main__":
    run(measure)
