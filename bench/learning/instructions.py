"""Tune SmolLM2-135M-Instruct on natural instructions without twelve tasks, and measure it on the twelve.

    python -m bench.learning.instructions --run [--tokens 300000] [--seeds 0]     # resumable
    python -m bench.learning.instructions --table

Before, after full finetuning and after LoRA. Training reads about `--tokens` tokens, the same number from each of the other 49
tasks (definition and input as the user's turn, an output as the assistant's), once. Every fifth task is held out. Records whose
input begins like one of a held-out task are left out of training, because the tasks share their passages. Records of more than
1,000 tokens are left out everywhere. Held-out items are sent with the chat template, without examples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.learning.prompts import prepare_model, write_records
from firth.corpora.catalog import fetch
from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.evaluate.tokenizer_match import load_tokenizer
from firth.io.atomic import write_text
from firth.runs.evaluate_prompts import evaluate_prompts

OUT = Path("runs/instructions")
ARMS = {"full": ["optimizer.lr=2e-5"], "lora": ["peft=lora", "optimizer.lr=5e-4"]}
LONGEST = 1000
TASK = """task: held_out_instructions
data: test.jsonl
output_type: generate_until
doc_to_text: "{{definition}}\\n\\n{{input}}"
doc_to_target: outputs
group_by: task
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 64}
metric_list: [{metric: exact_match, ignore_case: true, ignore_punctuation: true}, {metric: f1}]
filter_list: [{name: none, filter: [{function: remove_whitespace}]}]
"""


def prompt(record: dict[str, Any]) -> str:
    return f"{record['definition']}\n\n{record['input']}"


def beginning(record: dict[str, Any]) -> str:
    """Return the first 60 characters of a record's passage, to recognize it in other tasks."""
    return record["input"].partition(":")[2].strip()[:60].lower()


def prepare(tokens: int, items: int) -> None:
    """Write train.jsonl and test.jsonl."""
    model = prepare_model()
    tokenizer = load_tokenizer(model)
    tasks = [
        [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in sorted(fetch("natural_instructions").glob("*.jsonl"))
    ]
    rng = np.random.default_rng(0)

    def length(record: dict[str, Any]) -> int:
        return len(tokenizer.encode(prompt(record) + record["outputs"][0]))

    test: list[dict[str, Any]] = []
    for task in tasks[2::5]:
        fitting = [task[i] for i in rng.permutation(len(task))[: 4 * items] if length(task[i]) < LONGEST]
        test += fitting[:items]
    seen = {beginning(record) for record in test}
    train: list[dict[str, Any]] = []
    kept = [task for number, task in enumerate(tasks) if number % 5 != 2]
    for task in kept:
        left = tokens // len(kept)
        for i in rng.permutation(len(task)):
            size = length(task[i])
            if size >= LONGEST or beginning(task[i]) in seen:
                continue
            if left <= 0:
                break
            left -= size
            train.append(task[i])
    write_records(OUT / "test.jsonl", test)
    write_records(
        OUT / "train.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": prompt(record)},
                    {"role": "assistant", "content": record["outputs"][int(rng.integers(len(record["outputs"])))]},
                ]
            }
            for record in (train[i] for i in rng.permutation(len(train)))
        ],
    )
    write_text(OUT / "held_out_instructions.yaml", TASK)
    print(f"{len(train):,} training records, {len(test)} items of {len(tasks) - len(kept)} tasks")


def train(name: str, options: list[str], seed: int) -> Path:
    """Train with the command of a user, unless the run is complete."""
    run = OUT / f"{name}-{seed}"
    steps = max(1, len((OUT / "train.jsonl").read_text("utf-8").splitlines()) // 8)
    if not (run / "model").is_dir():
        command = [
            "sft", f"init_from={prepare_model()}", f"data.path={OUT / 'train.jsonl'}", "examples.max_length=1024", "batch.size=8",
            "batch.gradient_accumulation_steps=4", "checkpoint.every=20", f"max_steps={steps}", f"seed={seed}", *options, "--out", str(run),
        ]  # fmt: skip
        print("firth train " + " ".join(command), flush=True)
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "firth", "train", *command], check=True)
        write_text(run / "seconds.json", json.dumps(time.monotonic() - began) + "\n")
    return run


def evaluate(name: str, model: Path) -> None:
    """Evaluate a model on the held-out tasks, unless its results are there."""
    if (OUT / "results" / name / "results.json").is_file():
        return
    began = time.monotonic()
    evaluate_prompts(
        [str(model)], [str(OUT / "held_out_instructions.yaml")], PromptConfig(chat=True), weights="bf16",
        out=OUT / "results" / name,
    )  # fmt: skip
    print(f"{name}: evaluated in {time.monotonic() - began:.0f} s", flush=True)


def table() -> str:
    """Return a table of the models: exact match and F1 over all items, with standard errors clustered by task."""
    rows = ["| model | exact match | F1 |", "|---|---|---|"]
    for path in sorted((OUT / "results").glob("*/results.json")):
        found = json.loads(path.read_text("utf-8"))["results"]["held_out_instructions"]
        cells = [
            f"{found[f'{name},none']:.3f} ± {1.96 * found[f'{name}_stderr,none']:.3f}" for name in ("exact_match", "f1")
        ]
        rows.append(f"| {path.parent.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--items", type=int, default=20, help="items of each held-out task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    if args.run:
        OUT.mkdir(parents=True, exist_ok=True)
        if not (OUT / "train.jsonl").is_file():
            prepare(args.tokens, args.items)
        evaluate("before", prepare_model())
        for seed in args.seeds:
            for name, options in ARMS.items():
                evaluate(f"{name}-{seed}", train(name, options, seed))
    if args.table:
        print(table())


if __name__ == "__main__":
    main()
