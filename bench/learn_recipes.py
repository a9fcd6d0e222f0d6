"""Every tiny recipe run to its end as it comes: what `firth train NAME` takes, and what it learns.

    python -m bench.learn_recipes --run                  # all, one after the other: about 45 minutes on two cores; resumable
    python -m bench.learn_recipes --run --only bert t5   # some
    python -m bench.learn_recipes --table                # markdown for docs/results.md

Beside each the same model at its beginning: a rate of zero for one step, the same tokenizer and the same held-out text.
That is no model of nothing: it begins with the frequencies of its answers (`firth.recipes.begin`). Seconds are of the whole
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
from firth.recipes.names import RECIPES
from firth.recipes.recipe import load
from firth.recipes.run import run

NAMES = (
    "word2vec", "lstm", "elmo", "gpt", "gpt2", "gpt3", "llama", "bert", "roberta", "spanbert", "albert", "electra", "xlnet",
    "mpnet", "linformer", "t5", "bart", "prefix_lm", "closed_book", "contrastive", "vae",
)  # fmt: skip


def measure(name: str, results: Path, settings: Sequence[str]) -> dict[str, Any]:
    """One recipe to its end and at its beginning: its steps, seconds and last metrics."""
    before, cpu, clock = busy(), time.process_time(), time.perf_counter()
    done = run(load(name, settings), results / name, echo=print)
    wall = time.perf_counter() - clock
    dirty = others(before, busy(), time.process_time() - cpu, wall)
    tokenizer = [f"tokenizer.path={done.directory / 'tokenizer'}"]
    born = run(load(name, [*settings, *tokenizer, *NOTHING]), results / f"{name}-untrained", echo=lambda _: None)
    return {
        "name": name, "steps": done.steps, "tokens": done.tokens, "seconds": done.seconds, "wall": wall, "others": dirty,
        "parameters": done.metrics.get("parameters"), "metrics": done.metrics, "untrained": born.metrics,
    }  # fmt: skip


def table(results: Path) -> str:
    """Markdown of what is there."""
    lines = [
        "| recipe | steps | seconds | of training | held-out loss: as it begins | at its end | and |",
        "|---|---|---|---|---|---|---|",
    ]
    facts = ""
    for name in NAMES:
        path = results / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text("utf-8"))
        mark = "!" if (found["others"] or 0) > DIRTY else ""
        ends, begins = found["metrics"], found["untrained"]
        more = ", ".join(
            f"{key.removeprefix('valid/')} {begins[key]:.3f} -> {value:.3f}"
            for key, value in ends.items()
            if key.startswith("valid/") and key != "valid/loss" and key in begins
        )
        lines.append(
            f"| {name} | {found['steps']} | {found['wall']:.0f}{mark} | {found['seconds']:.0f} "
            f"| {begins['valid/loss']:.3f} | {ends['valid/loss']:.3f} | {more} |"
        )
        facts = describe(found["machine"])
    return "\n".join([*lines, "", f"(`!`: others used more than {DIRTY:.0%} of the machine.)", "", facts])


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--set", nargs="+", default=[], help="settings for all, such as length.steps=2: a try")
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
                print(f"{name}: {found['wall']:.0f} s, {found['untrained']['valid/loss']:.3f} -> "
                      f"{found['metrics']['valid/loss']:.3f}", flush=True)  # fmt: skip
    if given.table:
        print(table(given.results))


if __name__ == "__main__":
    main()
