"""SmolLM2-135M-Instruct by number of examples: ten tasks of BIG-bench and MMLU; rationales against direct answers.

    python -m bench.learning.prompts --run        # resumes: replies are kept by hash of weights and request
    python -m bench.learning.prompts --table

The model, the questions and the tasks come from `firth fetch` (smollm2, mmlu, bigbench). The tasks were chosen before any of
them was run: short ones of different kinds, with at least 100 examples. MMLU's five examples are questions of five subjects
which are not evaluated. The examples in a prompt are the same for all items of a task (seed 0), unless the item is one of them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from firth.corpora.catalog import fetch
from firth.evaluate.prompting.prompt_task import PromptConfig, PromptTask
from firth.evaluate.prompting.requests import ReplyCache
from firth.evaluate.prompting.responders import LocalModel
from firth.evaluate.prompting.runner import run_tasks
from firth.evaluate.prompting.task_files import load_tasks
from firth.io.atomic import cache_directory, write_text
from firth.runs.import_export import import_model

OUT = Path("runs/prompts")
SHOTS = (0, 1, 3, 5)
LIMIT = 50
WEIGHTS = "bf16"
BIGBENCH = (
    "anachronisms", "arithmetic/2_digit_addition", "date_understanding", "entailed_polarity", "implicatures",
    "linguistic_mappings/past_tense_json", "phrase_relatedness", "social_iqa", "strategyqa",
    "unnatural_in_context_learning/identity",
)  # fmt: skip
QUESTIONS = 100
RATIONALES = {
    "direct": PromptConfig(shots=8, limit=QUESTIONS),
    "few-shot rationales": PromptConfig(shots=8, limit=QUESTIONS, cot="few-shot"),
    "few-shot rationales, 5 votes": PromptConfig(shots=8, limit=40, cot="few-shot", votes=5),
    "direct, chat": PromptConfig(shots=0, limit=QUESTIONS, chat=True),
    "step by step, chat": PromptConfig(shots=0, limit=QUESTIONS, chat=True, cot="zero-shot"),
}
"""Ways to answer word problems."""
STORIES = (
    ("{name} has {a} {thing}. {name} buys {b} more and gives {c} to a friend. How many {thing} does {name} have now?",
     "{name} starts with {a} {thing}. After buying {b} more there are {a} + {b} = {s}. After giving away {c} "
     "there are {s} - {c} = {t}.", 1),
    ("There are {a} {thing} on the table and {b} in a box. {name} takes {c} away. How many {thing} are left?",
     "Together there are {a} + {b} = {s} {thing}. {name} takes {c} away, so {s} - {c} = {t} are left.", 1),
    ("{name} finds {a} {thing} on Monday, {b} on Tuesday and {c} on Wednesday. How many {thing} does {name} find in all?",
     "On Monday and Tuesday {name} finds {a} + {b} = {s} {thing}. With Wednesday there are {s} + {c} = {t}.", 2),
    ("{name} puts {a} {thing} into each of {b} bags and keeps {c} outside. How many {thing} does {name} have?",
     "In the bags there are {a} * {b} = {p} {thing}. With those outside there are {p} + {c} = {t}.", 3),
)  # fmt: skip
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")
THINGS = ("apples", "books", "coins", "pencils", "stamps", "shells", "marbles", "cards")


def story(rng: np.random.Generator) -> dict[str, str]:
    """Return a word problem of two steps: question, rationale, answer."""
    question, rationale, kind = STORIES[rng.integers(len(STORIES))]
    a, b, c = (int(rng.integers(2, 13)) for _ in range(3))
    if kind == 1:
        c = int(rng.integers(1, a + b))
    values: dict[str, Any] = {
        "name": NAMES[rng.integers(len(NAMES))], "thing": THINGS[rng.integers(len(THINGS))],
        "a": a, "b": b, "c": c, "s": a + b, "p": a * b,
        "t": {1: a + b - c, 2: a + b + c, 3: a * b + c}[kind],
    }  # fmt: skip
    return {
        "question": question.format(**values),
        "rationale": rationale.format(**values),
        "answer": str(values["t"]),
    }


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare_model() -> Path:
    """Return the directory of the imported model."""
    if not (OUT / "model" / "config.json").is_file():
        OUT.mkdir(parents=True, exist_ok=True)
        import_model(next(fetch("smollm2").glob("*.gguf")), OUT / "model")
    return OUT / "model"


def prepare() -> None:
    """Write the model, MMLU's questions and examples, and the word problems."""
    prepare_model()
    questions = [json.loads(line) for line in (fetch("mmlu") / "mmlu.jsonl").read_text("utf-8").splitlines()]
    firsts = {question["subject"]: question for question in reversed(questions)}
    subjects = sorted(firsts)[:: len(firsts) // 5][:5]
    examples = [firsts[subject] for subject in subjects]
    write_records(OUT / "mmlu-examples.jsonl", [example | {"subject": "example"} for example in examples])
    write_records(OUT / "mmlu.jsonl", [question for question in questions if question not in examples])
    rng = np.random.default_rng(0)
    stories = list({record["question"]: record for record in (story(rng) for _ in range(260))}.values())
    write_records(OUT / "stories-examples.jsonl", stories[:8])
    write_records(OUT / "stories.jsonl", stories[8:208])


@dataclass(frozen=True)
class Setting:
    """One evaluation.

    Args:
        name: Name of its file.
        task: Task to load.
        config: How prompts are built.
        data: Files of the questions.
        examples: Files of the examples.
    """

    name: str
    task: str
    config: PromptConfig
    data: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()


def settings() -> list[Setting]:
    """Return all evaluations, the cheap ones first."""
    stories = ((str(OUT / "stories.jsonl"),), (str(OUT / "stories-examples.jsonl"),))
    mmlu = ((str(OUT / "mmlu.jsonl"),), (str(OUT / "mmlu-examples.jsonl"),))
    directory = fetch("bigbench")
    found = [Setting(f"mmlu-{shots}", "mmlu", PromptConfig(shots=shots), *mmlu) for shots in SHOTS]
    for shots in SHOTS:
        for name in BIGBENCH:
            config = PromptConfig(shots=shots, limit=LIMIT)
            found.append(Setting(f"{name.replace('/', '-')}-{shots}", str(directory / name / "task.json"), config))
    found += [Setting(f"stories-{name}", "arithmetic", config, *stories) for name, config in RATIONALES.items()]
    config = PromptConfig(shots=0)
    found.append(Setting("mmlu_full_answers-0", "mmlu_full_answers", config, *mmlu))
    return found


def fixed_examples(task: PromptTask) -> PromptTask:
    """Return the task with a pool of five examples, which are the same for all items and not evaluated."""
    if task.pool:
        return replace(task, sampler="first_n")
    order = np.random.default_rng(0).permutation(len(task.items))
    examples, rest = order[: max(SHOTS)], np.sort(order[max(SHOTS) :])
    return replace(task, pool=[task.items[i] for i in examples], items=[task.items[i] for i in rest], sampler="first_n")


def run() -> None:
    """Run every setting whose file is not there."""
    prepare()
    model = LocalModel.open(OUT / "model", WEIGHTS)
    for setting in settings():
        path = OUT / f"{setting.name}.json"
        if path.is_file():
            continue
        task = fixed_examples(load_tasks(setting.task, setting.data, setting.examples)[0])
        began = time.monotonic()
        replies = ReplyCache(cache_directory() / "replies", model.digest)
        [result] = run_tasks([task], model, setting.config, replies)
        replies.close()
        chance = [1 / len(task.choices_of(item)) for item in task.selected(setting.config) if task.choices]
        record = {
            "seconds": time.monotonic() - began,
            "items": len(result.items),
            "chance": float(np.mean(chance)) if chance else 0.0,
            "metrics": {name: (value.value, value.stderr) for name, value in result.metrics.items()},
            "values": {name: [item.metrics[name] for item in result.items] for name in result.metrics},
        }
        write_text(path, json.dumps(record) + "\n")
        print(f"{setting.name}: {record['metrics']}, {record['seconds']:.0f} s", flush=True)


def interval(value: float, stderr: float) -> str:
    """Return a mean with its 95% interval."""
    return f"{value:.3f} ± {1.96 * stderr:.3f}"


def table() -> str:
    """Return a table of the first metric by task and number of examples, and the gain of five examples over none."""
    rows = ["| task | metric | chance | " + " | ".join(f"{k} shots" for k in SHOTS) + " | 5 over 0 |", "|---" * 8 + "|"]
    for name in ("mmlu", *(task.replace("/", "-") for task in BIGBENCH)):
        paths = [OUT / f"{name}-{shots}.json" for shots in SHOTS]
        found = [json.loads(path.read_text("utf-8")) for path in paths if path.is_file()]
        if len(found) < len(SHOTS):
            continue
        metric = next(iter(found[0]["metrics"]))
        gains = np.array(found[-1]["values"][metric]) - np.array(found[0]["values"][metric])
        cells = [interval(*one["metrics"][metric]) for one in found]
        gain = interval(float(gains.mean()), float(gains.std(ddof=1) / len(gains) ** 0.5))
        rows.append(f"| {name} | {metric} | {found[0]['chance']:.3f} | " + " | ".join(cells) + f" | {gain} |")
    rows += ["", "| word problems | exact match | over direct |", "|---|---|---|"]
    base = OUT / "stories-direct.json"
    for name in RATIONALES:
        path = OUT / f"stories-{name}.json"
        if path.is_file() and base.is_file():
            one, first = (json.loads(file.read_text("utf-8")) for file in (path, base))
            count = len(one["values"]["exact_match"])  # the first questions, where there are fewer
            gains = np.array(one["values"]["exact_match"]) - np.array(first["values"]["exact_match"][:count])
            gain = interval(float(gains.mean()), float(gains.std(ddof=1) / len(gains) ** 0.5))
            rows.append(f"| {name} | {interval(*one['metrics']['exact_match'])} | {gain} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.run:
        run()
    if args.table:
        print(table())


if __name__ == "__main__":
    main()
