"""Predicted against measured memory and time of training, for every recipe at tiny and small size.

    python -m bench.speed.estimate                       # all cases; writes runs/bench-estimate.json and prints the table
    python -m bench.speed.estimate --only gpt dpo --sizes tiny
    python -m bench.speed.estimate --what predict measure --jobs 2 --seconds 500   # only the memory, what is missing yet, for some 500 s
    python -m bench.speed.estimate --table               # the table of the last run

Each case is a process of its own; for the memory alone it is forked from one that has loaded the libraries. Memory: the peak
resident size of training (VmHWM) minus the resident size before the model is built, after a step of a one-layer model, which
loads the kernels; the prediction is made after that. Time: N steps of the real trainer against what `firth train --dry-run`
says; predictions and runs take turns, and the minimum of each counts, since other work on the machine slows single ones.

Small is a width of 384 and six layers; finetuning starts from the tiny or small model of its kind, untrained, on made records.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import fcntl
import gc
import itertools
import json
import multiprocessing
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from firth.corpora import catalog, readers
from firth.runs.estimate import PreparedRun
from firth.runs.recipe import Recipe, load, published
from firth.runs.recipe_names import RECIPES

HOME = Path("runs/bench-estimate")
RESULTS = Path("runs/bench-estimate.json")

SMALL = {"hidden_size": 384, "num_layers": 6, "num_heads": 6, "head_dim": 0, "num_kv_heads": 0, "intermediate_size": 0}
"""Fields of the model config at small size."""

STARTS = {"bert": "classification regression multiple_choice token_classification question_answering glue semi_supervised "
          "weak_supervision", "elmo": "token_features", "t5": "text_to_text", "closed_book": "closed_book_questions",
          "gpt": "sft reward_model ranking dpo simpo orpo kto reinforce rloo grpo ppo"}  # fmt: skip
"""Recipe of the start model -> recipes that start from it."""
START = {name: start for start, names in STARTS.items() for name in names.split()}

ROLLOUTS = ("examples.reward_function=builtins:len",)
SETTINGS: dict[str, tuple[str, ...]] = {
    "semi_supervised": ("objective=consistency", "examples=partially_labeled", "examples.num_labeled=200"),
    "reinforce": ROLLOUTS, "rloo": ROLLOUTS, "grpo": ROLLOUTS, "ppo": ROLLOUTS,
}  # fmt: skip
"""Recipe -> further settings."""

STEPS = {"tiny": 12, "small": 4}
MORE_STEPS = {"word2vec": 20}
"""Recipe -> how many times as many: rows of its tables have no optimizer state before they are used."""
ROUNDS = 1


def records(lines: list[str]) -> dict[str, Callable[[int], dict[str, Any]]]:
    """Return the maker of records of each kind; lines of a play are their texts."""

    def text(i: int, n: int = 3) -> str:
        return " ".join(lines[(i * 7 + k) % len(lines)] for k in range(n))

    def tagged(i: int) -> dict[str, Any]:
        words = text(i).split()
        return {"tokens": words, "tags": ["x" if len(word) > 4 else "y" for word in words]}

    def question(i: int) -> dict[str, Any]:
        passage = text(i, 12)
        word = passage.split()[i % 9]
        answers = {"text": [word], "answer_start": [passage.index(word)]}
        return {"id": str(i), "question": "Who is it?", "context": passage, "title": str(i), "answers": answers}

    labeled = {"text": text, "label": lambda i: "ab"[i % 2]}
    dialogue = {"prompt": text, "completion": lambda i: text(i + 1, 1 + i % 3)}
    made = {
        "labeled": lambda i: {name: make(i) for name, make in labeled.items()},
        "scored": lambda i: {"text": text(i), "label": i % 5},
        "choices": lambda i: {"text": text(i), "options": [text(i + 1, 1), text(i + 2, 1)], "label": i % 2},
        "tagged": tagged,
        "questions": question,
        "votes": lambda i: {"text": text(i), "labels": ["a", "b", "ab"[i % 2]]},
        "sentences": lambda i: {"sentence": text(i), "label": i % 2},
        "dialogues": lambda i: {name: make(i) for name, make in dialogue.items()},
        "preferences": lambda i: {"prompt": text(i), "chosen": text(i + 1, 2), "rejected": text(i + 2, 1)},
        "judged": lambda i: {"prompt": text(i), "completion": text(i + 1, 2), "label": i % 3 > 0},
        "rankings": lambda i: {"prompt": text(i), "answers": [text(i + k, 1) for k in range(1, 4)]},
    }
    return made  # type: ignore[return-value]  # noqa: RET504


KINDS = {
    "classification": "labeled", "regression": "scored", "multiple_choice": "choices", "token_classification": "tagged",
    "token_features": "tagged", "question_answering": "questions", "text_to_text": "dialogues", "glue": "sentences",
    "semi_supervised": "labeled", "weak_supervision": "votes", "closed_book_questions": "dialogues", "sft": "dialogues",
    "reward_model": "preferences", "ranking": "rankings", "dpo": "preferences", "simpo": "preferences",
    "orpo": "preferences", "kto": "judged", **dict.fromkeys(("reinforce", "rloo", "grpo", "ppo"), "dialogues"),
}  # fmt: skip
"""Finetuning recipe -> kind of its records."""


def prepare() -> None:
    """Write the records, the tokenizer and the untrained start models that the cases share."""
    from firth.runs.prepare import train_tokenizer
    from firth.runs.run import run

    if (HOME / "done").exists():
        return
    HOME.mkdir(parents=True, exist_ok=True)
    paths = catalog.paths("shakespeare", print)
    if not (HOME / "tokenizer").exists():
        train_tokenizer(paths, HOME / "tokenizer", algorithm="byte-bpe", vocab_size=4096, num_sentinels=100, log=print)
    (HOME / "plays").mkdir(exist_ok=True)
    for number, play in enumerate(itertools.islice(readers.documents(paths), 6)):
        (HOME / "plays" / f"{number}.txt").write_text(play.text, "utf-8")
    lines = [line.strip() for line in next(iter(readers.documents(paths))).text.splitlines() if len(line) > 20]
    for kind, make in records(lines).items():
        (HOME / f"{kind}.jsonl").write_text("".join(json.dumps(make(i)) + "\n" for i in range(1000)), "utf-8")
    for start in STARTS:
        for size in STEPS:
            directory = HOME / f"{start}-{size}"
            if not (directory / "done.json").exists():
                shutil.rmtree(directory, ignore_errors=True)
                few = ["max_steps=1", "evaluation.every=0", "sample_prompts=[]", "init_head_from_frequencies=false"]
                run(load(start, [*own(start, size), *few]), directory, log=lambda _: None)
    (HOME / "done").touch()


def own(name: str, size: str) -> list[str]:
    """Return the settings of a recipe with a model of its own."""
    recipe = published(name)
    assert recipe.model is not None
    settings = [f"data.path={HOME / 'plays'}"]
    settings += [] if recipe.tokenizer.algorithm == "word" else [f"tokenizer.path={HOME / 'tokenizer'}"]
    if size == "tiny":
        return settings
    fields = dict(SMALL) if not recipe.model.rnn.type else {"hidden_size": 384, "intermediate_size": 0}
    if recipe.model.encoder.num_layers:
        fields["encoder.num_layers"] = 6
    if recipe.model.num_layers == 0:
        fields.pop("num_layers", None)
        fields = {"hidden_size": 384}
    return settings + [f"model.{field}={value}" for field, value in fields.items()]


def recipe_of(name: str, size: str, steps: int) -> Recipe:
    """Return the recipe of a case, for a run of some steps."""
    few = f"max_steps={steps}"
    if name not in START:
        return load(name, [*own(name, size), few])
    start = [f"init_from={HOME / f'{START[name]}-{size}'}", f"data.path={HOME / f'{KINDS[name]}.jsonl'}"]
    return load(name, [*start, *SETTINGS.get(name, ()), few])


def _status(field: str) -> int:
    """Return a size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def train(run: PreparedRun, steps: int) -> float:
    """Train some steps of a case and return the seconds."""
    import torch

    from firth.training import trainer
    from firth.training.logging import NullReporter
    from firth.training.schedule import Budget
    from firth.training.trainer import TrainerConfig

    torch.manual_seed(0)
    model = run.build()
    with tempfile.TemporaryDirectory() as place:
        config = TrainerConfig(save_every=0, precision=run.recipe.precision)
        result = trainer.train(
            model, run.recipe.objective, run.batches, Path(place), budget=Budget(max_steps=steps),
            optimizer=run.recipe.optimizer, schedule=run.recipe.schedule, config=config, reporter=NullReporter(),
        )  # fmt: skip
    return result.seconds


def predict(run: PreparedRun, steps: int) -> dict[str, Any]:
    """Predict the memory of a case."""
    from firth.runs.step_estimate import step_estimate

    sampled, kept = run.sample()
    step = step_estimate(run.build, run.recipe, sampled, kept, run.batches.source, run.varieties())
    return {
        "parameters": step.parameters,
        "memory": dataclasses.asdict(step.memory),
        "predicted_bytes": step.peak_of_run(steps) - kept,  # models of the source are loaded before the base is read
    }


def measure(run: PreparedRun, steps: int) -> dict[str, Any]:
    """Measure the memory of a case."""
    _warm_up(run.recipe)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    base = _status("VmRSS")
    train(run, steps)
    return {"measured_bytes": _status("VmHWM") - base, "base_bytes": base}


def time_both(run: PreparedRun, steps: int) -> dict[str, Any]:
    """Predict and measure the time of a case, in turns."""
    from firth.runs.step_estimate import step_flops, time_steps

    seconds = [train(run, steps)]
    sampled, _ = run.sample()
    flops = step_flops(run.build(), run.recipe.objective, sampled)
    predicted = []
    for _ in range(ROUNDS):
        times = time_steps(run.build(), run.recipe, run.batches)
        predicted.append(steps * times.seconds(flops))
        seconds.append(train(run, steps))
    return {"predicted_seconds": min(predicted), "measured_seconds": min(seconds)}


MEASUREMENTS = {"measure": measure, "predict": predict, "time": time_both}
"""Name of a measurement -> function, in the order in which a process makes them."""
KEYS = {"predict": "predicted_bytes", "measure": "measured_bytes", "time": "measured_seconds"}
"""Name of a measurement -> a field of its result."""


PRELOADED = ["torch._subclasses.fake_tensor", "firth.recipes.encoders", "firth.runs.prepare", "firth.runs.estimate"]
"""Modules of the process that is forked for each case."""


def case(name: str, size: str, wanted: set[str]) -> dict[str, Any]:
    """Predict or measure one case, in this process."""
    from firth.runs.estimate import prepared

    warnings.simplefilter("ignore")
    steps = STEPS[size] * MORE_STEPS.get(name, 1)
    with prepared(recipe_of(name, size, steps), lambda _: None) as run:
        row = {"name": name, "size": size, "steps": steps, "precision": run.recipe.precision}
        for what, function in MEASUREMENTS.items():
            if what in wanted:
                row |= function(run, steps)
    return row


def _warm_up(recipe: Any) -> None:
    """Load the libraries and kernels of a step: products, attention, norms, the optimizer."""
    import torch

    from firth.model.config import decoder_config
    from firth.model.model import LM
    from firth.objectives.causal_lm import CausalLM
    from firth.training.device import casts, keep_freed_memory
    from firth.training.optimizer import Optimizer
    from firth.training.step import step

    keep_freed_memory()
    config, objective = decoder_config(100, 64, 1), CausalLM()
    model = LM(config, objective.heads(config))
    optimizer, batch = Optimizer(recipe.optimizer, model), {"tokens": torch.ones(2, 16, dtype=torch.int64)}
    for _ in range(2):
        step(
            model,
            objective,
            [batch | {"labels": batch["tokens"]}],
            precision=casts(recipe.precision, torch.device("cpu")),
        )
        optimizer.clip_grad_norm()
        optimizer.step(1.0)


KINDS_OF_TABLES = {"bytes": ("Peak memory, MB", 1e6, 0, 0.15), "seconds": ("Time, s", 1.0, 2, 0.20)}
"""What is predicted -> heading, size of the unit, digits, and the most that a prediction may be off."""


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown tables of memory and time, and a summary of each."""
    found = {(row["name"], row["size"]): row for row in rows}
    names = [name for name in RECIPES if any((name, size) in found for size in STEPS)]
    lines = []
    for what, (title, scale, digits, limit) in KINDS_OF_TABLES.items():
        cells = [f"{size}: predicted | measured | error" for size in STEPS]
        lines += ["", title, "", f"| recipe | precision | {' | '.join(cells)} |", "|---|---|" + 6 * "---|"]
        met = dict.fromkeys(STEPS, 0)
        of = dict.fromkeys(STEPS, 0)
        for name in names:
            cells = []
            for size in STEPS:
                row = found.get((name, size), {})
                predicted, measured = (row.get(f"{how}_{what}") for how in ("predicted", "measured"))
                error = predicted / measured - 1 if predicted and measured else None
                met[size] += error is not None and abs(error) <= limit
                of[size] += error is not None
                missed = ", **missed**" if error is not None and abs(error) > limit else ""
                values = ["" if x is None else f"{x / scale:,.{digits}f}" for x in (predicted, measured)]
                cells += [*values, "" if error is None else f"{error:+.0%}{missed}"]
            precision = next(row["precision"] for (own, _), row in found.items() if own == name)
            lines.append(f"| {name} | {precision} | {' | '.join(cells)} |")
        lines += [
            "",
            f"Within {limit:.0%}: " + ", ".join(f"{met[size]} of {of[size]} at {size} size" for size in STEPS),
        ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    """Return the numbers of a case in a line."""
    numbers = {
        key: row[key] for what in KINDS_OF_TABLES for key in (f"predicted_{what}", f"measured_{what}") if key in row
    }
    return f"{row['name']} {row['size']}: " + ", ".join(f"{key} {value:,.4g}" for key, value in numbers.items())


def read() -> list[dict[str, Any]]:
    """Return the rows of all cases."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def add(found: dict[str, Any]) -> dict[str, Any]:
    """Add a measurement to the row of its case and return the row; several processes may do so."""
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {(row["name"], row["size"]): row for row in read()}
        row = rows.setdefault((found["name"], found["size"]), {})
        row |= found
        RESULTS.write_text(json.dumps([*rows.values()], indent=1))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*RECIPES], default=[*RECIPES])
    parser.add_argument("--sizes", nargs="*", choices=[*STEPS], default=[*STEPS])
    parser.add_argument("--table", action="store_true", help="print the table of the last run")
    parser.add_argument("--what", nargs="*", choices=[*MEASUREMENTS], default=[*MEASUREMENTS], help="all by default")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="start no measurement later; the next call continues"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time; only for the memory")
    parser.add_argument("--again", action="store_true", help="repeat what was measured before")
    args = parser.parse_args()
    if not args.table:
        prepare()
        start, known = time.monotonic(), {(row["name"], row["size"]): row for row in read()}
        context: Any = multiprocessing.get_context("spawn" if "time" in args.what else "forkserver")
        if "time" not in args.what:
            context.set_forkserver_preload(PRELOADED)

        def do(size: str, name: str) -> None:
            row = known.get((name, size), {})
            wanted = {what for what in args.what if args.again or KEYS[what] not in row}
            if not wanted or time.monotonic() - start > args.seconds:
                return
            with ProcessPoolExecutor(1, context) as process:
                try:
                    row = add(process.submit(case, name, size, wanted).result())
                except Exception as error:
                    print(f"{name} {size} failed: {error}", flush=True)
                    return
            print(_line(row), f"({time.monotonic() - start:.0f} s)", flush=True)

        with ThreadPoolExecutor(args.jobs) as threads:
            list(threads.map(do, *zip(*itertools.product(args.sizes, args.only), strict=True)))
    print(table(read()))


if __name__ == "__main__":
    main()
