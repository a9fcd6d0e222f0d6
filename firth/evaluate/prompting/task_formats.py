"""Read published tasks in their own formats: BIG-bench and natural instructions.

Tasks of BIG-bench are read from their task.json (Srivastava 2022; `bigbench/api/json_task.py` of its repository).

Prompts, choices, metrics and the reading of answers are those of BIG-bench 1.0:

- choices are listed in the prompt in one random order (seed 42) unless `append_choices_to_input` is false;
- copies of an example are dropped;
- an answer is what `output_regex` finds, by default the text up to the end of a sentence or line;
- `metrics` says what is computed. BLEU and ROUGE are between 0 and 100. A file with metrics of choices and of texts is two tasks.

The examples in a prompt are drawn as for every task, so they are not the same as those that BIG-bench draws.

Tasks of natural instructions (Mishra 2022, Wang 2022) have a definition, positive examples and instances.

    {"Definition": [text], "Positive Examples": [{"input", "output", "explanation"}], "Instances": [{"input", "output": [texts]}]}

A prompt has the definition, positive examples of the same task (`--shots`, two by default) and the input. Several tasks are one
evaluation, grouped by task: a directory with their JSON files, or a text file that lists tasks held out from training, one per line, whose
JSON files are in its directory or in a directory `tasks` next to one of its parents (as `splits/default/test_tasks.txt`).

ROUGE-L does not stem words, which the evaluation script of natural instructions does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from firth.evaluate.prompting.metrics import Filter, FilterChain, check_filter
from firth.evaluate.prompting.prompt_task import MetricConfig, OutputType, PromptTask
from firth.evaluate.prompting.prompts import Item, without_lone_surrogates
from firth.types import LOGGER, UserError

CHOICE_SEED = 42
"""Seed of the order of choices, as in BIG-bench."""
ANSWER_REGEX = r"[^\.\?\!\;\n]+"
"""What is read of an answer if the file has neither `output_regex` nor `stop_string`."""
MAX_ANSWER_TOKENS = 256
OWN_FIELDS = ("question", "choices", "targets")
"""Fields that are looked up in training text: the prompt also has the prefixes and the choices in random order."""
ROUGE = ("rouge1", "rouge2", "rougeLsum")
KINDS: dict[str, OutputType] = {
    "multiple_choice_grade": "multiple_choice", "macro_f1": "multiple_choice", "log_likelihood": "loglikelihood",
    **dict.fromkeys(
        (
            "exact_str_match", "case_insensitive_str_match", "numeric_match_with_0_1_relative_error", "sequence_f1", "bleu", *ROUGE,
        ),
        "generate_until",
    ),
}  # fmt: skip
"""Metric -> what it needs of the model."""
MODEL_METRICS = frozenset({"bleurt"})
"""Metrics that are models themselves; they are left out."""


def read_bigbench(path: Path, parent: str = "") -> list[PromptTask]:
    """Read the tasks of a task.json, or of the directories next to it if it has no examples.

    Args:
        path: The file.
        parent: Name of the task that has this one as a part.

    Returns:
        The tasks; the one of `preferred_score` is first.

    Raises:
        UserError: The file is not such a task.
    """
    try:
        task = without_lone_surrogates(json.loads(path.read_text("utf-8")))
        name = str(task["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: this is not a task.json of BIG-bench, which has a name and a list of examples: {error}"
        ) from error
    name = f"{parent}:{name}" if parent else name
    if "examples" not in task:
        parts = sorted(path.parent.glob("*/task.json"))
        if not parts:
            raise UserError(f"{path}: this task has neither examples nor directories with a task.json")
        return [one for part in parts for one in read_bigbench(part, name)]
    metrics = _metrics(task, path)
    items = _items(task, path, metrics)
    kinds = dict.fromkeys(KINDS[metric] for metric in metrics)
    return [
        replace(_task(task, path, items, [m for m in metrics if KINDS[m] == kind]), name=name + _suffix(kind, number))
        for number, kind in enumerate(kinds)
    ]


def _suffix(kind: str, number: int) -> str:
    return "" if not number else {"multiple_choice": ":choices", "generate_until": ":texts"}.get(kind, ":likelihood")


def _metrics(task: Mapping[str, Any], path: Path) -> list[str]:
    """Return the metrics of a task that are computed, the preferred one first."""
    named = task.get("metrics")
    if not isinstance(named, list) or not named:
        raise UserError(f"{path}: metrics must be a list of names, and it is {named!r}")
    metrics = [one for metric in named for one in (ROUGE if metric == "rouge" else (str(metric),))]
    preferred = str(task.get("preferred_score", metrics[0]))
    metrics = sorted(dict.fromkeys(metrics), key=lambda metric: metric != preferred)
    for metric in metrics:
        if metric in MODEL_METRICS:
            LOGGER.warning(f"{path}: the metric {metric} is a model, which is not run here; it is left out")
        elif metric not in KINDS:
            raise UserError(f"{path}: the metric {metric!r} is not computed here: the metrics are {', '.join(KINDS)}")
    metrics = [metric for metric in metrics if metric not in MODEL_METRICS]
    if not metrics:
        raise UserError(
            f"{path}: all metrics of this task ({', '.join(map(str, named))}) are models, which are not run here"
        )
    return metrics


def _items(task: Mapping[str, Any], path: Path, metrics: list[str]) -> list[Item]:
    """Return the examples of a task, each once."""
    examples = task["examples"]
    if not isinstance(examples, list) or not examples:
        raise UserError(f"{path}: examples must be a list of records, and it is {str(examples)[:60]!r}")
    kinds = {KINDS[metric] for metric in metrics}
    items, seen = [], set()
    for number, one in enumerate(examples, 1):
        key = json.dumps(one)
        if key in seen:
            continue
        seen.add(key)
        location = f"{path}: example {number}"
        if not isinstance(one, dict) or "input" not in one or not ("target" in one or "target_scores" in one):
            raise UserError(f"{location}: an example has the fields input, and target or target_scores")
        if "multiple_choice" in kinds and not one.get("target_scores"):
            raise UserError(f"{location}: there is no target_scores, which the metric {metrics[0]} needs")
        if kinds - {"multiple_choice"} and "target" not in one:
            raise UserError(f"{location}: there is no target, which the metrics {', '.join(metrics)} need")
        fields = _fields(one, task, location)
        items.append(Item(fields, location, tuple(name for name in OWN_FIELDS if name in fields)))
    return items


@functools.cache
def _choice_order(count: int) -> list[int]:
    """Return the order in which sorted choices are listed; it is the same for all examples with as many choices."""
    return np.random.RandomState(CHOICE_SEED).permutation(count).tolist()


def _fields(one: Mapping[str, Any], task: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Return the fields of an item: input (the whole prompt), question, targets, choices, scores and the index of the best choice."""
    scores = one.get("target_scores") or {}
    shown = ""
    if scores and task.get("append_choices_to_input", True):
        prefix = str(task.get("choice_prefix", "\n  choice: "))
        names = sorted(scores)
        shown = "".join(prefix + names[i] for i in _choice_order(len(names)))
    before, after = task.get("example_input_prefix", "\nQ: "), task.get("example_output_prefix", "\nA: ")
    question = str(one["input"])
    fields: dict[str, Any] = {"input": f"{before}{question}{shown}{after}", "question": question}
    if scores:
        try:
            values = [float(score) for score in scores.values()]
        except (TypeError, ValueError) as error:
            raise UserError(f"{location}: the scores of the choices must be numbers: {scores}") from error
        if "target" not in one and max(values) <= min(values) and (len(values) > 1 or values[0] == 0):
            raise UserError(f"{location}: no choice has a higher score than the others")
        fields |= {"choices": list(scores), "scores": values, "best": values.index(max(values))}
        fields["targets"] = [list(scores)[fields["best"]]]
    if "target" in one:
        found = one["target"] if isinstance(one["target"], list) else [one["target"]]
        fields["targets"] = [str(target) for target in found]
        if not found:
            raise UserError(f"{location}: the list of targets is empty")
    fields["shown"] = fields["targets"][0]
    return fields


def _task(task: Mapping[str, Any], path: Path, items: list[Item], metrics: list[str]) -> PromptTask:
    """Return the task of the metrics of one kind."""
    separator = str(task.get("few_shot_example_separator", "\n"))
    kind = KINDS[metrics[0]]
    base = PromptTask(
        name=str(task["name"]), items=items, output_type=kind, prompt="input", target="targets", target_delimiter="",
        fewshot_delimiter=separator, example_answer="shown",
        description=str(task.get("task_prefix", "")).replace("{", "{{ '{' }}"),
        metrics=tuple(MetricConfig(metric) for metric in metrics),
    )  # fmt: skip
    if kind == "multiple_choice":
        several = [item for item in items if len(item.fields["choices"]) > 1]
        if len(several) < len(items):
            LOGGER.warning(
                f"{path}: {len(items) - len(several):,} of {len(items):,} examples have one choice; they are left out"
            )
        return replace(base, items=several, target="best", choices="choices", scores="scores")
    if kind == "loglikelihood":
        return base
    stop, pattern = task.get("stop_string"), task.get("output_regex")
    if not stop and pattern is None:
        pattern = ANSWER_REGEX
    steps = [Filter("search", {"regex_pattern": pattern})] if pattern else []
    steps.append(Filter("remove_whitespace"))
    following = separator + str(task.get("example_input_prefix", "\nQ: ")).rstrip()  # the next question
    longest = max(len(target.encode("utf-8", "surrogatepass")) for item in items for target in item.fields["targets"])
    return replace(
        base,
        filters=(FilterChain("none", tuple(check_filter(step, str(path)) for step in steps)),),
        stop=(str(stop),) if stop else (following,) if following.strip() else (),
        max_new_tokens=min(MAX_ANSWER_TOKENS, longest + 8),  # a token has a byte or more
    )


NAME = "natural_instructions"
FIELDS = ("Definition", "Positive Examples", "Instances")
SHOTS = 2


def read_natural_instructions(paths: Sequence[str]) -> PromptTask:
    """Read tasks of natural instructions as one task, grouped by task.

    Args:
        paths: JSON files, directories of them, or lists of tasks (.txt).

    Raises:
        UserError: A file is no such task, or there is none.
    """
    items: list[Item] = []
    examples: list[Item] = []
    for path in _files(paths):
        shown, found = _read(path)
        examples += shown
        items += found
    return PromptTask(
        name=NAME, items=items, pool=examples, output_type="generate_until", prompt="Input: {{input}}\nOutput:", target="output",
        description="{{definition}}\n\n", shots=SHOTS, sampler="first_n", group="task", stop=("\nInput:", "\n\n"), max_new_tokens=128,
        filters=(FilterChain("none", (Filter("remove_whitespace"),)),),
        metrics=(MetricConfig("rougeL"), MetricConfig("exact_match", {"ignore_case": True, "ignore_punctuation": True})),
    )  # fmt: skip


def _files(paths: Sequence[str]) -> Iterator[Path]:
    """Yield the JSON file of each task."""
    if not paths:
        raise UserError(f"{NAME}: there are no tasks: name their JSON files, a directory or a list of them with --data")
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(path.glob("*.json"))
            if not found:
                raise UserError(f"{path}: there is no .json file of a task in this directory")
            yield from found
        elif path.suffix == ".txt" and path.is_file():
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                if line.strip():
                    yield _listed(line.strip(), path, number)
        else:
            yield path


def _listed(name: str, path: Path, number: int) -> Path:
    """Return the file of a task that a list names."""
    file = name if name.endswith(".json") else f"{name}.json"
    places = [path.parent, *(parent / "tasks" for parent in path.resolve().parents[:3])]
    found = next((place / file for place in places if (place / file).is_file()), None)
    if found is None:
        raise UserError(f"{path}:{number}: there is no {file} in {' or '.join(map(str, places))}")
    return found


def _read(path: Path) -> tuple[list[Item], list[Item]]:
    """Return the positive examples and the instances of a task."""
    try:
        task = without_lone_surrogates(json.loads(path.read_text("utf-8")))
        definition, positive, instances = (task[field] for field in FIELDS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: this is not a task of natural instructions, which has {', '.join(FIELDS)}: {error}"
        ) from error
    common = {
        "task": path.stem,
        "definition": "\n".join(definition) if isinstance(definition, list) else str(definition),
    }
    for field, found in (("Positive Examples", positive), ("Instances", instances)):
        if not isinstance(found, list) or not found:
            raise UserError(f"{path}: {field} must be a list of records, and it is {str(found)[:60]!r}")
    return (
        [_item(one, common, f"{path}: positive example {i}") for i, one in enumerate(positive, 1)],
        [_item(one, common, f"{path}: instance {i}") for i, one in enumerate(instances, 1)],
    )


def _item(record: Any, common: Mapping[str, str], location: str) -> Item:
    if not isinstance(record, dict) or not isinstance(record.get("input"), str) or not record.get("output"):
        raise UserError(f"{location}: an example has the fields input and output")
    output = record["output"]
    # Answers are stripped, so the gold texts are too.
    outputs = [str(one).strip() for one in (output if isinstance(output, list) else [output])]
    return Item({**common, "input": record["input"], "output": outputs}, location, ("input", "output"))
