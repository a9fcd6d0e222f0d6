"""The text of a planned run: how hard it is for a compressor and for a short run, and its vocabulary.

A short run calibrates a law on the text: how hard it is for this recipe and vocabulary is measured, not assumed.

The vocabulary follows from the size of the text and of the model. The smaller of two limits holds, as a power of two:

1. Text: the largest vocabulary of which 95% of the subwords occur at least 100 times (Gowda and May 2020, section 5), at least SMALLEST.
2. Model: vocabulary parameters = 3,145,728 (N / 33 M) ** 0.835 for N other parameters (Tao et al. 2024, approach 2), at least
   SMALLEST_OF_MODEL. It was fitted to models of 33 M to 3 B parameters, and gives too few for small ones: at widths 32 and 64,
   2,048 subwords had 5% to 10% fewer bits per byte than 512 at equal FLOPs.
"""

from __future__ import annotations

import bz2
import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firth.data.token_store import TokenStore
from firth.io.integrity import read_done
from firth.runs.estimate import PreparedRun, prepared
from firth.runs.recipe import Recipe
from firth.runs.run import run
from firth.scaling.fit import Estimate
from firth.scaling.fitted import FittedLaw, LawPoint
from firth.scaling.sizes import planned_recipe
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import LogLine, UserError

SAMPLE_TOKENS, PIECES = 250_000, 16
"""Tokens that are compressed, and the number of stretches of text that they are from."""


def compressed_bits(store: TokenStore, tokenizer: Tokenizer) -> float:
    """Return the bits per byte of a sample of a text under bzip2.

    A small text compresses worse than a large one, so two texts are comparable only from about half of SAMPLE_TOKENS.
    """
    total = len(store.tokens)
    piece = max(1, min(SAMPLE_TOKENS, total) // PIECES)
    starts = np.linspace(0, total - piece, PIECES).astype(int)
    text = "\n".join(tokenizer.decode(np.asarray(store.tokens[s : s + piece])) for s in starts).encode()
    return 8 * len(bz2.compress(text, 9)) / len(text)


@dataclass(frozen=True)
class Calibration:
    """A short run on the text of a plan.

    Args:
        point: Where the law is read for it.
        measured: Its bits per byte on held-out text.
    """

    point: LawPoint
    measured: float

    def bits(self, law: FittedLaw, point: LawPoint) -> Estimate:
        """Return the bits per byte of a longer run: those of the short one, times the ratio of the two by the law."""
        return law.ratio(point, self.point).times(self.measured)


def calibrate(base: Recipe, width: int, steps: int, point: LawPoint, log: LogLine) -> Calibration:
    """Train a short run in a temporary directory.

    Args:
        base: The recipe of the plan.
        width: Width of the model.
        steps: Optimizer steps.
        point: Where the law is read for this run.
        log: Receives messages.

    Raises:
        UserError: The run reports no bits per byte.
    """
    recipe = dataclasses.replace(planned_recipe(base, width, steps), sample_prompts=(), loggers=())
    log(f"calibration: width {width}, {steps} steps")
    with tempfile.TemporaryDirectory(prefix="firth-") as place:
        run(recipe, Path(place) / "run", log=lambda _: None)
        done = read_done(Path(place) / "run")
    bits = (done or {}).get("metrics", {}).get("valid/bits_per_byte")
    if bits is None or not np.isfinite(bits):
        raise UserError("the calibration run reports no bits per byte of held-out text: plan without --calibrate")
    log(f"calibration: {bits:.3f} bits per byte")
    return Calibration(point, float(bits))


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
