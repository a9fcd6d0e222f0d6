"""Plan a run: the size, the epochs and the settings that a law expects to be best for a text and some hours on this machine.

    firth plan --text mine/ --hours 2 --for text

The law is one of `firth scale fit`, or the one that firth ships for decoders (firth/scaling/files, with its text and CPU). The
plan keeps what its runs kept: the recipe, the vocabulary size, the length of rows, the batch, and the rules of a sweep
(`firth.scaling.sweep`). Sizes are compared by the loss that the law expects after the tokens that each reads in the time.
The speed of each is that of timed steps on this machine (`firth.runs.estimate`).

Losses of two texts differ by how hard the texts are. The bits per byte are those of the law times the ratio of the
two texts' sizes under bzip2, and their interval includes the error that this has on other texts, if the law states it.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firth.report.charts import number
from firth.runs import config_io
from firth.runs.estimate import PreparedRun, RunEstimate, estimate_prepared, prepared
from firth.runs.recipe import EvalConfig, Recipe, load
from firth.runs.recipe_names import RECIPES
from firth.runs.step_estimate import check_fits
from firth.scaling.compressed import compressed_bits
from firth.scaling.fit import Estimate
from firth.scaling.fitted import FAR, FittedLaw
from firth.scaling.sizes import count_parameters, scaled, scaled_config
from firth.scaling.sweep import DECAY_RATIO, MIN_STEPS, WARMUP_STEPS
from firth.training.device import default_device
from firth.training.schedule import Budget, Schedule
from firth.types import LOGGER, LogLine, UserError

FILES = Path(__file__).parent / "files"
"""Directory of the default laws: decoder.json for text."""
NO_LAW = (
    "firth ships no law of encoders for labels: those of its sweep learned more than the frequencies of tokens at 1e12 FLOPs only, and "
    "follow no law; train larger ones with `firth scale run roberta`, fit them with `firth scale fit`, and give fit.json with --law"
)
WIDTHS = (*range(16, 128, 16), *range(128, 256, 32), *range(256, 512, 64), *range(512, 2049, 128))
"""Widths to choose from."""
LEAST_WORTH = 0.1
"""Text is not read further once a repeated token is worth less than this share of a new one."""
MAX_EPOCHS = 4.0
"""The most epochs where the law has no measured worth of repeats (Muennighoff et al. 2023: about as good as new text)."""
SPARE = 0.95
"""Share of the hours that is planned: the rest is for the tokenizer, the evaluation and the export."""


@dataclass(frozen=True)
class PlannedSize:
    """A size in a plan.

    Args:
        width: Width of the model.
        parameters: Parameters that a token is multiplied by.
        tokens: Tokens that it reads.
        seconds: Training time.
        loss: The loss that the law expects.
    """

    width: int
    parameters: int
    tokens: float
    seconds: float
    loss: float


@dataclass(frozen=True)
class Plan:
    """A planned run.

    Args:
        goal: labels or text.
        recipe: The recipe, ready to train.
        estimate: What it takes.
        parameters: Parameters that a token is multiplied by.
        loss: The expected held-out loss.
        bits_per_byte: The same in bits per byte; None if the law has no bytes.
        command: The command to type.
        notes: What limits the plan, a sentence each.
    """

    goal: str
    recipe: Recipe
    estimate: RunEstimate
    parameters: int
    loss: Estimate
    bits_per_byte: Estimate | None
    command: str
    notes: tuple[str, ...]


def default_law(goal: str) -> FittedLaw:
    """Return the law that is used where none is given.

    Raises:
        UserError: There is none for this goal.
    """
    if goal == "labels":
        raise UserError(NO_LAW)
    return FittedLaw.load(FILES / "decoder.json")


def goal_of(law: FittedLaw) -> str:
    """Return what the models of a law are for: text if they predict the next token, else labels."""
    return "text" if law_recipe(law, "text").objective.attention == "causal" else "labels"


def law_recipe(law: FittedLaw, goal: str) -> Recipe:
    """Return the recipe of the runs of a law; for a table without one, a published recipe of the goal."""
    stored = law.source.get("recipe")
    if not stored:
        return load("gpt" if goal == "text" else "roberta")
    recipe: Recipe = config_io.from_dict(Recipe, stored, config_io.SourceLocation())
    return recipe


def plan_runs(
    text: Sequence[str], hours: float, goal: str, law_file: Path | None, out: Path, log: LogLine = LOGGER.info
) -> str:
    """Plan a run for each goal and return the plans as text.

    Args:
        text: Files or directories.
        hours: Hours of training.
        goal: labels, text or both.
        law_file: A fitted law, used for the goal that its recipe fits.
        out: Directory of the planned runs.
        log: Receives messages.

    Raises:
        UserError: The text is too small, the time too short, or the law does not fit the goal.
    """
    goals = ["labels", "text"] if goal == "both" else [goal]
    given: dict[str, FittedLaw] = {}
    if law_file is not None:
        law = FittedLaw.load(law_file)
        own = goal_of(law)
        if own not in goals:
            raise UserError(f"{law_file} is a law of models for {own}, and the plan is for {goal}: use --for {own}")
        given[own] = law
    if goal == "both" and "labels" not in given:
        log(NO_LAW)
        goals.remove("labels")
    laws = {one: given.get(one) or default_law(one) for one in goals}
    return "\n\n".join(describe(plan_run(text, hours, one, laws[one], out / one, log)) for one in goals)


def plan_run(
    text: Sequence[str], hours: float, goal: str, law: FittedLaw, out: Path, log: LogLine = LOGGER.info
) -> Plan:
    """Plan one run.

    Args:
        text: Files or directories.
        hours: Hours of training.
        goal: labels or text.
        law: The law.
        out: The run directory of the command.
        log: Receives messages.
    """
    base = law_recipe(law, goal)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, path=tuple(text), corpus="", cache_dir=""))
    with prepared(base, log) as run:
        best, found, notes = _choose(run, base, law, hours * 3600 * SPARE, log)
        found = dataclasses.replace(found, step_seconds=best.seconds / max(1, round(best.tokens / found.step.tokens)))
        own = compressed_bits(run.data.stores()[0], run.data.tokenizer)
    steps = max(1, round(best.tokens / found.step.tokens))
    recipe = planned_recipe(base, best.width, steps)
    found = dataclasses.replace(found, steps=steps, tokens=best.tokens, epochs=best.tokens / found.data_tokens)
    loss = law.loss(best.parameters, best.tokens, found.data_tokens)
    C = float(law.rule.flops(best.parameters, best.tokens))
    if why := law.optimum(C).too_wide:
        raise UserError(f"there is no plan: {why}, or plan fewer hours")
    check_fits(found.step, default_device(), steps)
    if (far := C / law.flops[1]) > FAR:
        notes.append(f"this is {far:.0f} times the compute of the largest run of the law: an extrapolation")
    if best.parameters > law.sizes[1]:
        notes.append(
            f"the size is {best.parameters / law.sizes[1]:.2g} times the largest of the law, {number(law.sizes[1], 3)} parameters: an "
            "extrapolation"
        )
    bits = _bits_per_byte(law, loss, own)
    command = command_of(recipe, out)
    return Plan(goal, recipe, found, best.parameters, loss, bits, command, tuple(notes))


def _choose(
    run: PreparedRun, base: Recipe, law: FittedLaw, seconds: float, log: LogLine
) -> tuple[PlannedSize, RunEstimate, list[str]]:
    """Return the size with the least expected loss, what a step of it takes, and notes.

    The time of a token is interpolated between sizes that are timed; the chosen size is timed too until it stays the choice.
    """
    timed: dict[int, RunEstimate] = {}

    def measure(width: int) -> None:
        if width not in timed:
            timed[width] = estimate_prepared(_of_width(run, base, width))
            log(f"width {width}: {timed[width].step.flops / timed[width].step_seconds / 1e9:.1f} GFLOP/s")

    for width in (32, 128):
        measure(width)
    unique = timed[32].data_tokens
    repeats = law.repeats
    limit = repeats.epochs_at_worth(LEAST_WORTH) if repeats is not None else MAX_EPOCHS
    for _ in range(4):
        candidates = [
            _candidate(run, base, width, timed, law, seconds, unique, limit)
            for width in WIDTHS
            if width <= 4 * max(timed)
        ]
        least = min(candidates, key=lambda one: one.loss)
        if least.width in timed:
            break
        measure(least.width)
    measure(least.width)
    step = timed[least.width].step
    steps = round(least.tokens / step.tokens)
    if steps < MIN_STEPS:
        raise UserError(
            f"there is time or text for {steps} steps of {step.tokens:,.0f} tokens only, and a plan needs {MIN_STEPS}: give more hours or "
            "more text"
        )
    notes = []
    if least.seconds < 0.9 * seconds:
        notes.append(
            f"the text is read {least.tokens / unique:.1f} times in {least.seconds / 60:.0f} minutes, and further epochs are not worth the "
            "rest of the time: more text would be"
        )
    return least, timed[least.width], notes


def _candidate(
    run: PreparedRun,
    base: Recipe,
    width: int,
    timed: dict[int, RunEstimate],
    law: FittedLaw,
    seconds: float,
    unique: float,
    limit: float,
) -> PlannedSize:
    """Return a size with the tokens that it reads in the time, at most `limit` epochs, and its expected loss."""
    known = sorted(timed)
    parameters = count_parameters(_of_width(run, base, width).recipe).multiplied
    per_token = [np.log(timed[w].step_seconds / timed[w].step.tokens) for w in known]
    counts = [np.log(count_parameters(_of_width(run, base, w).recipe).multiplied) for w in known]
    # Outside the timed sizes a token takes time in proportion to its FLOPs at the speed of the nearest one.
    inside = float(np.interp(np.log(parameters), counts, per_token))
    beyond = max(0.0, np.log(parameters) - counts[-1]) + min(0.0, np.log(parameters) - counts[0])
    time = float(np.exp(inside + beyond))
    tokens = min(seconds / time, limit * unique)
    return PlannedSize(width, parameters, tokens, tokens * time, law.expected(parameters, tokens, unique))


def _of_width(run: PreparedRun, base: Recipe, width: int) -> PreparedRun:
    """Return a prepared run with the model and the optimizer of another width."""
    assert base.model is not None
    fields = scaled_config(base.model, width)
    model = dataclasses.replace(fields, vocab_size=run.recipe.model.vocab_size, causal=run.recipe.model.causal)
    return dataclasses.replace(
        run, recipe=dataclasses.replace(run.recipe, model=model, optimizer=scaled(base, width).optimizer)
    )


def planned_recipe(base: Recipe, width: int, steps: int) -> Recipe:
    """Return the recipe of a plan: the law's, at a width and a number of steps, with its schedule."""
    return dataclasses.replace(
        scaled(base, width), budget=Budget(max_steps=steps), schedule=Schedule("wsd", decay_ratio=DECAY_RATIO, warmup_steps=WARMUP_STEPS),
        evaluation=EvalConfig(every=max(1, steps // 4), max_examples=base.evaluation.max_examples),
    )  # fmt: skip


def command_of(recipe: Recipe, out: Path) -> str:
    """Return the command that trains a recipe, as settings of the published one of its name."""
    start = load(recipe.name) if recipe.name in RECIPES else None
    if start is None:
        raise UserError(
            f"the law is of the recipe {recipe.name!r}, which is no published one: plan with a law of gpt or roberta"
        )
    settings = changed_fields(config_io.to_dict(start), config_io.to_dict(recipe))
    if load(recipe.name, settings) != recipe:
        raise AssertionError("the command is not that of the planned recipe")
    return shlex.join(["firth", "train", recipe.name, *settings, "--out", str(out)])


def changed_fields(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Return field=value for each field of a recipe that differs from another one.

    >>> changed_fields({"a": 1, "b": {"c": 2, "d": [3]}}, {"a": 1, "b": {"c": 4, "d": ["x"]}})
    ['b.c=4', 'b.d=[x]']
    """
    found = []
    for name, value in after.items():
        old = before.get(name)
        if value == old:
            continue
        if isinstance(value, dict) and isinstance(old, dict) and value.get("kind") == old.get("kind"):
            found += changed_fields(old, value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}={_written(value)}")
    return found


def _written(value: Any) -> str:
    """Return a value as the command line reads it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, float) else str(value)


def _bits_per_byte(law: FittedLaw, loss: Estimate, own: float) -> Estimate | None:
    """Return the expected bits per byte of a text from the loss on the text of the law."""
    if not law.bits_per_nat:
        return None
    ratio = own / law.source["compressed_bits"] if law.source.get("compressed_bits") else 1.0
    spread = 1 + float(law.source.get("text_error", 0.0))
    return Estimate(
        *(
            value * law.bits_per_nat * ratio * f
            for value, f in zip((loss.value, loss.low, loss.high), (1.0, 1 / spread, spread), strict=True)
        )
    )


def describe(plan: Plan) -> str:
    """Return a plan as text."""
    found, recipe = plan.estimate, plan.recipe
    model = found.recipe.model
    what = {"labels": "a masked encoder, to label text with", "text": "a decoder, to write text"}[plan.goal]
    bits = plan.bits_per_byte
    expected = f"{bits} bits per byte" if bits else f"loss {plan.loss}"
    if bits and plan.goal == "labels":
        expected += " of masked tokens"
    lines = [
        f"For {plan.goal}: {what} ({recipe.name})",
        f"  parameters    {found.step.parameters:,} ({plan.parameters:,} without a separate embedding table): width {model.hidden_size}, "
        f"{model.num_layers} layers",
        f"  vocabulary    {model.vocab_size:,}, that of the law",
        f"  text          {number(found.data_tokens, 3)} tokens, read {found.epochs:.2g} times",
        f"  batch         {recipe.batch.size} examples of {found.step.tokens / recipe.batch.size:,.0f} tokens, {found.steps:,} steps",
        f"  time          {found.seconds / 60:.0f} minutes of training ({found.timing})",
        f"  memory        {found.step.peak_bytes / 1e9:.2g} GB",
        f"  expected      {expected}, on held-out text",
        *(f"  note          {note}" for note in plan.notes),
        f"  {plan.command}",
    ]
    return "\n".join(lines)
