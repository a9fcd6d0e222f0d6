"""What prefix LM, span corruption, BART's noises and salient spans learn: recorded runs, and their rows for docs/results/index.md.

    python -m bench.learn_seq2seq --run                 # everything, three seeds; resumable
    python -m bench.learn_seq2seq --run --limit 4       # in pieces: at most four new runs, then stop
    python -m bench.learn_seq2seq --run --scale 0.02    # a try: a fiftieth of the steps, in a folder of its own
    python -m bench.learn_seq2seq --table               # markdown

Objectives. Each trains the tiny body on Shakespeare's plays for STEPS steps and is scored on held-out plays by its own
loss, beside the same model untrained. Then it is finetuned for TUNED steps to write the second half of a text given the
first, beside a model that starts from nothing: the downstream loss, in nats per token, is alike for all.

Closed book. The recipe `closed_book` reads the 1,100 glosses of `places` with salient or with random spans hidden, or
reads nothing; then it is finetuned on questions about three quarters of the names and examined on the others (exact
match, greedy). Beside it what the commonest answer would get.
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
STEPS, TUNED = 120, 60
"""Steps of an objective's run, and of the finetuning behind it."""
READ, ASKED = 3000, 200
"""Steps of reading the book, and of learning how questions are asked."""

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

BOOKS = {"salient spans": "salient", "random spans": "spans", "nothing read": ""}
"""Row of the table -> the noise of reading."""


def quiet(_: str) -> None:
    """The runs say nothing."""


def train(recipe: Sequence[str], seed: int, where: Path, settings: Sequence[str]) -> dict[str, Any]:
    """A run of a recipe: its steps, seconds and last metrics."""
    from firth.runs.recipe import load
    from firth.runs.run import run

    plan = load(recipe[0], [*recipe[1:], f"seed={seed}", *settings])
    done = run(plan, where, log=quiet)
    return {"steps": done.steps, "seconds": done.seconds, "tokens": done.tokens, **done.metrics}


def coder(results: Path, corpus: str, algorithm: str, size: int) -> str:
    """One tokenizer for all runs on a corpus."""
    from firth.corpora import catalog
    from firth.runs.prepare import train_tokenizer

    where = results / f"tokenizer-{corpus}"
    if not (where / "tokenizer.json").exists():
        train_tokenizer(catalog.paths(corpus, quiet), where, algorithm=algorithm, vocab_size=size, num_sentinels=100)
    return str(where)


NOTHING = ["optimizer.lr=1e-12", "optimizer.embedding_lr=0", "optimizer.scalar_lr=0", "max_steps=1"]
"""Settings with which a model is scored as it was born."""


def objective(name: str, seed: int, results: Path, scale: float) -> dict[str, Any]:
    """Pretrained, untrained and downstream losses of an objective."""
    work = results / "work" / f"{name.replace(' ', '-').replace(':', '')}-{seed}"
    shared = [
        f"tokenizer.path={coder(results, 'shakespeare', 'byte-bpe', 4096)}",
        f"data.cache_dir={results / 'stores'}",
    ]
    recipe = OBJECTIVES[name]
    steps, tuned = max(2, round(STEPS * scale)), max(2, round(TUNED * scale))
    learnt = train(recipe, seed, work / "trained", [*shared, "evaluation.every=0", f"max_steps={steps}"])
    born = train(recipe, seed, work / "untrained", [*shared, "evaluation.every=0", *NOTHING])
    one_row = name.endswith("one row")
    half = [
        "prefix_lm" if one_row else "prefix_lm:halves", "objective.min_prefix=0.5", "objective.max_prefix=0.5", *shared,
        f"max_steps={tuned}", "optimizer.lr=1e-3", "evaluation.every=0",
    ]  # fmt: skip
    after = train(half, seed, work / "tuned", ["model=null", f"init_from={work / 'trained'}"])
    sides = "one row" if one_row else "two sides"  # what starts from nothing is the same for all
    scratch = train(half, seed, results / "work" / f"scratch-{sides.replace(' ', '-')}-{seed}", [])
    return {
        "steps": learnt["steps"], "seconds": learnt["seconds"], "tokens": learnt["tokens"], "loss": learnt["valid/loss"],
        "untrained": born["valid/loss"], "downstream": after["valid/loss"], "from scratch": scratch["valid/loss"],
    }  # fmt: skip


def closed_book(name: str, seed: int, results: Path, scale: float) -> dict[str, Any]:
    """Exact match on names that no finetuning question was about."""
    from firth.corpora import catalog
    from firth.evaluate.evaluate import evaluate

    work = results / "work" / f"{name.replace(' ', '-')}-{seed}"
    shared = [f"tokenizer.path={coder(results, 'places', 'bpe', 8192)}", "evaluation.every=0"]
    steps = max(2, round(READ * scale))
    noise = BOOKS[name]
    how = [f"objective.noise={noise}", f"max_steps={steps}"] if noise else NOTHING
    read = train(["closed_book"], seed, work / "read", [*shared, *how])
    asked = [
        f"init_from={work / 'read'}",
        f"max_steps={max(2, round(ASKED * scale))}",
        "evaluation.every=0",
        "data.validation_fraction=0",
    ]
    tuned = train(["closed_book_questions"], seed, work / "asked", asked)
    found = {
        "steps": read["steps"],
        "seconds": read["seconds"] + tuned["seconds"],
        "read": read["loss"],
        "asked": tuned["loss"],
    }
    for part in ("train", "test"):
        score = evaluate(work / "asked", catalog.paths(f"places/{part}.jsonl", quiet), task="generation")
        found |= {f"{part} {key}": score[key] for key in ("items", "exact_match", "majority_accuracy")}
    return found


PARTS = {"objective": (objective, OBJECTIVES), "closed_book": (closed_book, BOOKS)}


def measure(results: Path, limit: int, scale: float, only: str) -> None:
    """Every run that is not recorded yet, a seed of all before the next seed."""
    began, facts = 0, machine()
    for seed in SEEDS:
        for part, (do, names) in PARTS.items():
            for name in names:
                record = results / "runs" / f"{part}-{name.replace(' ', '-').replace(':', '')}-{seed}.json"
                if record.exists() or only not in ("", part) or began == limit:
                    continue
                began += 1
                clock = time.perf_counter()
                found = do(name, seed, results, scale)
                found = {"part": part, "name": name, "seed": seed, "wall": time.perf_counter() - clock, **found}
                record.parent.mkdir(parents=True, exist_ok=True)
                record.write_text(json.dumps(found | {"machine": facts}, indent=1), encoding="utf-8")
                print(f"{part} {name} seed {seed}: {found['wall']:.0f} s", flush=True)


def over_seeds(runs: Sequence[dict[str, Any]], field: str, form: str = ".3f") -> str:
    """The mean, and the least and the greatest where there are several."""
    values = [run[field] for run in runs]
    spread = f" ({min(values):{form}}..{max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def table(results: Path) -> str:
    """Markdown of what is recorded."""
    runs = [json.loads(path.read_text("utf-8")) for path in sorted((results / "runs").glob("*.json"))]
    if not runs:
        return "nothing is recorded yet: --run"
    lines = [
        f"Means over {len({run['seed'] for run in runs})} seeds (least..greatest), nats per asked token on held-out plays; "
        f"{math.fsum(run['wall'] for run in runs) / 60:.0f} minutes in all.", "",
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
        "| read before the questions | exact match, names not asked about | names asked about | commonest answer |",
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
    parser.add_argument("--limit", type=int, default=-1, help="at most so many new runs")
    parser.add_argument("--only", choices=list(PARTS), default="", help="one part")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps")
    parser.add_argument("--results", type=Path, default=Path("runs/learn_seq2seq"))
    given = parser.parse_args()
    results = given.results if given.scale == 1 else given.results / f"scale-{given.scale:g}"
    if given.run:
        measure(results, given.limit, given.scale, given.only)
    if given.table:
        print(table(results))


if __name__ == "__main__":
    main()
