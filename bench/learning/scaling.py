"""Scaling laws of small models on a CPU: sweeps, a prediction made before its run, repeated text, and a plan that is followed.

    python -m bench.learning.scaling runs/scaling decoder encoder lstm
    python -m bench.learning.scaling runs/scaling predict           fit, predict the largest run, train it
    python -m bench.learning.scaling runs/scaling repeats           one model on 1 M, 3 M and 10 M tokens, read up to 16 times

Each part calls `firth scale run` and can be stopped and started again. The text is the State of the Union addresses, WordNet's glosses and
the Brown corpus (28 MB), with 1,024 subwords. docs/results/scaling.md has the results.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from firth.corpora import catalog

CORPORA = ("sotu", "wordnet", "brown")
COMMON = ("tokenizer.vocab_size=1024", "examples.max_length=128", "batch.size=8", "evaluation.max_examples=512")
SIZES = "16,24,32,48,64,96,128"
BUDGETS = "6e10,2e11,6e11,2e12"
LARGEST = "6e12"
PARTS = {
    "decoder": ("gpt", SIZES, BUDGETS, ("optimizer.lr=0.005",)),
    "encoder": ("roberta", SIZES, BUDGETS, ()),
    "lstm": ("lstm", "32,64,128", "2e11,6e11,2e12", ()),
}
"""Name -> recipe, widths, budgets, settings. The decoder's rate is the best of 0.0015, 0.003 and 0.006 at widths 32 and 128, in between."""


def text() -> str:
    """Return the setting of the data: the files of three corpora."""
    return f"data.path=[{','.join(path for name in CORPORA for path in catalog.paths(name, print))}]"


def sweep(out: Path, part: str, sizes: str = "", budgets: str = "", *settings: str) -> None:
    """Run a sweep, or what is left of it."""
    recipe, all_sizes, all_budgets, own = PARTS[part]
    options = ["--sizes", sizes or all_sizes, "--budgets", budgets or all_budgets, "--max-epochs", "1"]
    firth("scale", "run", recipe, text(), *COMMON, *own, *settings, *options, "--out", str(out / part))


def firth(*words: str) -> None:
    """Run a command of firth."""
    subprocess.run([sys.executable, "-m", "firth", *words], check=True)


def main(out: Path, parts: list[str]) -> None:
    """Run the parts in order."""
    for part in parts:
        sweep(out, part)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
