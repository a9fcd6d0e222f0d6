"""Run a sweep of settings, and show it: the table of its trials, and a page with importance, parallel coordinates and curves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from firth.compare.report import Interval
from firth.io.integrity import read_done
from firth.report.charts import Curve, Figure, number
from firth.report.page import Cell, Command, Report, Section, StatCell, Table
from firth.report.page import write as write_page
from firth.report.parallel import ParallelAxis, ParallelCoordinates
from firth.runs.recipe import load
from firth.runs.workers import Claims, start_workers
from firth.sweep.space import Parameter
from firth.sweep.trials import (
    CLAIMS,
    DIVERGED,
    REASON,
    STARTUP_TRIALS,
    WARMUP_PERCENT,
    StudyConfig,
    Sweeper,
    arms,
    best_trial,
    completed,
    metric_of,
    optuna_module,
    prepare,
    run_trials,
    seed_directory,
)
from firth.types import LOGGER, LogLine, UserError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

RELIABLE_TRIALS = 40
"""Finished trials below which the importance is not to be trusted: PED-ANOVA compares the best tenth with all."""
STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


def sweep_recipe(
    name: str, settings: Sequence[str], config: StudyConfig, out: Path, workers: int = 1, log: LogLine = LOGGER.info
) -> str:
    """Run the trials of a sweep, or what is left of them, together with other processes, and write its page.

    Args:
        name: The recipe: its name or file.
        settings: field=value, and field=log(...), uniform(...) or choice(...) for the varied fields.
        config: The configuration.
        out: The directory of the sweep.
        workers: Processes to start; 1 trains in this one.
        log: Prints a line of progress.

    Returns:
        The table, the best trial and its command.

    Raises:
        UserError: The settings or the directory do not fit, or no trial finished.
    """
    sweeper = prepare(name, settings, config, out, log)
    if workers > 1:
        start_workers(workers, _work, (name, list(settings), config, out))
    run_trials(sweeper, log)
    return show(sweeper)


def _work(name: str, settings: Sequence[str], config: StudyConfig, out: Path) -> None:
    """Run trials in a process of its own."""
    run_trials(prepare(name, settings, config, out, _silent), LOGGER.info)


def show(sweeper: Sweeper) -> str:
    """Write the page of a sweep and return its table, the best trial and its command."""
    study = sweeper.study()
    trials = study.get_trials(deepcopy=False)
    if not trials:
        raise UserError(f"{sweeper.out} has no trial yet: run the sweep first")
    with Claims(sweeper.out / CLAIMS).exclusive("page"):
        write_page(page(sweeper, study), sweeper.out / "report.html")
    lines = [_text_table(trial_table(sweeper, trials))]
    if completed(study):
        best = best_trial(sweeper, study)
        lines += ["", _best_sentence(sweeper, best), sweeper.command(sweeper.settings(best), _best_out(sweeper, best))]
        seeds = Seeds.of(sweeper, best)
        if seeds is not None:
            lines += ["", seeds.sentence(sweeper)]
    return "\n".join([*lines, "", f"report: {sweeper.out / 'report.html'}"])


def _best_out(sweeper: Sweeper, best: FrozenTrial) -> str:
    return f"runs/{load(sweeper.name, sweeper.fixed).name}-trial-{best.number}"


def _best_sentence(sweeper: Sweeper, best: FrozenTrial) -> str:
    settings = " ".join(sweeper.settings(best))
    return f"Trial {best.number} is the best: {sweeper.config.metric} {number(best.value or 0.0)} with {settings}"


@dataclass(frozen=True)
class Seeds:
    """The best trial and the recipe, trained with the same other seeds.

    Args:
        names: Names of both.
        values: Metrics of each, by seed; NaN where the run diverged.
    """

    names: tuple[str, str]
    values: tuple[dict[int, float], dict[int, float]]

    @staticmethod
    def of(sweeper: Sweeper, best: FrozenTrial) -> Seeds | None:
        """Read the runs that have ended; None if there are not two seeds of each."""
        found: list[dict[int, float]] = []
        for arm in arms(best):
            runs = (sweeper.out / "seeds" / arm).glob("seed-*")
            numbers = [
                int(run.name.removeprefix("seed-")) for run in runs if read_done(run) or (run / DIVERGED).is_file()
            ]
            directories = {seed: seed_directory(sweeper.out, arm, seed) for seed in sorted(numbers)}
            found.append(
                {
                    seed: metric_of(sweeper.config.metric, path) if read_done(path) else math.nan
                    for seed, path in directories.items()
                }
            )
        if len(found[0]) < 2 or found[0].keys() != found[1].keys():
            return None
        return Seeds(arms(best), (found[0], found[1]))

    @property
    def differences(self) -> list[float]:
        """The best trial minus the recipe, for each seed with which both were trained to the end."""
        first, second = self.values
        found = [first[seed] - second[seed] for seed in first]
        return [one for one in found if not math.isnan(one)]

    @property
    def difference(self) -> Interval | None:
        """The mean difference with a 95% interval; None if no seed has one."""
        return Interval.of(self.differences)

    def sentence(self, sweeper: Sweeper) -> str:
        """Return whether the best trial beats the recipe beyond the noise of seeds, and how many runs diverged."""
        return " ".join([self._compared(sweeper), *self._diverged()])

    def _diverged(self) -> list[str]:
        counts = [sum(map(math.isnan, values.values())) for values in self.values]
        if not any(counts):
            return []
        whole = len(self.values[0])
        return [
            f"Diverged: {counts[0]} of {whole} seeds of {self.names[0]}, {counts[1]} of {whole} of the recipe's own."
        ]

    def _compared(self, sweeper: Sweeper) -> str:
        gap, metric = self.difference, sweeper.config.metric
        if gap is None:
            return "No seed compares the settings."
        better = gap.mean < 0 if sweeper.config.minimizes else gap.mean > 0
        what = f"{gap.mean:+.4g}{gap.limits('+.4g')} {metric} over {len(self.differences)} other seeds"
        if not gap.excludes_zero:
            return f"These seeds do not distinguish the settings of {self.names[0]} from the recipe's own: {what}."
        return f"The settings of {self.names[0]} are {'better' if better else 'worse'} than the recipe's own: {what}."

    def table(self, sweeper: Sweeper) -> Table:
        """Return a row for each seed."""
        first, second = self.values
        rows: list[list[Cell]] = [
            [
                str(seed),
                *(_or_diverged(value) for value in (first[seed], second[seed])),
                _or_none(first[seed] - second[seed]),
            ]
            for seed in first
        ]
        head = ["seed", self.names[0], "the recipe's own settings", "difference"]
        return Table(f"{sweeper.config.metric} with other seeds", head, rows)


def _or_diverged(value: float) -> Cell:
    return "diverged" if math.isnan(value) else value


def _or_none(value: float) -> Cell:
    return None if math.isnan(value) else value


def trial_table(sweeper: Sweeper, trials: Sequence[FrozenTrial]) -> Table:
    """Return a row for each trial: how it ended, its metric, its settings, how far it was trained."""
    fields = [one.field for one in sweeper.parameters]
    rows: list[list[Cell]] = []
    for trial in trials:
        settings = dict(one.split("=", 1) for one in sweeper.settings(trial))
        cells = [_cell(one, settings.get(one.field)) for one in sweeper.parameters]
        rows.append([trial.number, _state(trial), _value(trial), *cells, f"{_reached(trial)}%", _seconds(trial)])
    direction = "min" if sweeper.config.minimizes else "max"
    head = ["trial", "state", sweeper.config.metric, *fields, "trained", "seconds"]
    note = (
        "Pruned trials show their last validation. Seconds are from the first start to the end, interruptions included."
    )
    return Table("Trials", head, rows, note, {sweeper.config.metric: direction} if any(map(_value, trials)) else {})


def _cell(one: Parameter, text: str | None) -> Cell:
    """Return a setting as a number if it is one; numbers over many magnitudes as text, since cells of a column have equal decimals."""
    try:
        value = float(text or "")
    except ValueError:
        return text
    return number(value) if one.form == "log" else int(value) if value.is_integer() else value


def _state(trial: FrozenTrial) -> str:
    reason = trial.user_attrs.get(REASON, "")
    return "diverged" if reason.startswith("diverged") else STATES[trial.state.name]


def _value(trial: FrozenTrial) -> float | None:
    """Return the metric of a trial; the last one of a trial that was pruned."""
    value = trial.value if trial.state.name == "COMPLETE" else trial.intermediate_values.get(trial.last_step or 0)
    return value if value is not None and math.isfinite(value) else None


def _reached(trial: FrozenTrial) -> int:
    return 100 if trial.state.name == "COMPLETE" else trial.last_step or 0


def _seconds(trial: FrozenTrial) -> int | None:
    return None if trial.duration is None else round(trial.duration.total_seconds())


def _text_table(table: Table) -> str:
    """Return a table of the page as aligned text."""
    rows = [list(table.head)]
    rows += [["" if c is None else c if isinstance(c, str) else f"{c:.4g}" for c in row] for row in table.rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(table.head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def importance(study: Study) -> dict[str, float]:
    """Return the importance of each varied field by PED-ANOVA, adding up to 1; {} with fewer than three finished trials.

    It measures how far the values of the best tenth are from those of all finished trials (Watanabe et al. 2023). Unlike fANOVA
    it needs no forest, and so no further package.
    """
    if len(completed(study)) < 3:
        return {}
    with warnings.catch_warnings(action="ignore"):
        found: dict[str, float] = optuna_module("importance").get_param_importances(study)
    return found


def page(sweeper: Sweeper, study: Study) -> Report:
    """Return the page of a sweep."""
    trials, metric = study.get_trials(deepcopy=False), sweeper.config.metric
    ended = [_state(trial) for trial in trials]
    best = best_trial(sweeper, study) if completed(study) else None
    numbers, text, commands = [], [], []
    if best is not None:
        command = sweeper.command(sweeper.settings(best), _best_out(sweeper, best))
        numbers.append(StatCell(f"best {metric}", best.value, f"trial {best.number}"))
        text += [_best_sentence(sweeper, best) + ".", f"Train it with `{command}`."]
        commands = [
            Command("Train the recipe with the settings of the best trial", command),
            Command("Try more settings", f"firth sweep {sweeper.out} --trials {2 * len(trials)}"),
        ]
        own = trials[0].value if trials[0].state.name == "COMPLETE" else None
        if own is not None:
            numbers.append(StatCell(f"{metric} of trial 0", own, "the recipe's own values, where the ranges hold them"))
    numbers += [
        StatCell("trials", len(trials), f"{ended.count('finished')} finished"),
        StatCell(
            "pruned", ended.count("pruned"), f"{ended.count('diverged') + ended.count('failed')} diverged or failed"
        ),
    ]
    sections = [Section("Trials", _rules(sweeper), tables=(trial_table(sweeper, trials),))]
    seeds = Seeds.of(sweeper, best) if best is not None else None
    if seeds is not None:
        why = "The best of many trials was lucky too. Here its settings and the recipe's own are trained with seeds that no trial had."
        sections.append(Section("Other seeds", f"{why}\n\n{seeds.sentence(sweeper)}", tables=(seeds.table(sweeper),)))
    sections += _importance_section(study)
    drawn = [trial for trial in trials if _value(trial) is not None]
    if drawn:
        sections.append(Section("Settings and result", parallels=(_parallel(sweeper, drawn, best),)))
        sections.append(Section("Curves", figures=(_curves(sweeper, drawn, best),)))
    facts = {"recipe": sweeper.name, "fixed settings": " ".join(sweeper.fixed) or "none"}
    facts |= {one.field: str(one) for one in sweeper.parameters} | {"precision": str(sweeper.shared["precision"])}
    return Report(
        f"A sweep of {sweeper.name}", tuple(sections), "\n\n".join(text), tuple(numbers), tuple(commands), facts
    )


def _rules(sweeper: Sweeper) -> str:
    """Return how trials are chosen and pruned, in sentences."""
    better = "lower" if sweeper.config.minimizes else "higher"
    chosen = (
        f"A {better} {sweeper.config.metric} is better. Settings are chosen by TPE with seed {sweeper.config.seed}."
    )
    if not sweeper.config.prune:
        return f"{chosen} No trial is pruned."
    return (
        f"{chosen} A trial is pruned if, after {WARMUP_PERCENT}% of its budget, its best validation is worse than the median of the "
        f"finished trials at that point, once {STARTUP_TRIALS} have finished."
    )


def _importance_section(study: Study) -> list[Section]:
    found, count = importance(study), len(completed(study))
    if not found:
        return []
    doubt = (
        f"With {count} finished trials it is not to be trusted: {RELIABLE_TRIALS} or more are needed."
        if count < RELIABLE_TRIALS
        else f"It rests on {count} finished trials."
    )
    text = (
        "PED-ANOVA: how far the values of the best tenth of the finished trials are from the values of all of them. Pruned trials are "
        f"not counted. {doubt}"
    )
    rows: list[list[Cell]] = [[field, f"{share:.0%}"] for field, share in found.items()]
    return [Section("Importance", text, tables=(Table("Share of the importance", ["field", "share"], rows),))]


def _kind(trial: FrozenTrial, best: FrozenTrial | None) -> str:
    if best is not None and trial.number == best.number:
        return "best"
    return "finished" if trial.state.name == "COMPLETE" else "pruned"


def _parallel(sweeper: Sweeper, trials: Sequence[FrozenTrial], best: FrozenTrial | None) -> ParallelCoordinates:
    axes = [
        ParallelAxis(
            one.field.rpartition(".")[2] if len(sweeper.parameters) > 2 else one.field,
            [trial.params[one.field] for trial in trials], one.form == "log",
        )
        for one in sweeper.parameters
    ]  # fmt: skip
    axes.append(ParallelAxis(sweeper.config.metric, [_value(trial) for trial in trials]))
    return ParallelCoordinates(
        "Each line is a trial", axes, [_kind(trial, best) for trial in trials], [f"trial {t.number}" for t in trials],
        "The thick line is the best trial; dashed lines were pruned and show their last validation.",
    )  # fmt: skip


def _curves(sweeper: Sweeper, trials: Sequence[FrozenTrial], best: FrozenTrial | None) -> Figure:
    """Return the validations of all trials: one curve with breaks for each kind, so that the names stay readable."""
    curves = []
    for kind, color in (("finished", 5), ("pruned", 1), ("best", 0)):
        x: list[float] = []
        y: list[float] = []
        for trial in trials:
            if _kind(trial, best) == kind and trial.intermediate_values:
                x += [*trial.intermediate_values, math.nan]
                y += [*trial.intermediate_values.values(), math.nan]
        if x:
            curves.append(Curve(kind, x, y, color=color, dashed=kind == "pruned", points=kind == "best"))
    return Figure("Validations while trials train", "% of the budget", sweeper.config.metric, tuple(curves))


def _silent(_: str) -> None:
    """Print nothing."""
