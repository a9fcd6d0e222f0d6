"""The words of a text and how often each occurs, as a tokenizer's pre-tokenizer cuts it: what every trainer learns from.

The engine cuts 3 MB a second. ASCII is cut here by the same rules, five times as fast; other text is cut at white space
first, across which no pre-tokenizer of `firth.tokenizer.train` joins anything, so that the engine sees each stretch once, and only
those that are not ASCII.

>>> from firth.tokenizer.train import blank
>>> sorted(count(blank("byte-bpe", "<unk>"), ["low, lower low"]).items())
[(',', 1), ('low', 1), ('Ġlow', 1), ('Ġlower', 1)]
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer as Engine

from firth.tokenizer.tokenizer import byte_alphabet

BLANK = "▁"
"""How Unigram vocabularies write a blank (Metaspace)."""

SPACE = " \t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""White space of Unicode (White_Space), which pre-tokenizers cut at."""

BERT_SPACE = SPACE.replace("\t-\r\x85", "\t\n\r")
"""The same without the control characters that BERT's normalizer drops, so that the text around them is one word."""

ASCII_WORD = {
    "ByteLevel": r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    "Whitespace": r"\w+|[^\w\s]+",
    "BertPreTokenizer": r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]",
}
"""Pre-tokenizer -> its words in ASCII text."""

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Control characters of ASCII, which normalizers may drop."""


def count(engine: Engine, texts: Iterable[str]) -> Counter[str]:
    """Return word -> how often, after the engine's normalizer, as its pre-tokenizer cuts.

    Args:
        engine: One of those of `firth.tokenizer.train.blank`.
        texts: What to count the words of.
    """
    definition = json.loads(engine.to_str())
    kind = definition["pre_tokenizer"]["type"]
    if kind == "Metaspace":  # cut before each blank, which the normalizer may have made
        words: Counter[str] = Counter()
        for text in texts:
            words.update(re.findall(f"{BLANK}?[^{BLANK}]+|{BLANK}", normal(engine, text).replace(" ", BLANK)))
        return words
    space = BERT_SPACE if kind == "BertPreTokenizer" else SPACE
    stretch, word = re.compile(f"[{space}]*[^{space}]+|[{space}]+"), re.compile(ASCII_WORD[kind], re.A)
    lowered = '"Lowercase"' in json.dumps(definition["normalizer"])
    plain: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for text in texts:
        if text.isascii() and not CONTROL.search(text):
            plain.update(word.findall(text.lower() if lowered else text))
        else:
            others.update(stretch.findall(text))
    words = Counter()
    for text, often in others.items():
        if text.isascii() and not CONTROL.search(text):
            for found in word.findall(text.lower() if lowered else text):
                plain[found] += often
        else:
            for found, _ in engine.pre_tokenizer.pre_tokenize_str(normal(engine, text)):
                words[found] += often
    characters = {byte: character for character, byte in byte_alphabet().items()} if kind == "ByteLevel" else {}
    for found, often in plain.items():
        words[found.translate(characters)] += often
    return words


def normal(engine: Engine, text: str) -> str:
    """The text as the engine's normalizer writes it."""
    return text if engine.normalizer is None else str(engine.normalizer.normalize_str(text))
