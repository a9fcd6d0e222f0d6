"""Learning of prefix LM, span corruption, BART's noises and salient span masking: runs, and their tables.

    python -m bench.learning.seq2seq --run                 # everything, three seeds; resumable
    python -m bench.learning.seq2seq --run --limit 4       # in pieces: at most four new runs, then stop
    python -m bench.learning.seq2seq --run --scale 0.02    # a trial: 2% of the steps, in a directory of its own
    python -m bench.learning.seq2seq --table               # markdown

Objectives. Each trains the tiny body on Shakespeare's plays for STEPS steps and is scored by its own loss on held-out plays,
against the same model untrained. Then it is finetuned for FINETUNE_STEPS steps to write the second half of a text given the
first, against a model from random weights. The downstream loss, in nats per token, is the same for all.

Closed book. The recipe `closed_book` is trained on the 1,100 glosses of `places` with salient or random spans masked, or not
at all; then it is finetuned on questions about three quarters of the names and tested on the others (exact match, greedy).
The baseline is the most frequent answer.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import describe, machine

SEEDS = (0, 1, 2)
STEPS, FINETUNE_STEPS = 120, 60
"""Steps of pretraining, and of finetuning."""
READING_STEPS, QUESTION_STEPS = 3000, 200
"""Steps on the glosses, and on the questions."""

OBJECTIVES: dict[str, list[str]] = {
    "span corruption": ["t5"],
    "denoise: masking": ["bart", "objective.noises=[masking]"],
    "denoise: deletion": ["bart", "objective.noises=[deletion]"],
    "denoise: infilling": ["bart", "objective.noises=[infilling]"],
    "denoise: permutation": ["bart", "objective.noises=[permutation]"],
    "denoise: rotation": ["bart", "objective.noises=[rotation]"],
    "denoise: permutation, infilling": ["bart"],
    "prefix LM, two sides": ["prefix_lm:halves", "objective.min_prefix=0", "objective.max_prefix=1"],
    "prefix LM, one row": ["prefix_lm"],
}
"""Row of the table -> recipe and settings."""

BOOKS = {"salient spans": "salient", "random spans": "spans", "no training": ""}
"""Row of the table -> noise of the training on glosses."""


def silent(_: str) -> None:
    """Drop progress lines."""


def train(recipe: Sequence[str], seed: int, directory: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Run a recipe; return its steps, seconds, tokens and final metrics."""
    from firth.runs.recipe import load
    from firth.runs.run import run

    recipe_ = load(recipe[0], [*recipe[1:], f"seed={seed}", *settings])
    done = run(recipe_, directory, log=silent)
    return {"steps": done.steps, "seconds": done.seconds, "tokens": done.tokens, **done.metrics}


def tokenizer_for(results: Path, corpus: str, algorithm: str, size: int) -> str:
    """Return the directory of the tokenizer of a corpus, trained once."""
    from firth.corpora import catalog
    from firth.runs.prepare import train_tokenizer

    directory = results / f"tokenizer-{corpus}"
    if not (directory / "tokenizer.json").exists():
        train_tokenizer(
            catalog.paths(corpus, silent), directory, algorithm=algorithm, vocab_size=size, num_sentinels=100
        )
    return str(directory)


UNTRAINED = ["optimizer.lr=1e-12", "optimizer.embedding_lr=0", "optimizer.scalar_lr=0", "max_steps=1"]
"""Settings that score an untrained model."""


def objective(name: str, seed: int, results: Path, scale: float) -> dict[str, Any]:
    """Return the pretrained, untrained and downstream losses of an objective."""
    directory = results / "work" / f"{name.replace(' ', '-').replace(':', '')}-{seed}"
    shared = [
        f"tokenizer.path={tokenizer_for(results, 'shakespeare', 'byte-bpe', 4096)}",
        f"data.cache_dir={results / 'stores'}",
    ]
    recipe = OBJECTIVES[name]
    steps, finetuned = max(2, round(STEPS * scale)), max(2, round(FINETUNE_STEPS * scale))
    pretrained = train(recipe, seed, directory / "trained", [*shared, "evaluation.every=0", f"max_steps={steps}"])
    untrained = train(recipe, seed, directory / "untrained", [*shared, "evaluation.every=0", *UNTRAINED])
    one_row = name.endswith("one row")
    second_half = [
        "prefix_lm" if one_row else "prefix_lm:halves", "objective.min_prefix=0.5", "objective.max_prefix=0.5", *shared,
        f"max_steps={finetuned}", "optimizer.lr=1e-3", "evaluation.every=0",
    ]  # fmt: skip
    after = train(second_half, seed, directory / "tuned", ["model=null", f"init_from={directory / 'trained'}"])
    sides = "one row" if one_row else "two sides"  # the baseline from random weights is the same for all
    scratch = train(second_half, seed, results / "work" / f"scratch-{sides.replace(' ', '-')}-{seed}", [])
    return {
        "steps": pretrained["steps"], "seconds": pretrained["seconds"], "tokens": pretrained["tokens"], "loss": pretrained["valid/loss"],
        "untrained": untrained["valid/loss"], "downstream": after["valid/loss"], "from scratch": scratch["valid/loss"],
    }  # fmt: skip


def closed_book(name: str, seed: int, results: Path, scale: float) -> dict[str, Any]:
    """Return exact match on names in the finetuning questions, and on the other names."""
    from firth.corpora import catalog
    from firth.evaluate.evaluate import evaluate

    directory = results / "work" / f"{name.replace(' ', '-')}-{seed}"
    shared = [f"tokenizer.path={tokenizer_for(results, 'places', 'bpe', 8192)}", "evaluation.every=0"]
    steps = max(2, round(READING_STEPS * scale))
    noise = BOOKS[name]
    settings = [f"objective.noise={noise}", f"max_steps={steps}"] if noise else UNTRAINED
    reading = train(["closed_book"], seed, directory / "read", [*shared, *settings])
    questions = [
        f"init_from={directory / 'read'}",
        f"max_steps={max(2, round(QUESTION_STEPS * scale))}",
        "evaluation.every=0",
        "data.validation_fraction=0",
    ]
    finetuned = train(["closed_book_questions"], seed, directory / "questions", questions)
    found = {
        "steps": reading["steps"],
        "seconds": reading["seconds"] + finetuned["seconds"],
        "reading_loss": reading["loss"],
        "question_loss": finetuned["loss"],
    }
    for part in ("train", "test"):
        score = evaluate(directory / "questions", catalog.paths(f"places/{part}.jsonl", silent), task="generation")
        found |= {f"{part} {key}": score[key] for key in ("items", "exact_match", "majority_accuracy")}
    return found


PARTS = {"objective": (objective, OBJECTIVES), "closed_book": (closed_book, BOOKS)}


def measure(results: Path, limit: int, scale: float, only: str) -> None:
    """Perform the missing runs, one seed of all before the next seed."""
    num_started, machine_facts = 0, machine()
    for seed in SEEDS:
        for part, (run_part, names) in PARTS.items():
            for name in names:
                record = results / "runs" / f"{part}-{name.replace(' ', '-').replace(':', '')}-{seed}.json"
                if record.exists() or only not in ("", part) or num_started == limit:
                    continue
                num_started += 1
                clock = time.perf_counter()
                found = run_part(name, seed, results, scale)
                found = {"part": part, "name": name, "seed": seed, "wall": time.perf_counter() - clock, **found}
                record.parent.mkdir(parents=True, exist_ok=True)
                record.write_text(json.dumps(found | {"machine": machine_facts}, indent=1), encoding="utf-8")
                print(f"{part} {name} seed {seed}: {found['wall']:.0f} s", flush=True)


def over_seeds(runs: Sequence[dict[str, Any]], field: str, fmt: str = ".3f") -> str:
    """Return the mean, with minimum and maximum if there are several runs."""
    values = [run[field] for run in runs]
    spread = f" ({min(values):{fmt}}..{max(values):{fmt}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{fmt}}{spread}"


def table(results: Path) -> str:
    """Return Markdown tables of the existing results."""
    runs = [json.loads(path.read_text("utf-8")) for path in sorted((results / "runs").glob("*.json"))]
    if not runs:
        return "There are no results yet: use --run"
    lines = [
        f"Means over {len({run['seed'] for run in runs})} seeds (minimum..maximum), nats per supervised token on held-out plays; "
        f"{math.fsum(run['wall'] for run in runs) / 60:.0f} minutes in total.", "",
        "| objective | steps | its loss | untrained | second half given the first, after finetuning | from scratch |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in OBJECTIVES:
        some = [run for run in runs if run["name"] == name]
        if some:
            cells = [over_seeds(some, field) for field in ("loss", "untrained", "downstream", "from scratch")]
            lines.append(f"| {name} | {some[0]['steps']} | {' | '.join(cells)} |")
    lines += [
        "",
        "| training before the questions | exact match, other names | names in the questions | most frequent answer |",
    ]
    lines.append("|---|---|---|---|")
    for name in BOOKS:
        some = [run for run in runs if run["name"] == name]
        if some:
            cells = [over_seeds(some, f"{part} exact_match") for part in ("test", "train")]
            lines.append(f"| {name} | {' | '.join(cells)} | {some[0]['test majority_accuracy']:.3f} |")
    return "\n".join([*lines, "", describe(runs[-1]["machine"])])


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--limit", type=int, default=-1, help="maximum number of new runs")
    parser.add_argument("--only", choices=list(PARTS), default="", help="one part")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the steps")
    parser.add_argument("--results", type=Path, default=Path("runs/learn_seq2seq"))
    args = parser.parse_args()
    results = args.results if args.scale == 1 else args.results / f"scale-{args.scale:g}"
    if args.run:
        measure(results, args.limit, args.scale, args.only)
    if args.table:
        print(table(results))


if __name__ == "__main__":
    main()
