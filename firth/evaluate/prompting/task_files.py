"""Read tasks from files: YAML with the fields of lm-evaluation-harness, BIG-bench's task.json, and natural instructions.

A task of one's own is a YAML file of ten lines:

    task: capitals
    data: capitals.jsonl                 # {"country": "Chad", "capital": "N'Djamena"} per line; a path next to the YAML file
    output_type: generate_until
    doc_to_text: "The capital of {{country}} is"
    doc_to_target: capital
    num_fewshot: 3
    generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
    metric_list: [{metric: exact_match, ignore_case: true}]

Public task files of lm-evaluation-harness are read as they are where they hold no Python; their `dataset_path` names a hub,
which nothing here calls, so the records are given on the command line (`--data`, `--examples`). Four fields are firth's own:

    doc_to_rationale: "{{rationale}} The answer is {{answer}}."     what examples show with --cot few-shot
    rename_fields: {"#1 String": sentence1}                         fields of a record under other names
    column_names: [source, label, mark, sentence]                   columns of a table without a header
    missing_labels: ["-"]                                           records with these gold answers are left out
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from firth.corpora.readers import nearest, records
from firth.evaluate.prompting.metrics import Filter, FilterChain, check_filter
from firth.evaluate.prompting.prompt_task import METRICS, OUTPUT_TYPES, MetricConfig, PromptTask
from firth.evaluate.prompting.prompts import Item, check_template, render_value, without_lone_surrogates
from firth.evaluate.prompting.task_formats import NAME, read_bigbench, read_natural_instructions
from firth.io.yaml_files import read_yaml
from firth.types import UserError

BUILTIN = Path(__file__).with_name("tasks")
"""Directory of the tasks that firth ships."""
READ_FIELDS = frozenset({
    "task", "include", "data", "examples", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "description",
    "target_delimiter", "fewshot_delimiter", "num_fewshot", "fewshot_config", "generation_kwargs", "filter_list",
    "metric_list", "repeats", "group_by", "doc_to_rationale", "rename_fields", "column_names", "missing_labels",
})  # fmt: skip
"""Fields of a task file that are used."""
IGNORED_FIELDS = frozenset({
    "tag", "group", "task_alias", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
    "test_split", "fewshot_split", "metadata", "should_decontaminate", "doc_to_decontamination_query",
})  # fmt: skip
"""Fields of lm-evaluation-harness that say where its data comes from, or serve its lists; they are skipped."""
GENERATION_FIELDS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
"""Settings of `generation_kwargs` that are used; a task with another one is refused."""
DEFAULT_METRICS = frozenset({"acc", "acc_norm", "exact_match", "f1", "perplexity", *METRICS["loglikelihood_rolling"]})
"""Metrics of a task that names none."""
PYTHON_FIELDS = frozenset({"process_docs", "process_results", "custom_dataset", "use_prompt", "unsafe_code", "class"})
"""Fields of lm-evaluation-harness that run Python or fetch templates; a task with one is refused."""


def builtin_names() -> list[str]:
    """Return the names of the tasks that firth ships."""
    return sorted([NAME, *(path.stem for path in BUILTIN.glob("*.yaml"))])


def load_tasks(name: str, data: Sequence[str] = (), examples: Sequence[str] = ()) -> list[PromptTask]:
    """Load the task of a name, or the tasks of a task.json of BIG-bench.

    Args:
        name: Name of a shipped task, a YAML file, or a task.json of BIG-bench or its directory.
        data: Files of the questions; by default those that the task file names.
        examples: Files of the records that examples in prompts are taken from; or one text file (.txt), which is put before
            each question as it is.

    Raises:
        UserError: There is no such task, a field is wrong, or there is no data.
    """
    path = Path(name)
    if path.is_dir() and (path / "task.json").is_file():
        path = path / "task.json"
    own_examples = name == NAME or (path.suffix == ".json" and path.is_file())
    if own_examples and examples:
        raise UserError(f"{name}: this task has its own examples: leave out --examples")
    if name == NAME:
        return [read_natural_instructions(data)]
    if own_examples:
        if data:
            raise UserError(f"{name}: this task has its own questions: leave out --data")
        return read_bigbench(path)
    if not path.is_file():
        path = BUILTIN / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"there is no task {name!r}: give a YAML file, a task.json of BIG-bench, or one of {', '.join(builtin_names())}"
        )
    return [read_task(path, data, examples)]


def is_prompt_task(name: str) -> bool:
    """Return whether a name is that of a shipped task, or a task file."""
    path = Path(name)
    return (
        name in builtin_names()
        or path.suffix in (".yaml", ".yml")
        or path.name == "task.json"
        or (path / "task.json").is_file()
    )


def read_task(path: Path, data: Sequence[str] = (), examples: Sequence[str] = ()) -> PromptTask:
    """Read a task from a YAML file; see `load_tasks`."""
    settings, lines = _settings(path)

    def at(field: str) -> str:
        return f"{path}:{lines[field]}" if field in lines else str(path)

    def text(field: str, default: str) -> str:
        value = settings.get(field, default)
        if value is None:
            return default
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise UserError(f"{at(field)}: {field} must be text, and it is {value!r}")
        return str(value)

    output_type = text("output_type", "generate_until")
    if output_type not in OUTPUT_TYPES:
        raise UserError(
            f"{at('output_type')}: output_type is {output_type!r}, and must be one of {', '.join(OUTPUT_TYPES)}"
        )
    choices = settings.get("doc_to_choice", ())
    if isinstance(choices, list):
        choices = tuple(str(choice) for choice in choices)
    if not isinstance(choices, str | tuple):
        raise UserError(f"{at('doc_to_choice')}: doc_to_choice must be a list or a template")
    if output_type == "multiple_choice" and (not choices or (isinstance(choices, tuple) and len(choices) < 2)):
        raise UserError(f"{at('doc_to_choice')}: a multiple_choice task needs doc_to_choice with two choices or more")
    for field in ("doc_to_text", "doc_to_target", "description", "doc_to_choice", "doc_to_rationale"):
        for template in [settings.get(field)] if isinstance(settings.get(field), str) else settings.get(field) or ():
            if isinstance(template, str):
                check_template(template, at(field))
    if "doc_to_text" not in settings and output_type != "loglikelihood_rolling":
        raise UserError(f"{path}: doc_to_text is missing: it is the template of the prompt")
    generation = _mapping(settings.get("generation_kwargs"), at("generation_kwargs"))
    temperature, top_p = _sampling(generation, at("generation_kwargs"))
    repeats = settings.get("repeats", 1)
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise UserError(f"{at('repeats')}: repeats must be an integer of at least 1, and it is {repeats!r}")
    delimiter = text("fewshot_delimiter", "\n\n")
    until = generation.get("until", [delimiter])
    fewshot = _mapping(settings.get("fewshot_config"), at("fewshot_config"))
    pool_paths = examples or _paths(settings.get("examples"), path, at("examples"))
    item_paths = data or _paths(settings.get("data"), path, at("data"))
    if not item_paths:
        raise UserError(
            f"{path}: there are no records: give them with --data FILES, or name them in the task file (data: FILES)"
        )
    samples = fewshot.get("samples")
    if isinstance(samples, str):
        raise UserError(f"{at('fewshot_config')}: samples must be a list of records here; Python is not run")
    names = _mapping(settings.get("rename_fields"), at("rename_fields"))
    columns = [str(one) for one in settings.get("column_names") or ()]
    missing = [str(one) for one in settings.get("missing_labels") or ()]
    target = text("doc_to_target", "")

    def read(paths: Sequence[str]) -> list[Item]:
        found = [_renamed(item, names) for item in _items(paths, columns)]
        return [one for one in found if str(render_value(target, one)) not in missing] if missing else found

    written = [one for one in pool_paths if one.endswith(".txt")]
    if written and len(pool_paths) > 1:
        raise UserError(
            f"{written[0]}: a text file of examples is put before each question: give no other file of examples"
        )
    pool = [Item(one, f"{at('fewshot_config')}, example {i}") for i, one in enumerate(samples or (), 1)]
    return PromptTask(
        name=text("task", path.stem),
        items=read(item_paths),
        pool=pool if pool or written else read(pool_paths),
        example_text=_example_text(Path(written[0]), delimiter) if written else "",
        rationale=text("doc_to_rationale", ""),
        output_type=output_type,  # type: ignore[arg-type]
        prompt=text("doc_to_text", ""),
        target=target,
        choices=choices,
        description=text("description", ""),
        target_delimiter=text("target_delimiter", " "),
        fewshot_delimiter=delimiter,
        shots=int(settings.get("num_fewshot") or 0),
        sampler="first_n" if fewshot.get("sampler") == "first_n" or samples else "random",
        group=text("group_by", ""),
        filters=_filters(settings.get("filter_list"), at("filter_list")),
        metrics=_metrics(settings.get("metric_list"), output_type, at("metric_list")),
        stop=tuple(str(one) for one in ([until] if isinstance(until, str) else until)),
        max_new_tokens=int(generation.get("max_gen_toks", 256)),
        repeats=repeats,
        temperature=temperature,
        top_p=top_p,
    )


def _settings(path: Path, depth: int = 0) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the fields of a task file over those that it includes, and the line of each of its own."""
    found, node = _read(path)
    found = without_lone_surrogates(found)
    lines = {
        key.value: key.start_mark.line + 1 for key, _ in (node.value if isinstance(node, yaml.MappingNode) else ())
    }
    if not isinstance(found, dict):
        raise UserError(f"{path}: a task is a list of fields, such as `doc_to_text: ...`")
    for field in found:
        where = f"{path}:{lines.get(field, 1)}"
        if field in PYTHON_FIELDS:
            raise UserError(f"{where}: {field} runs Python of lm-evaluation-harness, which is not run here")
        if field not in READ_FIELDS | IGNORED_FIELDS:
            raise UserError(
                f"{where}: there is no field {field!r}; {nearest(str(field), dict.fromkeys(sorted(READ_FIELDS)))}"
            )
    base = found.pop("include", None)
    if base is None:
        return found, lines
    if depth > 8:
        raise UserError(f"{path}:{lines['include']}: files include each other without end")
    below, below_lines = _settings(path.parent / str(base), depth + 1)
    return below | found, below_lines | lines


def _read(path: Path) -> tuple[Any, yaml.Node | None]:
    try:
        return read_yaml(path)
    except UserError as error:
        if "!function" in str(error):
            raise UserError(f"{path}: this task runs Python (!function), which is not run here") from error
        raise


def _mapping(value: Any, location: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{location}: options are wanted, such as {{until: [...]}}, and this is {value!r}")
    return value


def _sampling(generation: Mapping[str, Any], location: str) -> tuple[float, float]:
    """Return temperature and nucleus of generated answers; temperature 0 is greedy decoding."""
    unknown = [name for name in generation if name not in GENERATION_FIELDS]
    if unknown:
        raise UserError(
            f"{location}: generation_kwargs has {unknown[0]!r}, which is not supported: it may have {', '.join(GENERATION_FIELDS)}"
        )
    sampled = generation.get("do_sample")
    if sampled not in (None, True, False):
        raise UserError(f"{location}: do_sample must be true or false, and it is {sampled!r}")
    temperature = generation.get("temperature", 1.0 if sampled else 0.0)
    top_p = generation.get("top_p", 1.0)
    for name, value, right in (
        ("temperature", temperature, "at least 0"), ("top_p", top_p, "above 0 and at most 1"),
    ):  # fmt: skip
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (value >= 0 if name == "temperature" else 0 < value <= 1):
            raise UserError(f"{location}: {name} must be a number {right}, and it is {value!r}")
    return (0.0, 1.0) if sampled is False else (float(temperature), float(top_p))


def _paths(value: Any, path: Path, location: str) -> list[str]:
    """Return the files that a task file names, relative to it."""
    if value is None:
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{location}: file names are wanted")
    return [str(path.parent / name) for name in names]


def _items(paths: Sequence[str], columns: Sequence[str]) -> Iterator[Item]:
    """Yield the records of files; a .json file may also be an object with a list of `examples`, as of BIG-Bench Hard."""
    listed = {path: found for path in paths if (found := _listed_examples(Path(path))) is not None}
    for path, found in listed.items():
        for number, record in enumerate(found, 1):
            if not isinstance(record, dict):
                raise UserError(f"{path}: example {number}: this is no record with fields: {str(record)[:60]!r}")
            yield Item(without_lone_surrogates(record), f"{path}: example {number}")
    rest = [path for path in paths if path not in listed]
    for location, record in records(rest, columns=columns) if rest else ():
        yield Item(without_lone_surrogates(record), location)


def _listed_examples(path: Path) -> list[Any] | None:
    """Return the list `examples` of a JSON object, or None if the file is another one."""
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    inner = found.get("examples") if isinstance(found, dict) else None
    return inner if isinstance(inner, list) else None


def _renamed(item: Item, names: Mapping[str, Any]) -> Item:
    """Return an item with some fields under other names, where it has none of that name."""
    added = {str(new): item.fields[old] for old, new in names.items() if old in item.fields and new not in item.fields}
    return Item({**item.fields, **added}, item.location) if added else item


def _example_text(path: Path, delimiter: str) -> str:
    """Return a file of written examples, without the lines up to "-----" that BIG-Bench Hard has at the top of its prompts."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this file of examples cannot be read: {error}") from error
    head, rule, rest = text.partition("\n-----\n")
    text = (rest if rule and "canary" in head.lower() else text).strip()
    if not text:
        raise UserError(f"{path}: this file of examples is empty")
    return text + delimiter


def _filters(value: Any, location: str) -> tuple[FilterChain, ...]:
    chains = []
    for chain in value or ():
        steps = tuple(
            check_filter(
                Filter(str(step.get("function")), {k: v for k, v in step.items() if k != "function"}), location
            )
            for step in chain.get("filter", ())
        )
        chains.append(FilterChain(str(chain.get("name", "none")), steps))
    return tuple(chains)


def _metrics(value: Any, output_type: str, location: str) -> tuple[MetricConfig, ...]:
    known = METRICS[output_type]
    if not value:
        return tuple(MetricConfig(name) for name in known if name in DEFAULT_METRICS)
    metrics = []
    for one in [value] if isinstance(value, dict) else value:
        options = dict(one) if isinstance(one, dict) else {"metric": one}
        name = options.pop("metric", None)
        if name not in known:
            raise UserError(f"{location}: {output_type} has no metric {name!r}: it has {', '.join(known)}")
        for ours in ("aggregation", "higher_is_better", "hf_evaluate"):
            options.pop(ours, None)
        unknown = options.keys() - {"ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore"}
        if unknown:
            raise UserError(f"{location}: the metric {name} has no option {sorted(unknown)[0]!r}")
        metrics.append(MetricConfig(str(name), options))
    return tuple(metrics)
