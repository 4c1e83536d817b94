"""Covers sft_lightning.data.formats, sft_lightning.data.templates and sft_lightning.data.tokens.

`golden_tokens.json` has hashes of the tokens and loss weights of every named template with several tokenizers, and of
every format. They may change only with `TOKENIZATION_VERSION`. `python tests/data/tokens/test_golden_tokens.py` writes
them anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import xxhash
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.formats.registry import FORMATS
from sft_lightning.data.pairs.examples import PairBuilder, PairHistory
from sft_lightning.data.templates.binding import bind_template, special_tokens
from sft_lightning.data.templates.named import named_template
from sft_lightning.data.templates.template import Template
from sft_lightning.data.templates.turn_formats import TURN_FORMATS
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.record_log import RecordLog
from sft_lightning.data.tokens.store_key import TOKENIZATION_VERSION
from sft_lightning.data.tokens.tokenization import TokenizedBatch, tokenize
from sft_lightning.types import LossOn, Message, Record, Segment

FILE = Path(__file__).with_name("golden_tokens.json")

# --- tokenizers, with their vocabularies written down: what a trainer makes of a text changes with its version --------

SPECIAL = ["<pad>", "<s>", "</s>", "<eos>", "<|end|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>"]
SPECIAL += ["<|im_start|>", "<|begin_of_text|>", "<bos>", "<｜end▁of▁sentence｜>", "[gMASK]sop"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_MERGES = "t h|th e|Ġ the|i n|a n|Ġ a|Ċ Ċ|Ġ Ġ|A S|S I|AS SI|S T|ASSI ST|A N|AN T|ASSIST ANT|# #|## #|e r|! !|. ."
LETTERS = sorted({*map(chr, range(33, 127)), "▁", "\n", "é", "你", "好", "，"})
LETTER_MERGES = "t h|th e|▁ the|i n|▁ a|▁ ▁|\n \n|> ▁|: ▁|] ▁|▁ A|e r|! !|. .|▁ x"
WORDS = ["▁the", "the", "▁a", "ing", "er", "▁x", "▁▁", "!!", "...", "\n\n", ":▁", "▁A"]


def with_merges(characters: Sequence[str], merges: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary of special tokens, characters and merges, and the merges."""
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges.split("|"))]
    tokens = dict.fromkeys([*SPECIAL, *characters, *(left + right for left, right in pairs)])
    return {token: index for index, token in enumerate(tokens)}, pairs


def finished(backend: Tokenizer, *, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL[3:]})
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2's, with a BOS as Llama 3's has."""
    backend = Tokenizer(models.BPE(*with_merges(BYTES, BYTE_MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return finished(backend, bos=True)


def byte_level_nfc() -> PreTrainedTokenizerFast:
    """Like Qwen's: NFC, a splitter of its own, no BOS."""
    backend = Tokenizer(models.BPE(*with_merges(BYTES, BYTE_MERGES)))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return finished(backend, bos=False)


def metaspace() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space before the text, merges across words, bytes for what it does not know."""
    vocabulary, merges = with_merges([*(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS], LETTER_MERGES)
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    return finished(backend, bos=True)


def unigram() -> PreTrainedTokenizerFast:
    """Like T5's: a space before every word, NFKC, an unknown token."""
    pieces = [(token, 0.0) for token in [*SPECIAL, "<unk>"]]
    pieces += [(letter, -9.0) for letter in LETTERS] + [(word, -5.0 - index / 7) for index, word in enumerate(WORDS)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=len(SPECIAL)))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    return finished(backend, bos=False)


TOKENIZERS: tuple[Callable[[], PreTrainedTokenizerFast], ...] = (byte_level, byte_level_nfc, metaspace, unigram)

# --- templates -------------------------------------------------------------------------------------------------------

CONVERSATIONS = (
    [Message("user", "the thing", context="a\nb"), Message("assistant", "in the end...")],
    [
        Message("user", " what?  "),
        Message("assistant", "é 你好，🙂\n\n"),
        Message("user", ""),
        Message("assistant", " 42 "),
    ],
    [
        Message("system", "the system:\n\n"),
        Message("user", "ASSISTANT: x</s>", train=True, weight=0.5),
        Message("assistant", "[1] over", train=False),
        Message("user", "{content}ﬁ"),
        Message("assistant", "!!", weight=2.0),
        Message("user", "a"),
        Message("assistant", "b", train=True),
    ],
)  # fmt: skip

JINJA = {
    "plain.jinja": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "thinking.jinja": "{{ bos_token }}{% for m in messages %}{% set past = m.role == 'assistant' and not loop.last %}"
    "<|im_start|>{{ m.role }}: {{ m.content.replace('é', '') if past else m.content }}"
    "{{ '<|im_end|>' if m.role == 'assistant' else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}",
}


def template_hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield `tokenizer/template` and the hash of its tokens and weights."""
    for make in TOKENIZERS:
        tokenizer = make()
        encoder = TextEncoder(tokenizer)
        for name in TURN_FORMATS:
            template = named_template(name, special_tokens(tokenizer))
            told = [turns for turns in CONVERSATIONS if template.format.system or turns[0].role != "system"]
            examples = [rendered(template, told, loss_on) for loss_on in get_args(LossOn)]
            yield f"{make.__name__}/{name}", hash_of(examples, encoder)
        for name, text in JINJA.items():
            (folder / name).write_text(text)
            bound = bind_template(str(folder / name), tokenizer)
            yield f"{make.__name__}/{name}", hash_of([rendered(bound, CONVERSATIONS[:2], "assistant")], encoder)


def rendered(template: Template, conversations: Sequence[Sequence[Message]], loss_on: LossOn) -> list[list[Segment]]:
    return [example for messages in conversations for example in template.render(messages, loss_on)]


def hash_of(examples: Sequence[list[list[Segment]]], encoder: TextEncoder) -> str:
    return hash_of_tokens([tokenize(each, encoder) for each in examples])


def hash_of_tokens(batches: Sequence[TokenizedBatch]) -> str:
    digest = xxhash.xxh3_64()
    for batch in batches:
        for array, dtype in ((batch.input_ids, "<i4"), (batch.loss_weights, "<f4"), (batch.counts, "<i8")):
            digest.update(array.astype(dtype).tobytes())
    return digest.hexdigest()


# --- formats ---------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}
TURNS = [
    {"role": "assistant", "content": "left out"},
    {"role": "human", "value": "the question"},
    {"from": "gpt", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "weight": 0.5},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": " the end ", "train": True},
    {"role": "user", "content": "trailing"},
]
RECORDS: dict[str, dict[str, Any]] = {
    "alpaca": {
        "system": "s",
        "history": [["q", "a"]],
        "instruction": "the ",
        "input": "x",
        "output": " in ",
        "weight": 2,
    },
    "firefly": {"system": "s", "conversation": [{"human": "the ", "assistant": " in "}]},
    "messages": {"messages": TURNS, "system": "s"},
    "sharegpt": {"conversations": TURNS},
    "preference": {"prompt": " the", "chosen": " in ", "rejected": "er "},
    "prompt_completion": {"prompt": "the ", "completion": "end "},
    "segments": {"segments": [{"text": "the", "train": False}, {"text": " end ", "train": True, "weight": 0.25}]},
    "text": {"text": "the end\n\n"},
}
CHAT = {
    "prompt": "USER: the ASSISTANT:", "chosen": " in", "rejected": "er", "label": "a", "question": "q", "history": "h",
    "human_ref_A": "A", "human_ref_B": "B", "labels": 1, "INSTRUCTION": "i", "RESPONSE": "r", "query": "q",
    "positive_passages": [{"text": "p"}], "human_answers": ["h"], "queries": {"zh_cn": "z", "ja": "j"},
    "answers": {"zh_cn": [{"text": "a"}], "ja": [{"text": "b"}]}, "sentence": "s", "questions": ["q"], "paragraph": "p",
}  # fmt: skip
"""What every data set of DeepSpeed-Chat but one reads."""

WEBGPT = {"question": {"full_text": "q"}, "answer_0": "a [1] (2)", "answer_1": "b", "score_0": 1, "score_1": 0}
TOOLS = {
    "tools": [{"name": "f", "parameters": {}}],
    "messages": [
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": "", "reasoning_content": "in", "tool_calls": [CALL]},
        {"role": "tool", "content": "er"},
        {"role": "assistant", "content": "end"},
    ],
}
TOOL_TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.role }}: {{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>' if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def format_hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield `formats/name` and the hash of the tokens and weights of a record."""
    tokenizer = byte_level()
    builder = ExampleBuilder(tokenizer=tokenizer, template=bind_template("vicuna_v1.1", tokenizer), loss_on="assistant")
    for name in FORMATS:
        fields = RECORDS.get(name) or (WEBGPT if "webgpt" in name else CHAT)
        yield f"formats/{name}", hash_of_record(builder, fields, name)
    for history in get_args(PairHistory):
        pairs = PairBuilder(tokenizer=tokenizer, template=builder.template, loss_on="assistant", history=history)
        yield f"pairs/{history}", hash_of_record(pairs, RECORDS["preference"], "preference")
    (folder / "tools.jinja").write_text(TOOL_TEMPLATE)
    calling = bind_template(str(folder / "tools.jinja"), tokenizer)
    tools = ExampleBuilder(tokenizer=tokenizer, template=calling, loss_on="assistant")
    yield "formats/messages with tools", hash_of_record(tools, TOOLS, "messages")


def hash_of_record(builder: ExampleBuilder, fields: dict[str, Any], format_name: str) -> str:
    record = Record(fields, "golden", "golden.json, record 0")
    return hash_of_tokens([batch for batch, _ in builder.build([record], format_name, "golden.json", RecordLog())])


# --- what is compared ------------------------------------------------------------------------------------------------


def hashes(folder: Path) -> dict[str, str]:
    return {**dict(template_hashes(folder)), **dict(format_hashes(folder))}


def test_tokens_and_weights_change_only_with_the_version(tmp_path: Path) -> None:
    golden = json.loads(FILE.read_text())
    now = hashes(tmp_path)
    changed = sorted(name for name, value in golden["hashes"].items() if now.get(name) != value)
    if changed and golden["version"] == TOKENIZATION_VERSION:
        pytest.fail(
            f"{len(changed)} of {len(now)} tokenizations changed ({', '.join(changed[:5])}), so stores on users' disks "
            "would be wrong. If you meant that, raise TOKENIZATION_VERSION in sft_lightning/data/tokens/store_key.py "
            "and run: python tests/data/tokens/test_golden_tokens.py"
        )
    if golden != {"version": TOKENIZATION_VERSION, "hashes": now}:
        pytest.fail("golden_tokens.json is out of date; run: python tests/data/tokens/test_golden_tokens.py")


def test_another_mask_or_another_token_is_another_hash() -> None:
    encoder = TextEncoder(byte_level())
    template = named_template("vicuna_v1.1", special_tokens(byte_level()))
    values = {
        hash_of([rendered(template, [turns], loss_on)], encoder)
        for turns in CONVERSATIONS[:2]
        for loss_on in ("all", "assistant")
    }
    assert len(values) == 4


def write() -> None:
    """Write the hashes of today; refuse to write others under a version that has some."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        now = hashes(Path(folder))
    golden = json.loads(FILE.read_text()) if FILE.is_file() else {"version": 0, "hashes": {}}
    changed = [name for name, value in golden["hashes"].items() if now.get(name) != value]
    if changed and golden["version"] == TOKENIZATION_VERSION:
        raise SystemExit(f"raise TOKENIZATION_VERSION first: {len(changed)} hashes changed, such as {changed[0]}")
    FILE.write_text(json.dumps({"version": TOKENIZATION_VERSION, "hashes": now}, indent=1) + "\n")


if __name__ == "__main__":
    write()
