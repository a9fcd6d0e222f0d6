"""The vocabulary of a planned run: from the size of its text and of its model.

Two limits, and the smaller one holds, as a power of two:

1. Text: the largest vocabulary of which 95% of the subwords occur at least 100 times (Gowda and May 2020, section 5), at least SMALLEST.
2. Model: vocabulary parameters = 3,145,728 (N / 33 M) ** 0.835 for N other parameters (Tao et al. 2024, approach 2), at least
   SMALLEST_OF_MODEL. It was fitted to models of 33 M to 3 B parameters, and gives too few for small ones: at widths 32 and 64,
   2,048 subwords had 5% to 10% fewer bits per byte than 512 at equal FLOPs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from firth.runs.estimate import PreparedRun, prepared
from firth.runs.recipe import Recipe
from firth.types import LogLine

SMALLEST, SMALLEST_OF_MODEL, LARGEST = 512, 2048, 1 << 17
"""Smallest vocabulary for a text, the smallest that every model supports, and the largest of all."""
FREQUENT, FREQUENT_SHARE = 100, 0.95
"""Occurrences of a frequent subword, and the share of subwords that have to be frequent."""


def largest_of_model(other_parameters: float, width: int) -> int:
    """Return the vocabulary that a model supports, a power of two.

    Args:
        other_parameters: Parameters without embeddings and LM head.
        width: Width of the embeddings.

    >>> largest_of_model(33e6, 768), largest_of_model(2_870e6, 3200), largest_of_model(20e3, 64)
    (4096, 32768, 2048)
    """
    parameters = 3_145_728 * (other_parameters / 33e6) ** 0.8353974
    return int(np.clip(1 << round(np.log2(max(1.0, parameters / width))), SMALLEST_OF_MODEL, LARGEST))


def frequent_share(run: PreparedRun) -> float:
    """Return the share of subwords that occur FREQUENT times or more in the text, of those that occur.

    Control tokens and the bytes that no text has are left out.
    """
    vocab = run.data.tokenizer.vocab
    counts = np.bincount(run.data.stores()[0].tokens, minlength=vocab.size)[~vocab.special] * run.scale
    return float((counts[counts > 0] >= FREQUENT).mean())


@contextmanager
def prepared_with_vocabulary(recipe: Recipe, largest: int, log: LogLine) -> Iterator[tuple[Recipe, PreparedRun]]:
    """Prepare a recipe with the largest vocabulary that its text and its model support; a given tokenizer is kept.

    Args:
        recipe: The recipe.
        largest: The vocabulary that the model supports.
        log: Receives messages.
    """
    size = largest
    while True:
        chosen = recipe if recipe.tokenizer.path else of_vocabulary(recipe, size)
        with prepared(chosen, log) as run:
            if recipe.tokenizer.path or size <= SMALLEST or frequent_share(run) >= FREQUENT_SHARE:
                yield chosen, run
                return
        size //= 2


def of_vocabulary(recipe: Recipe, size: int) -> Recipe:
    """Return a recipe whose tokenizer and model have another vocabulary size."""
    assert recipe.model is not None
    return dataclasses.replace(
        recipe, tokenizer=dataclasses.replace(recipe.tokenizer, vocab_size=size), model=recipe.model.with_fields({"vocab_size": size})
    )  # fmt: skip
