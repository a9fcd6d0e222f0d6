"""Read the tokenizers of GGUF files: llama.cpp's lists of tokens, scores, types and merges (`gguf_write` writes them).

    tokenizer.ggml.model   algorithm                                    read   written
    gpt2                   byte-level BPE, pre-tokenizer `pre`          yes    yes, if `pre` has a name for the pre-tokenizer
    llama                  SentencePiece BPE: scores, bytes             yes    yes
    t5                     SentencePiece Unigram                        yes    no
    bert                   WordPiece, `▁` before the start of a word    yes    yes, uncased

llama.cpp identifies a pre-tokenizer by name only (`tokenizer.ggml.pre`); its converter finds the name by hashing the
tokens of one text, so a new vocabulary has none. Here a table maps each name to its patterns, and a tokenizer is written
under the name with the same patterns. Unknown names are rejected: text split in another way would be silently worse. As in
llama.cpp, text is not normalized for `gpt2` and `llama`. Pieces of the type "unused" ([PAD511], padding of the embedding
table) are not tokens: the tokenizer does not have their ids.

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

MAX_TOKEN_CHARACTERS = formats.MAX_PIECE_CHARACTERS
"""Maximum length of a token. Real ones have a few hundred characters at most (a run of blanks)."""
BLANK = "▁"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
"""English contractions, in either case."""


def llama3_pattern(digits: str, letters: str = r"\p{L}", others: str = r"[^\s\p{L}\p{N}]") -> str:
    """Return Llama 3's pattern, or a variant of it.

    Args:
        digits: Pattern of a number.
        letters: Pattern of a letter.
        others: Pattern of any other sign.
    """
    return CONTRACTIONS + (
        rf"[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}| ?{others}+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer of llama.cpp.

    Args:
        patterns: Each splits the pieces that the previous ones left.
        ignore_merges: Whether a piece that is a token stays whole.
        add_bos: Whether bos is added if the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


WORDS = PreTokenizer((GPT2,))
DIGITS = PreTokenizer((r"\p{N}", GPT2))
LLAMA3 = PreTokenizer((llama3_pattern(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
QWEN2 = PreTokenizer((llama3_pattern(r"\p{N}"),))
PRE: dict[str, PreTokenizer] = {
    "gpt-2": WORDS, "mpt": WORDS, "phi-2": WORDS, "olmo": WORDS, "jais": WORDS, "trillion": WORDS, "roberta-bpe": WORDS,
    "modern-bert": WORDS, "exaone4": WORDS, "jina-v2-code": WORDS,
    "smollm": DIGITS, "starcoder": DIGITS, "refact": DIGITS, "command-r": DIGITS, "codeshell": DIGITS, "exaone": DIGITS,
    "minerva-7b": DIGITS,
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "falcon3": LLAMA3, "lfm2": LLAMA3, "pixtral": LLAMA3,
    "dbrx": PreTokenizer(LLAMA3.patterns), "smaug-bpe": PreTokenizer(LLAMA3.patterns), "chatglm-bpe": PreTokenizer(LLAMA3.patterns),
    "glm4": PreTokenizer(LLAMA3.patterns, ignore_merges=True),
    "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2, "stablelm2": QWEN2, "hunyuan": QWEN2, "megrez": QWEN2,
    "qwen35": PreTokenizer((llama3_pattern(r"\p{N}", r"[\p{L}\p{M}]", r"[^\s\p{L}\p{M}\p{N}]"),)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
}  # fmt: skip
"""`tokenizer.ggml.pre` -> pre-tokenizer; of several equal ones the first name is written."""

ROLES = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id",
    "sep": "seperator_token_id", "cls": "cls_token_id", "mask": "mask_token_id",
}  # fmt: skip
"""Role -> its key after `tokenizer.ggml.`; the misspelling is llama.cpp's."""


def read(path: Path) -> tuple[Engine, dict[str, str], str | None, bool, list[str]]:
    """Read the tokenizer of a GGUF file.

    Returns:
        Arguments of `Tokenizer`: engine, roles, chat template, bos and ends.

    Raises:
        UserError: The file has no supported tokenizer.
    """
    file = gguf.read(path)
    tokens = file.list("tokenizer.ggml.tokens")
    if any(len(token) > MAX_TOKEN_CHARACTERS for token in tokens):
        raise UserError(f"{path}: a token of its vocabulary is longer than {MAX_TOKEN_CHARACTERS} characters")
    kind = file.text("tokenizer.ggml.model")
    if kind not in READERS:
        raise UserError(f"{path}: its tokenizer is of the kind {kind!r}; firth reads {', '.join(READERS)}")
    types = file.numbers("tokenizer.ggml.token_type", len(tokens))
    scores = file.numbers("tokenizer.ggml.scores", len(tokens))
    scored = np.zeros(len(tokens)) if scores is None else scores
    typed = np.full(len(tokens), NORMAL) if types is None else types
    pieces = list(zip(tokens, scored.tolist(), typed.tolist(), strict=True))
    try:
        engine, add_bos = READERS[kind](file, pieces)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: its tokenizer cannot be built: {error}") from None
    named = {}
    for role, key in ROLES.items():
        id = file.metadata.get(f"tokenizer.ggml.{key}")
        if type(id) is int and 0 <= id < len(tokens):
            named[role] = tokens[id]
    template = file.text("tokenizer.chat_template") if "tokenizer.chat_template" in file.metadata else None
    eot = file.metadata.get("tokenizer.ggml.eot_token_id")
    ends = [tokens[eot]] if type(eot) is int and 0 <= eot < len(tokens) else []
    return engine, named, template, bool(file.metadata.get("tokenizer.ggml.add_bos_token", add_bos)), ends


def gpt2(file: GGUFFile, pieces: list[Piece]) -> tuple[Engine, bool]:
    """Return byte-level BPE."""
    if "tokenizer.ggml.pre" not in file.metadata:
        raise UserError(f"{file.path} does not name its pre-tokenizer (tokenizer.ggml.pre): convert it again")
    name = file.text("tokenizer.ggml.pre")
    if name not in PRE:
        raise UserError(f"{file.path} uses the pre-tokenizer {name!r}, which firth does not know ({', '.join(PRE)})")
    pre = PRE[name]
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in file.list("tokenizer.ggml.merges"))]
    merged = {a + b for a, b in merges}
    vocab = {token: i for i, (token, _, type) in enumerate(pieces) if type != UNUSED or token in merged}
    engine = Engine(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    builtin = pre.patterns[-1] == GPT2  # the library's own version of this pattern is faster
    steps: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in pre.patterns[: len(pre.patterns) - builtin]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=builtin))
    engine.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, _, type in pieces if type in (UNKNOWN, CONTROL)]
    )
    engine.add_tokens([AddedToken(t, normalized=False, special=False) for t, _, type in pieces if type == USER])
    return engine, pre.add_bos


def llama(file: GGUFFile, pieces: list[Piece]) -> tuple[Engine, bool]:
    """Return SentencePiece's BPE, without normalization as in llama.cpp."""
    dummy = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    return formats.sentencepiece_engine(pieces, False, b"", dummy, squeeze=False), True


def t5(file: GGUFFile, pieces: list[Piece]) -> tuple[Engine, bool]:
    """Return SentencePiece's Unigram with its normalization."""
    charsmap = file.metadata.get("tokenizer.ggml.precompiled_charsmap")
    if any(type == UNUSED for _, _, type in pieces):
        raise UserError(f"{file.path}: its Unigram vocabulary has unused pieces, which firth does not read")
    dummy = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", False))
    squeeze = bool(file.metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
    compiled = charsmap.tobytes() if isinstance(charsmap, np.ndarray) else b""
    return formats.sentencepiece_engine(pieces, True, compiled, dummy, squeeze), False


def bert(file: GGUFFile, pieces: list[Piece]) -> tuple[Engine, bool]:
    """Return WordPiece; in GGUF the first piece of a word has a `▁` and the others have no prefix."""

    def to_wordpiece(token: str, type: int) -> str:
        bracketed = token[:1] == "[" and token[-1:] == "]" and len(token) > 2
        if token.startswith(BLANK):
            return token[1:]
        return token if type == CONTROL or bracketed else f"##{token}"

    tokens = [to_wordpiece(token, type) for token, _, type in pieces]
    if "[UNK]" not in tokens:
        raise UserError(f"{file.path}: its WordPiece vocabulary has no [UNK]: convert it again")
    unused = {i for i, (_, _, type) in enumerate(pieces) if type == UNUSED}
    return formats.wordpiece({token: i for i, token in enumerate(tokens) if i not in unused}), True


READERS = {"gpt2": gpt2, "llama": llama, "t5": t5, "bert": bert}
