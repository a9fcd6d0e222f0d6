"""Plan a run: the size, the epochs and the settings that a law expects to be best for a text and some hours on this machine.

    firth plan --text mine/ --hours 2 --for text

The law is one of `firth scale fit`, or the one that firth ships for decoders (firth/scaling/files, with its text and CPU). The
plan keeps the recipe, the length of rows, the batch and the rules of a sweep (`firth.scaling.sweep`); the vocabulary is that of
`firth.scaling.text`. Sizes are compared by the loss that the law expects after the text that each reads in the time.
The speed of each is that of timed steps on this machine (`firth.runs.estimate`).

The law is read at the width of a model and at the bytes that it reads, both in the law's own vocabulary. Losses of two texts differ
by how hard the texts are. The bits per byte are those of the law times the ratio of the two texts' sizes under bzip2, and their
interval includes the error that this has on other texts; a short run on the text replaces both (`firth.scaling.text`).
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firth.model.flops import num_parameters
from firth.report.charts import number
from firth.runs import config_io
from firth.runs.estimate import PreparedRun, RunEstimate, estimate_prepared
from firth.runs.recipe import Recipe, load
from firth.runs.recipe_names import RECIPES
from firth.runs.run import check_weights_fit
from firth.runs.step_estimate import certainly_fits, check_fits
from firth.scaling.fit import Estimate
from firth.scaling.fitted import FAR, FittedLaw, LawPoint
from firth.scaling.sizes import count_parameters, planned_recipe, scaled, scaled_config
from firth.scaling.sweep import MIN_STEPS
from firth.scaling.text import calibrate, compressed_bits, largest_of_model, prepared_with_vocabulary
from firth.training.device import default_device, machine_peak
from firth.training.distributed import Ranks
from firth.types import LOGGER, LogLine, UserError

FILES = Path(__file__).parent / "files"
"""Directory of the default laws: decoder.json for text."""
NO_LAW = (
    "firth ships no law of encoders for labels: in its sweep of 20 runs they learned little more than the frequencies of tokens before "
    "they had read 3 M tokens, at any size, which is no power law; train `firth train roberta` on 4 M tokens or more, in batches of at "
    "least 2,000 (with 500 nothing more was learned), or fit a law of longer runs of `firth scale run roberta` and give fit.json with --law"
)
WIDTHS = (*range(16, 128, 16), *range(128, 256, 32), *range(256, 512, 64), *range(512, 2049, 128))
"""Widths to choose from."""
LEAST_WORTH = 0.1
"""Text is not read further once a repeated token is worth less than this share of a new one."""
MAX_EPOCHS = 4.0
"""The most epochs where the law has no measured worth of repeats (Muennighoff et al. 2023: about as good as new text)."""
MAX_TIMED = 7
"""The most sizes that are timed."""
CALIBRATION_SHARE = 0.1
"""Share of the hours that the calibration run takes."""
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
        point: Where the law is read.
        loss: The loss that the law expects there.
    """

    width: int
    parameters: int
    tokens: float
    seconds: float
    point: LawPoint
    loss: float


@dataclass(frozen=True)
class Plan:
    """A planned run.

    Args:
        goal: labels or text.
        recipe: The recipe, ready to train.
        estimate: What it takes.
        parameters: Parameters that a token is multiplied by.
        loss: The loss that the law expects, on its own text in its own vocabulary.
        bits_per_byte: The expected bits per byte of held-out text; None if the law has no bytes.
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
    text: Sequence[str],
    hours: float,
    goal: str,
    law_file: Path | None,
    out: Path,
    log: LogLine = LOGGER.info,
    measured: bool = False,
) -> str:
    """Plan a run for each goal and return the plans as text.

    Args:
        text: Files or directories.
        hours: Hours of training.
        goal: labels, text or both.
        law_file: A fitted law, used for the goal that its recipe fits.
        out: Directory of the planned runs.
        log: Receives messages.
        measured: Whether a short run on the text calibrates the bits per byte.

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
    return "\n\n".join(describe(plan_run(text, hours, one, laws[one], out / one, log, measured)) for one in goals)


def plan_run(
    text: Sequence[str],
    hours: float,
    goal: str,
    law: FittedLaw,
    out: Path,
    log: LogLine = LOGGER.info,
    measured: bool = False,
) -> Plan:
    """Plan one run.

    Args:
        text: Files or directories.
        hours: Hours of training.
        goal: labels or text.
        law: The law.
        out: The run directory of the command.
        log: Receives messages.
        measured: Whether a short run on the text calibrates the bits per byte.

    Raises:
        UserError: The law does not determine the best size for this compute, no size fits into the free memory, or there is too
            little text or time.
    """
    law_base = law_recipe(law, goal)
    law_base = dataclasses.replace(
        law_base, data=dataclasses.replace(law_base.data, path=tuple(text), corpus="", cache_dir="")
    )
    seconds = hours * 3600 * SPARE
    with prepared_with_vocabulary(law_base, _vocabulary(law_base, law, seconds), log) as (base, run):
        choice = _Choice(run, base, law_base, law, log)
        best, notes = choice.best(seconds)
        found = choice.timed[best.width]
        own = compressed_bits(run.data.stores()[0], run.data.tokenizer)
        calibration = None
        if measured:
            pilot, _ = choice.best(CALIBRATION_SHARE * seconds, known=True)
            calibration = calibrate(
                base, pilot.width, round(pilot.tokens / choice.timed[pilot.width].step.tokens), pilot.point, log
            )
    steps = max(1, round(best.tokens / found.step.tokens))
    recipe = planned_recipe(base, best.width, steps)
    found = dataclasses.replace(
        found,
        steps=steps,
        tokens=best.tokens,
        epochs=best.tokens / found.data_tokens,
        step_seconds=best.seconds / steps,
    )
    C = law.compute(best.point)
    if why := law.optimum(C).too_wide:
        raise UserError(f"there is no plan: {why}, or plan fewer hours")
    if (far := C / law.flops[1]) > FAR:
        notes.append(f"this is {far:.0f} times the compute of the largest run of the law: an extrapolation")
    if best.point.parameters > law.sizes[1]:
        factor = best.point.parameters / law.sizes[1]
        notes.append(
            f"the size is {factor:.2g} times the largest of the law, {number(law.sizes[1], 3)} parameters: an extrapolation"
        )
    loss = law.loss_at(best.point)
    bits = calibration.bits(law, best.point) if calibration else _bits_per_byte(law, loss, own)
    command = command_of(recipe, out)
    return Plan(goal, recipe, found, best.parameters, loss, bits, command, tuple(notes))


def _vocabulary(base: Recipe, law: FittedLaw, seconds: float) -> int:
    """Return the vocabulary that the model supports, of the size that the law expects to be best at the speed of its runs."""
    assert base.model is not None
    speed = law.flops_per_second or machine_peak(default_device().type, "fp32") / 10
    best = law.optimum(seconds * speed).parameters.value
    others = {}
    for width in WIDTHS:
        config = scaled_config(base.model, width)
        table = 0 if config.tie_embeddings else config.vocab_size * config.embedding_dim
        counted = num_parameters(config) - table
        others[width] = (abs(np.log(counted / best)), counted - config.vocab_size * width)
    width = min(others, key=lambda w: others[w][0])
    return largest_of_model(max(1.0, others[width][1]), width)


class _Choice:
    """The choice among the widths of a plan.

    Args:
        run: The prepared run.
        base: Its recipe.
        law_base: The recipe with the vocabulary of the law.
        law: The law.
        log: Receives messages.
    """

    def __init__(self, run: PreparedRun, base: Recipe, law_base: Recipe, law: FittedLaw, log: LogLine) -> None:
        self.run, self.base, self.law_base, self.law, self.log = run, base, law_base, law, log
        self.timed: dict[int, RunEstimate] = {}
        store = run.data.stores()[0]
        per_token = store.num_bytes / len(store.tokens)
        own = 1 / (law.bits_per_nat * np.log(2)) if law.bits_per_nat else per_token
        self.law_tokens = per_token / own
        """Tokens of the law's vocabulary for each token."""

    def best(self, seconds: float, known: bool = False) -> tuple[PlannedSize, list[str]]:
        """Return the size with the least expected loss, and notes.

        The time of a token is interpolated between sizes that are timed; the chosen size is timed too until it stays the choice.
        A size that does not fit into the memory, or that reads too few tokens, is replaced by the next smaller one.

        Args:
            seconds: Training time.
            known: Whether to choose among sizes that are timed.

        Raises:
            UserError: No size fits.
        """
        for width in (32, 128) if not known else ():
            self._measure(width)
        widths, larger = sorted(self.timed) if known else list(WIDTHS), ""
        while True:
            found = [self._candidate(w, seconds) for w in widths if w <= 4 * max(self.timed)]
            least = min(found, key=lambda one: one.loss)
            few, misfit = self._few_steps(least), self._misfit(least)
            if few or misfit:
                larger = larger or misfit
                widths = [w for w in widths if w < least.width]
                if not widths:
                    raise UserError(few or misfit)
                continue
            if least.width in self.timed:
                break
            if len(self.timed) < MAX_TIMED:
                self._measure(least.width)
            else:
                widths = [w for w in widths if w in self.timed]
        notes = []
        if least.seconds < 0.9 * seconds:
            notes.append(
                f"the text is read {least.tokens / self.unique:.1f} times in {least.seconds / 60:.0f} minutes, and further epochs are not "
                "worth the rest of the time: more text would be"
            )
        if larger:
            notes.append(f"the law prefers a larger size, which does not fit into the free memory: {larger}")
        return least, notes

    @property
    def unique(self) -> float:
        """Tokens of the text."""
        return next(iter(self.timed.values())).data_tokens

    def _measure(self, width: int) -> None:
        if width not in self.timed:
            found = estimate_prepared(self._of_width(width))
            self.timed[width] = found
            self.log(f"width {width}: {found.step.flops / found.step_seconds / 1e9:.1f} GFLOP/s")

    def _few_steps(self, size: PlannedSize) -> str:
        """Return why a size reads too few tokens; empty if it reads enough."""
        per_step = next(iter(self.timed.values())).step.tokens
        steps = round(size.tokens / per_step)
        if steps >= MIN_STEPS:
            return ""
        return (
            f"there is time or text for {steps} steps of {per_step:,.0f} tokens only, and a plan needs {MIN_STEPS}: give more hours or "
            "more text"
        )

    def _misfit(self, size: PlannedSize) -> str:
        """Return why `firth train` would refuse a size for want of memory; empty if it fits."""
        sized = self._of_width(size.width)
        try:
            check_weights_fit(sized.recipe, sized.recipe.model, Ranks())
            if certainly_fits(sized.recipe, sized.batches.batches(0), default_device()):
                return ""
            step = (self.timed.get(size.width) or estimate_prepared(sized, timed=False)).step
            check_fits(step, default_device(), max(1, round(size.tokens / step.tokens)))
        except UserError as error:
            return str(error)
        return ""

    def _candidate(self, width: int, seconds: float) -> PlannedSize:
        """Return a size with the tokens that it reads in the time, and its expected loss."""
        known = sorted(self.timed)
        parameters = self._parameters(width)
        per_token = [np.log(self.timed[w].step_seconds / self.timed[w].step.tokens) for w in known]
        counts = [np.log(self._parameters(w)) for w in known]
        # Outside the timed sizes a token takes time in proportion to its FLOPs at the speed of the nearest one.
        inside = float(np.interp(np.log(parameters), counts, per_token))
        beyond = max(0.0, np.log(parameters) - counts[-1]) + min(0.0, np.log(parameters) - counts[0])
        time = float(np.exp(inside + beyond))
        repeats = self.law.repeats
        limit = repeats.epochs_at_worth(LEAST_WORTH) if repeats is not None else MAX_EPOCHS
        most = min(seconds / time, limit * self.unique)
        of_law = count_parameters(scaled(self.law_base, width)).multiplied

        def size(tokens: float) -> PlannedSize:
            point = LawPoint(of_law, tokens * self.law_tokens, self.unique * self.law_tokens)
            return PlannedSize(width, parameters, tokens, tokens * time, point, self.law.expected_at(point))

        # A large model gains nothing from further epochs, and by a law of repeats it may lose.
        epochs = [size(n * self.unique) for n in range(1, int(most / self.unique) + 1)]
        return min([*epochs, size(most)], key=lambda one: one.loss)

    def _parameters(self, width: int) -> int:
        return count_parameters(self._of_width(width).recipe).multiplied

    def _of_width(self, width: int) -> PreparedRun:
        """Return the prepared run with the model and the optimizer of another width."""
        assert self.base.model is not None
        own = self.run.recipe
        fields = scaled_config(self.base.model, width)
        model = dataclasses.replace(fields, vocab_size=own.model.vocab_size, causal=own.model.causal)
        recipe = dataclasses.replace(own, model=model, optimizer=scaled(self.base, width).optimizer)
        return dataclasses.replace(self.run, recipe=recipe)


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
        f"  vocabulary    {model.vocab_size:,}, as much as text and model support",
        f"  text          {number(found.data_tokens, 3)} tokens, read {found.epochs:.2g} times",
        f"  batch         {recipe.batch.size} examples of {found.step.tokens / recipe.batch.size:,.0f} tokens, {found.steps:,} steps",
        f"  time          {found.seconds / 60:.0f} minutes of training ({found.timing})",
        f"  memory        {found.step.peak_bytes / 1e9:.2g} GB",
        f"  expected      {expected}, on held-out text",
        *(f"  note          {note}" for note in plan.notes),
        f"  {plan.command}",
    ]
    return "\n".join(lines)
