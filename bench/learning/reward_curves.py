"""Accuracy of a reward model on held-out prompts, over the number of comparisons and over its size.

    python -m bench.learning.reward_curves --run                     # all missing runs: about 10 minutes on two idle cores
    python -m bench.learning.reward_curves --run --lock FILE         # each run holds a lock, for a machine that others use
    python -m bench.learning.reward_curves --table                   # markdown of the existing runs, and RESULTS/curves.html

The problem is that of `bench.learning.frontier`: comparisons are the best and the worst of four sampled answers by the ratings of
their words. A reward model starts from a decoder that was finetuned on the sentences, and sees each comparison three times. Data: 75
to 2,400 comparisons with one decoder. Size: decoders of three sizes with all comparisons, each finetuned for as many steps. The
comparisons of 500 further prompts are held out. Each run is a line of RESULTS/curves.jsonl; a stopped command continues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import busy_seconds, machine, other_load
from bench.learning.frontier import (
    MAX_LENGTH,
    SEEDS,
    holding,
    mean_and_half,
    prepare,
    train_start,
    write_comparisons,
    write_sentences,
)
from firth.pretrained.load_save import load_model
from firth.report.charts import Curve, Figure
from firth.report.page import Report, Section, write
from firth.runs.inference import evaluate_run
from firth.runs.recipe import load
from firth.runs.run import run

PAIRS = (75, 150, 300, 600, 1200, 2400)
SIZES = ((32, 1), (64, 2), (128, 4))
"""Hidden size and layers of the decoders."""
DATA_SIZE = (64, 2)
"""The decoder of the curve over comparisons."""
START_STEPS = 400
EPOCHS, ROWS = 3, 16


@dataclass(frozen=True)
class Point:
    """A reward model to train.

    Args:
        size: Hidden size and layers of its decoder.
        pairs: Comparisons to train on.
        seed: Seed of the head and of the order.
    """

    size: tuple[int, int]
    pairs: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.size[0]}x{self.size[1]}-{self.pairs}-{self.seed}"


POINTS = [
    *(Point(DATA_SIZE, pairs, seed) for seed in SEEDS for pairs in PAIRS),
    *(Point(size, PAIRS[-1], seed) for seed in SEEDS for size in SIZES if size != DATA_SIZE),
]


def first_lines(path: Path, count: int, out: Path) -> Path:
    """Write the first lines of a file; return the new file."""
    out.write_text("".join(f"{line}\n" for line in path.read_text("utf-8").splitlines()[:count]), "utf-8")
    return out


def measure(point: Point, start: Path, comparisons: Path, held_out: Path, out: Path) -> dict[str, Any]:
    """Train a reward model and return its accuracy and calibration error on held-out prompts."""
    data = first_lines(comparisons, point.pairs, out.with_suffix(".jsonl"))
    count = len(data.read_text("utf-8").splitlines())
    before, cpu, clock = busy_seconds(), time.process_time(), time.perf_counter()
    done = run(load("reward_model", [
        f"init_from={start}", f"data.path={data}", f"data.validation_path={held_out}", f"batch.size={ROWS}", f"seed={point.seed}",
        f"max_steps={max(1, EPOCHS * count // ROWS)}", f"examples.max_length={MAX_LENGTH}", "evaluation.every=0", "checkpoint.every=0",
        "optimizer.lr=1e-3",
    ]), out, log=print)  # fmt: skip
    wall = time.perf_counter() - clock
    others = other_load(before, busy_seconds(), time.process_time() - cpu, wall)
    found = json.loads(evaluate_run(out, [str(held_out)], task=None, limit=None, as_json=True))
    return {
        "size": point.size, "pairs": count, "wanted": point.pairs, "seed": point.seed, "accuracy": found["accuracy"],
        "calibration_error": found["calibration_error"], "parameters": sum(p.numel() for p in load_model(out / "model").parameters()),
        "steps": done.steps, "seconds": done.seconds, "wall": wall, "others": others, "machine": machine(),
    }  # fmt: skip


def run_missing(results: Path, frontier: Path, lock: Path | None) -> None:
    """Run what is missing; each row is written when it is known."""
    results.mkdir(parents=True, exist_ok=True)
    with holding(lock):
        files = prepare(frontier)
        held_out = write_comparisons(files.start, files.held_out, frontier, "-held-out")
    sentences = write_sentences(frontier / "sentences")
    known = {(tuple(row["size"]), row["wanted"], row["seed"]) for row in read_rows(results)}
    for point in POINTS:
        if (point.size, point.pairs, point.seed) not in known:
            with holding(lock):
                name = f"start-{point.size[0]}x{point.size[1]}"
                start = train_start(sentences["supervised"], results / name, *point.size, steps=START_STEPS)
            with holding(lock):
                row = measure(point, start, files.comparisons, held_out, results / point.name)
                with (results / "curves.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(point.name, row["accuracy"], row["calibration_error"], row["seconds"], flush=True)


def read_rows(results: Path) -> list[dict[str, Any]]:
    path = results / "curves.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def groups(rows: Sequence[dict[str, Any]], sizes: bool) -> list[list[dict[str, Any]]]:
    """Return the rows of each point of a curve, over sizes or over comparisons, from small to large."""
    kept = [row for row in rows if (row["wanted"] == PAIRS[-1] if sizes else tuple(row["size"]) == DATA_SIZE)]
    key = "parameters" if sizes else "pairs"
    return [[row for row in kept if row[key] == value] for value in sorted({row[key] for row in kept})]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return both curves as Markdown."""
    lines = [
        "| parameters | comparisons | seeds | accuracy on held-out prompts | calibration error | s | others |",
        "|---|---|---|---|---|---|---|",
    ]
    for sizes in (False, True):
        for found in groups(rows, sizes):
            accuracy, error = (
                mean_and_half([row[name] for row in found]) for name in ("accuracy", "calibration_error")
            )
            loads = [row["others"] for row in found if row["others"] is not None]
            lines.append(
                f"| {found[0]['parameters']:,} | {found[0]['pairs']:,} | {len(found)} | {accuracy[0]:.3f} ± {accuracy[1]:.3f} "
                f"| {error[0]:.3f} ± {error[1]:.3f} | {sum(row['seconds'] for row in found) / len(found):.0f} "
                f"| {sum(loads) / max(1, len(loads)):.0%} |"
            )
    return "\n".join(lines)


def page(rows: Sequence[dict[str, Any]]) -> Report:
    """Return the page with both curves."""
    figures = []
    for sizes, label in ((False, "comparisons"), (True, "parameters")):
        points = groups(rows, sizes)
        means = [mean_and_half([row["accuracy"] for row in found]) for found in points]
        key = "parameters" if sizes else "pairs"
        curve = Curve(
            "reward model", [found[0][key] for found in points], [mean for mean, _ in means], points=True,
            intervals=[(mean - half, mean + half) for mean, half in means],
        )  # fmt: skip
        figures.append(
            Figure(
                f"Accuracy over {label}",
                label,
                "accuracy on held-out prompts",
                (curve,),
                "Intervals are 95%, over seeds.",
                log_x=True,
            )
        )
    return Report("Reward models", sections=(Section("", figures=figures),))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--lock", type=Path, help="a file to hold an flock on during each run")
    parser.add_argument(
        "--frontier", type=Path, default=Path("runs/frontier"), help="results of bench.learning.frontier"
    )
    parser.add_argument("--results", type=Path, default=Path("runs/reward_curves"))
    args = parser.parse_args(argv)
    if args.run:
        run_missing(args.results, args.frontier, args.lock)
    rows = read_rows(args.results)
    if rows:
        print(table(rows))
        print(write(page(rows), args.results / "curves.html"))


if __name__ == "__main__":
    main()
