"""Learning of the permuted objectives: XLNet and MPNet against masked and causal models of the same body.

    python -m bench.learning.permuted --run               # every candidate, three seeds; resumable
    python -m bench.learning.permuted --run --limit 2     # in pieces: at most two new runs, then stop
    python -m bench.learning.permuted --run --only mlm    # some of them
    python -m bench.learning.permuted --table             # markdown for docs/results/index.md

All have the body of the tiny recipes and train on rows of 64 tokens of Shakespeare's plays, 16 per step; a third of the
tokens is supervised, twice as many as in the papers, since a short run needs more of them (causal: all tokens):

    xlnet             PLM on XLNet's positions, with 64 tokens of memory
    xlnet, no memory  the same without
    mpnet             MPNet on MPNet's positions
    mpnet, rotary     MPNet on rotary positions
    mlm               [MASK], rotary positions
    causal            the same body with causal attention, rotary positions

Scores on held-out plays, before the first step and after the last: the objective's own loss, in nats per supervised token
("xlnet" with and without its memory), and the cloze test, which is the same for all (`firth.evaluate.perplexity`, bits per hidden
token and accuracy) and has no memory.

Each run writes one JSON into the results directory; existing results are not repeated. The table counts runs during which
other processes used more than 3% of the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.harness import MAX_OTHER_LOAD, busy_seconds, describe, machine, other_load
from firth.data.collate import Batches
from firth.data.examples import ExamplesConfig
from firth.data.source import Source
from firth.data.token_store import TokenStore
from firth.data.windows import ChunksConfig, Documents, WindowsConfig
from firth.evaluate import perplexity
from firth.model.config import ModelConfig, encoder_config
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.permuted_lm import PLM, MPNet
from firth.pretrained.load_save import load_model
from firth.recipes.common import DATA, HIDDEN_SIZE, MAX_POSITIONS, NUM_LAYERS, VOCAB_SIZE, tiny_recipe
from firth.runs import examples
from firth.runs.examples import spread
from firth.runs.prepare import RunData, train_tokenizer
from firth.runs.recipe import BatchConfig, Recipe, TokenizerConfig
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab
from firth.training.step import validate

SEEDS = (0, 1, 2)
LENGTH, ROWS, MEMORY = 64, 16, 64
NUM_HELD_OUT = 256
"""Held-out windows for the loss of an objective."""
NUM_CLOZE = 768
"""Held-out texts with one hidden token."""

BODY = encoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS)
XLNET_BODY = BODY.with_fields({"position.type": "xlnet", "embedding.mask": True})
CANDIDATES: dict[str, tuple[Objective, ModelConfig, ExamplesConfig]] = {
    "xlnet": (PLM(k=3), XLNET_BODY.with_fields({"attention.memory_length": MEMORY}), WindowsConfig(LENGTH)),
    "xlnet, no memory": (PLM(k=3), XLNET_BODY, WindowsConfig(LENGTH)),
    "mpnet": (MPNet(mlm_probability=0.3), BODY.with_fields({"position.type": "mpnet"}), ChunksConfig(LENGTH)),
    "mpnet, rotary": (MPNet(mlm_probability=0.3), BODY, ChunksConfig(LENGTH)),
    "mlm": (MLM(mlm_probability=0.3), BODY, ChunksConfig(LENGTH)),
    "causal": (CausalLM(), replace(BODY, causal=True), WindowsConfig(LENGTH)),
}


def recipe(name: str, seed: int, steps: int, results: Path) -> Recipe:
    objective, config, examples = CANDIDATES[name]
    recipe_ = tiny_recipe(name, objective, examples, config, steps=steps, batch=BatchConfig(size=ROWS))
    evaluation, checkpoint = replace(recipe_.evaluation, every=0), replace(recipe_.checkpoint, every=steps)
    source = replace(DATA, cache_dir=str(results / "stores"))
    tokenizer = TokenizerConfig(path=str(results / "tokenizer"), vocab_size=VOCAB_SIZE)
    return replace(recipe_, seed=seed, data=source, tokenizer=tokenizer, evaluation=evaluation, checkpoint=checkpoint)


def score(model: LM, name: str, seed: int, held_out: Source, store: TokenStore, vocab: Vocab) -> dict[str, float]:
    """Return the objective's own loss, the same without memory if the model has one, and the cloze scores."""
    objective, _, _ = CANDIDATES[name]

    def own_loss(source: Source) -> float:
        return validate(
            model,
            objective,
            Batches(spread(source, NUM_HELD_OUT), objective, vocab, batch_size=64, seed=seed).all_batches(),
        )["loss"]

    found = {"loss": own_loss(held_out)} | perplexity.cloze_score(
        model, objective, perplexity.cloze_items(store, vocab, NUM_CLOZE, LENGTH), vocab
    )
    if model.config.attention.memory_length:
        found["forgetful"] = own_loss(Documents(WindowsConfig(max_length=LENGTH), store, vocab, held_out=True))
    return found


def train_and_score(name: str, seed: int, steps: int, results: Path) -> dict[str, object]:
    recipe_ = recipe(name, seed, steps, results)
    tokenizer = Tokenizer.load(results / "tokenizer")
    data = RunData(
        recipe_.data, tokenizer, results, memory_length=recipe_.model.attention.memory_length if recipe_.model else 0
    )
    held_out, store = examples.build_datasets(recipe_.examples, data, recipe_.objective).validation, data.stores()[1]
    assert held_out is not None and store is not None and recipe_.model is not None
    config = replace(recipe_.model, vocab_size=tokenizer.vocab.size)
    torch.manual_seed(seed)
    before = score(LM(config, recipe_.objective.heads(config)).eval(), name, seed, held_out, store, tokenizer.vocab)
    busy_before, cpu, clock = busy_seconds(), time.process_time(), time.perf_counter()
    result = run(recipe_, results / "runs" / f"{name}-{seed}-{steps}", log=lambda _: None)
    wall = time.perf_counter() - clock
    others = other_load(busy_before, busy_seconds(), time.process_time() - cpu, wall)
    after = score(load_model(result.model), name, seed, held_out, store, tokenizer.vocab)
    return {"name": name, "seed": seed, "steps": steps, "seconds": result.seconds, "others": others,
            "before": before, "after": after}  # fmt: skip


def table(results: Path, steps: int) -> str:
    lines = [
        "| objective | loss, untrained | loss | without memory | cloze bits, untrained | cloze bits | accuracy | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    noisy = 0
    for name in CANDIDATES:
        runs = [json.loads(p.read_text()) for p in sorted(results.glob(f"{name}-*-{steps}.json"))]
        if not runs:
            continue
        noisy += sum((r["others"] or 0) > MAX_OTHER_LOAD for r in runs)

        def cell(when: str, what: str, runs: list[dict] = runs) -> str:
            values = [r[when][what] for r in runs if what in r[when]]
            return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""

        cells = [cell("before", "loss"), cell("after", "loss"), cell("after", "forgetful"), cell("before", "bits")]
        cells += [cell("after", "bits"), cell("after", "accuracy")]
        seconds = statistics.median(r["seconds"] for r in runs)
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
    summary = (
        f"{steps} steps of {ROWS} x {LENGTH} tokens, {len(SEEDS)} seeds: mean, minimum and maximum; {noisy} noisy runs."
    )
    return "\n".join([*lines, "", summary, describe(machine())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--limit", type=int, default=1000, help="maximum number of new runs")
    parser.add_argument("--results", type=Path, default=Path("runs/learn_permuted"))
    args = parser.parse_args()
    results: Path = args.results
    results.mkdir(parents=True, exist_ok=True)
    if args.run:
        if not (results / "tokenizer").exists():
            train_tokenizer(
                DATA.paths(print), results / "tokenizer", algorithm="byte-bpe", vocab_size=VOCAB_SIZE, log=print
            )
        left = args.limit
        for seed in SEEDS:
            for name in args.only:
                path = results / f"{name}-{seed}-{args.steps}.json"
                if path.exists() or left <= 0:
                    continue
                left -= 1
                scores = train_and_score(name, seed, args.steps, results)
                path.write_text(json.dumps(scores, indent=1))
                print(
                    f"{name} seed {seed}: {scores['before']} -> {scores['after']} in {scores['seconds']:.0f} s",
                    flush=True,
                )
    if args.table:
        print(table(results, args.steps))


if __name__ == "__main__":
    main()
