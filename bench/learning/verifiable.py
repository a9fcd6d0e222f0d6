"""Reinforcement learning from a verifiable reward: sums of two numbers, with the result in brackets.

    python -m bench.learning.verifiable --run                          # all missing runs: about 5 minutes on one core; resumable
    python -m bench.learning.verifiable --run --only grpo --seeds 0    # some
    python -m bench.learning.verifiable --table                        # markdown for docs/results/verifiable-rewards.md

A small decoder is first trained by supervised finetuning on problems with two answers each, "12 + 35" -> "[47]" and "[51]", of
which one is right: it learns the format, and is mostly wrong. Each method then starts from it and trains on other problems,
whose answers it never sees: the reward is 1 for the right result in brackets, plus 0.1 for a number in brackets. No problem is
in two of the parts. `overoptimized` is GRPO with a reward that can be raised without being right: digits count too.

Accuracy is measured on held-out problems, before and after: one answer sampled at temperature 1, and the most likely answer. The
interval is that of Wilson at 95% over the held-out problems. Each run has one JSON in runs/verifiable.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.harness import busy_seconds, machine, other_load
from firth.data.dialogues import prompts as read_prompts
from firth.data.examples import DataConfig
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.config import decoder_config
from firth.pretrained.load_save import load_model
from firth.recipes import post_training
from firth.report.sections import parting
from firth.runs.examples import DialoguesConfig
from firth.runs.recipe import BatchConfig, TokenizerConfig, load
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import CONTROL
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget

LARGEST = 49
"""Largest number of a sum."""
SUPERVISED, TRAINED, HELD_OUT = 1400, 600, 500
"""Problems of the three parts, of the 2,500 that there are."""
SUPERVISED_STEPS = 1200
SEEDS = (0, 1, 2)
MAX_NEW_TOKENS = 10
ANSWER = re.compile(r"\[(\d+)\]")

ANSWERS, PHASES = 128, 30
"""Answers of a rollout phase, and phases of a run."""
ROLLOUT = (f"examples.rollout_size={ANSWERS}", f"examples.max_new_tokens={MAX_NEW_TOKENS}", "optimizer.lr=3e-4")
GROUPS = (*ROLLOUT, "batch.size=128", "examples.num_generations=8", f"max_steps={PHASES}", "evaluation.every=10")
METHODS: dict[str, tuple[str, ...]] = {
    "grpo": GROUPS,
    "rloo": GROUPS,
    "ppo": (*ROLLOUT, "batch.size=64", "examples.num_epochs=2", f"max_steps={4 * PHASES}", "evaluation.every=40"),
    "overoptimized": (*GROUPS, "optimizer.lr=1e-3", f"max_steps={2 * PHASES}", "objective.beta=0"),
}
"""Method -> settings of its recipe. PPO takes four steps on each rollout phase, the others one."""
REWARDS = {"overoptimized": (("correct", "digits"), (1.0, 0.15))}
"""Method -> functions of this module and their weights, where they are not those of `TRUE_REWARDS`."""
TRUE_REWARDS = (("correct", "well_formed"), (1.0, 0.1))


def correct(completion: str, result: str) -> float:
    """Return 1 for the right result in brackets, and nothing else."""
    found = ANSWER.fullmatch(completion.strip())
    return float(found is not None and found[1] == result)


def well_formed(completion: str) -> float:
    """Return 1 for a number in brackets, and nothing else."""
    return float(ANSWER.fullmatch(completion.strip()) is not None)


def digits(completion: str) -> float:
    """Return the number of digits: a proxy that can be raised without being right."""
    return float(sum(character.isdigit() for character in completion))


def write_problems(out: Path) -> dict[str, Path]:
    """Write the three parts; return their files."""
    out.mkdir(parents=True, exist_ok=True)
    problems = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(0).shuffle(problems)
    files, first = {}, 0
    for name, count in (("supervised", SUPERVISED), ("trained", TRAINED), ("held_out", HELD_OUT)):
        files[name] = out / f"{name}.jsonl"
        rows = [{"prompt": f"{a} + {b}", "result": str(a + b)} for a, b in problems[first : first + count]]
        if name == "supervised":
            wrong = random.Random(1)
            rows = [
                {"prompt": row["prompt"], "completion": f"[{int(row['result']) + shift}]"}
                for row in rows
                for shift in (0, wrong.randint(1, 9))
            ]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        first += count
    return files


def start(results: Path, files: dict[str, Path]) -> Path:
    """Train the decoder that every method starts from; return its run."""
    size = len(CONTROL) + 256  # digits are tokens of their own
    recipe = replace(
        post_training.sft(),
        name="verifiable-start",
        data=DataConfig(path=(str(files["supervised"]),)),
        tokenizer=TokenizerConfig(algorithm="byte-bpe", vocab_size=size),
        model=decoder_config(vocab_size=size, hidden_size=64, num_layers=2, num_heads=4, max_positions=64),
        examples=DialoguesConfig(max_length=48),
        batch=BatchConfig(size=48),
        optimizer=OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.0),
        budget=Budget(max_steps=SUPERVISED_STEPS),
    )
    run(recipe, results / "start", log=print)
    return results / "start"


def accuracy(directory: Path, held_out: Path) -> dict[str, float]:
    """Return the shares of held-out problems that one sampled answer, and the most likely answer, are right for."""
    tokenizer, model = Tokenizer.load(directory / "model"), load_model(directory / "model")
    prompts, _, _ = read_prompts([str(held_out)], tokenizer, 48)
    found = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=temperature, seed=1)
        answers = Engine(model, tokenizer).generate([p.tokens for p in prompts], sampling)
        texts = [(answer.text, str(prompt.fields["result"])) for answer, prompt in zip(answers, prompts, strict=True)]
        found[name] = statistics.mean(correct(*text) for text in texts)
        found[f"{name}_format"] = statistics.mean(well_formed(text) for text, _ in texts)
    return found | {"problems": len(prompts)}


def measure(method: str, seed: int, base: Path, files: dict[str, Path], out: Path) -> dict[str, Any]:
    """Train one method with one seed; return its accuracy, the last rollout batch and the time."""
    names, weights = REWARDS.get(method, TRUE_REWARDS)
    functions = [f"bench.learning.verifiable:{name}" for name in names]
    settings = [
        f"init_from={base}", f"data.path={files['trained']}", f"data.validation_path={files['held_out']}", f"seed={seed}",
        f"examples.reward_function=[{', '.join(functions)}]", f"examples.reward_weights={list(weights)}",
        "examples.true_reward_function=bench.learning.verifiable:correct", *METHODS[method],
    ]  # fmt: skip
    before, cpu, clock = busy_seconds(), time.process_time(), time.perf_counter()
    done = run(load("grpo" if method == "overoptimized" else method, settings), out, log=print)
    wall = time.perf_counter() - clock
    others = other_load(before, busy_seconds(), time.process_time() - cpu, wall)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    rollouts = [row for row in rows if row["split"] == "rollouts"]
    parted = parting(rollouts)
    curve = [[row["step"], row["reward/correct"]] for row in rows if row["split"] == "valid"]
    return accuracy(out, files["held_out"]) | {
        "method": method, "seed": seed, "steps": done.steps, "answers": ANSWERS * len(rollouts), "seconds": done.seconds, "wall": wall,
        "others": others, "last": rollouts[-1], "curve": curve, "parting": parted and dataclasses.asdict(parted), "machine": machine(),
    }  # fmt: skip


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95% interval of Wilson for a share of n.

    >>> [round(x, 3) for x in wilson(0.5, 100)]
    [0.404, 0.596]
    """
    z = 1.959964
    center, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (center - spread) / (1 + z * z / n), (center + spread) / (1 + z * z / n)


def interval(share: float, n: int) -> str:
    """Return a share with its interval."""
    low, high = wilson(share, n)
    return f"{share:.3f} ({low:.3f} to {high:.3f})"


def table(results: Path) -> str:
    """Return a Markdown table of the existing runs."""
    lines = [
        "| run | seed | sampled answer right | most likely answer right | in brackets | KL, nats an answer | answers | s | others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(results.glob("*.json"), key=lambda path: (path.stem != "start", path.stem)):
        row = json.loads(path.read_text("utf-8"))
        n = row["problems"]
        cells = [
            row["method"],
            row.get("seed", ""),
            interval(row["sampled"], n),
            interval(row["greedy"], n),
            f"{row['sampled_format']:.3f}",
        ]
        if "last" in row:
            load_of_others = "" if row["others"] is None else f"{row['others']:.0%}"
            cells += [
                f"{row['last']['kl_per_answer']:.2f}",
                f"{row['answers']:,}",
                f"{row['seconds']:.0f}",
                load_of_others,
            ]
        else:
            cells += ["0", "", "", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--results", type=Path, default=Path("runs/verifiable"))
    args = parser.parse_args(argv)
    results: Path = args.results
    if args.run:
        files = write_problems(results / "problems")
        base = start(results, files)
        first = results / "start.json"
        if not first.exists():
            first.write_text(json.dumps({"method": "start"} | accuracy(base, files["held_out"])), "utf-8")
        print(first.read_text("utf-8"), flush=True)
        for seed in args.seeds:
            for method in args.only:
                file = results / f"{method}-{seed}.json"
                if not file.exists():
                    file.write_text(
                        json.dumps(measure(method, seed, base, files, results / f"{method}-{seed}")), "utf-8"
                    )
                    print(file.read_text("utf-8"), flush=True)
    if args.run or args.table:
        print(table(results))


if __name__ == "__main__":
    main()
