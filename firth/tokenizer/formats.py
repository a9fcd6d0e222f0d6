"""Tokenizers in the formats that came before tokenizer.json, as engines of the tokenizers library.

    vocab.txt                       BERT: WordPiece, one token per line
    vocab.json + merges.txt         GPT-2, RoBERTa: byte-level BPE (OpenAI's own names: encoder.json + vocab.bpe)
    spiece.model, tokenizer.model   SentencePiece: Unigram (T5, XLNet, ALBERT) and BPE with byte fallback (Llama)

A SentencePiece model is one protobuf message; the dozen fields that matter are read here by hand, so that neither
sentencepiece nor protobuf is needed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from firth.tokenizer.limits import check_bounds, check_growth
from firth.types import UserError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""SentencePiece's types of pieces."""
Piece = tuple[str, float, int]
"""(text, score, type)."""

LONGEST = 1000
"""Characters of the longest piece that is read: the ways to make one are as many as the square of its length."""


def find(folder: Path) -> Path | None:
    """The tokenizer file of a directory, the newest format first; None where there is none."""
    for name in ("tokenizer.json", *READERS):
        if (folder / name).is_file():
            return folder / name
    models_there = sorted(folder.glob("*.model"))
    return models_there[0] if models_there else None


LARGEST = 1 << 28
"""Bytes of the largest tokenizer file that is read; the largest in use has a tenth of that."""


def text_of(file: Path) -> str:
    """A file's text. UserError where it is not UTF-8 or larger than any such file is."""
    if file.stat().st_size > LARGEST:
        raise UserError(f"{file} has {file.stat().st_size:,} bytes, more than any tokenizer needs: it is not read")
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: this is not a tokenizer's text, for it is not UTF-8 ({error})") from None


def read(file: Path) -> Engine:
    """The engine in a tokenizer's file. Raises UserError where it cannot be read."""
    reader = READERS.get(file.name, sentencepiece if file.suffix == ".model" else tokenizer_json)
    if file.stat().st_size > LARGEST:
        raise UserError(f"{file} has {file.stat().st_size:,} bytes, more than any tokenizer needs: it is not read")
    try:
        return reader(file)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception for whatever it cannot make an engine of
        raise UserError(f"{file}: this is not a tokenizer that firth can read ({_line(error)})") from None


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:120]


def tokenizer_json(file: Path) -> Engine:
    """The tokenizers library's own format."""
    text = text_of(file)
    try:
        definition = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: the tokenizers library cannot read this tokenizer: it is not JSON ({error})"
        ) from None
    check_bounds(definition, file)
    try:
        return Engine.from_str(text)
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise UserError(f"{file}: the tokenizers library cannot read this tokenizer: {_line(error)}") from None


def bert(file: Path) -> Engine:
    """BERT's vocab.txt: one token per line; uncased where no capital letter stands in it."""
    tokens = [line.removesuffix("\r") for line in text_of(file).removesuffix("\n").split("\n")]
    if len(set(tokens)) < len(tokens) or "[UNK]" not in tokens:
        twice = (
            next((t for i, t in enumerate(tokens) if t in tokens[:i]), None) if len(set(tokens)) < len(tokens) else None
        )
        why = "has no [UNK]" if twice is None else f"has the token {twice!r:.40} twice"
        raise UserError(f"{file} {why}: one token on each line is expected, each once; copy it again")
    return wordpiece({token: i for i, token in enumerate(tokens)})


def wordpiece(tokens: dict[str, int]) -> Engine:
    """BERT's WordPiece of these tokens and their ids."""
    engine = Engine(models.WordPiece(tokens, unk_token="[UNK]"))
    cased = any(token != token.lower() for token in tokens if not token.startswith("["))
    engine.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    engine.add_special_tokens([t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in tokens])
    return engine


def gpt2(file: Path) -> Engine:
    """GPT-2's vocabulary (vocab.json or encoder.json) and the merges beside it (merges.txt or vocab.bpe)."""
    beside = next((p for name in ("merges.txt", "vocab.bpe") if (p := file.parent / name).is_file()), None)
    if beside is None:
        raise UserError(f"{file}: the merges that belong to it are missing: put merges.txt beside it")
    vocab = json.loads(text_of(file))
    lines = [line for line in text_of(beside).split("\n") if line and not line.startswith("#version")]
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    engine = Engine(models.BPE(vocab, pairs))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([t for t in ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>") if t in vocab])
    return engine


def sentencepiece(file: Path) -> Engine:
    """A SentencePiece model: its Unigram or BPE pieces, its normalisation, its control symbols.

    Models with pieces of the type UNUSED, and models of whole words or characters, are refused. The ids are those of
    sentencepiece but for a text that spells a control token.
    """
    message = list(fields(file.read_bytes()))
    pieces = [_piece(value) for number, value in message if number == 1 and isinstance(value, bytes)]
    trainer = _last(message, 2)
    normalizer = _last(message, 3)
    kind = trainer.get(3, 1)
    if kind not in (1, 2) or not pieces or any(type == UNUSED for _, _, type in pieces):
        raise UserError(f"{file}: only SentencePiece models of Unigram or BPE pieces, all in use, can be read")
    if max(len(text) for text, _, _ in pieces) > LONGEST:
        raise UserError(f"{file} has a piece of more than {LONGEST} characters: it is not read")
    if all(type != UNKNOWN for _, _, type in pieces):
        raise UserError(f"{file} has no piece for what is unknown: copy it again")
    charsmap, dummy, squeeze = normalizer.get(2), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
    return pieced(pieces, kind == 1, charsmap if isinstance(charsmap, bytes) else b"", dummy, squeeze)


def pieced(pieces: list[Piece], unigram: bool, charsmap: bytes, dummy: bool, squeeze: bool) -> Engine:
    """SentencePiece's engine of these pieces: Unigram, else BPE.

    charsmap: its normalisation, compiled, or nothing. dummy: put a blank before a text. squeeze: make many blanks one.
    """
    unknown = next((i for i, (_, _, type) in enumerate(pieces) if type == UNKNOWN), 0)
    bytewise = any(type == BYTE for _, _, type in pieces)
    engine = Engine(
        models.Unigram([(text, score) for text, score, _ in pieces], unk_id=unknown, byte_fallback=bytewise)
        if unigram
        else _bpe(pieces, pieces[unknown][0], bytewise)
    )
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    if squeeze:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if dummy:  # Metaspace would do it too, but not where the text begins with a blank of its own
        steps.append(normalizers.Prepend("▁"))
    engine.normalizer = normalizers.Sequence(steps)
    check_growth(json.loads(engine.normalizer.__getstate__()), "this SentencePiece model")
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=unigram)
    back: list[decoders.Decoder] = [decoders.ByteFallback()] if bytewise else []
    engine.decoder = decoders.Sequence([*back, decoders.Metaspace(prepend_scheme="always" if dummy else "never")])
    control = [AddedToken(t, normalized=False, special=True) for t, _, type in pieces if type in (UNKNOWN, CONTROL)]
    engine.add_special_tokens(control)
    engine.add_tokens([AddedToken(t, normalized=False, special=False) for t, _, type in pieces if type == USER])
    return engine


def _bpe(pieces: list[Piece], unknown: str, bytewise: bool) -> models.BPE:
    vocab = {text: i for i, (text, _, type) in enumerate(pieces) if type != UNUSED}
    return models.BPE(vocab, ways(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=bytewise)


def ways(pieces: list[Piece]) -> list[tuple[str, str]]:
    """SentencePiece joins whichever neighbours make the best-scored piece: every way to make each piece, best first."""
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    scores = {text: score for text, score, type in pieces if type in (NORMAL, USER)}
    made = []
    for text, score in scores.items():
        splits = [(text[:i], text[i:]) for i in range(1, len(text))]
        found = [(a, b) for a, b in splits if a in scores and b in scores]
        made += [(-score, vocab[text], vocab[a], vocab[b], (a, b)) for a, b in found]
    return [way[-1] for way in sorted(made)]


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: numbers as int, all else as bytes.

    >>> list(fields(b"\\x08\\x96\\x01\\x12\\x02hi"))
    [(1, 150), (2, b'hi')]
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"no protobuf message: wire type {wire}")
        if at + size > len(data):
            raise ValueError("the file is cut off")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if shift > 63:
            raise ValueError("no protobuf message: a number of more than 64 bits")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _piece(data: bytes) -> Piece:
    """(text, score, type) of one piece."""
    text, score, type = "", 0.0, NORMAL
    for number, value in fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            type = value
    return text, score, type


def _last(message: list[tuple[int, int | bytes]], number: int) -> dict[int, int | bytes]:
    found: dict[int, int | bytes] = {}
    for n, value in message:
        if n == number and isinstance(value, bytes):
            found |= dict(fields(value))
    return found


READERS: dict[str, Callable[[Path], Engine]] = {
    "vocab.txt": bert, "vocab.json": gpt2, "encoder.json": gpt2,
    "spiece.model": sentencepiece, "tokenizer.model": sentencepiece,
}  # fmt: skip
