"""Reward against divergence of PPO, GRPO, RLOO, DPO, IPO and best-of-n: sentiment control of movie reviews.

    python -m bench.learning.frontier --run                                # all missing runs: about 25 minutes on two idle cores
    python -m bench.learning.frontier --run --only dpo --seeds 0           # some
    python -m bench.learning.frontier --run --lock FILE                    # hold a lock during five runs at a time
    python -m bench.learning.frontier --table                              # markdown of the existing runs, and RESULTS/report.html

The setting is that of the DPO paper (Rafailov 2023, section 6.1), with a smaller model and a smaller text. A prompt is the first four
words of a sentence of a movie review (`firth fetch sentiment`), the answer is the rest. The reward is known: the ratings of the
answer's words in VADER's lexicon (`firth fetch vader_lexicon`), in the range -1 to 1. A decoder is finetuned on the sentences.
From it, four answers to each of 2,500 prompts are sampled; the best and the worst are a comparison. DPO and IPO train on the
comparisons, PPO, GRPO and RLOO on the prompts with the reward itself. Each method has four strengths of its penalty and three seeds.

Measured on 500 prompts that nothing was trained on, one answer each at temperature 1: the mean reward, and the divergence from the
finetuned decoder, exact at each state (`firth pipeline`'s stage `frontier`). The divergence of best-of-n is log n - (n - 1)/n, the
largest that it can have. Each run is a line of RESULTS/results.jsonl; a stopped command continues.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import math
import multiprocessing
import random
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.harness import busy_seconds, machine, other_load
from firth.corpora import catalog, readers
from firth.data.examples import DataConfig
from firth.model.config import decoder_config
from firth.pipelines.best_of_n import RankAnswers, SampleAnswers
from firth.pipelines.frontier import CompareMethods
from firth.recipes import post_training
from firth.report.charts import Curve, Figure
from firth.report.page import Report, Section, write
from firth.runs.examples import DialoguesConfig
from firth.runs.recipe import BatchConfig, EvalConfig, TokenizerConfig, load
from firth.runs.run import run
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget

PROMPT_WORDS, SHORTEST, LONGEST = 4, 9, 32
"""Words of a prompt, and of the sentences that are kept."""
PROMPTS, HELD_OUT = 2500, 500
VOCAB_SIZE = 1024
SUPERVISED_STEPS, SUPERVISED_ROWS = 800, 64
MAX_NEW_TOKENS, MAX_LENGTH = 48, 96
SEEDS = (0, 1, 2)
BEST_OF = (2, 4, 8, 16)
REWARD = "bench.learning.frontier:sentiment"
WORD = re.compile(r"[a-z][a-z'-]*[a-z]|[a-z]")

ANSWERS, PHASES = 64, 40
PAIRS, PAIR_STEPS = 32, 80
ROLLOUT = (
    f"examples.reward_function={REWARD}", f"examples.rollout_size={ANSWERS}", f"examples.max_new_tokens={MAX_NEW_TOKENS}",
    "examples.num_generations=8", "optimizer.lr=4e-4", "evaluation.every=0", "checkpoint.every=0",
)  # fmt: skip
COMPARED = (
    f"batch.size={PAIRS}", f"max_steps={PAIR_STEPS}", f"examples.base.max_length={MAX_LENGTH}", "optimizer.lr=3e-4", "evaluation.every=0",
    "checkpoint.every=0",
)  # fmt: skip
GROUPS = (*ROLLOUT, f"batch.size={ANSWERS}", f"max_steps={PHASES}")


@dataclass(frozen=True)
class Method:
    """A method with the strengths of its penalty.

    Args:
        recipe: Name of the recipe.
        strength: The field that is varied.
        strengths: Its values, from weak to strong.
        settings: Settings that are the same in all runs.
        compared: Whether it trains on comparisons.
    """

    recipe: str
    strength: str
    strengths: tuple[float, ...]
    settings: tuple[str, ...]
    compared: bool = False


METHODS = {
    "ppo": Method(
        "ppo", "examples.kl_coef", (0.02, 0.05, 0.1, 0.2),
        (*ROLLOUT, "batch.size=64", "examples.num_epochs=2", f"max_steps={2 * PHASES}"),
    ),
    "grpo": Method("grpo", "objective.beta", (0.05, 0.15, 0.3, 0.6), GROUPS),
    "rloo": Method("rloo", "examples.kl_coef", (0.02, 0.05, 0.1, 0.2), GROUPS),
    "dpo": Method("dpo", "objective.beta", (0.03, 0.1, 0.3, 1.0), COMPARED, compared=True),
    "ipo": Method("dpo", "objective.beta", (0.3, 1.0, 3.0, 10.0), (*COMPARED, "objective.loss_type=ipo"), compared=True),
}  # fmt: skip


@functools.cache
def lexicon() -> dict[str, float]:
    """Return the rating of each word, from -4 to 4."""
    rows = readers.records(catalog.paths("vader_lexicon", log=lambda _: None))
    return {record["text"]: record["score"] for _, record in rows}


def sentiment(completion: str) -> float:
    """Return the ratings of a text's words, summed and mapped to -1 to 1 as VADER does it: s / sqrt(s^2 + 15)."""
    total = sum(lexicon().get(word, 0.0) for word in WORD.findall(completion.lower()))
    return total / math.sqrt(total * total + 15)


@dataclass(frozen=True)
class Files:
    """Files and models that the methods share.

    Args:
        prompts: Prompts to train on.
        held_out: Prompts to measure on.
        start: The finetuned decoder.
        comparisons: Preferences between its answers.
    """

    prompts: Path
    held_out: Path
    start: Path
    comparisons: Path


def write_sentences(out: Path) -> dict[str, Path]:
    """Write the sentences as prompt and completion, in three parts without a common prompt; return their files."""
    out.mkdir(parents=True, exist_ok=True)
    rows = {}
    for _, record in readers.records(catalog.paths("sentiment")):
        words = record["text"].split()
        if SHORTEST <= len(words) <= LONGEST:
            prompt = " ".join(words[:PROMPT_WORDS])
            rows.setdefault(prompt, {"prompt": prompt, "completion": " ".join(words[PROMPT_WORDS:])})
    kept = list(rows.values())
    random.Random(0).shuffle(kept)
    parts = {
        "held_out": kept[:HELD_OUT],
        "prompts": kept[HELD_OUT : HELD_OUT + PROMPTS],
        "supervised": kept[HELD_OUT + PROMPTS :],
    }
    files = {name: out / f"{name}.jsonl" for name in parts}
    for name, part in parts.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    return files


def train_start(
    supervised: Path, out: Path, hidden_size: int = 64, num_layers: int = 2, steps: int = SUPERVISED_STEPS
) -> Path:
    """Finetune a decoder on the sentences; return its run."""
    recipe = replace(
        post_training.sft(),
        name="frontier-start",
        data=DataConfig(path=(str(supervised),)),
        tokenizer=TokenizerConfig(algorithm="byte-bpe", vocab_size=VOCAB_SIZE),
        model=decoder_config(
            vocab_size=VOCAB_SIZE, hidden_size=hidden_size, num_layers=num_layers, num_heads=4, max_positions=128
        ),
        examples=DialoguesConfig(max_length=MAX_LENGTH),
        batch=BatchConfig(size=SUPERVISED_ROWS),
        optimizer=OptimizerConfig(name="adamw", lr=4e-3, weight_decay=0.1),
        evaluation=EvalConfig(every=100),
        budget=Budget(max_steps=steps),
    )
    run(recipe, out, log=print)
    return out


def write_comparisons(start: Path, prompts: Path, results: Path, suffix: str = "") -> Path:
    """Sample four answers to each prompt, and compare the best with the worst; return the file of preferences."""
    answers, ranked = results / f"answers{suffix}", results / f"ranked{suffix}"
    for directory in (answers, ranked):
        directory.mkdir(exist_ok=True)
    if not (answers / SampleAnswers.output).exists():
        sample = SampleAnswers(str(start), (str(prompts),), num_samples=4, max_new_tokens=MAX_NEW_TOKENS)
        print(sample.run(answers), flush=True)
    if not (ranked / RankAnswers.output).exists():
        print(RankAnswers((str(answers / SampleAnswers.output),), reward_function=REWARD).run(ranked), flush=True)
    return ranked / RankAnswers.output


def prepare(results: Path) -> Files:
    """Finetune the decoder, sample its answers and compare them; what exists is kept."""
    files = write_sentences(results / "sentences")
    start = train_start(files["supervised"], results / "start")
    return Files(files["prompts"], files["held_out"], start, write_comparisons(start, files["prompts"], results))


def compared(
    files: Files, directory: Path, models: Sequence[Path], best_of: Sequence[int] = (), seed: int = 0
) -> list[dict[str, Any]]:
    """Return the results of the decoder that all start from, of further models, and of best-of-n."""
    directory.mkdir(parents=True, exist_ok=True)
    stage = CompareMethods(
        tuple(map(str, models)), str(files.start), (str(files.held_out),), reward_function=REWARD, best_of=tuple(best_of),
        max_new_tokens=MAX_NEW_TOKENS, limit=0, seed=seed,
    )  # fmt: skip
    stage.run(directory)
    return json.loads((directory / stage.output).read_text("utf-8"))  # type: ignore[no-any-return]


def measure_best_of_n(files: Files, seed: int, out: Path) -> list[dict[str, Any]]:
    """Return a row for the start, and one for each n."""
    rows = compared(files, out, (), BEST_OF, seed)
    for row, n in zip(rows, (1, *BEST_OF), strict=True):
        row |= {"method": "best of n", "strength": n, "seed": seed}
    return rows


def measure(name: str, strength: float, seed: int, files: Files, out: Path) -> dict[str, Any]:
    """Train one method with one strength and one seed; return its row."""
    method = METHODS[name]
    data = files.comparisons if method.compared else files.prompts
    settings = [
        f"init_from={files.start}",
        f"data.path={data}",
        f"seed={seed}",
        f"{method.strength}={strength}",
        *method.settings,
    ]
    before, cpu, clock = busy_seconds(), time.process_time(), time.perf_counter()
    done = run(load(method.recipe, settings), out, log=print)
    wall = time.perf_counter() - clock
    others = other_load(before, busy_seconds(), time.process_time() - cpu, wall)
    [_, row] = compared(files, out / "measured", [out])
    return row | {
        "method": name, "strength": strength, "seed": seed, "steps": done.steps, "seconds": done.seconds, "wall": wall, "others": others,
        "machine": machine(),
    }  # fmt: skip


@contextlib.contextmanager
def holding(path: Path | None) -> Iterator[None]:
    """Hold a lock that other programs may wait for; None holds nothing."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    time.sleep(1)  # so that a program that waits for it comes next


def read_results(results: Path) -> list[dict[str, Any]]:
    path = results / "results.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def add(results: Path, rows: Sequence[dict[str, Any]]) -> None:
    with (results / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        print(row["method"], row["strength"], row["seed"], row["reward"], row["kl"], row.get("seconds"), flush=True)


def run_one(results: Path, name: str, strength: float, seed: int) -> None:
    """Do one run and write its row."""
    files = prepare(results)
    add(results, [measure(name, strength, seed, files, results / f"{name}-{strength:g}-{seed}")])


def run_missing(results: Path, names: Sequence[str], seeds: Sequence[int], lock: Path | None, jobs: int) -> None:
    """Run what is missing, one strength of all methods under one lock, in `jobs` processes of one thread each."""
    results.mkdir(parents=True, exist_ok=True)
    with holding(None if (results / "ranked" / RankAnswers.output).exists() else lock):
        files = prepare(results)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for seed in seeds:
            if missing(results, "best of n", seed):
                with holding(lock):
                    add(results, measure_best_of_n(files, seed, results / f"best-of-n-{seed}"))
            for place in (1, 2, 0, 3):  # the middle of the curves first
                chosen = [(name, METHODS[name].strengths[place]) for name in names]
                if any(strength in missing(results, name, seed) for name, strength in chosen):
                    with holding(lock):
                        left = [
                            (name, strength) for name, strength in chosen if strength in missing(results, name, seed)
                        ]
                        started = [pool.submit(run_one, results, name, strength, seed) for name, strength in left]
                        for one in started:
                            one.result()


def missing(results: Path, name: str, seed: int) -> list[float]:
    """Return the strengths of a method that have no row yet, with one seed."""
    known = {(row["method"], row["strength"], row["seed"]) for row in read_results(results)}
    strengths = (1, *BEST_OF) if name == "best of n" else METHODS[name].strengths
    return [strength for strength in strengths if (name, strength, seed) not in known]


T_TWO_DEGREES = {2: 12.706, 3: 4.303}
"""Number of seeds -> 97.5% quantile of Student's t."""


@dataclass(frozen=True)
class Point:
    """Mean over seeds of one method with one strength, and half the 95% interval over seeds."""

    method: str
    strength: float
    seeds: int
    kl: tuple[float, float]
    reward: tuple[float, float]
    length: float
    seconds: float
    others: float


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the 95% interval of Student's t; NaN for one value.

    >>> [round(x, 3) for x in mean_and_half([1.0, 2.0, 3.0])]
    [2.0, 2.484]
    """
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), T_TWO_DEGREES[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def points(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """Return the mean of each method and strength, in the order of the methods."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["strength"]), []).append(row)
    order = [*METHODS, "best of n"]

    def mean(found: Sequence[dict[str, Any]], name: str) -> float:
        known = [row[name] for row in found if row.get(name) is not None]
        return statistics.mean(known) if known else math.nan

    return [
        Point(
            method, strength, len(found),
            mean_and_half([row["kl"] for row in found]), mean_and_half([row["reward"][0] for row in found]),
            mean(found, "length"), mean(found, "seconds"), mean(found, "others"),
        )
        for (method, strength), found in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]  # fmt: skip


def table(found: Sequence[Point]) -> str:
    """Return the points as Markdown."""
    lines = [
        "| method | strength | seeds | KL, nats an answer | reward | tokens | s | others |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        field = "n" if one.method == "best of n" else METHODS[one.method].strength
        ends = [f"{x:.{digits}f}" if x == x else "" for x, digits in ((one.length, 1), (one.seconds, 0))]
        others = f"{one.others:.0%}" if one.others == one.others else ""
        lines.append(
            f"| {one.method} | {field} = {one.strength:g} | {one.seeds} | {one.kl[0]:.2f} ± {one.kl[1]:.2f} "
            f"| {one.reward[0]:.3f} ± {one.reward[1]:.3f} | {' | '.join(ends)} | {others} |"
        )
    return "\n".join(lines)


def frontier_page(found: Sequence[Point]) -> Report:
    """Return the page: reward over the divergence, one curve for each method."""
    curves = []
    for name in (*METHODS, "best of n"):
        own = sorted((one for one in found if one.method == name), key=lambda one: one.kl[0])
        if own:
            intervals = [(one.reward[0] - one.reward[1], one.reward[0] + one.reward[1]) for one in own]
            curves.append(
                Curve(name, [one.kl[0] for one in own], [one.reward[0] for one in own], points=True, intervals=intervals,
                      dashed=name == "best of n")
            )  # fmt: skip
    note = "Each point is a strength of the penalty, a mean over seeds. Intervals are 95%, over seeds. The KL of best-of-n is its bound."
    figure = Figure(
        "Reward over the divergence",
        "KL from the finetuned decoder, nats per answer",
        "mean reward",
        tuple(curves),
        note,
    )
    return Report("Sentiment control", sections=(Section("", figures=[figure]),))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--lock", type=Path, help="a file to hold an flock on during the runs of one strength")
    parser.add_argument("--results", type=Path, default=Path("runs/frontier"))
    args = parser.parse_args(argv)
    if args.run:
        run_missing(args.results, args.only, args.seeds, args.lock, args.jobs)
    found = points(read_results(args.results))
    if found:
        print(table(found))
        (args.results / "points.json").write_text(json.dumps([asdict(one) for one in found], indent=1), "utf-8")
        print(write(frontier_page(found), args.results / "report.html"))


if __name__ == "__main__":
    main()
