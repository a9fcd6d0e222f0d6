"""Every tiny recipe run to its end as it comes: what `firth train NAME` takes, and what it learns.

    python -m bench.learn_recipes --run                  # all, one after the other: about 45 minutes on two cores; resumable
    python -m bench.learn_recipes --run --only bert t5   # some
    python -m bench.learn_recipes --clock --only gpt     # 80 steps of some, to time those that ran beside other work
    python -m bench.learn_recipes --table                # markdown for docs/results/index.md

Beside each the same model at its beginning: a rate of zero for one step, the same tokenizer and the same held-out text.
That is no model of nothing: it begins with the frequencies of its answers (`firth.runs.init_head`). Seconds are of the whole
command, with tokenizer and token store, and of training alone. One JSON for each in runs/learn_recipes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import DIRTY, busy, describe, machine, others
from bench.learn_seq2seq import NOTHING
from firth.runs.recipe import load
from firth.runs.recipe_names import RECIPES
from firth.runs.run import run

NAMES = (
    "word2vec", "lstm", "elmo", "gpt", "gpt2", "gpt3", "llama", "bert", "roberta", "spanbert", "albert", "electra", "xlnet",
    "mpnet", "linformer", "t5", "bart", "prefix_lm", "closed_book", "contrastive", "vae",
)  # fmt: skip

CLOCK = 80


def measure(name: str, results: Path, settings: Sequence[str]) -> dict[str, Any]:
    """One recipe to its end and at its beginning: its steps, seconds and last metrics."""
    before, cpu, clock = busy(), time.process_time(), time.perf_counter()
    done = run(load(name, settings), results / name, log=print)
    wall = time.perf_counter() - clock
    dirty = others(before, busy(), time.process_time() - cpu, wall)
    tokenizer = [f"tokenizer.path={done.directory / 'tokenizer'}"]
    born = run(load(name, [*settings, *tokenizer, *NOTHING]), results / f"{name}-untrained", log=lambda _: None)
    return {
        "name": name, "steps": done.steps, "tokens": done.tokens, "seconds": done.seconds, "wall": wall, "others": dirty,
        "parameters": done.metrics.get("parameters"), "metrics": done.metrics, "untrained": born.metrics,
    }  # fmt: skip


def clocked(name: str, results: Path) -> dict[str, Any]:
    """CLOCK steps of a recipe, which is not the beginning of any: steps and seconds of training."""
    before, cpu, clock = busy(), time.process_time(), time.perf_counter()
    tokenizer = [f"tokenizer.path={path}" for path in (results / name / "tokenizer",) if path.exists()]
    settings = [f"max_steps={CLOCK}", "evaluation.every=0", "checkpoint.every=0", "sample_prompts=[]", *tokenizer]
    done = run(load(name, settings), results / "clock" / name, log=lambda _: None)
    dirty = others(before, busy(), time.process_time() - cpu, time.perf_counter() - clock)
    return {"steps": done.steps, "seconds": done.seconds, "others": dirty}


def seconds(found: dict[str, Any], results: Path) -> str:
    """Of training: the run's own if it was alone, else its steps at the pace of those that were timed (~)."""
    quiet, path = (found["others"] or 0) <= DIRTY, results / "clock" / f"{found['name']}.json"
    if quiet or not path.exists():
        return f"{found['seconds']:.0f}{'' if quiet else '!'}"
    timed = json.loads(path.read_text("utf-8"))
    spoilt = "!" if (timed["others"] or 0) > DIRTY else ""
    return f"~{timed['seconds'] / timed['steps'] * found['steps']:.0f}{spoilt}"


def score(metrics: dict[str, float]) -> float:
    """The loss on held-out text; that in training where nothing is held out (closed_book reads all there is)."""
    return metrics.get("valid/loss", metrics["loss"])


def table(results: Path) -> str:
    """Markdown of what is there."""
    lines = [
        "| recipe | steps | seconds of training | held-out loss: as it begins | at its end | and |",
        "|---|---|---|---|---|---|",
    ]
    facts = ""
    for name in NAMES:
        path = results / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text("utf-8"))
        ends, begins = found["metrics"], found["untrained"]
        more = ", ".join(
            f"{key.removeprefix('valid/')} {begins[key]:.3f} -> {value:.3f}"
            for key, value in ends.items()
            if key.startswith("valid/") and key != "valid/loss" and key in begins
        )
        lines.append(
            f"| {name} | {found['steps']} | {seconds(found, results)} "
            f"| {score(begins):.3f} | {score(ends):.3f} | {more} |"
        )
        facts = describe(found["machine"])
    marks = (
        f"(`!`: others used more than {DIRTY:.0%} of the machine. `~`: at the pace of {CLOCK} steps on a quiet one.)"
    )
    return "\n".join([*lines, "", marks, "", facts])


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--clock", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--set", nargs="+", default=[], help="settings for all, such as max_steps=2: a try")
    parser.add_argument("--results", type=Path, default=Path("runs/learn_recipes"))
    given = parser.parse_args()
    assert set(NAMES) <= set(RECIPES), "a recipe is gone"
    if given.run:
        facts = machine()
        for name in given.only:
            path = given.results / f"{name}.json"
            if not path.exists():
                found = measure(name, given.results, given.set) | {"machine": facts}
                path.write_text(json.dumps(found, indent=1), encoding="utf-8")
                print(f"{name}: {found['wall']:.0f} s, {score(found['untrained']):.3f} -> "
                      f"{score(found['metrics']):.3f}", flush=True)  # fmt: skip
    for name in given.only if given.clock else ():
        path = given.results / "clock" / f"{name}.json"
        if not path.exists():
            timed = clocked(name, given.results)
            path.write_text(json.dumps(timed, indent=1), encoding="utf-8")
            print(name, timed, flush=True)
    if given.table:
        print(table(given.results))


if __name__ == "__main__":
    main()
