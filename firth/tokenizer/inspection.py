"""Inspect a tokenizer: its merges in the order they were learned, with their counts, and how it splits words.

    firth tokenizer show tokenizer/ taaaaasty laern Transformerify

prints, for byte-level BPE trained on Shakespeare's plays,

       #      count  merge
       1    101,668  ␣ + t -> ␣t
       2     79,909  h + e -> he
    ...
    words
      taaaaasty        ta  a  a  a  ast  y
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from firth.tokenizer.merges import Merge
from firth.tokenizer.tokenizer import Tokenizer, byte_alphabet

SIGNS = {"Ġ": "␣", "▁": "␣", " ": "␣", "Ċ": "⏎", "\n": "⏎", "ĉ": "⇥", "\t": "⇥"}


@dataclass(frozen=True)
class TokenizerView:
    """Summary of a tokenizer.

    Args:
        kind: Type of the model, as in tokenizer.json.
        size: Number of ids.
        control: Number of control tokens.
        merges: In the order they were learned (BPE, and WordPiece trained by firth).
        scores: The most likely pieces with their natural log-probability (Unigram).
        pieces: The first pieces of more than one letter, by id (other models).
        splits: Each word that was given, and its pieces.
        byte_level: Whether pieces are spelled in GPT-2's byte alphabet.
    """

    kind: str
    size: int
    control: int
    merges: tuple[Merge, ...]
    scores: tuple[tuple[str, float], ...]
    pieces: tuple[str, ...]
    splits: tuple[tuple[str, tuple[str, ...]], ...]
    byte_level: bool = False


def inspect_tokenizer(tokenizer: Tokenizer, words: Sequence[str], first: int = 20) -> TokenizerView:
    """Return the first merges or pieces of a tokenizer, and how it splits some words."""
    model = json.loads(tokenizer.definition)["model"]
    vocab = tokenizer.vocab
    merges = tokenizer.merges[:first]
    scores: tuple[tuple[str, float], ...] = ()
    pieces: tuple[str, ...] = ()
    if model["type"] == "Unigram":
        likely = sorted((-score, text) for i, (text, score) in enumerate(model["vocab"]) if not vocab.special[i])
        scores = tuple((text, -minus) for minus, text in likely[:first])
    elif not merges and "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"][:first]]
        merges = tuple(Merge(left, right) for left, right in pairs)
    elif not merges:
        prefix = model.get("continuing_subword_prefix") or ""
        ordered = sorted(model["vocab"].items(), key=lambda row: row[1])
        pieces = tuple(t for t, i in ordered if len(t.removeprefix(prefix)) > 1 and not vocab.special[i])[:first]
    return TokenizerView(
        kind=model["type"],
        size=vocab.size,
        control=int(vocab.special.sum()),
        merges=merges,
        scores=scores,
        pieces=pieces,
        splits=tuple((word, tuple(tokenizer.pieces(word))) for word in words),
        byte_level=tokenizer.is_byte_level,
    )


def readable(piece: str, byte_level: bool = False) -> str:
    """Return a piece with visible signs for its blanks, line breaks and tabs.

    Args:
        piece: The piece as the vocabulary spells it.
        byte_level: Whether it is spelled in GPT-2's byte alphabet; the bytes of an incomplete character are shown as `\\xc3`.

    >>> readable("Ġthe"), readable("ĊĊ")
    ('␣the', '⏎⏎')
    >>> readable("ĠÄįlov", byte_level=True), readable("Ã", byte_level=True)
    ('␣člov', '\\\\xc3')
    """
    alphabet = byte_alphabet()
    if byte_level and all(character in alphabet for character in piece):
        piece = bytes(alphabet[character] for character in piece).decode("utf-8", "backslashreplace")
    return "".join(SIGNS.get(character, character) for character in piece)


def render(view: TokenizerView) -> str:
    """Return a view as plain text."""
    lines = [f"{view.kind} tokenizer: {view.size} ids, {view.control} of them control tokens", ""]
    if view.merges:
        lines += [
            f"the first {len(view.merges)} merges, in the order they were learned",
            f"{'#':>6}  {'count':>9}  merge",
        ]
        for i, merge in enumerate(view.merges, 1):
            count = "" if merge.count is None else f"{merge.count:,}"
            pieces = (merge.left, merge.right, _joined(merge.left, merge.right))
            left, right, merged = (readable(piece, view.byte_level) for piece in pieces)
            lines.append(f"{i:>6}  {count:>9}  {left} + {right} -> {merged}")
    if view.scores:
        lines += [f"the {len(view.scores)} most likely pieces", f"{'#':>6}  {'log p':>9}  piece"]
        lines += [f"{i:>6}  {score:>9.3f}  {readable(piece)}" for i, (piece, score) in enumerate(view.scores, 1)]
    if view.pieces:
        lines += [f"the first {len(view.pieces)} pieces of more than one letter, by id", "  " + "  ".join(view.pieces)]
    lines += ["", "words"]
    lines += [
        f"  {word:<16} {'  '.join(readable(piece, view.byte_level) for piece in pieces)}"
        for word, pieces in view.splits
    ]
    return "\n".join(lines)


def report(directory: Path | str, words: Sequence[str], first: int = 20) -> str:
    """Return the text that `firth tokenizer show` prints.

    Raises:
        UserError: The directory has no tokenizer.
    """
    return render(inspect_tokenizer(Tokenizer.load(directory), words, first))


def _joined(left: str, right: str) -> str:
    """Join two pieces; the WordPiece prefix of a continuation is kept only at the beginning."""
    return left + (right.removeprefix("##") if right != "##" else right)
