"""SpanBERT's claim on MiniLM: does pretraining on spans and their boundaries help a task about spans? CPU.

    python -m bench.learning.spans --run       # three seeds: half an hour on one thread; resumable
    python -m bench.learning.spans --table     # markdown for docs/results/index.md

Contracts of `firth fetch ner_finance`, a tenth held out. MiniLM is pretrained further on the text of the others for STEPS
steps, with 30% of the tokens masked: single tokens, spans, or spans with the span boundary objective (SBO). Then each model
is finetuned to tag names (people, places, organizations). The baseline is MiniLM without further pretraining.

    filled, tokens    held-out text with geometric spans masked: exactly filled spans, and correct tokens
    F1                of whole held-out names (as in seqeval)
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from bench.learning.encoders import Data, span_scores
from bench.learning.tasks import JOBS, classes, silent, train_test_files
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
STEPS, ROWS, LENGTH, MLM_PROBABILITY = 120, 8, 128, 0.3
TAGGING_STEPS, TAGGING_ROWS = 120, 8
"""Steps of finetuning, and sentences per step."""
ARMS = {
    "nothing": "",
    "masked tokens": f"{{kind: mlm, mlm_probability: {MLM_PROBABILITY}}}",
    "masked spans": f"{{kind: mlm, mlm_probability: {MLM_PROBABILITY}, noise: geometric, whole_span_replacement: true}}",
    "masked spans + SBO": (
        f"[{{kind: mlm, mlm_probability: {MLM_PROBABILITY}, noise: geometric, whole_span_replacement: true}}, sbo]"
    ),
}
TUNED = (
    "optimizer={name: adamw, lr: 0.0001, scalar_lr: 0.0005, weight_decay: 0.01, beta2: 0.98}",
    "schedule={kind: linear, warmup_ratio: 0.1}",
    "evaluation.every=0", "checkpoint.every=0",
)  # fmt: skip


def write_texts() -> tuple[Path, Path]:
    """Write the training and the held-out text as records; return both files."""
    found = []
    for part in train_test_files("ner", JOBS["ner"], quick=False):
        path = RESULTS / f"{part.stem}.jsonl"
        rows = [json.loads(line) for line in part.open(encoding="utf-8")]
        path.write_text("".join(json.dumps({"text": " ".join(row["tokens"])}) + "\n" for row in rows), "utf-8")
        found.append(path)
    return found[0], found[1]


def read_on(arm: str, seed: int, scale: float) -> tuple[Path, dict[str, float]]:
    """Pretrain MiniLM further with the objective of an arm; return its directory and its scores on held-out spans."""
    start = catalog.fetch("minilm", silent)
    if not ARMS[arm]:
        return start, {}
    train, test = write_texts()
    directory = RESULTS / f"{arm.replace(' ', '-')}-{seed}"
    settings = (
        f"init_from={start}", "model=null", "sample_prompts=[]", f"objective={ARMS[arm]}", f"examples.max_length={LENGTH}",
        f"data={{path: ['{train}'], validation_path: ['{test}']}}",
        f"batch={{size: {ROWS}, pack_to_length: {LENGTH}}}", f"seed={seed}",
        f"max_steps={max(2, round(STEPS * scale))}", *TUNED,
    )  # fmt: skip
    recipe = load("spanbert", settings)
    model = run(recipe, directory, silent).model
    tokenizer = Tokenizer.load(model)
    train_store, held_out_store = RunData(recipe.data, tokenizer, directory).stores()
    assert held_out_store is not None
    scores = span_scores(
        load_model(model), MLM(), Data(train_store, held_out_store, tokenizer.vocab, np.zeros(tokenizer.vocab.size))
    )
    return model, {"filled": scores["span_exact"], "tokens": scores["token_exact"], "masked loss": scores["loss"]}


def one(arm: str, seed: int, scale: float) -> dict[str, float]:
    """Run an arm; return its scores on spans, and F1 of names after finetuning."""
    start, found = read_on(arm, seed, scale)
    train, test = train_test_files("ner", JOBS["ner"], quick=False)
    settings = [
        *JOBS["ner"].settings, f"data={train}", "data.validation_fraction=0", f"init_from={start}", f"seed={seed}",
        f"objective.class_names={json.dumps(classes(JOBS['ner'], (train, test)))}", f"batch.size={TAGGING_ROWS}",
        f"max_steps={max(2, round(TAGGING_STEPS * scale))}", *TUNED,
    ]  # fmt: skip
    directory = RESULTS / f"{arm.replace(' ', '-')}-{seed}-names"
    run(load("token_classification", settings), directory, silent)
    return found | {"F1": evaluate(directory, [str(test)])["f1"]}


def table() -> str:
    """Return a Markdown table of the means and the values of every seed."""
    names = ("filled", "tokens", "masked loss", "F1")
    lines = [f"| pretraining | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
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
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of all steps, for a trial")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds if args.run else ():
        for arm in args.only:
            file = RESULTS / f"{arm.replace(' ', '-')}-seed{seed}.json"
            if not file.exists():
                found = one(arm, seed, args.scale)
                file.write_text(json.dumps(found, indent=1))
                print(f"{arm}, seed {seed}: {found}", flush=True)
    if args.table:
        print(table())


if __name__ == "__main__":
    main()
