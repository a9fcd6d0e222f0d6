"""Which of two segments comes first (SOP; ALBERT, Lan 2020, section 3.1), and are they neighbours (NSP), on the same pairs of
real text: does it learn, and from what? CPU.

    python -m bench.learn_order --run              # from MiniLM, three seeds; about four minutes each on a free core
    python -m bench.learn_order --run --only nsp   # one of the two
    python -m bench.learn_order --run --oracles    # what counting alone tells: seconds
    python -m bench.learn_order --table            # markdown for docs/results/index.md

Text: paragraphs of the Brown corpus of at most 64 tokens, cut at the end of a sentence, so that both segments are whole
sentences as ALBERT's are. A tenth of the 500 samples is held out whole, and every held-out pair is scored.

    untrained    MiniLM and a head of small random numbers
    sop, nsp     the same after STEPS steps; NSP's stranger is the second segment of a paragraph of another sample of Brown,
                 of the same length or nearly, and as whole
    words        logistic regression on the very same pairs: which words are in which segment, and at their ends; the best of
                 three regularisations, chosen on the held-out pairs, in its favour
    junction     the running text in segments cut anywhere (`firth.data.windows.SegmentPairs`): of the two words that meet in the
                 middle, how much likelier than by chance does one follow the other, counted in the training text

The last is what order there is in `Pairs`: no word tells anything alone there, since both segments begin and end
anywhere, and an encoder must discover that the two words beside [SEP] have to fit.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import describe, machine
from firth.corpora import catalog, readers
from firth.data.collate import Batches
from firth.data.shuffle import ExampleRNG
from firth.data.source import Source
from firth.data.split import split
from firth.data.windows import SegmentPairs
from firth.model.model import LM
from firth.objectives.next_sentence import NSP
from firth.objectives.sentence_order import SOP
from firth.objectives.sentence_pairs import SentencePairObjective
from firth.pretrained.load_save import init_from, load_model
from firth.runs.prepare import DataConfig as Where
from firth.runs.prepare import RunData
from firth.tokenizer.tokenizer import Tokenizer
from firth.train.logging import NullReporter
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule
from firth.train.trainer import TrainerConfig, train
from firth.train.validate import validate
from firth.types import Example

RESULTS = Path("runs/learn_order")
SEEDS = (0, 1, 2)
CORPUS, HELD = "brown", 0.1
LENGTH, ROWS, STEPS = 64, 32, 120
RATE = 1e-4
"""AdamW's. A head ten times as quick (2e-3 beside 2e-4) learnt nothing in 60 steps."""
OBJECTIVES: dict[str, SentencePairObjective] = {"sop": SOP(), "nsp": NSP()}
LAST = 30
"""Steps at the end whose training loss is averaged."""

ENDS = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z])|(?<=[.!?][\"')])\s+(?=[\"'(]?[A-Z])")
SHORT = re.compile(r"\b(Mr|Mrs|Dr|St|Gen|Sen|Rep|Gov|Jr|Col|Capt|Prof|Rev|No|Messrs|[A-Z])\.$")
"""What ends in a full stop and no sentence with it."""


def sentences(text: str) -> list[str]:
    """
    >>> sentences('Mr. Hawksley said so. "Really?" He did.')
    ['Mr. Hawksley said so.', '"Really?"', 'He did.']
    """
    found: list[str] = []
    for part in ENDS.split(text):
        if found and SHORT.search(found[-1]):
            found[-1] += " " + part
        else:
            found.append(part)
    return found


class Paragraphs(Source):
    """Paragraphs of two sentences or more that fit into `length` tokens as a pair, cut after one of their sentences:
    {"first", "second", "other"}. Where, and which other, is fixed by the place in the text."""

    NEAR = 10
    """The stranger is one of so many seconds that are as long or just shorter."""

    def __init__(self, texts: Iterator[tuple[str, str]], tokenizer: Tokenizer, length: int) -> None:
        """texts: the name of a document, and a paragraph of it."""
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.of: list[str] = []
        draws = ExampleRNG(0, "sentences")
        for i, (name, text) in enumerate(texts):
            parts = [np.array(tokenizer.encode(s), np.int32) for s in sentences(text) if s.strip()]
            if len(parts) > 1 and sum(map(len, parts)) + 3 <= length:
                cut = 1 + int(draws.at(0, i).random() * (len(parts) - 1))
                self.pairs.append((np.concatenate(parts[:cut]), np.concatenate(parts[cut:])))
                self.of.append(name)
        self.by_length = sorted(range(len(self.pairs)), key=lambda i: len(self.pairs[i][1]))
        self.rank = {i: place for place, i in enumerate(self.by_length)}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        first, second = self.pairs[index]
        return {"first": first, "second": second, "other": self.pairs[self._stranger(index)][1]}

    def _stranger(self, index: int) -> int:
        """Who is as long as the second of `index`, or the next shorter ones; of the shortest, who is just longer."""
        place = self.rank[index]
        equal = place
        while equal + 1 < len(self) and self._length(equal + 1) == self._length(place):
            equal += 1
        order = [self.by_length[i] for i in (*range(equal, -1, -1), *range(equal + 1, len(self)))]
        found = [i for i in order[: 20 * self.NEAR] if self.of[i] != self.of[index]][: self.NEAR]
        return found[int(ExampleRNG(0, "strangers").at(0, index).random() * len(found))]

    def _length(self, place: int) -> int:
        return len(self.pairs[self.by_length[place]][1])


def quiet(_: str) -> None:
    """The catalogue says nothing."""


def material() -> tuple[Tokenizer, Paragraphs, Paragraphs]:
    """MiniLM's tokenizer, the pairs to learn from and those held out."""
    tokenizer = Tokenizer.load(catalog.fetch("minilm", echo=quiet))

    def part(apart: bool) -> Paragraphs:
        documents = split(readers.documents(catalog.paths(CORPUS, quiet)), HELD, held_out=apart)
        paragraphs = ((d.name, p.replace("\n", " ")) for d in documents for p in d.text.split("\n\n"))
        return Paragraphs(paragraphs, tokenizer, LENGTH)

    return tokenizer, part(False), part(True)


# ------------------------------------------------------------------------------- runs


def one(objective: SentencePairObjective, seed: int) -> dict[str, Any]:
    """SOP or NSP from MiniLM, once: its scores before and after."""
    tokenizer, learnt, held = material()
    home = catalog.fetch("minilm", echo=quiet)
    config = load_model(home).config
    torch.manual_seed(seed)
    model = LM(config, objective.heads(config))
    init_from(model, home)

    def scores() -> dict[str, float]:
        return validate(
            model, objective, Batches(held, objective, tokenizer.vocab, batch_size=ROWS, seed=99).all_batches()
        )

    batches = Batches(learnt, objective, tokenizer.vocab, batch_size=ROWS, seed=seed, pack_to_length=LENGTH)
    before, started = scores(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = train(
            model, objective, batches, Path(folder), budget=Budget(max_steps=STEPS),
            optimizer=OptimizerConfig("adamw", lr=RATE, weight_decay=0.01, beta2=0.98),
            schedule=Schedule("linear", warmup_ratio=0.1), config=TrainerConfig(save_every=0), reporter=NullReporter(),
        )  # fmt: skip
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
    last = [row["loss"] for row in rows if row["split"] == "train"][-LAST:]
    return {
        "seed": seed, "steps": done.step, "seconds": time.perf_counter() - started, "pairs": len(learnt),
        "held": len(held), "epochs": done.step * ROWS / len(learnt), "training_loss": statistics.mean(last),
        "before": before, "after": scores(),
    }  # fmt: skip


# ------------------------------------------------------------------------------- what counting tells


def words() -> dict[str, Any]:
    """Logistic regression on the pairs that `sop` learns from and is scored on; without a bias, since either may be first."""
    from scipy.sparse import coo_matrix
    from sklearn.linear_model import LogisticRegression

    tokenizer, learnt, held = material()
    size = tokenizer.vocab.size

    def features(source: Paragraphs, rng: np.random.Generator) -> tuple[Any, np.ndarray]:
        swapped = rng.random(len(source)) < 0.5
        at, column, value = [], [], []
        for i, (first, second) in enumerate(source.pairs):
            for tokens, sign in ((first, -1), (second, 1)):
                edges = (size + tokens[0], 2 * size + tokens[min(1, len(tokens) - 1)], 3 * size + tokens[-1])
                here = [*map(int, set(tokens.tolist())), *map(int, edges)]
                at += [i] * len(here)
                column += here
                value += [-sign if swapped[i] else sign] * len(here)
        return coo_matrix((value, (at, column)), (len(source), 4 * size)).tocsr().astype(np.float32), swapped

    rng = np.random.default_rng(0)
    (known, answers), (asked, wanted) = features(learnt, rng), features(held, rng)
    found = {
        c: float((LogisticRegression(C=c, max_iter=300, fit_intercept=False).fit(known, answers).predict(asked) == wanted).mean())
        for c in (0.03, 0.1, 0.3)
    }  # fmt: skip
    return {"accuracy": max(found.values()), "of": found, "held": len(held)}


def junction(length: int) -> dict[str, Any]:
    """How often the words that meet tell the order of segments of the running text, cut anywhere."""
    tokenizer = Tokenizer.load(catalog.fetch("minilm", echo=quiet))
    learnt, held = RunData(Where(corpus=CORPUS), tokenizer, RESULTS / "running", log=quiet).stores()
    assert held is not None
    tokens = np.asarray(learnt.tokens[:], np.int64)
    counts = np.bincount(tokens, minlength=tokenizer.vocab.size)
    share, size = counts / len(tokens), tokenizer.vocab.size
    after = Counter((tokens[:-1] * size + tokens[1:]).tolist())

    def gain(a: int, b: int) -> float:
        """log p(b after a) / p(b), five guesses by frequency mixed in."""
        return math.log((after[a * size + b] + 5 * share[b] + 1e-6) / (counts[a] + 5)) - math.log(share[b] + 1e-9)

    source = SegmentPairs(held, length)
    right = []
    for i in range(len(source)):
        first, second = source[i]["first"].tolist(), source[i]["second"].tolist()
        ahead = gain(first[-1], second[0]) - gain(second[-1], first[0])
        right.append(0.5 if ahead == 0 else float(ahead > 0))
    return {"accuracy": statistics.mean(right), "held": len(right)}


def table() -> str:
    """Every row with the binomial error of its held-out pairs."""
    lines = ["| two segments of Brown | held-out pairs | accuracy | error of one run |", "|---|---|---|---|"]

    def row(name: str, held: int, accuracies: Sequence[float]) -> str:
        mean = statistics.mean(accuracies)
        each = ", ".join(f"{a:.3f}" for a in accuracies)
        return f"| {name} | {held} | {each} | {math.sqrt(mean * (1 - mean) / held):.3f} |"

    for name, objective in OBJECTIVES.items():
        runs = [json.loads(f.read_text("utf-8")) for f in sorted(RESULTS.glob(f"{name}-seed*.json"))]
        (measure,) = objective.metrics
        for when, said in (("before", "untrained"), ("after", f"{name}, {STEPS} steps")) if runs else ():
            lines.append(row(said, runs[0]["held"], [r[when][measure] for r in runs]))
    if (RESULTS / "oracles.json").exists():
        oracles = json.loads((RESULTS / "oracles.json").read_text("utf-8"))
        lines += [row(name, found["held"], [found["accuracy"]]) for name, found in oracles.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--oracles", action="store_true", help="with --run: the counts alone")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="*", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if given.run and given.oracles:
        found = {
            "logistic regression on the words": words(),
            "running text cut anywhere, 128 tokens: the words that meet": junction(128),
            "running text cut anywhere, 48 tokens: the words that meet": junction(48),
        }
        (RESULTS / "oracles.json").write_text(json.dumps(found, indent=1))
    for name in given.only if given.run and not given.oracles else ():
        for seed in given.seeds:
            file = RESULTS / f"{name}-seed{seed}.json"
            if not file.exists():
                told = one(OBJECTIVES[name], seed) | {"machine": describe(machine())}
                file.write_text(json.dumps(told, indent=1))
                print(f"{name}, seed {seed}: {told['seconds']:.0f} s, {told['after']}", flush=True)
    if given.table:
        print(table())


if __name__ == "__main__":
    main()
