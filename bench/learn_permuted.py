"""What the permuted objectives learn: XLNet and MPNet beside masked and causal models of the same body.

    python -m bench.learn_permuted --run               # every contender, three seeds; resumable
    python -m bench.learn_permuted --run --limit 2     # in pieces: at most two new runs, then stop
    python -m bench.learn_permuted --run --only mlm    # some of them
    python -m bench.learn_permuted --table             # markdown for docs/results/index.md

All have the body of the tiny recipes and read rows of 64 tokens of Shakespeare's plays, 16 a step; a third of the tokens
is asked, twice what the papers ask, for what is asked is what a short run learns from (causal: all of them):

    xlnet             PLM on XLNet's positions, with 64 tokens of memory
    xlnet, no memory  the same without
    mpnet             MPNet on MPNet's positions
    mpnet, rotary     MPNet on rotary positions
    mlm               [MASK], rotary positions
    causal            the same body read to the left, rotary positions

On plays that are held out, before the first step and after the last: the objective's own loss, in nats a token asked (for
"xlnet" with its memory, and with none), and the cloze test that all can be asked alike (`firth.evaluate.cloze`, bits a
hidden token and how often it is the likeliest), which shows no memory to anybody.

Each run leaves one JSON in the results directory; what is there is not run again. A run during which others used more
than 3% of the machine says so in the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.harness import DIRTY, busy, describe, machine, others
from firth.data import windows as cut
from firth.data.collate import Batches
from firth.data.source import Source
from firth.data.token_store import TokenStore
from firth.evaluate import cloze
from firth.model.config import ModelConfig, encoder_config
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.mpnet import MPNet
from firth.objectives.objective import Objective
from firth.objectives.permuted_lm import PLM
from firth.pretrained.load_save import load_model
from firth.recipes.common import DATA, HIDDEN_SIZE, MAX_POSITIONS, NUM_LAYERS, VOCAB_SIZE, tiny_recipe
from firth.runs import examples
from firth.runs.examples import ChunksConfig, ExamplesConfig, WindowsConfig, spread
from firth.runs.prepare import RunData, train_tokenizer
from firth.runs.recipe import BatchConfig, Recipe, TokenizerConfig
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab
from firth.train.validate import validate

SEEDS = (0, 1, 2)
LENGTH, ROWS, MEMORY = 64, 16, 64
HELD = 256
"""Held-out windows that an objective's own loss is measured on."""
GAPS = 768
"""Held-out texts of which one token is hidden."""

BODY = encoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS)
FAR = replace(BODY, position="xlnet", mask_embedding=True)
CONTENDERS: dict[str, tuple[Objective, ModelConfig, ExamplesConfig]] = {
    "xlnet": (PLM(k=3), replace(FAR, memory_length=MEMORY), WindowsConfig(LENGTH)),
    "xlnet, no memory": (PLM(k=3), FAR, WindowsConfig(LENGTH)),
    "mpnet": (MPNet(mlm_probability=0.3), replace(BODY, position="mpnet"), ChunksConfig(LENGTH)),
    "mpnet, rotary": (MPNet(mlm_probability=0.3), BODY, ChunksConfig(LENGTH)),
    "mlm": (MLM(mlm_probability=0.3), BODY, ChunksConfig(LENGTH)),
    "causal": (CausalLM(), replace(BODY, causal=True), WindowsConfig(LENGTH)),
}


def recipe(name: str, seed: int, steps: int, results: Path) -> Recipe:
    objective, config, examples = CONTENDERS[name]
    made = tiny_recipe(name, objective, examples, config, steps=steps, batch=BatchConfig(size=ROWS))
    evaluation, checkpoint = replace(made.evaluation, every=0), replace(made.checkpoint, every=steps)
    source = replace(DATA, cache_dir=str(results / "stores"))
    plan = TokenizerConfig(path=str(results / "tokenizer"), vocab_size=VOCAB_SIZE)
    return replace(made, seed=seed, data=source, tokenizer=plan, evaluation=evaluation, checkpoint=checkpoint)


def measured(model: LM, name: str, seed: int, held: Source, store: TokenStore, vocab: Vocab) -> dict[str, float]:
    """The objective's own loss; the same without memory, where there is one; and the common cloze test."""
    objective, _, _ = CONTENDERS[name]

    def own(source: Source) -> float:
        return validate(
            model, objective, Batches(spread(source, HELD), objective, vocab, batch_size=64, seed=seed).all_batches()
        )["loss"]

    found = {"loss": own(held)} | cloze.score(model, objective, cloze.items(store, vocab, GAPS, LENGTH), vocab)
    if model.config.memory_length:
        found["forgetful"] = own(cut.Windows(store, LENGTH, tail=True))
    return found


def contend(name: str, seed: int, steps: int, results: Path) -> dict[str, object]:
    made = recipe(name, seed, steps, results)
    tokenizer = Tokenizer.load(results / "tokenizer")
    data = RunData(made.data, tokenizer, results, memory_length=made.model.memory_length if made.model else 0)
    held, store = examples.build_datasets(made.examples, data, made.objective).validation, data.stores()[1]
    assert held is not None and store is not None and made.model is not None
    config = replace(made.model, vocab_size=tokenizer.vocab.size)
    torch.manual_seed(seed)
    before = measured(LM(config, made.objective.heads(config)).eval(), name, seed, held, store, tokenizer.vocab)
    busy_before, cpu, clock = busy(), time.process_time(), time.perf_counter()
    finished = run(made, results / "runs" / f"{name}-{seed}-{steps}", log=lambda _: None)
    took = time.perf_counter() - clock
    dirty = others(busy_before, busy(), time.process_time() - cpu, took)
    after = measured(load_model(finished.model), name, seed, held, store, tokenizer.vocab)
    return {"name": name, "seed": seed, "steps": steps, "seconds": finished.seconds, "others": dirty,
            "before": before, "after": after}  # fmt: skip


def table(results: Path, steps: int) -> str:
    lines = [
        "| objective | loss, untrained | loss | without its memory | cloze bits, untrained | cloze bits | accuracy | seconds |",
        "|---|---|---|---|---|---|---|---|",
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

        cells = [cell("before", "loss"), cell("after", "loss"), cell("after", "forgetful"), cell("before", "bits")]
        cells += [cell("after", "bits"), cell("after", "accuracy")]
        seconds = statistics.median(r["seconds"] for r in runs)
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
    told = (
        f"{steps} steps of {ROWS} x {LENGTH} tokens, {len(SEEDS)} seeds: mean, least and greatest; {dirty} dirty runs."
    )
    return "\n".join([*lines, "", told, describe(machine())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--limit", type=int, default=1000, help="at most so many new runs")
    parser.add_argument("--results", type=Path, default=Path("runs/learn_permuted"))
    given = parser.parse_args()
    results: Path = given.results
    results.mkdir(parents=True, exist_ok=True)
    if given.run:
        if not (results / "tokenizer").exists():
            train_tokenizer(
                DATA.paths(print), results / "tokenizer", algorithm="byte-bpe", vocab_size=VOCAB_SIZE, log=print
            )
        left = given.limit
        for seed in SEEDS:
            for name in given.only:
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
