"""Commands that train: the demo, one recipe, a comparison of recipes, a pipeline of stages. `firth.cli` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firth.cli.options import Seed, Workers, number_option
from firth.fields import NonNegativeFloat, PositiveInt
from firth.types import UserError


def demo(
    text: Annotated[list[str] | None, typer.Option(help="Your own files or folders instead of Shakespeare.")] = None,
    out: Annotated[Path, typer.Option(help="The directory to write into.")] = Path("demo"),
    size: Annotated[
        str, typer.Option(help="small: about 7 minutes on two cores; tiny: a check in under one.")
    ] = "small",
    seed: Seed = 0,
) -> None:
    """Run every stage once on real text: pretrain, finetune, align, evaluate, report (about 7 minutes)."""
    from firth.demo.demo import run_demo

    run_demo(out, text=text or [], size=size, seed=seed)


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, a YAML file or a run directory.")],
    settings: Annotated[list[str] | None, typer.Argument(help="field=value, for example batch.size=64.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory; runs/NAME by default, or RECIPE if that is one.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, FLOPs, memory, tokens and time, and train nothing.")
    ] = False,
) -> None:
    """Train a model by a recipe. Run the same command again, or name the run directory, to resume."""
    from firth.runs.recipe import load
    from firth.runs.run import run

    resolved = load(recipe, settings or [])
    if dry_run:
        from firth.runs.estimate import dry_run as estimate_and_report

        estimate_and_report(resolved)
        return
    home = Path(recipe) if Path(recipe).is_dir() else Path("runs") / resolved.name
    if out is None and settings and home == Path(recipe) and resolved != load(recipe):
        raise UserError(
            f"{recipe} is a run directory, and {' '.join(settings)} would change its recipe: choose another directory with --out"
        )
    run(resolved, out or home)


def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(
            help="Recipes (NAME, NAME:SIZE, a YAML file); then field=value for all of them, NAME.field=value for one, "
            "probe.field=value for the finetuning. With --methods: INPUT=value and METHOD.field=value of the pipeline side_by_side."
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Compare methods of alignment instead of recipes: some of prompt,sft,best-of-n,dpo,ppo,grpo, by reward, truth, KL, "
            "samples, compute and minutes."
        ),
    ] = "",
    max_seconds: Annotated[float, number_option(NonNegativeFloat, help="Seconds of training per run.")] = 0.0,
    max_flops: Annotated[
        float,
        number_option(NonNegativeFloat, help="Counted FLOPs per run instead, for example 4e12: equal on any machine."),
    ] = 0.0,
    seeds: Annotated[int, number_option(PositiveInt, help="Runs per recipe, for the intervals.")] = 3,
    shares: Annotated[
        str, typer.Option(help="Shares of the compute, one run each: the points of the curve.")
    ] = "0.25,0.5,1",
    probe: Annotated[
        str,
        typer.Option(
            help="Records with text and label to finetune on: a file, a corpus's name, questions (Shakespeare's), or none; "
            "by default questions for models that read Shakespeare, else sarcasm."
        ),
    ] = "",
    labels: Annotated[int, number_option(PositiveInt, help="How many of these records are trained on.")] = 500,
    workers: Workers = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The directory for the runs, the table and the report; runs/compare by default, with --methods runs/methods."
        ),
    ] = None,
) -> None:
    """Compare recipes: same text, same tokenizer, equal compute, the same probe, several seeds; run it again to resume.

    A probe of the same kind of text shows the effect of pretraining: set data.path=FILES and --probe FILE.jsonl. --methods compares
    ways to align one model.
    """
    if methods:
        if max_seconds or max_flops:
            raise UserError("--methods has a budget for each method: ppo.max_steps=N, not --max-seconds or --max-flops")
        _compare_methods(methods.split(","), recipes, out or Path("runs/methods"))
        return
    from firth.compare.compare import ComparisonConfig, parse_shares
    from firth.compare.compare import compare as compare_recipes
    from firth.training.schedule import Budget

    if bool(max_seconds) == bool(max_flops):
        raise UserError("set the compute per run: --max-seconds N or --max-flops N, one of them")
    names, settings = [r for r in recipes if "=" not in r], [r for r in recipes if "=" in r]
    config = ComparisonConfig(
        Budget(max_seconds=max_seconds, max_flops=max_flops), parse_shares(shares), seeds, probe, labels
    )
    typer.echo(compare_recipes(names, settings, config, out or Path("runs/compare"), workers=workers))


def _compare_methods(methods: list[str], settings: list[str], out: Path) -> None:
    """Run the pipeline of the methods, and print its table."""
    from firth.pipelines.frontier import printed, read_results
    from firth.pipelines.pipeline import load_methods, run_pipeline

    run_pipeline(load_methods([name.strip() for name in methods], settings, out))
    typer.echo(printed(read_results(out / "table" / "results.json")))
    typer.echo(f"Report: {out / 'table' / 'report.html'}")


def pipeline(
    name: Annotated[
        str,
        typer.Argument(
            help="A YAML file; instruct_gpt, rlaif, constitutional, lmsi, star or side_by_side; or a single stage: sample "
            "(answers to prompts), judge (pairs of answers), rank (answers by a reward), revise, rationales, frontier or evaluate."
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="INPUT=value, STAGE.field=value, for example sft.max_steps=200; field=value of a single stage."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The directory to write into; runs/NAME by default.")] = None,
) -> None:
    """Run several stages in sequence: train, sample answers, judge, revise, evaluate. The same command resumes."""
    from firth.pipelines.pipeline import KINDS, load_pipeline, load_stage, run_pipeline, run_stage

    place = out or Path("runs") / Path(name).stem
    if name in KINDS:
        stage = load_stage(name, settings or [])
        for label, value in run_stage(stage, place).items():
            typer.echo(f"{label:<28} {value if isinstance(value, str) else f'{value:,.4g}'}")
        typer.echo(str(place / stage.output))
        return
    run_pipeline(load_pipeline(name, settings or [], place))
    typer.echo(f"Report: {place / 'report.html'}")
