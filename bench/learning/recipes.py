"""Time and final metrics of every tiny recipe with its defaults, as `firth train NAME` runs it.

    python -m bench.learning.recipes --run                  # all recipes in sequence: about 45 minutes on two cores; resumable
    python -m bench.learning.recipes --run --only bert t5   # some
    python -m bench.learning.recipes --clock --only gpt     # 80 steps of some, to time those that ran on a busy machine
    python -m bench.learning.recipes --table                # markdown for docs/results/index.md

The baseline of each is the untrained model: one step with a learning rate near zero, the same tokenizer and held-out text.
Its head predicts the label frequencies (`firth.runs.build_model`). Seconds are of the whole command, with tokenizer and token
store, and of training alone. Each recipe has one JSON in runs/learn_recipes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import MAX_OTHER_LOAD, busy_seconds, describe, machine, other_load
from bench.learning.seq2seq import UNTRAINED
from firth.runs.recipe import load
from firth.runs.recipe_names import RECIPES
from firth.runs.run import run

NAMES = (
    "word2vec", "lstm", "elmo", "gpt", "gpt2", "gpt3", "llama", "bert", "roberta", "spanbert", "albert", "electra", "xlnet",
    "mpnet", "linformer", "t5", "bart", "prefix_lm", "closed_book", "contrastive", "vae",
)  # fmt: skip

TIMED_STEPS = 80


def measure(name: str, results: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Run a recipe, and its untrained model; return steps, seconds and final metrics."""
    before, cpu, clock = busy_seconds(), time.process_time(), time.perf_counter()
    done = run(load(name, settings), results / name, log=print)
    wall = time.perf_counter() - clock
    others = other_load(before, busy_seconds(), time.process_time() - cpu, wall)
    tokenizer = [f"tokenizer.path={done.directory / 'tokenizer'}"]
    untrained = run(load(name, [*settings, *tokenizer, *UNTRAINED]), results / f"{name}-untrained", log=lambda _: None)
    return {
        "name": name, "steps": done.steps, "tokens": done.tokens, "seconds": done.seconds, "wall": wall, "others": others,
        "parameters": done.metrics.get("parameters"), "metrics": done.metrics, "untrained": untrained.metrics,
    }  # fmt: skip


def time_steps(name: str, results: Path) -> dict[str, Any]:
    """Time TIMED_STEPS steps of a recipe; return steps and seconds of training."""
    before, cpu, clock = busy_seconds(), time.process_time(), time.perf_counter()
    tokenizer = [f"tokenizer.path={path}" for path in (results / name / "tokenizer",) if path.exists()]
    settings = [f"max_steps={TIMED_STEPS}", "evaluation.every=0", "checkpoint.every=0", "sample_prompts=[]", *tokenizer]
    done = run(load(name, settings), results / "clock" / name, log=lambda _: None)
    others = other_load(before, busy_seconds(), time.process_time() - cpu, time.perf_counter() - clock)
    return {"steps": done.steps, "seconds": done.seconds, "others": others}


def seconds(found: dict[str, Any], results: Path) -> str:
    """Return the seconds of training: of the run if the machine was quiet, else estimated from timed steps (~)."""
    clean, path = (found["others"] or 0) <= MAX_OTHER_LOAD, results / "clock" / f"{found['name']}.json"
    if clean or not path.exists():
        return f"{found['seconds']:.0f}{'' if clean else '!'}"
    timing = json.loads(path.read_text("utf-8"))
    mark = "!" if (timing["others"] or 0) > MAX_OTHER_LOAD else ""
    return f"~{timing['seconds'] / timing['steps'] * found['steps']:.0f}{mark}"


def score(metrics: dict[str, float]) -> float:
    """Return the held-out loss, or the training loss if nothing is held out (closed_book trains on all text)."""
    return metrics.get("valid/loss", metrics["loss"])


def table(results: Path) -> str:
    """Return a Markdown table of the existing results."""
    lines = [
        "| recipe | steps | seconds of training | held-out loss, untrained | final | other metrics |",
        "|---|---|---|---|---|---|",
    ]
    machine_facts = ""
    for name in NAMES:
        path = results / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text("utf-8"))
        metrics, untrained_metrics = found["metrics"], found["untrained"]
        more = ", ".join(
            f"{key.removeprefix('valid/')} {untrained_metrics[key]:.3f} -> {value:.3f}"
            for key, value in metrics.items()
            if key.startswith("valid/") and key != "valid/loss" and key in untrained_metrics
        )
        lines.append(
            f"| {name} | {found['steps']} | {seconds(found, results)} "
            f"| {score(untrained_metrics):.3f} | {score(metrics):.3f} | {more} |"
        )
        machine_facts = describe(found["machine"])
    legend = f"(`!`: other processes used more than {MAX_OTHER_LOAD:.0%} of the machine. `~`: estimated from {TIMED_STEPS} steps.)"
    return "\n".join([*lines, "", legend, "", machine_facts])


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--clock", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument(
        "--set", nargs="+", default=[], help="settings for all recipes, such as max_steps=2 for a trial"
    )
    parser.add_argument("--results", type=Path, default=Path("runs/learn_recipes"))
    args = parser.parse_args()
    assert set(NAMES) <= set(RECIPES), "a recipe is missing"
    if args.run:
        machine_facts = machine()
        for name in args.only:
            path = args.results / f"{name}.json"
            if not path.exists():
                found = measure(name, args.results, args.set) | {"machine": machine_facts}
                path.write_text(json.dumps(found, indent=1), encoding="utf-8")
                print(f"{name}: {found['wall']:.0f} s, {score(found['untrained']):.3f} -> "
                      f"{score(found['metrics']):.3f}", flush=True)  # fmt: skip
    for name in args.only if args.clock else ():
        path = args.results / "clock" / f"{name}.json"
        if not path.exists():
            timing = time_steps(name, args.results)
            path.write_text(json.dumps(timing, indent=1), encoding="utf-8")
            print(name, timing, flush=True)
    if args.table:
        print(table(args.results))


if __name__ == "__main__":
    main()
