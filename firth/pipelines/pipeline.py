"""Several stages in sequence from one YAML file: `firth pipeline FILE`. A single stage: `firth pipeline KIND field=value`.

    inputs:
      model: the decoder to start from               # required: a description
      beta: {default: 0.1, about: strength of the penalty}
    stages:
      sft: {train: sft, init_from: $model, data.path: dialogues.jsonl}
      answers: {sample: $sft, data: prompts.jsonl, num_samples: 4}
      pairs: {judge: $answers, model: $sft}
      dpo: {train: dpo, init_from: $sft, data.path: $pairs, objective.beta: $beta}

`$NAME` is an input or the output of an earlier stage: the run directory of `train`, the file that a data stage writes. Stages are
written to DIR/NAME. The same command skips the finished ones and resumes the first unfinished one. Paths are relative to the
working directory, as in recipes.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from firth.corpora.download import digest as file_digest
from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.fields import NonNegativeInt, PositiveInt
from firth.io.atomic import make_directory, write_text
from firth.io.yaml_files import parse_yaml
from firth.pipelines.ai_feedback import JudgePairs, ReviseAnswers
from firth.pipelines.best_of_n import RankAnswers, SampleAnswers
from firth.pipelines.frontier import CompareMethods
from firth.pipelines.rationales import SampleRationales
from firth.pipelines.stage import Stage, Summary, Weights, files_of
from firth.report.page import Cell, Report, Section, Table, write
from firth.runs import config_io
from firth.runs.config_io import SourceLocation
from firth.runs.evaluate_prompts import evaluate_and_report
from firth.runs.recipe import Recipe, load
from firth.runs.run import run
from firth.types import LOGGER, UserError


@dataclass(frozen=True)
class TrainRecipe(Stage):
    """Train a recipe; the stage's directory is the run directory.

    Args:
        recipe: A recipe's name or a YAML file.
        settings: Fields of the recipe -> values, as on the command line of `firth train`.
    """

    main: ClassVar[str] = "recipe"

    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        _ = self.loaded

    def inputs(self) -> Iterator[Path]:
        yield from files_of("recipe", self.recipe)
        for name, value in self.settings.items():
            yield from files_of(name, value)
        for name, kind, value in config_io.paths(self.loaded):
            yield from files_of("data" if kind == "files" else name, value)

    @cached_property
    def loaded(self) -> Recipe:
        """The recipe with its settings."""
        return load(self.recipe, [f"{name}={_written(value)}" for name, value in self.settings.items()])

    def run(self, directory: Path) -> Summary:
        result = run(self.loaded, directory)
        numbers = {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}
        return {"steps": result.steps, "seconds": result.seconds, "tokens": result.tokens, **numbers}


def _written(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=1 << 20).removesuffix("\n").removesuffix("\n...")


@dataclass(frozen=True)
class EvaluateModels(Stage):
    """Evaluate models on tasks in prompts, as `firth evaluate` does; writes the table, results.json and report.html.

    Args:
        models: Runs, model directories, adapters, GGUF files or `openai:URL`.
        task: Names of tasks or task files.
        data: Files of the questions, for one task that names none.
        examples: Files of the examples in prompts.
        shots: Examples in each prompt; null for the task's own number.
        chat: Whether prompts are messages of the model's chat template.
        cot: "zero-shot" or "few-shot" chain of thought; "" for none.
        max_new_tokens: Most tokens of an answer; 0 for the task's own number.
        votes: Sampled answers of each question, of which the most frequent counts.
        limit: Most items; 0 for all.
        seed: Seed of examples and samples.
        weights: Data type of the weights; "" takes bf16 where it is faster.
    """

    main: ClassVar[str] = "models"

    models: tuple[str, ...]
    task: tuple[str, ...]
    data: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    shots: NonNegativeInt | None = None
    chat: bool = False
    cot: Literal["", "zero-shot", "few-shot"] = ""
    max_new_tokens: NonNegativeInt = 0
    votes: PositiveInt = 1
    limit: NonNegativeInt = 0
    seed: NonNegativeInt = 0
    weights: Weights = ""

    def run(self, directory: Path) -> Summary:
        config = PromptConfig(
            self.shots, self.chat, self.cot, self.votes, seed=self.seed, limit=self.limit or None, max_new_tokens=self.max_new_tokens
        )  # fmt: skip
        text = evaluate_and_report(
            self.models, self.task, config, data=self.data, examples=self.examples, weights=self.weights or None, within_word=False,
            out=directory, as_json=True,
        )  # fmt: skip
        write_text(directory / "table.json", text)
        return {
            f"{task}: {name.removesuffix(',none')}, {model}": value
            for model, one in zip(self.models, json.loads(text), strict=True)
            for task, metrics in one["results"].items()
            for name, value in metrics.items()
            if isinstance(value, float) and "stderr" not in name
        }


KINDS: dict[str, type[Stage]] = {
    "train": TrainRecipe,
    "sample": SampleAnswers,
    "judge": JudgePairs,
    "rank": RankAnswers,
    "revise": ReviseAnswers,
    "rationales": SampleRationales,
    "frontier": CompareMethods,
    "evaluate": EvaluateModels,
}
"""Kind of a stage -> its class."""

FILES = Path(__file__).parent / "files"
"""Pipelines by name: NAME.yaml."""

STAGE = "stage.json"
"""Digest of the settings and summary of a finished stage."""

VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Pipeline:
    """A pipeline with all variables replaced.

    Args:
        source: The file that it was read from.
        out: The directory of its stages.
        stages: Name -> stage, in order.
    """

    source: Path
    out: Path
    stages: Mapping[str, Stage]


@dataclass(frozen=True)
class FinishedStage:
    """A finished stage.

    Args:
        name: Its name.
        kind: Its kind.
        seconds: Time that it took.
        summary: Its numbers.
    """

    name: str
    kind: str
    seconds: float
    summary: Summary


def names() -> list[str]:
    """Return the names of the pipelines that come with firth."""
    return sorted(path.stem for path in FILES.glob("*.yaml"))


def load_pipeline(
    name: str, assignments: Sequence[str], out: Path, leave_out: Collection[str] = frozenset()
) -> Pipeline:
    """Read a pipeline and replace its variables.

    An input that no stage refers to need not be set.

    Args:
        name: A YAML file, or a name in `names`.
        assignments: `INPUT=value` and `STAGE.field=value`.
        out: The directory of its stages.
        leave_out: Names of stages that are not run.

    Raises:
        UserError: A stage, a field or a variable is wrong; the message names file and line.
    """
    path = Path(name) if Path(name).is_file() else FILES / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no pipeline {name!r}: give a YAML file, or one of {', '.join(names())}")
    data, lines = config_io.read_yaml(path)
    unknown = data.keys() - {"inputs", "stages"}
    if unknown:
        field = sorted(map(str, unknown))[0]
        raise UserError(f"{lines.get((field,), path)}: there is no field {field!r}: a pipeline has inputs and stages")
    stages = data.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) and stage for stage in stages.values()):
        raise UserError(f"{lines.get(('stages',), path)}: stages must be NAME: {{KIND: ..., field: ...}}")
    stages = {stage: given for stage, given in stages.items() if stage not in leave_out}
    values, typed = _assigned(data.get("inputs") or {}, stages, assignments, path, lines)
    built: dict[str, Stage] = {}
    for stage_name, given in stages.items():
        where = SourceLocation(("stages", str(stage_name)), lines, typed)
        if not re.fullmatch(r"[A-Za-z_]\w*", str(stage_name)) or stage_name in values:
            raise UserError(
                f"{where}: the name of a stage is of letters, digits and _, begins with no digit, and is not that of an input"
            )
        built[stage_name] = _stage(_replaced(given, values, where), where)
        values[stage_name] = str(out / stage_name / built[stage_name].output)
    return Pipeline(path, out, built)


def _assigned(
    inputs: Mapping[str, Any], stages: dict[str, dict[str, Any]], assignments: Sequence[str], path: Path,
    lines: Mapping[tuple[str, ...], str],
) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:  # fmt: skip
    """Apply the assignments: return the values of the inputs and the paths of the fields that were set; `stages` is changed."""
    values = {
        str(name): about["default"] for name, about in inputs.items() if isinstance(about, dict) and "default" in about
    }
    typed: dict[tuple[str, ...], str] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        stage, dot, field = name.partition(".")
        if not equals or (not dot and name not in inputs) or (dot and stage not in stages):
            raise UserError(
                f"{assignment!r}: write INPUT=value or STAGE.field=value; {path.name} has the inputs "
                f"{', '.join(map(str, inputs)) or 'none'} and the stages {', '.join(map(str, stages))}"
            )
        value, _ = parse_yaml(text, assignment)
        if dot:
            stages[stage][field] = value
            typed["stages", stage, field] = text
        else:
            values[name] = value
    used = set(VARIABLE.findall(json.dumps(stages, default=str)))
    for name, about in inputs.items():
        if name not in values and name in used:
            text = about.get("about", "") if isinstance(about, dict) else about
            raise UserError(f"{lines.get(('inputs', str(name)), path)}: set {name}=...: {text}")
    return values, typed


def _replaced(value: Any, values: Mapping[str, Any], where: SourceLocation) -> Any:
    """Return a value with `$NAME` replaced; a text that is only `$NAME` becomes the value itself."""
    if isinstance(value, dict):
        return {key: _replaced(one, values, where / str(key)) for key, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one, values, where / str(i)) for i, one in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in VARIABLE.findall(value):
        if name not in values:
            raise UserError(
                f"{where}: there is no ${name}: it is neither an input nor an earlier stage ({', '.join(values)})"
            )
    if VARIABLE.fullmatch(value):
        return values[value[1:]]
    return VARIABLE.sub(lambda found: str(values[found[1]]), value)


def _stage(fields: Mapping[str, Any], where: SourceLocation) -> Stage:
    """Return the stage of a mapping of its fields."""
    found = [kind for kind in KINDS if kind in fields]
    if len(found) != 1:
        raise UserError(f"{where}: a stage names one of its kinds ({', '.join(KINDS)}), such as train: sft")
    [kind] = found
    rest = {name: value for name, value in fields.items() if name != kind}
    stage_class = KINDS[kind]
    if stage_class is TrainRecipe:
        stage: Stage = TrainRecipe(str(fields[kind]), rest)
    else:
        stage = config_io.from_dict(stage_class, {stage_class.main: fields[kind], **rest}, where)
    try:
        stage.check()
    except UserError as error:
        raise UserError(f"{where.line()}: {error}") from error
    return stage


def load_stage(kind: str, assignments: Sequence[str]) -> Stage:
    """Return a single stage from `field=value` assignments.

    Args:
        kind: A name in KINDS.
        assignments: Its fields.

    Raises:
        UserError: The kind is train, or a field is wrong.
    """
    if kind == "train":
        raise UserError("train is a stage of a pipeline only: use `firth train RECIPE field=value`")
    settings: dict[str, Any] = config_io.override({}, list(assignments))
    typed: dict[tuple[str, ...], str] = {(name,): text for name, _, text in (one.partition("=") for one in assignments)}
    stage: Stage = config_io.from_dict(KINDS[kind], settings, SourceLocation((), {}, typed))
    stage.check()
    return stage


def run_stage(stage: Stage, directory: Path) -> Summary:
    """Run a single stage, which is not a part of a pipeline, and return its numbers."""
    make_directory(directory)
    return stage.run(directory)


def run_pipeline(pipeline: Pipeline) -> list[FinishedStage]:
    """Run the stages that are not finished, and write DIR/report.html after each.

    Raises:
        UserError: A stage fails, or DIR holds the stage of another pipeline.
    """
    make_directory(pipeline.out)
    finished: list[FinishedStage] = []
    digest = ""
    for number, (name, stage) in enumerate(pipeline.stages.items(), 1):
        directory = pipeline.out / name
        kind = next(kind for kind, one in KINDS.items() if isinstance(stage, one))
        digest = hashlib.sha256(f"{digest} {_identity(stage, pipeline.out)}".encode()).hexdigest()
        done = _finished(directory / STAGE, digest, name)
        if done is None:
            LOGGER.info(f"stage {number} of {len(pipeline.stages)}: {name} ({kind})")
            make_directory(directory)
            began = time.monotonic()
            try:
                summary = dict(stage.run(directory))
            except UserError as error:
                raise UserError(f"stage {name}: {error}") from error
            seconds = time.monotonic() - began
            write_text(
                directory / STAGE,
                json.dumps({"digest": digest, "kind": kind, "seconds": seconds, "summary": summary}, indent=1) + "\n",
            )
            done = FinishedStage(name, kind, seconds, summary)
            LOGGER.info(f"  {_line(summary)}")
        else:
            LOGGER.info(f"stage {number} of {len(pipeline.stages)}: {name} ({kind}) is finished")
        finished.append(done)
        write(pipeline_report(pipeline, finished), pipeline.out / "report.html")
    return finished


def _identity(stage: Stage, out: Path) -> str:
    """Return the settings of a stage, and hashes of what it reads, wherever the pipeline's directory is."""
    inputs = sorted({path.absolute() for path in stage.inputs() if not path.absolute().is_relative_to(out.absolute())})
    settings = {field.name: getattr(stage, field.name) for field in fields(stage)}
    return f"{type(stage).__name__} {settings}".replace(str(out), "$OUT") + " ".join(map(file_digest, inputs))


def _finished(path: Path, digest: str, name: str) -> FinishedStage | None:
    """Return a finished stage, or None.

    Raises:
        UserError: It was run with other settings.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        same, found = (
            record["digest"] == digest,
            FinishedStage(name, record["kind"], record["seconds"], record["summary"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: this file is damaged: delete {path.parent} to run the stage again") from error
    if not same:
        raise UserError(
            f"{path.parent}: the stage {name} or an earlier one was run with other settings: give another --out, or delete "
            "the directories of the stages that are to run again"
        )
    return found


def _line(summary: Summary) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in list(summary.items())[:8])


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def pipeline_report(pipeline: Pipeline, finished: Sequence[FinishedStage]) -> Report:
    """Return the page of a pipeline: its stages with their time, and the numbers of each."""
    rows: list[tuple[Cell, ...]] = [(one.name, one.kind, round(one.seconds, 1)) for one in finished]
    sections = [Section("Stages", tables=(Table("", ("stage", "kind", "seconds"), rows),))]
    for one in finished:
        numbers: list[tuple[Cell, ...]] = [
            (name, value if isinstance(value, str | int) else round(value, 4)) for name, value in one.summary.items()
        ]
        page = pipeline.out / one.name / "report.html"
        text = f"The page of this stage is {one.name}/report.html." if page.is_file() else ""
        sections.append(Section(one.name, text, tables=(Table("", ("number", "value"), numbers),)))
    return Report(pipeline.source.stem, sections=tuple(sections))


TRAINED = ("dpo", "ppo", "grpo")
"""Methods that are stages of the pipeline, each trained from the finetuned model."""

METHODS = ("prompt", "sft", "best-of-n", *TRAINED)


def load_methods(methods: Sequence[str], assignments: Sequence[str], out: Path) -> Pipeline:
    """Return the pipeline `side_by_side` without the stages of other methods.

    The finetuned model and the reward model are always trained: the first is what the divergence is measured from, the second is the
    reward of the table.

    Args:
        methods: Names in `METHODS`.
        assignments: `INPUT=value` and `STAGE.field=value`.
        out: The directory of the stages.

    Raises:
        UserError: There is no such method, or a setting is wrong.
    """
    for name in methods:
        if name not in METHODS:
            raise UserError(f"there is no method {name!r}: choose from {', '.join(METHODS)}")
    if not methods:
        raise UserError(f"there is no method to compare: choose from {', '.join(METHODS)}")
    table = [f"table.frontier=[{', '.join(f'${name}' for name in TRAINED if name in methods)}]"]
    if "prompt" not in methods:
        table.append("table.prompt=''")
    if "best-of-n" not in methods:
        table.append("table.best_of=[]")
    return load_pipeline("side_by_side", [*table, *assignments], out, leave_out=set(TRAINED) - set(methods))
