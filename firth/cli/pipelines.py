"""The command that runs pipelines and single stages; `firth.cli` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
