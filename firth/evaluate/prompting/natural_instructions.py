"""Read tasks in the format of natural instructions (Mishra 2022, Wang 2022): a definition, positive examples, instances.

    {"Definition": [text], "Positive Examples": [{"input", "output", "explanation"}], "Instances": [{"input", "output": [texts]}]}

A prompt has the definition, positive examples of the same task (`--shots`, two by default) and the input. Several tasks are one
evaluation, grouped by task: a directory with their JSON files, or a text file that lists tasks held out from training, one per line, whose
JSON files are in its directory or in a directory `tasks` next to one of its parents (as `splits/default/test_tasks.txt`).

ROUGE-L does not stem words, which the evaluation script of natural instructions does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from firth.evaluate.prompting.answers import Filter, FilterChain
from firth.evaluate.prompting.prompt_task import MetricConfig, PromptTask
from firth.evaluate.prompting.prompts import Item, without_lone_surrogates
from firth.types import UserError

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
