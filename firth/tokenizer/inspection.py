"""Looking inside a tokenizer: the merges in the order they were learnt, with their counts, and how words split.

    firth tokenizer show tokenizer/ taaaaasty laern Transformerify

prints, for byte-level BPE learnt from Shakespeare's plays,

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
from firth.tokenizer.tokenizer import Tokenizer

SIGNS = {"Ġ": "␣", "▁": "␣", " ": "␣", "Ċ": "⏎", "\n": "⏎", "ĉ": "⇥", "\t": "⇥"}


@dataclass(frozen=True)
class TokenizerView:
    """What there is to see of a tokenizer.

    kind: the model's name. merges: in the order learnt (BPE, and WordPiece trained by firth). scores: the likeliest
    pieces with their natural log-probability (Unigram). pieces: the first of more than one letter by id (else).
    splits: each word that was asked for and its pieces.
    """

    kind: str
    size: int
    control: int
    merges: tuple[Merge, ...]
    scores: tuple[tuple[str, float], ...]
    pieces: tuple[str, ...]
    splits: tuple[tuple[str, tuple[str, ...]], ...]


def inspect_tokenizer(tokenizer: Tokenizer, words: Sequence[str], first: int = 20) -> TokenizerView:
    """The first merges or pieces of a tokenizer, and how it splits some words."""
    model = json.loads(tokenizer.definition)["model"]
    vocab = tokenizer.vocab
    merges = tokenizer.learnt[:first]
    scores: tuple[tuple[str, float], ...] = ()
    pieces: tuple[str, ...] = ()
    if model["type"] == "Unigram":
        likely = sorted((-score, text) for i, (text, score) in enumerate(model["vocab"]) if not vocab.special[i])
        scores = tuple((text, -minus) for minus, text in likely[:first])
    elif not merges and "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"][:first]]
        merges = tuple(Merge(left, right) for left, right in pairs)
    elif not merges:
        on = model.get("continuing_subword_prefix") or ""
        ordered = sorted(model["vocab"].items(), key=lambda row: row[1])
        pieces = tuple(t for t, i in ordered if len(t.removeprefix(on)) > 1 and not vocab.special[i])[:first]
    return TokenizerView(
        kind=model["type"],
        size=vocab.size,
        control=int(vocab.special.sum()),
        merges=merges,
        scores=scores,
        pieces=pieces,
        splits=tuple((word, tuple(tokenizer.pieces(word))) for word in words),
    )


def readable(piece: str) -> str:
    """A piece with its blanks, line breaks and tabs drawn, however the vocabulary writes them.

    >>> readable("Ġthe"), readable("ĊĊ")
    ('␣the', '⏎⏎')
    """
    return "".join(SIGNS.get(character, character) for character in piece)


def render(seen: TokenizerView) -> str:
    """A look as plain text."""
    lines = [f"{seen.kind} tokenizer: {seen.size} ids, {seen.control} of them control tokens", ""]
    if seen.merges:
        lines += [
            f"the first {len(seen.merges)} merges, in the order they were learnt",
            f"{'#':>6}  {'count':>9}  merge",
        ]
        for i, merge in enumerate(seen.merges, 1):
            often = "" if merge.count is None else f"{merge.count:,}"
            left, right, made = map(readable, (merge.left, merge.right, _joined(merge.left, merge.right)))
            lines.append(f"{i:>6}  {often:>9}  {left} + {right} -> {made}")
    if seen.scores:
        lines += [f"the {len(seen.scores)} likeliest pieces", f"{'#':>6}  {'log p':>9}  piece"]
        lines += [f"{i:>6}  {score:>9.3f}  {readable(piece)}" for i, (piece, score) in enumerate(seen.scores, 1)]
    if seen.pieces:
        lines += [f"the first {len(seen.pieces)} pieces of more than one letter, by id", "  " + "  ".join(seen.pieces)]
    lines += ["", "words"]
    lines += [f"  {word:<16} {'  '.join(readable(piece) for piece in pieces)}" for word, pieces in seen.splits]
    return "\n".join(lines)


def report(directory: Path | str, words: Sequence[str], first: int = 20) -> str:
    """The page that `firth tokenizer show` prints. Raises UserError where there is no tokenizer."""
    return render(inspect_tokenizer(Tokenizer.load(directory), words, first))


def _joined(left: str, right: str) -> str:
    """What two pieces make; WordPiece's mark of a continuation is written only at its beginning."""
    return left + (right.removeprefix("##") if right != "##" else right)
