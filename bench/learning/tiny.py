"""What the tiny T5, BERT, ALBERT and ELECTRA learn of what their papers claim, on held-out text. CPU.

    python -m bench.learning.tiny --run                     # three seeds of all; two to three minutes each on two cores; resumable
    python -m bench.learning.tiny --run --only t5 --limit 1     # one new run of some
    python -m bench.learning.tiny --table                   # markdown for docs/results/tiny-recipes.md

t5        nats per dropped token that is no sentinel, below the frequencies of such tokens; the same for the first token of each
          span, for which the decoder has nothing but the encoder; and what `firth fill` writes
bert      accuracy of NSP, and of ALBERT's SOP, on all held-out pairs that are split between two sentences (and with any split;
albert    and unmasked; and unmasked with the first segment of another pair); the masked loss below the frequencies of tokens
electra   area under the ROC curve of the detector on all held-out tokens

ELMo's tags are in `bench.learning.recurrent`.

Each run is a run directory and a JSON in runs/learn_tiny. Intervals are 95% t intervals over seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import MAX_OTHER_LOAD, busy_seconds, describe, machine, other_load
from firth.data.collate import Batches
from firth.data.source import Source, SubsetSource
from firth.data.windows import Documents, SegmentPairsConfig
from firth.evaluate import metrics
from firth.model.model import LM
from firth.objectives.objective import components, supervised
from firth.pretrained.load_save import load_model
from firth.runs import examples
from firth.runs.evaluation import Validator, vocab
from firth.runs.inference import open_model
from firth.runs.prepare import RunData
from firth.runs.recipe import ResolvedRecipe, load, load_resolved
from firth.runs.run import RunResult, run
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.distributed import Ranks
from firth.training.step import validate
from firth.types import IGNORE, Batch, Example, Outputs

RESULTS = Path("runs/learn_tiny")
SEEDS = (0, 1, 2)
COUNTED_EXAMPLES, SCORED_EXAMPLES = 6000, 1024
"""Training examples whose labels are counted, and held-out examples whose tokens are scored."""

GAPS = (
    "I will <mask> you.", "What is the <mask> with you?", "My <mask> lord, I am your servant.", "Give me thy <mask>.",
    "I pray you, <mask> me.", "He is the <mask> of England.", "Good <mask>, my lord.", "Exit <mask>",
)  # fmt: skip
"""Texts for `firth fill`."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run with its model and its examples.

    Args:
        recipe: The resolved recipe.
        tokenizer: Its tokenizer.
        model: The exported model.
        train: Training examples.
        held_out: Held-out examples.
    """

    recipe: ResolvedRecipe
    tokenizer: Tokenizer
    model: LM
    train: Source
    held_out: Source

    @classmethod
    def of(cls, directory: Path) -> Trained:
        recipe, tokenizer = load_resolved(directory), Tokenizer.load(directory)
        data = RunData(recipe.data, tokenizer, directory, recipe.batch.size, recipe.seed)
        splits = examples.build_datasets(recipe.examples, data, recipe.objective)
        assert splits.validation is not None
        return cls(recipe, tokenizer, load_model(directory / "model"), splits.train, splits.validation)

    def batches(self, source: Source) -> Iterator[Batch]:
        return iter(
            Batches(
                source, self.recipe.objective, vocab(self.recipe, self.tokenizer), batch_size=32, seed=99
            ).all_batches()
        )

    def measure(self) -> dict[str, float]:
        """Return the metrics of the objective on every held-out example."""
        every = replace(self.recipe, evaluation=replace(self.recipe.evaluation, max_examples=len(self.held_out)))
        return Validator(every, self.held_out, 0.0, self.tokenizer, Ranks()).measure(self.model, 0)


def train(name: str, recipe: str, seed: int, settings: Sequence[str] = ()) -> RunResult:
    """Run a recipe as it comes, or return its finished run."""
    return run(load(recipe, [f"seed={seed}", *settings]), RESULTS / "work" / f"{name}-{seed}", log=print)


# ------------------------------------------------------------------------------- tokens


def below_frequencies(trained: Trained) -> dict[str, float]:
    """Return the held-out nats per predicted token that is no control token, by the model and by the frequencies of training labels.

    "first" are tokens after a sentinel: the first ones of the spans of T5.
    """
    ordinary = ~trained.tokenizer.vocab.special
    counts = np.ones(len(ordinary))
    for batch in trained.batches(examples.spread(trained.train, COUNTED_EXAMPLES)):
        np.add.at(counts, batch["labels"][batch["labels"] != IGNORE].numpy(), 1)
    logprobs = np.log(counts / counts[ordinary].sum())
    found: list[
        np.ndarray
    ] = []  # rows of (model's nats, nats by frequency, whether the best guess is right, whether first)

    def watch(outputs: Outputs, batch: Batch) -> None:
        head = trained.model.heads["lm"]
        states, labels = supervised(outputs["hidden"], batch["labels"])
        logits = head(states).float()
        nats = torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy()
        right, ids = (logits.argmax(-1) == labels).numpy(), labels.numpy()
        first = np.isin(np.concatenate(([-1], ids[:-1])), trained.tokenizer.vocab.sentinels)
        found.append(np.stack((nats, -logprobs[ids], right, first), 1)[ordinary[ids]])

    source = examples.spread(trained.held_out, SCORED_EXAMPLES)
    validate(trained.model, trained.recipe.objective, trained.batches(source), watch=watch)
    table = np.concatenate(found)
    scores = {"tokens": float(len(table))}
    for kind, rows in (("", table), ("first_", table[table[:, 3] > 0])):
        if len(rows):
            nats, frequency, right, _ = rows.mean(0).tolist()
            scores |= {
                f"{kind}nats": nats,
                f"{kind}frequency_nats": frequency,
                f"{kind}gap": frequency - nats,
                f"{kind}right": right,
            }
    return scores


def t5(seed: int) -> dict[str, Any]:
    done = train("t5", "t5", seed)
    model = open_model(done.directory)
    filled = {text: model.fill_gaps(text, 4) for text in GAPS} if not seed else {}
    return (
        timed(done)
        | below_frequencies(Trained.of(done.directory))
        | {"loss": done.metrics["valid/loss"], "filled": filled}
    )


def pairs(name: str) -> Callable[[int], dict[str, Any]]:
    """Return the study of a recipe with a pair task."""

    def study(seed: int) -> dict[str, Any]:
        done = train(name, name, seed)
        trained = Trained.of(done.directory)
        found, between = trained.measure(), whole_sentences(trained)
        split = replace(trained, held_out=SubsetSource(trained.held_out, between))
        pair_task = replace(trained.recipe, objective=components(trained.recipe.objective)[0])
        scores = {
            "accuracy": accuracy_of(split.measure()), "any split": accuracy_of(found),
            "unmasked": accuracy_of(replace(split, recipe=pair_task).measure()),
            "alone": accuracy_of(
                replace(split, recipe=pair_task, held_out=OtherFirst(trained.held_out, between)).measure()
            ),
            "pairs": len(between), "pairs with any split": len(trained.held_out), "loss": found["loss"],
        }  # fmt: skip
        return timed(done) | below_frequencies(trained) | scores

    return study


class OtherFirst(SubsetSource):
    """Pairs whose first segment is that of the next pair of a shuffled order.

    A model that compares the segments cannot exceed an accuracy of 0.5 on them. One that does has found what tells a second segment
    by itself: a fault of the pairs.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        super().__init__(source, indices)
        order = np.random.default_rng(0).permutation(len(indices))
        self.other = np.empty(len(indices), np.int64)
        self.other[order] = np.roll(order, 1)

    def __getitem__(self, index: int) -> Example:
        first = super().__getitem__(int(self.other[index]))["first"]
        return {**super().__getitem__(index), "first": first}


def whole_sentences(trained: Trained) -> np.ndarray:
    """Return the held-out pairs that are split between two sentences."""
    kind, documents = trained.recipe.examples, trained.held_out
    assert isinstance(kind, SegmentPairsConfig) and isinstance(documents, Documents)
    return np.array([i for i in range(len(documents)) if kind.splits_sentences(documents, i)])


def accuracy_of(found: dict[str, float]) -> float:
    return next(value for key, value in found.items() if key.endswith("_accuracy"))


def electra(seed: int) -> dict[str, Any]:
    done = train("electra", "electra", seed)
    found = Trained.of(done.directory).measure()
    return timed(done) | found


# ------------------------------------------------------------------------------- runs and tables


def timed(done: RunResult) -> dict[str, Any]:
    return {"steps": done.steps, "tokens": done.tokens, "seconds": done.seconds}


STUDIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "t5": t5, "bert": pairs("bert"), "albert": pairs("albert"), "electra": electra,
}  # fmt: skip

COLUMNS = {
    "t5": ("gap", "first_gap", "nats", "frequency_nats", "right", "loss"),
    "bert": ("accuracy", "any split", "unmasked", "alone", "gap", "nats"),
    "albert": ("accuracy", "any split", "unmasked", "alone", "gap", "nats"),
    "electra": ("auc", "loss/generator", "guessed", "replaced_share", "replaced_accuracy", "original_accuracy"),
}
"""Study -> the scores of its table."""


def measure(names: Sequence[str], seeds: Sequence[int], limit: int) -> None:
    """Perform the missing runs, one seed of all before the next."""
    facts, started = machine(), 0
    for seed in seeds:
        for name in names:
            path = RESULTS / f"{name}-{seed}.json"
            if path.exists() or started == limit:
                continue
            started += 1
            before, cpu, clock = busy_seconds(), time.process_time(), time.perf_counter()
            found = STUDIES[name](seed)
            wall = time.perf_counter() - clock
            others = other_load(before, busy_seconds(), time.process_time() - cpu, wall)
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {"wall": wall, "cpu": time.process_time() - cpu, "others": others, "machine": facts}
            path.write_text(json.dumps(found | record, indent=1), "utf-8")
            print(f"{name} seed {seed}: {wall:.0f} s, { ({key: found.get(key) for key in COLUMNS[name]}) }", flush=True)


def table() -> str:
    """Return Markdown tables of the means and their intervals over the existing seeds."""
    lines = []
    for name, columns in COLUMNS.items():
        found = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob(f"{name}-[0-9].json"))]
        if not found:
            continue
        busy = any((one["others"] or 0) > MAX_OTHER_LOAD for one in found)
        seconds = ", ".join(f"{one['seconds']:.0f}" for one in found if "seconds" in one) + (
            " (shared)" if busy else ""
        )
        lines += [f"**{name}**: {len(found)} seeds, {found[0].get('steps', 0)} steps, {seconds} s", ""]
        lines += ["| | mean | 95% | seeds |", "|---|---|---|---|"]
        for column in columns:
            values = [one[column] for one in found]
            mean, half = metrics.over_seeds(values)
            lines.append(f"| {column} | {mean:.3f} | ± {half:.3f} | {', '.join(f'{value:.3f}' for value in values)} |")
        lines.append("")
        for text, filled in found[0].get("filled", {}).items():
            lines.append(f"- {text} {filled}")
        lines += [describe(found[-1]["machine"]), ""]
    return "\n".join(lines)


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--limit", type=int, default=-1, help="maximum number of new runs")
    args = parser.parse_args()
    if args.run:
        measure(args.only, args.seeds, args.limit)
    if args.table:
        print(table())


if __name__ == "__main__":
    main()
