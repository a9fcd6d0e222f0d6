"""Learning of sentence order (SOP; ALBERT, Lan 2020, section 3.1) and next sentence (NSP) on the same pairs of real text. CPU.

    python -m bench.learning.order --run              # from MiniLM, three seeds; about four minutes each on a free core
    python -m bench.learning.order --run --only nsp   # one of the two
    python -m bench.learning.order --run --oracles    # baselines from word counts: seconds
    python -m bench.learning.order --table            # markdown for docs/results/index.md

Text: paragraphs of the Brown corpus of at most 64 tokens, split at the end of a sentence, so that both segments are whole
sentences as in ALBERT. A tenth of the 500 samples is held out, and every held-out pair is scored.

    untrained    MiniLM with a random head
    sop, nsp     the same after STEPS steps; the random segment of NSP is the second segment of a paragraph of another sample
                 of Brown, of nearly the same length
    words        logistic regression on the same pairs: words of each segment, and words at their ends; the best of three
                 regularizations, selected on the held-out pairs, in its favor
    junction     running text in segments split anywhere (`SegmentPairsConfig`): how much more often than by
                 chance does the first word of one segment follow the last word of the other, counted in the training text

The last is the only information on order in these pairs: single words have none there, since both segments start and end
anywhere, and an encoder must discover that the two words next to [SEP] have to fit.
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
from firth.data.examples import DataConfig
from firth.data.shuffle import ExampleRNG
from firth.data.source import Source
from firth.data.split import split
from firth.data.windows import Documents, SegmentPairsConfig
from firth.model.model import LM
from firth.objectives.sentence_pairs import NSP, SOP, SentencePairObjective
from firth.pretrained.load_save import init_from, load_model
from firth.runs.prepare import RunData
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.logging import NullReporter
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule
from firth.training.step import validate
from firth.training.trainer import TrainerConfig, train
from firth.types import Example

RESULTS = Path("runs/learn_order")
SEEDS = (0, 1, 2)
CORPUS, HELD_OUT_FRACTION = "brown", 0.1
LENGTH, ROWS, STEPS = 64, 32, 120
LEARNING_RATE = 1e-4
"""Of AdamW. With a ten times higher rate of the head (2e-3 against 2e-4) the model did not learn in 60 steps."""
OBJECTIVES: dict[str, SentencePairObjective] = {"sop": SOP(), "nsp": NSP()}
LOSS_STEPS = 30
"""Final steps over which the training loss is averaged."""

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z])|(?<=[.!?][\"')])\s+(?=[\"'(]?[A-Z])")
ABBREVIATION = re.compile(r"\b(Mr|Mrs|Dr|St|Gen|Sen|Rep|Gov|Jr|Col|Capt|Prof|Rev|No|Messrs|[A-Z])\.$")
"""Abbreviations that end in a full stop but do not end a sentence."""


def sentences(text: str) -> list[str]:
    """Split a text into sentences.

    >>> sentences('Mr. Hawksley spoke. "Really?" He did.')
    ['Mr. Hawksley spoke.', '"Really?"', 'He did.']
    """
    found: list[str] = []
    for pairs_of in SENTENCE_END.split(text):
        if found and ABBREVIATION.search(found[-1]):
            found[-1] += " " + pairs_of
        else:
            found.append(pairs_of)
    return found


class Paragraphs(Source):
    """Pairs {"first", "second", "other"} of paragraphs split after one of their sentences.

    Paragraphs have two sentences or more and fit into `length` tokens. The split and the random segment `other` are fixed by
    the position in the text.
    """

    NUM_CANDIDATES = 10
    """The random segment is drawn from so many second segments of nearly the same length."""

    def __init__(self, texts: Iterator[tuple[str, str]], tokenizer: Tokenizer, length: int) -> None:
        """Read the paragraphs; `texts` yields the name of a document and a paragraph of it."""
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.documents: list[str] = []
        rng = ExampleRNG(0, "sentences")
        for i, (name, text) in enumerate(texts):
            parts = [np.array(tokenizer.encode(s), np.int32) for s in sentences(text) if s.strip()]
            if len(parts) > 1 and sum(map(len, parts)) + 3 <= length:
                cut = 1 + int(rng.at(0, i).random() * (len(parts) - 1))
                self.pairs.append((np.concatenate(parts[:cut]), np.concatenate(parts[cut:])))
                self.documents.append(name)
        self.by_length = sorted(range(len(self.pairs)), key=lambda i: len(self.pairs[i][1]))
        self.rank = {i: rank for rank, i in enumerate(self.by_length)}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        first, second = self.pairs[index]
        return {"first": first, "second": second, "other": self.pairs[self._random_second(index)][1]}

    def _random_second(self, index: int) -> int:
        """Return the index of a second segment of another document that is as long or slightly shorter (or longer)."""
        rank = self.rank[index]
        equal = rank
        while equal + 1 < len(self) and self._length(equal + 1) == self._length(rank):
            equal += 1
        order = [self.by_length[i] for i in (*range(equal, -1, -1), *range(equal + 1, len(self)))]
        found = [i for i in order[: 20 * self.NUM_CANDIDATES] if self.documents[i] != self.documents[index]][
            : self.NUM_CANDIDATES
        ]
        return found[int(ExampleRNG(0, "strangers").at(0, index).random() * len(found))]

    def _length(self, rank: int) -> int:
        return len(self.pairs[self.by_length[rank]][1])


def silent(_: str) -> None:
    """Drop progress lines."""


def load_pairs() -> tuple[Tokenizer, Paragraphs, Paragraphs]:
    """Return MiniLM's tokenizer, the training pairs and the held-out pairs."""
    tokenizer = Tokenizer.load(catalog.fetch("minilm", log=silent))

    def pairs_of(held_out: bool) -> Paragraphs:
        documents = split(readers.documents(catalog.paths(CORPUS, silent)), HELD_OUT_FRACTION, held_out=held_out)
        paragraphs = ((d.name, p.replace("\n", " ")) for d in documents for p in d.text.split("\n\n"))
        return Paragraphs(paragraphs, tokenizer, LENGTH)

    return tokenizer, pairs_of(False), pairs_of(True)


# ------------------------------------------------------------------------------- runs


def train_once(objective: SentencePairObjective, seed: int) -> dict[str, Any]:
    """Train SOP or NSP from MiniLM; return its scores before and after."""
    tokenizer, train_pairs, held_out_pairs = load_pairs()
    base_model = catalog.fetch("minilm", log=silent)
    config = load_model(base_model).config
    torch.manual_seed(seed)
    model = LM(config, objective.heads(config))
    init_from(model, base_model)

    def scores() -> dict[str, float]:
        return validate(
            model,
            objective,
            Batches(held_out_pairs, objective, tokenizer.vocab, batch_size=ROWS, seed=99).all_batches(),
        )

    batches = Batches(train_pairs, objective, tokenizer.vocab, batch_size=ROWS, seed=seed, pack_to_length=LENGTH)
    before, started = scores(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = train(
            model, objective, batches, Path(folder), budget=Budget(max_steps=STEPS),
            optimizer=OptimizerConfig("adamw", lr=LEARNING_RATE, weight_decay=0.01, beta2=0.98),
            schedule=Schedule("linear", warmup_ratio=0.1), config=TrainerConfig(save_every=0), reporter=NullReporter(),
        )  # fmt: skip
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
    last = [row["loss"] for row in rows if row["split"] == "train"][-LOSS_STEPS:]
    return {
        "seed": seed, "steps": done.step, "seconds": time.perf_counter() - started, "pairs": len(train_pairs),
        "held": len(held_out_pairs), "epochs": done.step * ROWS / len(train_pairs), "training_loss": statistics.mean(last),
        "before": before, "after": scores(),
    }  # fmt: skip


# ------------------------------------------------------------------------------- baselines from counts


def word_regression() -> dict[str, Any]:
    """Score logistic regression on the pairs of `sop`; without a bias, since either segment may be first."""
    from scipy.sparse import coo_matrix
    from sklearn.linear_model import LogisticRegression

    tokenizer, train_pairs, held_out_pairs = load_pairs()
    size = tokenizer.vocab.size

    def features(source: Paragraphs, rng: np.random.Generator) -> tuple[Any, np.ndarray]:
        swapped = rng.random(len(source)) < 0.5
        at, column, value = [], [], []
        for i, (first, second) in enumerate(source.pairs):
            for tokens, sign in ((first, -1), (second, 1)):
                edges = (size + tokens[0], 2 * size + tokens[min(1, len(tokens) - 1)], 3 * size + tokens[-1])
                columns = [*map(int, set(tokens.tolist())), *map(int, edges)]
                at += [i] * len(columns)
                column += columns
                value += [-sign if swapped[i] else sign] * len(columns)
        return coo_matrix((value, (at, column)), (len(source), 4 * size)).tocsr().astype(np.float32), swapped

    rng = np.random.default_rng(0)
    (train_features, train_labels), (test_features, test_labels) = (
        features(train_pairs, rng),
        features(held_out_pairs, rng),
    )
    found = {}
    for c in (0.03, 0.1, 0.3):
        classifier = LogisticRegression(C=c, max_iter=300, fit_intercept=False).fit(train_features, train_labels)
        found[c] = float((classifier.predict(test_features) == test_labels).mean())
    return {"accuracy": max(found.values()), "of": found, "held": len(held_out_pairs)}


def junction_statistic(length: int) -> dict[str, Any]:
    """Score the prediction of order from the two adjacent words of segments of running text, split anywhere."""
    tokenizer = Tokenizer.load(catalog.fetch("minilm", log=silent))
    train_store, held_out_store = RunData(
        DataConfig(corpus=CORPUS), tokenizer, RESULTS / "running", log=silent
    ).stores()
    assert held_out_store is not None
    tokens = np.asarray(train_store.tokens[:], np.int64)
    counts = np.bincount(tokens, minlength=tokenizer.vocab.size)
    share, size = counts / len(tokens), tokenizer.vocab.size
    bigrams = Counter((tokens[:-1] * size + tokens[1:]).tolist())

    def log_ratio(a: int, b: int) -> float:
        """Return log p(b after a) / p(b), smoothed with five pseudo-counts."""
        return math.log((bigrams[a * size + b] + 5 * share[b] + 1e-6) / (counts[a] + 5)) - math.log(share[b] + 1e-9)

    source = Documents(SegmentPairsConfig(max_length=length, whole_sentences=False), held_out_store, tokenizer.vocab)
    scores = []
    for i in range(len(source)):
        first, second = source[i]["first"].tolist(), source[i]["second"].tolist()
        difference = log_ratio(first[-1], second[0]) - log_ratio(second[-1], first[0])
        scores.append(0.5 if difference == 0 else float(difference > 0))
    return {"accuracy": statistics.mean(scores), "held": len(scores)}


def table() -> str:
    """Return a Markdown table with the binomial standard error of the held-out pairs."""
    lines = ["| two segments of Brown | held-out pairs | accuracy | standard error of one run |", "|---|---|---|---|"]

    def row(name: str, num_pairs: int, accuracies: Sequence[float]) -> str:
        mean = statistics.mean(accuracies)
        each = ", ".join(f"{a:.3f}" for a in accuracies)
        return f"| {name} | {num_pairs} | {each} | {math.sqrt(mean * (1 - mean) / num_pairs):.3f} |"

    for name, objective in OBJECTIVES.items():
        runs = [json.loads(f.read_text("utf-8")) for f in sorted(RESULTS.glob(f"{name}-seed*.json"))]
        (measure,) = objective.metrics
        for when, label in (("before", "untrained"), ("after", f"{name}, {STEPS} steps")) if runs else ():
            lines.append(row(label, runs[0]["held"], [r[when][measure] for r in runs]))
    if (RESULTS / "oracles.json").exists():
        oracles = json.loads((RESULTS / "oracles.json").read_text("utf-8"))
        lines += [row(name, found["held"], [found["accuracy"]]) for name, found in oracles.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--oracles", action="store_true", help="with --run: the baselines alone")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="*", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.run and args.oracles:
        found = {
            "logistic regression on the words": word_regression(),
            "running text split anywhere, 128 tokens: the adjacent words": junction_statistic(128),
            "running text split anywhere, 48 tokens: the adjacent words": junction_statistic(48),
        }
        (RESULTS / "oracles.json").write_text(json.dumps(found, indent=1))
    for name in args.only if args.run and not args.oracles else ():
        for seed in args.seeds:
            file = RESULTS / f"{name}-seed{seed}.json"
            if not file.exists():
                result = train_once(OBJECTIVES[name], seed) | {"machine": describe(machine())}
                file.write_text(json.dumps(result, indent=1))
                print(f"{name}, seed {seed}: {result['seconds']:.0f} s, {result['after']}", flush=True)
    if args.table:
        print(table())


if __name__ == "__main__":
    main()
