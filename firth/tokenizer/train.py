"""Train a tokenizer on a bounded sample of a corpus: BPE with end-of-word suffix, byte-level BPE, WordPiece or Unigram.

`firth.tokenizer.merges` learns merges, `firth.tokenizer.unigram` a Unigram vocabulary.

    bpe         characters and `</w>`; the most frequent pair is merged, repeatedly (Sennrich 2016; GPT)
    byte-bpe    the same on bytes: nothing is unknown, decoding restores every text (GPT-2, RoBERTa, BART, Llama)
    wordpiece   `##` continuations, longest match first (BERT). Google never published how BERT's were trained; here,
                as in the tokenizers library, by the most frequent pair
    unigram     a probability for each piece, pruned from a large seed vocabulary (Kudo 2018; T5, XLNet, ALBERT)
    word        no subwords: the most frequent words in lower case, and one id for all others (word2vec)

A character too rare for an id of its own is written as its UTF-8 bytes, `<0xE6><0x97><0xA5>`, by bpe and unigram (byte
fallback, as in Llama's and Gemma's vocabularies), so that nothing is unknown. The WordPiece format has no byte fallback: a
word with such a character is unknown, as in BERT, and `train` reports the share of such tokens.

Memory is bounded: a corpus larger than `sample_bytes` is read once, and a uniform sample is kept (reservoir sampling,
seeded). The same text and seed give the same tokenizer.json, byte for byte. Of two equally frequent pairs the one whose
pieces have the smaller ids is merged first, and initial ids do not depend on counts: control tokens, then characters by
code point, then merges. (The library itself numbers `e</w>` and `##e` in the order of a hash table that differs in each
process, and so breaks ties at random.) Words are counted on all cores (`firth.tokenizer.workers`), and merges are learned
from the counts (`firth.tokenizer.merges`).

>>> t = train(["low lower lowest " * 9], "bpe", vocab_size=24, byte_fallback=False)
>>> t.pieces("lowest")
['lowe', 's', 't</w>']
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from firth.tokenizer import merges, unigram
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.tokenizer.workers import count_all
from firth.types import LOGGER, LogLine, UserError

ALGORITHMS = ("bpe", "byte-bpe", "wordpiece", "unigram")
WORD_LEVEL = "word"
"""The algorithm without subwords; decoding cannot restore rare words."""
CONTROL = ("<pad>", "<unk>", "<s>", "</s>", "<mask>", "<|im_start|>", "<|im_end|>")
END, CONTINUATION = "</w>", "##"
"""Marks of the end of a word (bpe) and of a continuation (wordpiece)."""
BERT = {"<pad>": "[PAD]", "<unk>": "[UNK]", "<s>": "[CLS]", "</s>": "[SEP]", "<mask>": "[MASK]"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
"""The tokens of byte fallback, as SentencePiece writes them."""
FALLBACK_ALGORITHMS = ("bpe", "unigram")
"""The character-based algorithms whose format has byte fallback."""
BYTE_LOG_PROBABILITY = -1000.0
"""Natural log-probability of a byte in a Unigram vocabulary: so low that the text `<0xE6>` does not become that byte. It has no
other effect, since a byte is only used if no piece matches.
"""
MEASURED_CHARACTERS = 2_000_000
"""Characters of the training text whose share of unknown tokens is measured; a million take about a second."""
SAMPLE_CHARACTERS = 1 << 12
"""Characters of one item of the reservoir, so that a huge document does not fill it."""
MIN_KNOWN_CHARACTERS = 250
"""So many different characters always get an id; beyond that, at most a quarter as many as there are ids."""


def train(
    texts: Iterable[str],
    algorithm: str,
    vocab_size: int,
    *,
    seed: int = 0,
    sample_bytes: int = 200_000_000,
    num_sentinels: int = 0,
    byte_fallback: bool = True,
    log: LogLine = LOGGER.info,
) -> Tokenizer:
    """Train a tokenizer.

    Args:
        texts: The documents.
        algorithm: One of ALGORITHMS, or WORD_LEVEL.
        vocab_size: Number of ids, including CONTROL and the sentinels; fewer if the text is too small.
        seed: Of the sample.
        sample_bytes: Bytes of text to train on; memory is about four times as much at most.
        num_sentinels: Number of T5's `<extra_id_n>` tokens; only span corruption needs them.
        byte_fallback: Whether rare characters are written as bytes, for FALLBACK_ALGORITHMS.
        log: Receives a message if a part of the training text is unknown to the tokenizer.

    Returns:
        The tokenizer, with the counts of its merges.

    Raises:
        UserError: The algorithm is unknown, the size is too small for the control tokens and the alphabet, or the corpus has no
            text.
    """
    if algorithm not in (*ALGORITHMS, WORD_LEVEL):
        known = ", ".join((*ALGORITHMS, WORD_LEVEL))
        raise UserError(f"there is no tokenizer algorithm {algorithm!r}; use one of {known}")
    control = [BERT.get(token, token) if algorithm == "wordpiece" else token for token in CONTROL]
    control += [f"<extra_id_{i}>" for i in range(num_sentinels)]
    bytes_ = BYTES if byte_fallback and algorithm in FALLBACK_ALGORITHMS else []
    engine = blank(algorithm, control[1], bool(bytes_))
    pieces = list(reservoir(texts, sample_bytes, seed))
    words = count_all(engine, pieces)
    if not words:
        raise UserError("there is no text to train a tokenizer on: every document is empty")
    letters, rare = _alphabet(algorithm, words, vocab_size - len(control) - len(bytes_), bool(bytes_))
    forms = {"bpe": [c + END for c in letters], "wordpiece": [CONTINUATION + c for c in letters]}.get(algorithm, [])
    first = [*control, *bytes_, *letters, *forms]
    if vocab_size < len(first):
        alphabet = (
            "" if algorithm == WORD_LEVEL else f" and {len(bytes_) or len(letters)} {_alphabet_unit(algorithm, bytes_)}"
        )
        raise UserError(
            f"a {algorithm} tokenizer of this text needs at least {len(first)} ids for its {len(control)} control tokens"
            f"{alphabet or ' and one word'}, not {vocab_size}: raise the size"
            + (", or train without byte fallback" if bytes_ else "")
            + (f", or take fewer sentinels than {num_sentinels}" if num_sentinels else "")
        )
    tokenizer = _learn(engine, algorithm, vocab_size, control, bytes_, letters, rare, first, words)
    may_have_unknown = algorithm == WORD_LEVEL or (
        rare and not bytes_
    )  # otherwise nothing is unknown, and measuring takes seconds
    if may_have_unknown and (share := unknown_share(tokenizer, pieces)):
        log(f"{share:.2%} of the tokens of the training text are {control[1]}: {_unknown_hint(algorithm, len(rare))}")
    return tokenizer


def _alphabet_unit(algorithm: str, bytes_: Sequence[str]) -> str:
    return "bytes" if bytes_ or algorithm == "byte-bpe" else "characters"


def _unknown_hint(algorithm: str, rare: int) -> str:
    """Return what the user can do about unknown tokens."""
    if algorithm == WORD_LEVEL:
        return "a vocabulary of whole words has only the most frequent ones; raise the size to have more"
    missing = f"{rare:,} rare characters have no id"
    if algorithm in FALLBACK_ALGORITHMS:
        return f"{missing}; train with byte fallback (--byte-fallback, tokenizer.byte_fallback=true), or raise the size"
    return (
        f"{missing}, and {algorithm} files have no byte fallback; use unigram or byte-bpe, which can write every character, or "
        "raise the size"
    )


def _learn(
    engine: Engine, algorithm: str, size: int, control: list[str], bytes_: list[str], letters: list[str],
    rare: list[str], first: list[str], words: Counter[str],
) -> Tokenizer:  # fmt: skip
    """Learn the pieces: `first` have the ids from 0 on, `rare` are the characters without an id."""
    if algorithm == WORD_LEVEL:
        frequent = sorted(words, key=lambda word: (-words[word], word))[: size - len(control)]
        ids = {token: i for i, token in enumerate([*control, *(w for w in frequent if w not in control)])}
        engine.model = models.WordLevel(ids, unk_token=control[1])
        engine.add_special_tokens(control)
        return Tokenizer(engine)
    if rare:
        words = _remove_rare(words, rare, unigram.BLANK if algorithm == "unigram" else "")
    if algorithm == "unigram":
        likely = unigram.learn(words, size - len(control) - len(bytes_)) if letters and words else []
        fixed = [(token, 0.0) for token in control] + [(byte, BYTE_LOG_PROBABILITY) for byte in bytes_]
        engine.model = models.Unigram(fixed + likely, unk_id=1, byte_fallback=bool(bytes_))
        engine.add_special_tokens(control)
        return Tokenizer(engine)
    prefix, suffix = CONTINUATION if algorithm == "wordpiece" else "", END if algorithm == "bpe" else ""
    vocab, learned = merges.learn(words, first, size, prefix, suffix)
    pairs = [(merge.left, merge.right) for merge in learned]
    if algorithm == "wordpiece":
        # BERT's limit is 100 characters; a longer word would be unknown as a whole.
        engine.model = models.WordPiece(vocab, unk_token=control[1], max_input_chars_per_word=1000)
    elif algorithm == "bpe":
        engine.model = models.BPE(
            vocab, pairs, unk_token=control[1], end_of_word_suffix=END, byte_fallback=bool(bytes_)
        )
    else:
        engine.model = models.BPE(vocab, pairs)
    engine.add_special_tokens(control)
    return Tokenizer(engine, merges=learned)


def unknown_share(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return the share of unknown tokens in the first MEASURED_CHARACTERS of texts."""
    unk = tokenizer.vocab.roles.get("unk")
    found = total = read = 0
    for text in texts:
        ids = tokenizer.encode(text)
        found, total, read = found + int(np.count_nonzero(ids == unk)), total + len(ids), read + len(text)
        if read >= MEASURED_CHARACTERS:
            break
    return found / total if total else 0.0


def blank(algorithm: str, unk: str, byte_fallback: bool = False) -> Engine:
    """Return the untrained engine of an algorithm: normalizer, pre-tokenizer and decoder."""
    fallback: list[decoders.Decoder] = [decoders.ByteFallback()] if byte_fallback else []
    if algorithm == "byte-bpe":
        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
    elif algorithm == "bpe":
        engine = Engine(models.BPE(unk_token=unk, end_of_word_suffix=END))
        engine.normalizer = normalizers.NFC()
        engine.pre_tokenizer = pre_tokenizers.Whitespace()
        # Signs are separate words; decoding joins them to the previous word.
        close = [decoders.Replace(f" {sign}", sign) for sign in ".,!?;:"]
        # The bytes of a word's last character are followed by those of `</w>`: bytes are joined before words.
        words = [*fallback, decoders.Fuse(), decoders.Replace(Regex(rf"{END}\z"), ""), decoders.Replace(END, " ")]
        engine.decoder = decoders.Sequence([*words, *close])
    elif algorithm == WORD_LEVEL:
        engine = Engine(models.WordLevel({}, unk_token=unk))
        engine.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        engine.pre_tokenizer = pre_tokenizers.Whitespace()
    elif algorithm == "wordpiece":
        engine = Engine(models.WordPiece(unk_token=unk))
        engine.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        engine.decoder = decoders.WordPiece(prefix=CONTINUATION)
    else:
        # Each word includes the blank before it, also at the start of the text and of a line, so that decoding restores
        # line breaks and runs of blanks (T5's own normalization drops them).
        engine = Engine(models.Unigram())
        lines = normalizers.Replace(Regex(r"\n(?=[\s\S])"), "\n ")
        engine.normalizer = normalizers.Sequence([normalizers.NFKC(), lines, normalizers.Prepend(" ")])
        engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        joined = [*fallback, decoders.Fuse(), decoders.Replace(unigram.BLANK, " "), decoders.Replace(Regex(r"\A "), "")]
        engine.decoder = decoders.Sequence([*joined, decoders.Replace("\n ", "\n")])
    return engine


def _remove_rare(words: Mapping[str, int], rare: Sequence[str], mark: str) -> Counter[str]:
    """Return the words with rare characters replaced by blanks: no piece may contain an unknown character.

    Args:
        words: Word -> count.
        rare: The characters.
        mark: Prefix of a word after a blank; may be empty.
    """
    blanks = dict.fromkeys(map(ord, rare), " ")
    found: Counter[str] = Counter()
    for word, number in words.items():
        first, *rest = word.translate(blanks).split(" ")
        for part in (first, *(mark + part for part in rest)):
            if part:
                found[part] += number
    return found


def _alphabet(algorithm: str, words: Counter[str], available: int, byte_fallback: bool) -> tuple[list[str], list[str]]:
    """Return the characters that get an id and those too rare for one, by code point.

    Args:
        algorithm: Of ALGORITHMS or WORD_LEVEL.
        words: Word -> count.
        available: Ids for characters and pieces. With byte fallback, characters get at most three quarters of them.
        byte_fallback: Whether rare characters are written as bytes.
    """
    if algorithm == "byte-bpe":
        return sorted(pre_tokenizers.ByteLevel.alphabet()), []
    if algorithm == WORD_LEVEL:
        return [min(words)], []  # at least one word
    found: Counter[str] = Counter()
    for word, number in words.items():
        for letter in word:
            found[letter] += number
    by_frequency = sorted(found, key=lambda letter: (letter != unigram.BLANK, -found[letter], letter))
    known = max(MIN_KNOWN_CHARACTERS, available // 4)
    if byte_fallback:
        known = min(known, max(available * 3 // 4, 0) // (2 if algorithm == "bpe" else 1))
    return sorted(by_frequency[:known]), sorted(by_frequency[known:])


def reservoir(texts: Iterable[str], sample: int, seed: int) -> Iterator[str]:
    """Yield the text in its order, or a uniform sample of about `sample` bytes of it if it is larger.

    Each piece gets a random key, and those with the smallest keys stay as long as they fit (Efraimidis & Spirakis 2006 with equal
    weights): memory is `sample` bytes, whatever the size of the corpus.
    """
    rng = random.Random(seed)
    kept: list[tuple[float, int, str]] = []  # a heap, the largest key first
    size = 0
    for at, piece in enumerate(_pieces(texts)):
        heapq.heappush(kept, (-rng.random(), at, piece))
        size += len(piece.encode())
        while size > sample and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].encode())
    for _, _, piece in sorted(kept, key=lambda k: k[1]):
        yield piece


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Split documents at white space into pieces of at most about SAMPLE_CHARACTERS."""
    for text in map(replace_lone_surrogates, texts):
        start = 0
        while start < len(text):
            end = min(start + SAMPLE_CHARACTERS, len(text))
            if end < len(text):
                space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
                end = space if space > start else end
            yield text[start:end]
            start = end
