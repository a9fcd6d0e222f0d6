"""Time to a loss: how soon firth's default recipe reaches the loss of other programs after T seconds of training, CPU.

    python -m bench.speed.time_to_loss --tune plain --seconds 60        # the peers' small grid; likewise adamw, firth
    python -m bench.speed.time_to_loss --run --seconds 180              # every candidate, three seeds; resumable
    python -m bench.speed.time_to_loss --run --seconds 180 --limit 4    # in pieces: at most four new runs, then stop
    python -m bench.speed.time_to_loss --table --seconds 180            # markdown for docs/results/index.md

All train a decoder of 6 layers and hidden size 384 on Shakespeare's plays (a byte-level BPE of 8192, windows of 256) and are
scored on the same windows of held-out plays:

    trainer   transformers' Trainer on a GPT2LMHeadModel, with its defaults (lr 5e-5, linear, 8 rows, fp32)
    trainer_bf16   the same with bf16=True
    plain     bench/speed/causal.py's plain fp32 loop: AdamW, tuned
    adamw     firth's own loop on the same GPT-2 with AdamW, tuned
    firth     the recipe `gpt:small` unchanged: its model config, Muon, its schedule

The clock runs while a program trains: making batches, logging, the optimizer, the first slow step. It stops while the
held-out text is scored, and starts after the model is built. Schedules follow the clock, so each run decays to its end
exactly at T. A run of firth that is stopped early has not decayed its learning rate, so the table also has shorter runs
(T/8, T/5, T/2.5), each with a full schedule of its own.

Each run is a process of its own and writes one JSON into the results directory; existing results are not repeated. The table
marks a run during which other processes used more than 3% of the machine: delete its file and run it again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from bench.harness import MAX_OTHER_LOAD, busy_seconds, describe, machine, other_load
from bench.speed.causal import LENGTH, VOCAB_SIZE, Plain, Rows, endless_batches, hf_model, plain_optimizer

MARKS = (1 / 16, 1 / 8, 1 / 5, 1 / 4, 1 / 3, 2 / 5, 1 / 2, 3 / 4, 1)
"""Fractions of the run after which the held-out text is scored, for a curve."""

ENDS = (1 / 4, 1 / 2, 1)
"""The same where only the end counts: scoring takes seconds."""

SCORED = 128
"""Held-out windows to score: 32,768 tokens, spread evenly over the held-out plays."""

GOALS = {"trainer": 8, "trainer_bf16": 8, "plain": 5, "adamw": 2.5}
"""Candidate -> the speedup that firth must have over it."""

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Settings:
    """Settings to tune.

    Args:
        lr: Peak learning rate.
        warmup: Fraction of the run.
        rows: Windows of 256 tokens per step.
    """

    lr: float
    warmup: float
    rows: int


TUNED = {
    "plain": Settings(lr=1e-3, warmup=0.05, rows=2),
    "adamw": Settings(lr=1e-3, warmup=0.05, rows=2),
}
"""Best settings of `--tune`; the whole grid is in docs/results/index.md."""

GRID: dict[str, tuple[float, ...]] = {
    "lr": (5e-4, 1e-3, 2e-3, 4e-3),
    "rows": (2, 4, 8, 16),
    "warmup": (0.05, 0.15),
}
"""Tried one after the other, each from the best so far; the learning rate once more at the end."""

INITIAL_SETTINGS = Settings(lr=2e-3, warmup=0.05, rows=8)


@dataclass(frozen=True)
class TextData:
    """Tokenized text.

    Args:
        train: (windows, LENGTH + 1) token ids.
        valid: (SCORED, LENGTH + 1) held-out token ids.
        store: Token store of the training text.
        tokenizer: Tokenizer, trained on the training text.
    """

    train: np.ndarray
    valid: Tensor
    store: Any
    tokenizer: Any


def prepare_text(corpus: str, results: Path) -> TextData:
    """Split the corpus into training and held-out plays; the tokenizer is trained on the training plays."""
    from firth.corpora.catalog import fetch
    from firth.data.examples import DataConfig
    from firth.data.windows import Documents, WindowsConfig
    from firth.runs.prepare import RunData, documents_of
    from firth.tokenizer.tokenizer import Tokenizer
    from firth.tokenizer.train import train

    class JoinedWindows(WindowsConfig):
        isolate = False  # documents attend to each other, as in the peers

    # Plain text files only: speeches.jsonl repeats the text of all plays, held-out ones too.
    config = DataConfig(path=(str(fetch(corpus) / "*.txt"),))
    folder = results / corpus
    if not (folder / "tokenizer").exists():
        texts = (d.text for d in documents_of(config, config.paths(print), validation=False))
        train(texts, "byte-bpe", VOCAB_SIZE).save(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    assert tokenizer.vocab.size == VOCAB_SIZE, tokenizer.vocab.size
    train_store, held_out_store = RunData(config, tokenizer, folder).stores()
    assert held_out_store is not None
    stores, kind = (train_store, held_out_store), JoinedWindows(max_length=LENGTH)
    rows, scored = (Documents(kind, store, tokenizer.vocab) for store in stores)
    indices = np.linspace(0, len(scored) - 1, SCORED).round().astype(int)
    valid = np.stack([scored[int(i)]["tokens"] for i in indices]).astype(np.int64)
    train_windows = np.stack([rows[i]["tokens"] for i in range(len(rows))])
    return TextData(train_windows, torch.from_numpy(valid), train_store, tokenizer)


Score = Callable[[Tensor, Tensor], Tensor]
"""Maps tokens (rows, LENGTH) and labels (rows, LENGTH) to the sum of -log p(label)."""


class Clock:
    """Clock of the training time, which scores the held-out text at the marks.

    `curve` holds (seconds, step, held-out loss) of each mark.
    """

    def __init__(self, seconds: float, valid: Tensor, marks: Sequence[float] = MARKS) -> None:
        self.seconds, self.valid, self.step = seconds, valid, 0
        self.curve: list[tuple[float, int, float]] = []
        self._marks = [m * seconds for m in marks]
        self._spent, self._own, self._busy = 0.0, 0.0, 0.0
        self._since: float | None = None
        self.others: float | None = None

    def start(self) -> None:
        self._since, self._cpu, self._all = time.perf_counter(), time.process_time(), busy_seconds()

    @property
    def passed(self) -> float:
        """Fraction of the run that has passed, 0 to 1."""
        return min(1.0, self.now / self.seconds)

    @property
    def now(self) -> float:
        """Seconds of training so far; 0 before `start`."""
        return self._spent + (0 if self._since is None else time.perf_counter() - self._since)

    def tick(self, score: Score, last: bool = False) -> bool:
        """Count a step and score at a mark; return whether the time is up. `last` scores at any time."""
        self.step += 1
        now = self.now
        if not last and (not self._marks or now < self._marks[0]):
            return False
        self._pause()
        self._marks = [m for m in self._marks if m > now]
        self.curve.append((round(now, 3), self.step, self._loss(score)))
        print(f"  {now:7.1f} s  step {self.step:5}  held out {self.curve[-1][2]:.4f}", flush=True)
        self.start()
        return now >= self.seconds

    def _pause(self) -> None:
        self._spent, self._since = self.now, None
        self._own += time.process_time() - self._cpu
        after = busy_seconds()
        if self._all is None or after is None:
            return
        self._busy += after - self._all
        self.others = other_load(0.0, self._busy, self._own, self._spent)

    @torch.no_grad()
    def _loss(self, score: Score) -> float:
        total = sum(score(rows[:, :-1], rows[:, 1:]).item() for rows in torch.split(self.valid, 16))
        return total / self.valid[:, 1:].numel()


# ------------------------------------------------------------------------------- candidates


def run_trainer(clock: Clock, data: TextData, seed: int, _: Settings | None, bf16: bool = False) -> nn.Module:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(seed)
    model: Any = hf_model()

    def score(tokens: Tensor, labels: Tensor) -> Tensor:
        model.eval()
        logits = model(input_ids=tokens).logits
        model.train()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    class TimingCallback(TrainerCallback):
        def on_train_begin(self, args: object, state: object, control: object, **rest: object) -> None:
            clock.start()

        def on_step_end(self, args: object, state: object, control: Any, **rest: object) -> None:
            control.should_training_stop = clock.tick(score)

    class ClockTrainer(Trainer):
        """Trainer with the default linear decay by the clock, since the number of steps is not known in advance."""

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            assert self.optimizer is not None
            self.lr_scheduler = LambdaLR(self.optimizer, lambda _: 1 - clock.passed)
            return self.lr_scheduler

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, max_steps=10_000_000, seed=seed, use_cpu=True, bf16=bf16, save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        ClockTrainer(
            model, arguments, train_dataset=Rows(data.train.astype(np.int64)), callbacks=[TimingCallback()]
        ).train()
    trained: nn.Module = model
    return trained


def run_plain(clock: Clock, data: TextData, seed: int, settings: Settings | None) -> nn.Module:
    assert settings is not None
    torch.manual_seed(seed)
    model = Plain()
    optimizer = plain_optimizer(model, settings.lr)
    score: Score = partial(model, reduction="sum")
    clock.start()
    for batch in endless_batches(data.train, settings.rows, seed):
        passed = clock.passed
        factor = min(passed / settings.warmup, (1 - passed) / (1 - settings.warmup))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * factor
        model(batch[:, :-1], batch[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if clock.tick(score):
            return model
    raise AssertionError("rows_for_ever ended")


def run_firth(clock: Clock, data: TextData, seed: int, settings: Settings | None, adamw: bool = False) -> nn.Module:
    """Run firth's loop on the recipe `gpt:small`, or with `adamw` on the peers' GPT-2 with AdamW and a linear decay."""
    from firth.data.collate import Batches
    from firth.data.windows import Documents, WindowsConfig
    from firth.model.config import ModelConfig
    from firth.model.model import LM
    from firth.recipes.decoders import gpt
    from firth.runs.build_model import init_head
    from firth.training.logging import NullReporter
    from firth.training.optimizer import OptimizerConfig
    from firth.training.schedule import Budget, Schedule
    from firth.training.trainer import TrainerConfig, train

    recipe = gpt("small")
    optimizer, schedule, config, rows = recipe.optimizer, recipe.schedule, recipe.model, recipe.batch.size
    if adamw:
        assert settings is not None
        config = ModelConfig(vocab_size=VOCAB_SIZE, hidden_size=384, num_layers=6, num_heads=6, max_positions=LENGTH)
        optimizer, schedule = OptimizerConfig(name="adamw"), Schedule("linear")
    if settings is not None:
        optimizer, rows = replace(optimizer, lr=settings.lr), settings.rows
        schedule = replace(schedule, warmup_ratio=settings.warmup)
    assert config is not None
    assert config.vocab_size == VOCAB_SIZE
    torch.manual_seed(seed)
    objective = recipe.objective
    model = LM(config, objective.heads(config))
    examples: Any = recipe.examples
    assert examples.max_length == LENGTH, "the recipe has windows of another length than the peers"
    vocab = data.tokenizer.vocab
    source = Documents(WindowsConfig(max_length=LENGTH), data.store, vocab)
    batches = Batches(source, objective, vocab, batch_size=rows, seed=seed)
    time_steps = torch.arange(LENGTH, dtype=torch.int32)

    def score(tokens: Tensor, labels: Tensor) -> Tensor:
        times = time_steps.expand(tokens.shape)
        batch = {"tokens": tokens, "labels": labels, "query_time": times, "key_time": times}
        return objective.loss(model, objective.forward(model, batch), batch)["tokens"]

    def evaluate(_: LM, __: int) -> dict[str, float]:
        clock.tick(score)
        return {}

    with tempfile.TemporaryDirectory() as directory:
        clock.start()
        if not adamw:
            init_head(model, objective, batches)
        train(
            model, objective, batches, Path(directory), budget=Budget(max_seconds=clock.seconds), optimizer=optimizer,
            schedule=schedule, config=TrainerConfig(eval_every=1, save_every=0), evaluate=evaluate, reporter=NullReporter(),
        )  # fmt: skip
    if not clock.curve or clock.curve[-1][1] != clock.step:  # the clock of the loop does not count its log
        clock.step -= 1
        clock.tick(score, last=True)
    return model


CANDIDATES: dict[str, Callable[[Clock, TextData, int, Settings | None], nn.Module]] = {
    "trainer": run_trainer,
    "trainer_bf16": partial(run_trainer, bf16=True),
    "plain": run_plain,
    "adamw": partial(run_firth, adamw=True),
    "firth": run_firth,
}


# ------------------------------------------------------------------------------- runs and results


@dataclass(frozen=True)
class Run:
    """Specification of a run.

    Args:
        candidate: One of CANDIDATES.
        seconds: Training time.
        seed: Seed.
        settings: None for the defaults (trainer) or those of the recipe (firth).
        curve: Whether to score at all MARKS.
    """

    candidate: str
    seconds: float
    seed: int
    settings: Settings | None
    curve: bool = False

    def file(self, results: Path) -> Path:
        s = self.settings
        tuned = "" if s is None else f"-rate{s.lr:g}-warmup{s.warmup:g}-rows{s.rows}"
        return results / "runs" / f"{self.candidate}-{self.seconds:g}s-seed{self.seed}{tuned}.json"


@dataclass
class Result:
    """Result of a run; `curve` holds (training seconds, step, held-out loss in nats per token)."""

    run: Run
    curve: list[tuple[float, int, float]]
    parameters: int
    others: float | None
    machine: dict[str, object] = field(default_factory=dict)

    @property
    def final(self) -> float:
        return self.curve[-1][2]

    def reaches(self, loss: float) -> float | None:
        """Return the seconds until the curve is first at or below `loss`, interpolated between marks; None if never."""
        before: tuple[float, int, float] | None = None
        for point in self.curve:
            if point[2] <= loss:
                if before is None:
                    return point[0]
                share = (before[2] - loss) / (before[2] - point[2])
                return before[0] + share * (point[0] - before[0])
            before = point
        return None


def load(file: Path) -> Result:
    data = json.loads(file.read_text())
    run = data["run"]
    settings = None if run["settings"] is None else Settings(**run["settings"])
    curve = [(float(t), int(n), float(v)) for t, n, v in data["curve"]]
    return Result(Run(**(run | {"settings": settings})), curve, data["parameters"], data["others"], data["machine"])


def run_and_save(run: Run, corpus: str, results: Path) -> None:
    """Train in this process, and write the result."""
    data = prepare_text(corpus, results)
    machine_facts = machine()
    clock = Clock(run.seconds, data.valid, MARKS if run.curve else ENDS)
    model = CANDIDATES[run.candidate](clock, data, run.seed, run.settings)
    found = Result(run, clock.curve, sum(p.numel() for p in model.parameters()), clock.others, machine_facts)
    file = run.file(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(json.dumps(asdict(found), indent=1))
    partial_file.rename(file)


class Runner:
    """Performs missing runs, each in a fresh process, until `limit` new ones are done."""

    def __init__(self, corpus: str, results: Path, limit: int) -> None:
        self.corpus, self.results, self.left = corpus, results, limit

    def get(self, run: Run) -> Result | None:
        """Return the result of a run; None if the limit is reached."""
        file = run.file(self.results)
        if not file.exists():
            if self.left == 0:
                return None
            self.left -= 1
            print(file.stem, flush=True)
            spec = json.dumps(asdict(run))
            command = [sys.executable, "-m", "bench.speed.time_to_loss", "--one", spec, "--corpus", self.corpus]
            subprocess.run([*command, "--results", str(self.results)], check=True)
        return load(file)

    def tune(self, candidate: str, seconds: float) -> None:
        """Tune one setting after the other over GRID, seed 0; print every run, the best first."""
        best, done = INITIAL_SETTINGS, {}
        for name in (*GRID, "lr"):
            for value in GRID[name]:
                tried = replace(best, **{name: type(getattr(best, name))(value)})
                found = self.get(Run(candidate, seconds, 0, tried))
                if found is None:
                    print("Stopped at the limit. Run the same command again to continue.")
                    return
                done[tried] = found
            best = min(done, key=lambda s: done[s].final)
        print(f"\n{candidate}, {seconds:g} s, seed 0\n\n| lr | warmup | rows | held-out loss | steps | other load |")
        print("|---|---|---|---|---|---|")
        for s, r in sorted(done.items(), key=lambda item: item[1].final):
            print(f"| {s.lr:g} | {s.warmup:g} | {s.rows} | {r.final:.4f} | {r.curve[-1][1]} | {other_load_cell(r)} |")
        print(f"\nbest: {best}")


def plan(seconds: float, candidates: Iterable[str], seeds: Sequence[int]) -> list[Run]:
    """Return all runs of a table, with firth's short ones, seed by seed, so that an early stop leaves whole rows."""
    runs = []
    for seed in seeds:
        runs += [Run(c, seconds, seed, TUNED.get(c), curve=c == "firth") for c in candidates]
        if "firth" in candidates:
            runs += [
                Run("firth", round(seconds / part, 3), seed, None)
                for part in sorted({GOALS[c] for c in candidates if c in GOALS})
            ]
    return runs


def other_load_cell(r: Result) -> str:
    """Return the load of other processes during a run, with a mark if it is too high."""
    return "unknown" if r.others is None else f"{r.others:.1%}{' NOISY' if r.others > MAX_OTHER_LOAD else ''}"


def table(seconds: float, results: Path) -> str:
    """Return a Markdown table of the existing results."""
    files = [run.file(results) for run in plan(seconds, CANDIDATES, SEEDS)]
    found = [load(f) for f in files if f.exists()]
    long = {(r.run.candidate, r.run.seed): r for r in found if r.run.seconds == seconds}
    short = {(r.run.seconds, r.run.seed): r for r in found if r.run.candidate == "firth"}
    lines = [
        f"Held-out loss (nats per token) after {seconds:g} s of training, and when firth reaches it.",
        "",
        "| candidate | seed | loss | steps | parameters | other load | firth reaches it after | fraction of T "
        "| goal | final loss of a firth run of that length |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    parts: dict[str, list[float]] = {}
    for (name, seed), r in sorted(long.items(), key=lambda item: (list(CANDIDATES).index(item[0][0]), item[0][1])):
        cells = ["", "", "", ""]
        ours = long.get(("firth", seed))
        if name != "firth":
            goal = GOALS[name]
            full_run = short.get((round(seconds / goal, 3), seed))
            at = None if ours is None else ours.reaches(r.final)
            if at is not None:
                parts.setdefault(name, []).append(seconds / at)
            time_steps = ["not reached", ""] if at is None else [f"{at:.1f} s", f"1/{seconds / at:.1f}"]
            final_loss_cell = (
                "" if full_run is None else f"{full_run.final:.4f} {'yes' if full_run.final <= r.final else 'no'}"
            )
            cells = [*time_steps, f"1/{goal:g}", final_loss_cell]
        row = [name, str(seed), f"{r.final:.4f}", str(r.curve[-1][1]), f"{r.parameters:,}", other_load_cell(r), *cells]
        lines.append(f"| {' | '.join(row)} |")
    lines.append("")
    for name, p in parts.items():
        lines.append(f"{name}: firth's curve crosses at 1/{statistics.median(p):.1f} of T, median of {len(p)} seeds.")
    if found:
        lines += [describe(found[0].machine)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--tune", choices=("plain", "adamw", "firth"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--candidates", "--contenders", nargs="*", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--limit", type=int, default=-1, help="maximum number of new runs; -1: all")
    parser.add_argument("--corpus", default="shakespeare")
    parser.add_argument("--results", type=Path, default=Path("runs/time_to_loss"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        spec = json.loads(args.one)
        settings = None if spec["settings"] is None else Settings(**spec["settings"])
        run_and_save(Run(**(spec | {"settings": settings})), args.corpus, args.results)
        return
    runner = Runner(args.corpus, args.results, args.limit)
    if args.tune:
        runner.tune(args.tune, args.seconds)
    if args.run:
        for run in plan(args.seconds, args.candidates, args.seeds):
            if runner.get(run) is None:
                print("Stopped at the limit. Run the same command again to continue.")
                break
    if args.table:
        print(table(args.seconds, args.results))


if __name__ == "__main__":
    main()
