"""What the permuted objectives learn: XLNet and MPNet beside masked and causal models of the same body.

    python -m bench.learn_permuted --run               # every contender, three seeds; resumable
    python -m bench.learn_permuted --run --limit 2     # in pieces: at most two new runs, then stop
    python -m bench.learn_permuted --table             # markdown for docs/results.md

All have the body of the tiny recipes and read the same windows of 128 tokens of Shakespeare's plays, as often:

    xlnet             PLM in spans on XLNet's positions, with 128 tokens of memory (the recipe `xlnet`)
    xlnet, no memory  the same without
    mpnet             MPNet in words on MPNet's positions (the recipe `mpnet`, on windows)
    mlm               15% masked, drawn anew, rotary positions (the recipe `roberta`, on windows)
    causal            the same body read to the left, rotary positions

Two figures on plays that are held out, before the first step and after the last: the objective's own loss in nats a
token asked, and the *gap loss*, which all can be asked alike: one token of a window is hidden, and guessed from all that
stands around it (from the left alone, for causal). An XLNet with memory is scored with its memory and without.

Each run leaves one JSON in the results directory; what is there is not run again. A run during which others used more
than 3% of the machine says so in the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.harness import DIRTY, busy, describe, machine, others
from firth.data import layout
from firth.data.batch import Batches, collate
from firth.data.source import Source
from firth.model.lm import LM
from firth.model.shape import encoder
from firth.model.weights import load_model
from firth.objectives.causal import CausalLM
from firth.objectives.mlm import MLM
from firth.objectives.mpnet import MPNet
from firth.objectives.objective import token_loss
from firth.objectives.plm import PLM
from firth.recipes import segments
from firth.recipes.material import Material, train_tokenizer
from firth.recipes.recipe import Batch, Recipe, TokenizerPlan
from firth.recipes.run import run
from firth.recipes.segments import Windows, spread
from firth.recipes.sizes import CONTEXT, DEPTH, TEXT, VOCAB, WIDTH, tiny
from firth.text.tokenizer import Tokenizer
from firth.text.vocab import Vocab
from firth.train.validate import validate
from firth.types import IGNORE, Example

SEEDS = (0, 1, 2)
LENGTH, ROWS, MEMORY = 128, 16, 128
HELD = 256
"""Held-out windows that an objective's own loss is measured on."""
GAPS = (48, 16)
"""Windows, and tokens of each, that the gap loss is measured on."""

BODY = encoder(VOCAB, WIDTH, DEPTH, context=CONTEXT)
CONTENDERS = {
    "xlnet": (PLM(noise="contexts"), replace(BODY, position="xlnet", query=True, memory=MEMORY)),
    "xlnet, no memory": (PLM(noise="contexts"), replace(BODY, position="xlnet", query=True)),
    "mpnet": (MPNet(noise="words"), replace(BODY, position="mpnet")),
    "mlm": (MLM(), BODY),
    "causal": (CausalLM(), replace(BODY, causal=True)),
}


def recipe(name: str, seed: int, steps: int, results: Path) -> Recipe:
    objective, shape = CONTENDERS[name]
    made = tiny(name, objective, Windows(length=LENGTH), shape, steps=steps, batch=Batch(rows=ROWS))
    checks = replace(made.checks, every=0, save=steps)
    source = replace(TEXT, store=str(results / "stores"))
    plan = TokenizerPlan(path=str(results / "tokenizer"), size=VOCAB)
    return replace(made, seed=seed, source=source, tokenizer=plan, checks=checks)


def gaps(source: Source, objective: str, vocab: Vocab, memory: bool) -> Iterator[Example]:
    """One hidden token of a window in each example, shown as the contender was trained to be asked. The same for all."""
    rng = np.random.default_rng(0)
    for index in np.linspace(0, len(source) - 2, GAPS[0]).round().astype(int):
        example = source[int(index)]
        tokens = example["tokens"][:LENGTH]
        places = rng.permutation(np.flatnonzero(~vocab.special[tokens[1:]]) + 1)[: GAPS[1]]
        kept = {"tokens": tokens} | ({"document": example["document"][:LENGTH]} if "document" in example else {})
        if memory:
            kept |= layout.earlier(example)
        for at in places.tolist():
            if objective == "causal":
                shown = CausalLM().view(kept, vocab, rng)
                asked = np.full(LENGTH - 1, IGNORE)
                asked[at - 1] = shown["labels"][at - 1]
                yield shown | {"labels": asked}
            elif objective.startswith("xlnet"):
                yield layout.permuted(kept, np.array([at]), np.array([vocab.mask]))
            else:
                masked, labels = tokens.copy(), np.full(LENGTH, IGNORE)
                masked[at], labels[at] = vocab.mask, tokens[at]
                yield kept | {"tokens": masked, "labels": labels}


@torch.no_grad()
def gap_loss(model: LM, examples: Iterator[Example]) -> float:
    """Nats a hidden token."""
    total, count, rows = 0.0, 0, list(examples)
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64])
        total += float(token_loss(model, model(batch), batch["labels"]))
        count += int((batch["labels"] != IGNORE).sum())
    return total / count


def measured(model: LM, name: str, seed: int, held: Source, vocab: Vocab) -> dict[str, float]:
    objective, shape = CONTENDERS[name]
    batches = Batches(spread(held, HELD), objective, vocab, rows=64, seed=seed)
    found = {"loss": validate(model, objective, batches.once())["loss"]}
    found["gap"] = gap_loss(model, gaps(held, name, vocab, bool(shape.memory)))
    if shape.memory:
        found["gap without memory"] = gap_loss(model, gaps(held, name, vocab, False))
    return found


def contend(name: str, seed: int, steps: int, results: Path) -> dict[str, object]:
    made = recipe(name, seed, steps, results)
    tokenizer = Tokenizer.load(results / "tokenizer")
    material = Material(made.source, tokenizer, results, memory=CONTENDERS[name][1].memory)
    held = segments.cut(made.segment, material, made.objective).valid
    assert held is not None and made.shape is not None
    shape = replace(made.shape, vocab=tokenizer.vocab.size)
    torch.manual_seed(seed)
    before = measured(LM(shape, made.objective.parts(shape)).eval(), name, seed, held, tokenizer.vocab)
    busy_before, cpu, clock = busy(), time.process_time(), time.perf_counter()
    finished = run(made, results / "runs" / f"{name}-{seed}-{steps}", echo=lambda _: None)
    took = time.perf_counter() - clock
    dirty = others(busy_before, busy(), time.process_time() - cpu, took)
    after = measured(load_model(finished.model), name, seed, held, tokenizer.vocab)
    return {"name": name, "seed": seed, "steps": steps, "seconds": finished.seconds, "others": dirty,
            "before": before, "after": after}  # fmt: skip


def table(results: Path, steps: int) -> str:
    lines = [
        "| objective | own loss, untrained | own loss | gap loss, untrained | gap loss | without its memory | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    dirty = 0
    for name in CONTENDERS:
        runs = [json.loads(p.read_text()) for p in sorted(results.glob(f"{name}-*-{steps}.json"))]
        if not runs:
            continue
        dirty += sum((r["others"] or 0) > DIRTY for r in runs)

        def cell(when: str, what: str, runs: list[dict] = runs) -> str:
            values = [r[when][what] for r in runs if what in r[when]]
            return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""

        seconds = statistics.median(r["seconds"] for r in runs)
        cells = [cell("before", "loss"), cell("after", "loss"), cell("before", "gap"), cell("after", "gap")]
        lines.append(f"| {name} | {' | '.join(cells)} | {cell('after', 'gap without memory')} | {seconds:.0f} |")
    told = (
        f"{steps} steps of {ROWS} x {LENGTH} tokens, {len(SEEDS)} seeds: mean, least and greatest; {dirty} dirty runs."
    )
    return "\n".join([*lines, "", told, describe(machine())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--limit", type=int, default=1000, help="at most so many new runs")
    parser.add_argument("--results", type=Path, default=Path("runs/learn_permuted"))
    given = parser.parse_args()
    results: Path = given.results
    results.mkdir(parents=True, exist_ok=True)
    if given.run:
        if not (results / "tokenizer").exists():
            train_tokenizer(TEXT.paths(print), results / "tokenizer", algorithm="byte-bpe", size=VOCAB, echo=print)
        left = given.limit
        for seed in SEEDS:
            for name in CONTENDERS:
                path = results / f"{name}-{seed}-{given.steps}.json"
                if path.exists() or left <= 0:
                    continue
                left -= 1
                told = contend(name, seed, given.steps, results)
                path.write_text(json.dumps(told, indent=1))
                print(f"{name} seed {seed}: {told['before']} -> {told['after']} in {told['seconds']:.0f} s", flush=True)
    if given.table:
        print(table(results, given.steps))


if __name__ == "__main__":
    main()
