"""Commands that plan: sweep the settings of a recipe, train sizes, fit a scaling law, plan a run. `firth.cli` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from firth.cli.options import Seed, Workers, number_option
from firth.fields import NonNegativeInt, PositiveFloat, PositiveInt
from firth.types import UserError


def sweep(
    recipe: Annotated[
        str, typer.Argument(help="A recipe: its name or a YAML file; or the directory of a sweep, to continue it.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="field=value, and for the varied fields field=log(LOW,HIGH), field=uniform(LOW,HIGH) or field=choice(A,B,...)."
        ),
    ] = None,
    trials: Annotated[
        int | None, number_option(PositiveInt, help="Trials in all, also those of earlier calls; 20 by default.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="A metric of the validation, or train/NAME for one of the last training step.")
    ] = "loss",
    direction: Annotated[
        Literal["minimize", "maximize"] | None, typer.Option(help="By default it follows the metric's name.")
    ] = None,
    prune: Annotated[bool, typer.Option(help="Stop trials that fall behind the median of the others.")] = True,
    seeds: Annotated[
        int,
        number_option(NonNegativeInt, help="Train the best trial and the recipe with so many other seeds at the end."),
    ] = 0,
    seed: Seed = 0,
    workers: Workers = 1,
    table: Annotated[
        bool, typer.Option("--table", help="Print the table of a sweep's directory; train nothing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The directory of the sweep; runs/sweep by default.")] = None,
) -> None:
    """Search the settings of a recipe: trials by optuna, pruned by the median; run it again to resume.

    Several processes, also on several machines, may run the same command on one directory: each takes other trials.
    """
    from firth.sweep.report import show, sweep_recipe
    from firth.sweep.trials import STUDY, StudyConfig, prepare, reopen

    directory = Path(recipe)
    config = StudyConfig(trials or 20, metric, direction or "", prune, seed, seeds)
    given = settings or []
    if (directory / STUDY).exists():
        if given or out:
            raise UserError(
                f"{recipe} is the directory of a sweep, whose settings are fixed: leave out {' '.join(given) or '--out'}"
            )
        recipe, given, config = reopen(directory, trials, seeds)
        fixed = (("--metric", metric, "loss", config.metric), ("--direction", direction, None, config.direction),
                 ("--no-prune", prune, True, config.prune), ("--seed", seed, 0, config.seed))  # fmt: skip
        changed = [option for option, value, default, own in fixed if value not in (default, own)]
        if changed:
            raise UserError(
                f"{directory} holds a sweep with another {changed[0]}: leave it out, or choose another --out"
            )
        out = directory
    elif table:
        raise UserError(f"{recipe} holds no sweep: --table needs the directory of one")
    out = out or Path("runs/sweep")
    if table:
        typer.echo(show(prepare(recipe, given, config, out, log=lambda _: None)))
        return
    typer.echo(sweep_recipe(recipe, given, config, out, workers))


def scale_run(
    recipe: Annotated[str, typer.Argument(help="A recipe that pretrains: its name or a YAML file.")],
    settings: Annotated[list[str] | None, typer.Argument(help="field=value, for example data.path=mine/.")] = None,
    budgets: Annotated[str, typer.Option(help="FLOPs of the runs, for example 1e12,3e12,1e13.")] = "",
    sizes: Annotated[str, typer.Option(help="Widths of the models, for example 64,96,128,192.")] = "",
    max_epochs: Annotated[
        float, number_option(PositiveFloat, help="Leave out points that would read the text more often.")
    ] = 4.0,
    workers: Workers = 1,
    out: Annotated[Path, typer.Option(help="The directory of the sweep.")] = Path("runs/scale"),
) -> None:
    """Train a recipe at several sizes and compute budgets, for a scaling law; run it again to resume.

    Several processes, also on several machines, may run the same command on one directory: each takes other sizes.
    """
    from firth.runs.recipe import load
    from firth.scaling.sweep import SweepConfig, run_sweep

    config = SweepConfig(_numbers("--budgets", budgets), tuple(map(int, _numbers("--sizes", sizes))), max_epochs)
    typer.echo(run_sweep(load(recipe, settings or []), config, out, workers=workers))


def plan(
    text: Annotated[
        list[str], typer.Option(help="Your text: a directory, files or globs; may be given several times.")
    ],
    hours: Annotated[float, number_option(PositiveFloat, help="Hours of training on this machine.")],
    goal: Annotated[
        Literal["labels", "text", "both"],
        typer.Option("--for", help="labels: an encoder to finetune; text: a decoder that writes; or both plans."),
    ] = "both",
    law: Annotated[
        Path | None, typer.Option(help="A fit.json of `firth scale fit`; by default the laws that firth ships.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The directory of the run in the command that is printed.")] = Path(
        "runs/plan"
    ),
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Train a tenth of the time on your text first, for the expected bits per byte."
        ),
    ] = False,
) -> None:
    """Plan a run for your text and time: size, vocabulary, epochs, memory, expected bits per byte, and the command."""
    from firth.scaling.plan import plan_runs

    typer.echo(plan_runs(text, hours, goal, law, out, measured=calibrate))


def _numbers(name: str, text: str) -> tuple[float, ...]:
    """Parse comma-separated numbers of an option."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{name} is {text!r}: write numbers with commas between them, for example 1e12,3e12") from None


def scale_fit(
    table: Annotated[
        Path,
        typer.Argument(help="A table of runs (CSV, TSV, JSONL) with parameters, tokens, loss; flops, epochs if known."),
    ],
    budgets: Annotated[str, typer.Option(help="FLOPs to find the best size for; by default 3 times the largest.")] = "",
    draws: Annotated[int, number_option(PositiveInt, help="Bootstrap samples for the intervals.")] = 400,
    skip_diverged: Annotated[bool, typer.Option("--skip-diverged", help="Leave out runs that diverged.")] = False,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write fit.json and fit.html here; by default next to the table.")
    ] = None,
) -> None:
    """Fit scaling laws to a table of runs: exponents, the best size for a budget, what repeated text is worth."""
    from firth.scaling.report import fit_and_report

    typer.echo(fit_and_report(table, _numbers("--budgets", budgets), draws, skip_diverged, seed, out or table.parent))
