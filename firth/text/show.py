"""Looking inside a tokenizer: the merges in the order they were learnt, with their counts, and how words split.

The engine keeps the order of the merges but not how often each pair stood in the text when it was merged, which is
the reason it was merged. `keep_counts` counts it again after training and leaves it in merges.json.

    firth tokenizer show tokenizer/ taaaaasty laern Transformerify
"""

from __future__ import annotations

import collections
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firth.text.tokenizer import Tokenizer
from firth.text.train import reservoir
from firth.types import UserError

COUNTED = 200
"""How many merges are counted."""
SAMPLE = 20_000_000
"""Bytes of text they are counted on at most."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Merge:
    """A learnt piece: what it was merged from, and how often the two stood side by side then (None: not counted)."""

    left: str
    right: str
    count: int | None


def merges(tokenizer: Tokenizer, first: int) -> list[Pair]:
    """The first merges in the order learnt; UserError for a model without merges."""
    model = json.loads(tokenizer.engine.to_str())["model"]
    if "merges" not in model:
        raise UserError(f"a {model['type']} model has no merges")
    pairs: list[Pair] = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"][:first]]
    return pairs


def keep_counts(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    directory: Path,
    *,
    sample: int = SAMPLE,
    seed: int = 0,
    first: int = COUNTED,
) -> None:
    """Count the first merges again, on the sample that training saw (SAMPLE bytes of it at most), into merges.json.

    Nothing is written for models without merges.
    """
    if "merges" not in json.loads(tokenizer.engine.to_str())["model"]:
        return
    words: collections.Counter[str] = collections.Counter()
    read = 0
    for piece in reservoir(texts, min(sample, SAMPLE), seed):
        read += len(piece.encode())
        normal = tokenizer.engine.normalizer.normalize_str(piece) if tokenizer.engine.normalizer else piece
        words.update(word for word, _ in tokenizer.engine.pre_tokenizer.pre_tokenize_str(normal))
    suffix = json.loads(tokenizer.engine.to_str())["model"].get("end_of_word_suffix") or ""
    counted = count(merges(tokenizer, first), words, suffix)
    rows = [{"left": m.left, "right": m.right, "count": m.count} for m in counted]
    partial = directory / "merges.json.partial"
    partial.write_text(json.dumps({"bytes": read, "merges": rows}, ensure_ascii=False, indent=1), "utf-8")
    os.replace(partial, directory / "merges.json")


def count(pairs: Sequence[Pair], words: collections.Counter[str], suffix: str = "") -> list[Merge]:
    """Apply the merges one after another and count each just before it is applied.

    >>> [m.count for m in count([("l", "o"), ("lo", "w")], collections.Counter({"low": 3, "lo": 2, "slow": 1}))]
    [6, 4]
    """
    spelled: dict[str, list[str]] = {}
    where: dict[Pair, set[str]] = collections.defaultdict(set)
    for word in words:
        letters = list(word)
        letters[-1] += suffix
        spelled[word] = letters
        for pair in itertools.pairwise(letters):
            where[pair].add(word)
    counted = []
    for pair in pairs:
        total = 0
        for word in where.pop(pair, ()):
            letters, merged = spelled[word], []
            i = 0
            while i < len(letters):
                if i + 1 < len(letters) and (letters[i], letters[i + 1]) == pair:
                    merged.append(letters[i] + letters[i + 1])
                    total += words[word]
                    i += 2
                else:
                    merged.append(letters[i])
                    i += 1
            spelled[word] = merged
            for new in itertools.pairwise(merged):
                where[new].add(word)
        counted.append(Merge(*pair, total))
    return counted


def kept(directory: Path, first: int) -> list[Merge]:
    """The first merges of a tokenizer's directory, with their counts where merges.json has them."""
    place = next(
        (p for p in (directory, directory / "tokenizer", directory / "model") if (p / "merges.json").exists()), None
    )
    counts: dict[Pair, int] = {}
    if place is not None:
        rows: list[dict[str, Any]] = json.loads((place / "merges.json").read_text("utf-8"))["merges"]
        counts = {(r["left"], r["right"]): r["count"] for r in rows}
    return [Merge(a, b, counts.get((a, b))) for a, b in merges(Tokenizer.load(directory), first)]


def readable(piece: str) -> str:
    """A piece with the byte alphabet's blank and line break drawn as they are usually shown.

    >>> readable("Ġthe"), readable("ĊĊ")
    ('␣the', '⏎⏎')
    """
    return piece.replace("Ġ", "␣").replace("▁", "␣").replace("Ċ", "⏎").replace("ĉ", "⇥")


def report(directory: Path, words: Sequence[str], first: int = 20) -> str:
    """The page that `firth tokenizer show` prints."""
    tokenizer = Tokenizer.load(directory)
    vocab = tokenizer.vocab
    kind = json.loads(tokenizer.engine.to_str())["model"]
    lines = [f"{kind['type']} tokenizer: {vocab.size} ids, {int(vocab.special.sum())} of them control tokens", ""]
    if "merges" in kind:
        lines += [f"the first {first} merges, in the order they were learnt", f"{'#':>4}  {'count':>9}  merge"]
        for i, m in enumerate(kept(directory, first), 1):
            seen = "" if m.count is None else f"{m.count:,}"
            lines.append(f"{i:>4}  {seen:>9}  {readable(m.left)} + {readable(m.right)} -> {readable(m.left + m.right)}")
    elif kind["type"] == "Unigram":
        pieces = [(p, s) for i, (p, s) in enumerate(kind["vocab"]) if not vocab.special[i]]
        lines += [f"the {first} likeliest pieces", f"{'#':>4}  {'log p':>9}  piece"]
        pieces.sort(key=lambda row: -row[1])
        lines += [f"{i:>4}  {score:>9.3f}  {readable(piece)}" for i, (piece, score) in enumerate(pieces[:first], 1)]
    else:
        longer = [t for t, _ in sorted(kind["vocab"].items(), key=lambda row: row[1]) if len(t.removeprefix("##")) > 1]
        ordinary = [t for t in longer if not vocab.special[tokenizer.id(t)]]
        lines += [
            f"the first {first} pieces of more than one letter, in the order of their ids",
            "  " + "  ".join(ordinary[:first]),
        ]
    lines += ["", "words"]
    lines += [f"  {word:<16} {'  '.join(readable(p) for p in tokenizer.pieces(word))}" for word in words]
    return "\n".join(lines)
