"""Training a tokenizer: BPE with end-of-word, byte-level BPE, WordPiece, Unigram, on a bounded sample of a corpus.

    bpe         characters and `</w>`; the most frequent pair is merged, again and again (Sennrich 2016; GPT)
    byte-bpe    the same on bytes: nothing is unknown, every text comes back (GPT-2, RoBERTa, BART, Llama)
    wordpiece   `##` continuations (BERT)
    unigram     a probability for each piece, pruned from a large seed vocabulary (Kudo 2018; T5, XLNet, ALBERT)

Memory is bounded: a corpus larger than `sample` bytes is read once and a uniform sample of its pieces is kept
(reservoir sampling by bytes, seeded), so the same text and seed give the same tokenizer.

>>> t = train(["low lower lowest " * 9], "bpe", size=22, sentinels=0)
>>> t.pieces("lowest")
['lowe', 'st</w>']
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from firth.text.tokenizer import Tokenizer
from firth.types import UserError

ALGORITHMS = ("bpe", "byte-bpe", "wordpiece", "unigram")
CONTROL = ("<pad>", "<unk>", "<s>", "</s>", "<mask>", "<|im_start|>", "<|im_end|>")
BERT = {"<pad>": "[PAD]", "<unk>": "[UNK]", "<s>": "[CLS]", "</s>": "[SEP]", "<mask>": "[MASK]"}
PIECE = 1 << 14  # characters: what the reservoir keeps or drops as one, so that one huge document does not fill it


def train(
    texts: Iterable[str],
    algorithm: str,
    size: int,
    *,
    seed: int = 0,
    sample: int = 200_000_000,
    sentinels: int = 100,
) -> Tokenizer:
    """A tokenizer of `size` ids, among them CONTROL and `sentinels` of T5's `<extra_id_n>`.

    sample: bytes of text to look at. Raises UserError for an unknown algorithm, a size too small for the control
    tokens and the alphabet, and a corpus without text.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"there is no tokenizer algorithm {algorithm!r}; use one of {', '.join(ALGORITHMS)}")
    control = [BERT.get(t, t) if algorithm == "wordpiece" else t for t in CONTROL]
    control += [f"<extra_id_{i}>" for i in range(sentinels)]
    least = len(control) + (256 if algorithm == "byte-bpe" else 1)
    if size < least:
        raise UserError(
            f"a {algorithm} tokenizer needs at least {least} ids for its control tokens and alphabet, not {size}"
        )
    pieces = list(reservoir(texts, sample, seed))
    if not pieces:
        raise UserError("there is no text to train a tokenizer on: every document is empty")
    engine, trainer = _engine(algorithm, size, control)
    engine.train_from_iterator(pieces, trainer)
    if engine.get_vocab_size() <= len(control) + 1:
        raise UserError(f"the text is too small for a tokenizer: no piece beyond the {len(control)} control tokens")
    return Tokenizer(engine)


def _engine(algorithm: str, size: int, control: list[str]) -> tuple[Engine, trainers.Trainer]:
    unk = control[1]
    common: dict[str, Any] = {"vocab_size": size, "special_tokens": control, "show_progress": False}
    if algorithm == "byte-bpe":
        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        return engine, trainers.BpeTrainer(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), **common)
    if algorithm == "bpe":
        engine = Engine(models.BPE(unk_token=unk, end_of_word_suffix="</w>"))
        engine.normalizer = normalizers.NFC()
        engine.pre_tokenizer = pre_tokenizers.Whitespace()
        engine.decoder = decoders.BPEDecoder(suffix="</w>")
        # Every known character is also kept without the end-of-word symbol, so that known letters are never unknown.
        return engine, trainers.BpeTrainer(end_of_word_suffix="</w>", **common)
    if algorithm == "wordpiece":
        engine = Engine(models.WordPiece(unk_token=unk))
        engine.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        engine.decoder = decoders.WordPiece(prefix="##")
        return engine, trainers.WordPieceTrainer(continuing_subword_prefix="##", **common)
    engine = Engine(models.Unigram())
    engine.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.decoder = decoders.Metaspace()
    return engine, trainers.UnigramTrainer(unk_token=unk, **common)


def reservoir(texts: Iterable[str], sample: int, seed: int) -> Iterator[str]:
    """The text in its own order, or a uniform sample of about `sample` bytes of its pieces where it is larger.

    Each piece gets a random key, and those with the smallest keys stay as long as they fit (Efraimidis & Spirakis
    2006 with weights equal): memory is `sample` bytes, whatever the size of the corpus.
    """
    rng = random.Random(seed)
    kept: list[tuple[float, int, str]] = []  # a heap, the largest key first
    size = 0
    for at, piece in enumerate(_pieces(texts)):
        heapq.heappush(kept, (-rng.random(), at, piece))
        size += len(piece.encode("utf-8", "replace"))
        while size > sample and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].encode("utf-8", "replace"))
    for _, _, piece in sorted(kept, key=lambda k: k[1]):
        yield piece


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Documents cut at white space into pieces of at most about PIECE characters."""
    for text in texts:
        text = text.encode("utf-8", "replace").decode("utf-8")
        start = 0
        while start < len(text):
            end = min(start + PIECE, len(text))
            if end < len(text):
                blank = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
                end = blank if blank > start else end
            yield text[start:end]
            start = end
