"""Are spans and their ends worth anything for a task about spans? MiniLM read on, then names tagged: SpanBERT's claim. CPU.

    python -m bench.learn_spans --run       # three seeds: half an hour on one thread; resumable
    python -m bench.learn_spans --table     # markdown for docs/results/index.md

Contracts of `firth fetch ner_finance`, a tenth held out. MiniLM reads the others without their tags for STEPS steps (masks are
drawn token by token, or as spans, or as spans whose tokens are also guessed from their ends alone: SBO), 30% hidden in all;
then each learns the names (people, places, organisations) from the tagged ones. Beside them MiniLM that read nothing.

    filled, tokens    held-out text, geometric spans all masked: how many spans are filled in exactly, how many tokens
    F1                of held-out names, whole (seqeval's)
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from bench.learn_encoders import Data, span_scores
from bench.learn_tasks import JOBS, classes, halves, say
from firth.corpora import catalog
from firth.evaluate.evaluate import evaluate
from firth.objectives.masked_lm import MLM
from firth.pretrained.load_save import load_model
from firth.runs.prepare import RunData
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer

RESULTS = Path("runs/learn_spans")
SEEDS = (0, 1, 2)
STEPS, ROWS, LENGTH, HIDDEN = 120, 8, 128, 0.3
TAGGING, TAGGED = 120, 8
"""Steps of tagging, and sentences in each."""
ARMS = {
    "nothing": "",
    "masked tokens": f"{{kind: mlm, rate: {HIDDEN}}}",
    "masked spans": f"{{kind: mlm, rate: {HIDDEN}, noise: geometric, alike: true}}",
    "masked spans + SBO": f"[{{kind: mlm, rate: {HIDDEN}, noise: geometric, alike: true}}, sbo]",
}
TUNED = (
    "optimizer={name: adamw, lr: 0.0001, scalar_lr: 0.0005, weight_decay: 0.01, beta2: 0.98}",
    "schedule={kind: linear, warmup_ratio: 0.1}",
    "evaluation.every=0", "checkpoint.every=0",
)  # fmt: skip


def bare() -> tuple[Path, Path]:
    """What is learnt from and what is held out, as text: a record a line, as the tokenizer reads its words."""
    found = []
    for part in halves("ner", JOBS["ner"], quick=False):
        path = RESULTS / f"{part.stem}.jsonl"
        rows = [json.loads(line) for line in part.open(encoding="utf-8")]
        path.write_text("".join(json.dumps({"text": " ".join(row["tokens"])}) + "\n" for row in rows), "utf-8")
        found.append(path)
    return found[0], found[1]


def read_on(arm: str, seed: int, scale: float) -> tuple[Path, dict[str, float]]:
    """MiniLM after it has read the text by an arm's objective, and how it fills in held-out spans."""
    start = catalog.fetch("minilm", say)
    if not ARMS[arm]:
        return start, {}
    train, test = bare()
    place = RESULTS / f"{arm.replace(' ', '-')}-{seed}"
    settings = (
        f"init_from={start}", "model=null", "sample_prompts=[]", f"objective={ARMS[arm]}", f"examples.max_length={LENGTH}",
        f"data={{path: ['{train}'], valid: ['{test}']}}", f"batch={{rows: {ROWS}, pack: {LENGTH}}}", f"seed={seed}",
        f"max_steps={max(2, round(STEPS * scale))}", *TUNED,
    )  # fmt: skip
    made = load("spanbert", settings)
    model = run(made, place, say).model
    tokenizer = Tokenizer.load(model)
    learnt, held = RunData(made.data, tokenizer, place).stores()  # type: ignore[arg-type]  # of a Text recipe
    assert held is not None
    scores = span_scores(load_model(model), MLM(), Data(learnt, held, tokenizer.vocab, np.zeros(tokenizer.vocab.size)))
    return model, {"filled": scores["span_exact"], "tokens": scores["token_exact"], "masked loss": scores["loss"]}


def one(arm: str, seed: int, scale: float) -> dict[str, float]:
    """An arm once: what it fills in, and the names it finds after it has learnt to."""
    start, found = read_on(arm, seed, scale)
    train, test = halves("ner", JOBS["ner"], quick=False)
    settings = [
        *JOBS["ner"].settings, f"data={train}", "data.validation_fraction=0", f"init_from={start}", f"seed={seed}",
        f"objective.class_names={json.dumps(classes(JOBS['ner'], (train, test)))}", f"batch.size={TAGGED}",
        f"max_steps={max(2, round(TAGGING * scale))}", *TUNED,
    ]  # fmt: skip
    place = RESULTS / f"{arm.replace(' ', '-')}-{seed}-names"
    run(load("token_classification", settings), place, say)
    return found | {"F1": evaluate(place, [str(test)])["f1"]}


def table() -> str:
    """Means and every seed."""
    names = ("filled", "tokens", "masked loss", "F1")
    lines = [f"| read before the names | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for arm in ARMS:
        rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{arm.replace(' ', '-')}-seed*.json"))]
        cells = []
        for name in names:
            values = [row[name] for row in rows if name in row]
            each = ", ".join(f"{value:.3f}" for value in values)
            cells.append(f"{statistics.mean(values):.3f} ({each})" if values else "")
        if rows:
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--scale", type=float, default=1.0, help="of all steps: a try")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds if given.run else ():
        for arm in given.only:
            file = RESULTS / f"{arm.replace(' ', '-')}-seed{seed}.json"
            if not file.exists():
                found = one(arm, seed, given.scale)
                file.write_text(json.dumps(found, indent=1))
                print(f"{arm}, seed {seed}: {found}", flush=True)
    if given.table:
        print(table())


if __name__ == "__main__":
    main()
