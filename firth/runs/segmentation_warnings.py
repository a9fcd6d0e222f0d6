"""Report, before a run, where an objective does not find the words, names or sentences that it looks for and falls back.

Words, names and sentences are found by Unicode's rules (`firth.tokenizer.segmentation`). Some scripts do not separate words, some
have no capitals, and some texts have no full stop; the objective then masks subwords or random spans, or splits anywhere.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from firth.data.noise import facts
from firth.data.source import Source
from firth.objectives.objective import Objective
from firth.runs.examples import ExamplesConfig
from firth.tokenizer import segmentation
from firth.tokenizer.vocab import Vocab
from firth.types import Example, UserError

SAMPLED_EXAMPLES = 64
"""Examples to inspect, evenly spaced."""
MIN_SHARE = 0.05
"""Smallest fraction of the examples or letters that is reported."""

REPORTS = {
    "words": "{share:.0%} of the letters are of scripts that do not separate words (Chinese, Japanese, Thai, Khmer, ...), so "
    "whole words fall back on subwords there; install firth[icu] to find words by ICU's dictionaries",
    "names": "{share:.0%} of the texts have no name, date or number that capitals or digits show, so salient spans fall back on "
    "random spans there",
    "sentences": "{share:.0%} of the texts are a single sentence, so there is no order of sentences to change there",
    "pairs": "{share:.0%} of the texts have no end of a sentence, so their pairs fall back on cuts anywhere",
}
"""Unit -> what is reported where it is not found."""


def fallbacks(objective: Objective, examples: ExamplesConfig, source: Source, vocab: Vocab) -> list[str]:
    """Return a sentence for each unit that the objective or the examples look for and often do not find.

    Args:
        objective: The objective.
        examples: The kind of examples.
        source: The training examples, of which SAMPLED_EXAMPLES are inspected.
        vocab: The vocabulary.
    """
    units = examples.text_units | objective.constraints.text_units
    if not units or vocab.spelling is None or not len(source):
        return []
    some = np.linspace(0, len(source) - 1, min(SAMPLED_EXAMPLES, len(source))).astype(int).tolist()
    texts = [text for i in some if len(text := _tokens(source[i]))]
    shares = {unit: _missing(unit, texts, vocab) for unit in sorted(units)} if texts else {}
    return [REPORTS[unit].format(share=share) for unit, share in shares.items() if share >= MIN_SHARE]


def resolve_segmentation(objective: Objective, wanted: Literal["auto", "icu", "uax29"]) -> Literal["icu", "uax29"]:
    """Return how an objective finds whole words on this machine; `wanted` if that is set and it does not look for words.

    Raises:
        UserError: This machine does not have the segmentation that the run started with or the recipe sets.
    """
    here: Literal["icu", "uax29"] = "icu" if segmentation.has_dictionary() else "uax29"
    if wanted == "auto" or wanted == here:
        return here
    if "words" in objective.constraints.text_units:
        hint = "install firth[icu]" if wanted == "icu" else "uninstall icu4py"
        raise UserError(
            f"word_segmentation={wanted}, and this machine finds words by {here}, which would mask other words: {hint}, or set "
            "word_segmentation=auto for a new run"
        )
    return wanted


def _tokens(example: Example) -> np.ndarray:
    parts = [example[name] for name in ("tokens", "first", "second") if name in example]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _missing(unit: str, texts: list[np.ndarray], vocab: Vocab) -> float:
    """Return the fraction of the letters (for words) or texts (for other units) where a unit is not found."""
    if unit == "words":
        if segmentation.has_dictionary():
            return 0.0
        letters = [c for text in texts for c in vocab.text(text) if c.isalpha()]
        return float(segmentation.unspaced(np.array(list(map(ord, letters)))).mean()) if letters else 0.0
    if unit == "names":
        return float(np.mean([not facts(text, vocab).any() for text in texts]))
    return float(np.mean([vocab.sentences(text).sum() < 2 for text in texts]))
