"""Right against wrong answers: a reward model and DPO on SmolLM2-135M-Instruct with LoRA.

    python -m bench.learning.right_wrong --run [--tokens 300000] [--seeds 0] [--lock FILE]     # resumable
    python -m bench.learning.right_wrong --table

The pairs are those of natural instructions whose authors wrote a wrong answer to a question with a known right one: CosmosQA (025),
QASC (042) and MultiRC (054 and 055). The prompt is passage and question, `chosen` the right answer, `rejected` the wrong one. Passages
are held out: no two parts share the first 60 characters of one. Training reads about `--tokens` tokens of pairs, once.

Measured on 600 held-out pairs, and on the 221 pairs of hhh_alignment (BIG-bench), which nothing is trained on: accuracy and
calibration of the reward model, and how often the model before and after DPO gives the right answer the higher log-probability, in
total (acc) and by character (acc_norm).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.learning.frontier import holding
from bench.learning.prompts import prepare_model, write_records
from firth.corpora.catalog import fetch
from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.evaluate.tokenizer_match import load_tokenizer
from firth.io.atomic import write_text
from firth.runs.evaluate_prompts import evaluate_prompts
from firth.runs.inference import evaluate_run

OUT = Path("runs/right_wrong")
GENERATED = ("subtask025_cosmosqa_incorrect_answer_generation", "subtask042_qasc_incorrect_option_generation")
RIGHT, WRONG = "subtask054_multirc_write_correct_answer", "subtask055_multirc_write_incorrect_answer"
ANSWER = "Correct Answer:"
HELD_OUT, LONGEST, PASSAGE = 600, 300, 60
"""Held-out pairs; most tokens of prompt and longer answer; characters that recognize a passage."""
ROWS = 4
SETTINGS = ("peft=lora", "optimizer.lr=2e-4", f"batch.size={ROWS}", "evaluation.every=0", "checkpoint.every=25")
ARMS = {
    "reward_model": ("reward_model", "examples.max_length=320"),
    "dpo": ("dpo", "examples.base.max_length=320"),
}
PARTS = ("held-out", "hhh")
TASK = """task: {name}
data: {name}.jsonl
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[chosen, rejected]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def read(task: str) -> list[dict[str, Any]]:
    path = fetch("natural_instructions") / f"{task}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def pairs() -> list[dict[str, str]]:
    """Return all pairs, the first wrong answer of each record."""
    found = []
    for task in GENERATED:
        for record in read(task):
            prompt, known, right = record["input"].partition(ANSWER)
            if known and right.strip():
                found.append(
                    {"prompt": prompt.strip(), "chosen": right.strip(), "rejected": record["outputs"][0].strip()}
                )
    wrong = {record["input"].strip(): record["outputs"][0].strip() for record in read(WRONG)}
    for record in read(RIGHT):
        prompt = record["input"].strip()
        if prompt in wrong:
            found.append({"prompt": prompt, "chosen": record["outputs"][0].strip(), "rejected": wrong[prompt]})
    return [pair for pair in found if pair["chosen"] != pair["rejected"]]


def hhh() -> list[dict[str, str]]:
    """Return the pairs of hhh_alignment."""
    found = []
    for path in sorted((fetch("bigbench") / "hhh_alignment").glob("*/task.json")):
        for example in json.loads(path.read_text("utf-8"))["examples"]:
            scores = example["target_scores"]
            best, worst = max(scores, key=scores.get), min(scores, key=scores.get)
            found.append({"prompt": example["input"].strip(), "chosen": best.strip(), "rejected": worst.strip()})
    return found


def passage(pair: dict[str, str]) -> str:
    """Return the beginning of a pair's passage, to recognize it in others."""
    return pair["prompt"].partition(":")[2].strip()[:PASSAGE].lower()


def prepare(tokens: int) -> None:
    """Write the pairs to train on, the held-out ones, and the tasks of both measurements."""
    tokenizer = load_tokenizer(prepare_model())
    rng, every = np.random.default_rng(0), pairs()

    def size(pair: dict[str, str]) -> int:
        return sum(len(tokenizer.encode(f"{pair['prompt']}\n{pair[side]}")) for side in ("chosen", "rejected"))

    held: list[dict[str, str]] = []
    train: list[dict[str, str]] = []
    left, seen = tokens, set[str]()
    for i in rng.permutation(len(every)):
        pair = every[i]
        if size(pair) > 2 * LONGEST:
            continue
        if len(held) < HELD_OUT:
            held.append(pair)
            seen.add(passage(pair))
        elif left > 0 and passage(pair) not in seen:
            train.append(pair)
            left -= size(pair)
    write_records(OUT / "train.jsonl", train)
    write_records(OUT / "held-out.jsonl", held)
    write_records(OUT / "hhh.jsonl", hhh())
    for name in PARTS:
        write_text(OUT / f"{name}.yaml", TASK.format(name=name))
    print(f"{len(train):,} pairs to train on, {tokens - left:,} tokens; {len(held)} held out", flush=True)


def train(name: str, seed: int) -> Path:
    """Train with the command of a user; a run that was stopped goes on."""
    run = OUT / f"{name}-{seed}"
    steps = max(1, len((OUT / "train.jsonl").read_text("utf-8").splitlines()) // ROWS)
    if not (run / "model").is_dir():
        recipe, length = ARMS[name]
        command = [
            recipe, f"init_from={prepare_model()}", f"data.path={OUT / 'train.jsonl'}", f"data.validation_path=[{OUT / 'held-out.jsonl'}]",
            length, f"max_steps={steps}", f"seed={seed}", *SETTINGS, "--out", str(run),
        ]  # fmt: skip
        print("firth train " + " ".join(command), flush=True)
        subprocess.run([sys.executable, "-m", "firth", "train", *command], check=True)
    return run


def measure_choices(name: str, model: Path) -> None:
    """Measure how often the right answer is more likely, unless it is known."""
    out = OUT / "results" / name
    if not (out / "results.json").is_file():
        tasks = [str(OUT / f"{part}.yaml") for part in PARTS]
        evaluate_prompts([str(model)], tasks, PromptConfig(chat=True), weights="bf16", out=out)


def measure_rewards(name: str, model: Path) -> None:
    """Measure accuracy and calibration of a reward model, unless they are known."""
    file = OUT / "results" / name / "rewards.json"
    if not file.is_file():
        found = {
            part: json.loads(evaluate_run(model, [str(OUT / f"{part}.jsonl")], task=None, limit=None, as_json=True))
            for part in PARTS
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(found, indent=1) + "\n")


def table() -> str:
    """Return the results as Markdown, with 95% intervals of the shares."""
    rows = ["| model | pairs | right answer preferred | by character | calibration error |", "|---|---|---|---|---|"]

    def share(value: float, half: float) -> str:
        return f"{value:.3f} ± {half:.3f}"

    for path in sorted((OUT / "results").glob("*/results.json")):
        for part, found in json.loads(path.read_text("utf-8"))["results"].items():
            cells = [share(found[f"{n},none"], 1.96 * found[f"{n}_stderr,none"]) for n in ("acc", "acc_norm")]
            rows.append(f"| {path.parent.name} | {part} | {' | '.join(cells)} | |")
    for path in sorted((OUT / "results").glob("*/rewards.json")):
        for part, found in json.loads(path.read_text("utf-8")).items():
            count = len((OUT / f"{part}.jsonl").read_text("utf-8").splitlines())
            accuracy = found["accuracy"]
            half = 1.96 * (accuracy * (1 - accuracy) / count) ** 0.5
            rows.append(
                f"| {path.parent.name} | {part} | {share(accuracy, half)} | | {found['calibration_error']:.3f} |"
            )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lock", type=Path, help="a file to hold an flock on during each step")
    args = parser.parse_args(argv)
    if args.run:
        OUT.mkdir(parents=True, exist_ok=True)
        if not (OUT / "train.jsonl").is_file():
            prepare(args.tokens)
        with holding(args.lock):
            measure_choices("before", prepare_model())
        for seed in args.seeds:
            for name in ARMS:
                with holding(args.lock):
                    run = train(name, seed)
                with holding(args.lock):
                    (measure_rewards if name == "reward_model" else measure_choices)(f"{name}-{seed}", run)
    if args.run or args.table:
        print(table())


if __name__ == "__main__":
    main()
