"""Add tokens of one's own text to a published tokenizer, whose ids keep their meaning.

The words of the text are split into the tokens that the tokenizer has, and the most frequent pairs of neighbors are merged, as in
training (`firth.tokenizer.merges`). The new tokens have the ids after the old ones.

    byte-level BPE    the new merges come after the old ones: a text is first encoded as before, and then merged further
    WordPiece         frequent characters that it does not know come first; the longest piece matches, old or new

>>> from firth.tokenizer.train import train
>>> old = train(["low lower lowest " * 9], "byte-bpe", vocab_size=266)
>>> new = extend(old, ["schnee schnell " * 9], 4)
>>> new.vocab.size - old.vocab.size, new.pieces("low") == old.pieces("low")
(4, True)
>>> [old.token(i) for i in old_tokens(old, new)[0]]
['c', 'h']
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from firth.tokenizer import merges
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import reservoir
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.tokenizer.workers import normal
from firth.types import UserError

SAMPLE_BYTES = 20_000_000
"""Most bytes of text that new tokens are learned on: published pre-tokenizers split about 2 MB per second."""

MAX_CHARACTER_SHARE = 0.25
"""Largest share of the new tokens that are single characters of WordPiece, unless there is nothing else to add."""


def extend(
    tokenizer: Tokenizer, texts: Iterable[str], count: int, *, seed: int = 0, sample_bytes: int = SAMPLE_BYTES
) -> Tokenizer:
    """Return a copy of a tokenizer with `count` more tokens, learned on texts; fewer if the text is too small.

    Args:
        tokenizer: Byte-level BPE or WordPiece.
        texts: The documents.
        count: Number of new tokens.
        seed: Of the sample.
        sample_bytes: Bytes of text to learn on.

    Raises:
        UserError: The tokenizer is of another kind.
    """
    definition = json.loads(tokenizer.definition)
    model = definition["model"]
    wordpiece = check_extendable(tokenizer)
    words: Counter[str] = Counter()
    added = [token["content"] for token in definition["added_tokens"]]
    between = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")
    for text in reservoir(texts, min(sample_bytes, SAMPLE_BYTES), seed):
        for part in between.split(normal(tokenizer.engine, text)):  # no piece may spell a token that is not the model's
            words.update(word for word, _ in tokenizer.engine.pre_tokenizer.pre_tokenize_str(part))
    ids = tokenizer.engine.get_vocab(with_added_tokens=True)
    first = sorted(ids, key=ids.__getitem__)
    prefix = model["continuing_subword_prefix"] if wordpiece else ""
    if wordpiece:
        ranked = _unknown_letters(words, ids, prefix)
        letters = sorted(ranked[: int(count * MAX_CHARACTER_SHARE)])
        known = {*ids, *letters}
        spelled = {word: longest_match(word, known, prefix) for word in words}
        first += letters
    else:
        spelled = {word: [token.value for token in tokenizer.engine.model.tokenize(word)] for word in words}
    kept = {word: number for word, number in words.items() if spelled[word]}
    found, learned = merges.learn(kept, first, len(ids) + count, prefix, split=lambda word: spelled[word] or [])
    new = [piece for piece, place in found.items() if place >= len(ids)]
    if wordpiece:  # characters that are words, as in Chinese, leave little to merge
        new += sorted([letter for letter in ranked if letter not in known][: max(0, count - len(new))])
    vocab = model["vocab"]
    vocab |= {
        token: ids[token] for token in added
    }  # the library numbers those that the model lacks after its last piece
    vocab |= {piece: tokenizer.vocab.size + i for i, piece in enumerate(new)}
    if not wordpiece:
        pairs = [[merge.left, merge.right] for merge in learned]
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        model["merges"] += [" ".join(pair) for pair in pairs] if as_text else pairs
    return tokenizer.with_definition(json.dumps(definition, ensure_ascii=False))


def check_extendable(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer is WordPiece, and not byte-level BPE.

    Raises:
        UserError: It is neither.
    """
    model: dict[str, Any] = json.loads(tokenizer.definition)["model"]
    if model["type"] == "WordPiece":
        return True
    if model["type"] != "BPE" or not tokenizer.is_byte_level:
        raise UserError(
            f"tokenizer.extend adds tokens to WordPiece and byte-level BPE, and the tokenizer of the start model is {model['type']}: "
            "leave it out"
        )
    return False


def old_tokens(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """Return, for each new token of an extended tokenizer, the old ids that its text had; [] for a character that was unknown."""
    wordpiece, ids = check_extendable(old), old.engine.get_vocab(with_added_tokens=True)
    prefix = json.loads(old.definition)["model"].get("continuing_subword_prefix") or ""
    found = []
    for id in range(old.vocab.size, new.vocab.size):
        token = new.token(id)
        if wordpiece:
            inside = token.startswith(prefix)
            pieces = longest_match(token.removeprefix(prefix) if inside else token, ids, prefix, inside) or []
            found.append([ids[piece] for piece in pieces])
        else:
            found.append([part.id for part in old.engine.model.tokenize(token)])
    return found


def tokens_per_word(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return the tokens for each word between blanks."""
    words = sum(len(text.split()) for text in texts)
    return sum(map(len, tokenizer.encode_batch(texts))) / max(words, 1)


def stripped_accents(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return the share of the letters whose accent the normalizer of a tokenizer removes (BERT's uncased ones do)."""
    letters = lost = 0
    for text in map(replace_lone_surrogates, texts):
        letters += sum(map(str.isalpha, text))
        lost += max(0, _accents(text) - _accents(normal(tokenizer.engine, text)))
    return lost / max(letters, 1)


def _accents(text: str) -> int:
    """Return the number of combining marks after canonical decomposition."""
    return sum(unicodedata.category(character) == "Mn" for character in unicodedata.normalize("NFD", text))


def longest_match(word: str, vocab: Collection[str], prefix: str, inside: bool = False) -> list[str] | None:
    """Return the pieces of WordPiece, of which each is the longest that fits; None if no piece fits somewhere.

    Args:
        word: The word.
        vocab: The pieces.
        prefix: Marks a piece that continues a word.
        inside: Whether the word is the continuation of another.
    """
    pieces, start = [], 0
    while start < len(word):
        mark = prefix if start or inside else ""
        end = next((end for end in range(len(word), start, -1) if mark + word[start:end] in vocab), None)
        if end is None:
            return None
        pieces.append(mark + word[start:end])
        start = end
    return pieces


def _unknown_letters(words: Counter[str], vocab: Collection[str], prefix: str) -> list[str]:
    """Return the characters that WordPiece lacks, alone and as continuations, the most frequent first."""
    found: Counter[str] = Counter()
    for word, number in words.items():
        for symbol in merges.spell(word, prefix):
            if symbol not in vocab:
                found[symbol] += number
    return sorted(found, key=lambda symbol: (-found[symbol], symbol))
