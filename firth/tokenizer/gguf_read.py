"""Tokenizers in GGUF files: llama.cpp's lists of tokens, scores, types and merges to an engine (`to_gguf` writes them).

    tokenizer.ggml.model   what it is                                   read   written
    gpt2                   byte-level BPE, cut as `pre` says            yes    yes, where `pre` has a name for the cutting
    llama                  SentencePiece BPE: scores, bytes             yes    yes
    t5                     SentencePiece Unigram                        yes    no
    bert                   WordPiece, `▁` before what begins a word     yes    yes, uncased

llama.cpp knows how text is cut into words by name only (`tokenizer.ggml.pre`); its converter finds the name by hashing
what a tokenizer makes of one text, so a new vocabulary has none there. Here one table says what each name means, and
the name for a tokenizer is the one that means what it does. A name that is not in the table is refused: text cut in
another way would be silently worse. Text is not normalised for `gpt2` and `llama`, as llama.cpp has it. Pieces of the type
"unused" ([PAD511], which fill up a table) are no tokens: the tokenizer does not have their ids.

>>> PRE["qwen2"] == PRE["stablelm2"], PRE["qwen2"] == PRE["llama-bpe"]  # one digit makes a number, or up to three
(True, False)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

from firth.io import gguf
from firth.io.gguf import GGUFFile
from firth.tokenizer import formats
from firth.tokenizer.formats import CONTROL, NORMAL, UNKNOWN, UNUSED, USER, Piece
from firth.types import UserError

LONGEST = formats.LONGEST
"""Characters of a token. Real ones have a few hundred at most (a row of blanks)."""
BLANK = "▁"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
"""What English contracts, in whichever case."""


def lines(digits: str, letters: str = r"\p{L}", others: str = r"[^\s\p{L}\p{N}]") -> str:
    """Llama 3's pattern, from which others differ in how many digits make a number and in what a letter is."""
    return SHORT + (
        rf"[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}| ?{others}+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip


@dataclass(frozen=True)
class PreTokenizer:
    """patterns: each cuts the pieces that those before it left. whole: a piece that is a token is not merged anew.
    begins: whether bos is put before a text where the file does not say.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    begins: bool = False


WORDS = PreTokenizer((GPT2,))
DIGITS = PreTokenizer((r"\p{N}", GPT2))
LLAMA3 = PreTokenizer((lines(r"\p{N}{1,3}"),), whole=True, begins=True)
QWEN2 = PreTokenizer((lines(r"\p{N}"),))
PRE: dict[str, PreTokenizer] = {
    "gpt-2": WORDS, "mpt": WORDS, "phi-2": WORDS, "olmo": WORDS, "jais": WORDS, "trillion": WORDS, "roberta-bpe": WORDS,
    "modern-bert": WORDS, "exaone4": WORDS, "jina-v2-code": WORDS,
    "smollm": DIGITS, "starcoder": DIGITS, "refact": DIGITS, "command-r": DIGITS, "codeshell": DIGITS, "exaone": DIGITS,
    "minerva-7b": DIGITS,
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "falcon3": LLAMA3, "lfm2": LLAMA3, "pixtral": LLAMA3,
    "dbrx": PreTokenizer(LLAMA3.patterns), "smaug-bpe": PreTokenizer(LLAMA3.patterns), "chatglm-bpe": PreTokenizer(LLAMA3.patterns),
    "glm4": PreTokenizer(LLAMA3.patterns, whole=True),
    "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2, "stablelm2": QWEN2, "hunyuan": QWEN2, "megrez": QWEN2,
    "qwen35": PreTokenizer((lines(r"\p{N}", r"[\p{L}\p{M}]", r"[^\s\p{L}\p{M}\p{N}]"),)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
}  # fmt: skip
"""`tokenizer.ggml.pre` -> how text is cut; the first name of a kind is the one that is written."""

ROLES = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id",
    "sep": "seperator_token_id", "cls": "cls_token_id", "mask": "mask_token_id",
}  # fmt: skip
"""Role -> its key behind `tokenizer.ggml.`; the spelling of one is llama.cpp's."""


def read(path: Path) -> tuple[Engine, dict[str, str], str | None, bool, list[str]]:
    """What makes the `Tokenizer` of a GGUF file: its engine, roles, template, bos and ends. UserError where it has none that
    can be read."""
    file = gguf.read(path)
    tokens = file.list("tokenizer.ggml.tokens")
    if any(len(token) > LONGEST for token in tokens):
        raise UserError(f"{path}: a token of its vocabulary is longer than {LONGEST} characters")
    kind = file.text("tokenizer.ggml.model")
    if kind not in READERS:
        raise UserError(f"{path}: its tokenizer is of the kind {kind!r}; firth reads {', '.join(READERS)}")
    types = file.numbers("tokenizer.ggml.token_type", len(tokens))
    scores = file.numbers("tokenizer.ggml.scores", len(tokens))
    scored = np.zeros(len(tokens)) if scores is None else scores
    typed = np.full(len(tokens), NORMAL) if types is None else types
    pieces = list(zip(tokens, scored.tolist(), typed.tolist(), strict=True))
    try:
        engine, begins = READERS[kind](file, pieces)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception for whatever it cannot build
        raise UserError(f"{path}: its tokenizer cannot be built: {error}") from None
    named = {}
    for role, key in ROLES.items():
        id = file.metadata.get(f"tokenizer.ggml.{key}")
        if type(id) is int and 0 <= id < len(tokens):
            named[role] = tokens[id]
    template = file.text("tokenizer.chat_template") if "tokenizer.chat_template" in file.metadata else None
    turn = file.metadata.get("tokenizer.ggml.eot_token_id")
    ends = [tokens[turn]] if type(turn) is int and 0 <= turn < len(tokens) else []
    return engine, named, template, bool(file.metadata.get("tokenizer.ggml.add_bos_token", begins)), ends


def gpt2(file: GGUFFile, pieces: list[Piece]) -> tuple[Engine, bool]:
    """Byte-level BPE."""
    if "tokenizer.ggml.pre" not in file.metadata:
        raise UserError(f"{file.path} does not say how text is cut into words (tokenizer.ggml.pre): convert it again")
    name = file.text("tokenizer.ggml.pre")
    if name not in PRE:
        raise UserError(
            f"{file.path} cuts text into words as {name!r} does, which firth does not know ({', '.join(PRE)})"
        )
    cut = PRE[name]
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in file.list("tokenizer.ggml.merges"))]
    made = {a + b for a, b in merges}
    vocab = {token: i for i, (token, _, type) in enumerate(pieces) if type != UNUSED or token in made}
    engine = Engine(models.BPE(vocab, merges, ignore_merges=cut.whole))
    own = cut.patterns[-1] == GPT2  # the library has this one built in, which is faster
    steps: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in cut.patterns[: len(cut.patterns) - own]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own))
    engine.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, _, type in pieces if type in (UNKNOWN, CONTROL)]
    )
    engine.add_tokens([AddedToken(t, normalized=False, special=False) for t, _, type in pieces if type == USER])
    return engine, cut.begins


def llama(file: GGUFFile, pieces: list[Piece]) -> tuple[Engine, bool]:
    """SentencePiece's BPE, which llama.cpp has without normalisation."""
    dummy = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    return formats.pieced(pieces, False, b"", dummy, squeeze=False), True


def t5(file: GGUFFile, pieces: list[Piece]) -> tuple[Engine, bool]:
    """SentencePiece's Unigram, with its normalisation."""
    charsmap = file.metadata.get("tokenizer.ggml.precompiled_charsmap")
    if any(type == UNUSED for _, _, type in pieces):
        raise UserError(
            f"{file.path}: its Unigram vocabulary has pieces that are not in use, which firth does not read"
        )
    dummy = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", False))
    squeeze = bool(file.metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
    compiled = charsmap.tobytes() if isinstance(charsmap, np.ndarray) else b""
    return formats.pieced(pieces, True, compiled, dummy, squeeze), False


def bert(file: GGUFFile, pieces: list[Piece]) -> tuple[Engine, bool]:
    """WordPiece: a word's first piece has a blank's sign before it there, what goes on has nothing."""

    def spelled(token: str, type: int) -> str:
        bracketed = token[:1] == "[" and token[-1:] == "]" and len(token) > 2
        if token.startswith(BLANK):
            return token[1:]
        return token if type == CONTROL or bracketed else f"##{token}"

    tokens = [spelled(token, type) for token, _, type in pieces]
    if "[UNK]" not in tokens:
        raise UserError(f"{file.path}: its WordPiece vocabulary has no [UNK]: convert it again")
    unused = {i for i, (_, _, type) in enumerate(pieces) if type == UNUSED}
    return formats.wordpiece({token: i for i, token in enumerate(tokens) if i not in unused}), True


READERS = {"gpt2": gpt2, "llama": llama, "t5": t5, "bert": bert}
