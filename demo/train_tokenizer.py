"""Train a byte-level BPE tokenizer on a corpus of `{"text": ...}` lines and save it as transformers loads it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]


def read_texts(corpus: Path) -> Iterator[str]:
    """Yield the text of each line."""
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Return a trained tokenizer that puts `<s>` before each text.

    All 256 bytes are in its alphabet, so that it can encode any text; it has `<unk>` because templates expect it.

    Args:
        texts: The corpus.
        vocab_size: Number of tokens, with special tokens and the 256 bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[bos]
    )
    return tokenizer


def main() -> None:
    """Parse the options, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help='JSON lines with a "text"')
    parser.add_argument("--vocab_size", type=int, default=1000, help="tokens, special ones and the 256 bytes included")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train(read_texts(args.corpus), args.vocab_size),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(args.output_dir)
    characters, tokens = 0, 0
    for text in read_texts(args.corpus):
        characters += len(text)
        tokens += len(tokenizer(text).input_ids)
    print(f"tokenizer: {args.output_dir}, {len(tokenizer)} tokens; the corpus has {tokens:,} tokens", end=" ")
    print(f"({characters / tokens:.1f} characters per token)")


if __name__ == "__main__":
    main()
