"""Read tokenizers in formats older than tokenizer.json, as engines of the tokenizers library.

    vocab.txt                       BERT: WordPiece, one token per line
    vocab.json + merges.txt         GPT-2, RoBERTa: byte-level BPE (OpenAI's own names: encoder.json + vocab.bpe)
    spiece.model, tokenizer.model   SentencePiece: Unigram (T5, XLNet, ALBERT) and BPE with byte fallback (Llama)

A SentencePiece model is one protobuf message; its few relevant fields are parsed here, so that neither sentencepiece nor
protobuf is needed.
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

MAX_PIECE_CHARACTERS = 1000
"""Maximum length of a piece: the number of merges that make it grows with the square of its length."""


def find(folder: Path) -> Path | None:
    """Return the tokenizer file of a directory, the newest format first; None if there is none."""
    for name in ("tokenizer.json", *READERS):
        if (folder / name).is_file():
            return folder / name
    model_files = sorted(folder.glob("*.model"))
    return model_files[0] if model_files else None


MAX_FILE_BYTES = 1 << 28
"""Maximum size of a tokenizer file; the largest in use has a tenth of it."""


def text_of(file: Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: The file is not UTF-8 or larger than MAX_FILE_BYTES.
    """
    if file.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{file} has {file.stat().st_size:,} bytes, more than any tokenizer needs: it is not read")
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: this is not a tokenizer file: it is not UTF-8 ({error})") from None


def read(file: Path) -> Engine:
    """Return the engine in a tokenizer file.

    Raises:
        UserError: The file cannot be read as a tokenizer.
    """
    reader = READERS.get(file.name, sentencepiece if file.suffix == ".model" else tokenizer_json)
    if file.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{file} has {file.stat().st_size:,} bytes, more than any tokenizer needs: it is not read")
    try:
        return reader(file)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file}: this is not a tokenizer that firth can read ({_line(error)})") from None


def _line(error: Exception) -> str:
    """Return an error message in one line."""
    return " ".join(str(error).split())[:120]


def tokenizer_json(file: Path) -> Engine:
    """Read the tokenizers library's own format."""
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
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file}: the tokenizers library cannot read this tokenizer: {_line(error)}") from None


def bert(file: Path) -> Engine:
    """Read BERT's vocab.txt: one token per line; uncased if no token has a capital letter."""
    tokens = [line.removesuffix("\r") for line in text_of(file).removesuffix("\n").split("\n")]
    if len(set(tokens)) < len(tokens) or "[UNK]" not in tokens:
        twice = (
            next((t for i, t in enumerate(tokens) if t in tokens[:i]), None) if len(set(tokens)) < len(tokens) else None
        )
        why = "has no [UNK]" if twice is None else f"has the token {twice!r:.40} twice"
        raise UserError(f"{file} {why}: one token per line is expected, each once; copy it again")
    return wordpiece({token: i for i, token in enumerate(tokens)})


def wordpiece(tokens: dict[str, int]) -> Engine:
    """Return BERT's WordPiece with these tokens and ids."""
    engine = Engine(models.WordPiece(tokens, unk_token="[UNK]"))
    cased = any(token != token.lower() for token in tokens if not token.startswith("["))
    engine.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    engine.add_special_tokens([t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in tokens])
    return engine


def gpt2(file: Path) -> Engine:
    """Read GPT-2's vocabulary (vocab.json or encoder.json) and merges (merges.txt or vocab.bpe in the same directory)."""
    merges_file = next((p for name in ("merges.txt", "vocab.bpe") if (p := file.parent / name).is_file()), None)
    if merges_file is None:
        raise UserError(f"{file}: its merges are missing: put merges.txt into the same directory")
    vocab = json.loads(text_of(file))
    lines = [line for line in text_of(merges_file).split("\n") if line and not line.startswith("#version")]
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    engine = Engine(models.BPE(vocab, pairs))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([t for t in ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>") if t in vocab])
    return engine


def sentencepiece(file: Path) -> Engine:
    """Read a SentencePiece model: its Unigram or BPE pieces, its normalization, its control symbols.

    The ids equal those of sentencepiece, except for a text that contains the spelling of a control token.

    Raises:
        UserError: The model has unused pieces or is of the type word or char.
    """
    message = list(fields(file.read_bytes()))
    pieces = [_piece(value) for number, value in message if number == 1 and isinstance(value, bytes)]
    trainer = _last(message, 2)
    normalizer = _last(message, 3)
    kind = trainer.get(3, 1)
    if kind not in (1, 2) or not pieces or any(type == UNUSED for _, _, type in pieces):
        raise UserError(f"{file}: only SentencePiece models of type Unigram or BPE without unused pieces can be read")
    if max(len(text) for text, _, _ in pieces) > MAX_PIECE_CHARACTERS:
        raise UserError(f"{file} has a piece of more than {MAX_PIECE_CHARACTERS} characters: it is not read")
    if all(type != UNKNOWN for _, _, type in pieces):
        raise UserError(f"{file} has no unknown piece: copy it again")
    charsmap, dummy, squeeze = normalizer.get(2), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
    return sentencepiece_engine(pieces, kind == 1, charsmap if isinstance(charsmap, bytes) else b"", dummy, squeeze)


def sentencepiece_engine(pieces: list[Piece], unigram: bool, charsmap: bytes, dummy: bool, squeeze: bool) -> Engine:
    """Return an engine that tokenizes as SentencePiece does.

    Args:
        pieces: The pieces, in the order of their ids.
        unigram: Unigram, else BPE.
        charsmap: Precompiled normalization; may be empty.
        dummy: Add a prefix space to a text (add_dummy_prefix).
        squeeze: Collapse runs of blanks (remove_extra_whitespaces).
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
    if dummy:  # Metaspace would do it too, but not if the text starts with a blank
        steps.append(normalizers.Prepend("▁"))
    engine.normalizer = normalizers.Sequence(steps)
    check_growth(json.loads(engine.normalizer.__getstate__()), "this SentencePiece model")
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=unigram)
    fallback: list[decoders.Decoder] = [decoders.ByteFallback()] if bytewise else []
    engine.decoder = decoders.Sequence([*fallback, decoders.Metaspace(prepend_scheme="always" if dummy else "never")])
    control = [AddedToken(t, normalized=False, special=True) for t, _, type in pieces if type in (UNKNOWN, CONTROL)]
    engine.add_special_tokens(control)
    engine.add_tokens([AddedToken(t, normalized=False, special=False) for t, _, type in pieces if type == USER])
    return engine


def _bpe(pieces: list[Piece], unknown: str, bytewise: bool) -> models.BPE:
    vocab = {text: i for i, (text, _, type) in enumerate(pieces) if type != UNUSED}
    return models.BPE(vocab, all_merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=bytewise)


def all_merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Return all merges that make the pieces, best first.

    SentencePiece merges the neighbors that form the piece of the highest score, whichever they are.
    """
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    scores = {text: score for text, score, type in pieces if type in (NORMAL, USER)}
    made = []
    for text, score in scores.items():
        splits = [(text[:i], text[i:]) for i in range(1, len(text))]
        found = [(a, b) for a, b in splits if a in scores and b in scores]
        made += [(-score, vocab[text], vocab[a], vocab[b], (a, b)) for a, b in found]
    return [merge[-1] for merge in sorted(made)]


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message: varints as int, all others as bytes.

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
    """Parse (text, score, type) of one piece."""
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
