"""Commands of pipelines and of the stages that make data; `firth.cli` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pipeline(
    file: Annotated[
        str, typer.Argument(help="A YAML file, or instruct_gpt, rlaif, constitutional, lmsi, star or side_by_side.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="INPUT=value, STAGE.field=value, for example sft.max_steps=200.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The directory of the stages; runs/NAME by default.")] = None,
) -> None:
    """Run several stages in sequence: train, sample answers, judge, revise, evaluate. The same command resumes."""
    from firth.pipelines.pipeline import load_pipeline, run_pipeline

    place = out or Path("runs") / Path(file).stem
    run_pipeline(load_pipeline(file, settings or [], place))
    typer.echo(f"Report: {place / 'report.html'}")


def annotate(
    kind: Annotated[
        str,
        typer.Argument(
            help="sample (answers to prompts), rank (answers by a reward), judge (pairs of answers), revise or rationales."
        ),
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="field=value, for example model=runs/sft data=prompts.jsonl.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The directory to write into.")] = Path("annotations"),
) -> None:
    """Make training records with a model: sampled answers, preferences of a judge, revisions, rationales."""
    from firth.io.atomic import make_directory
    from firth.pipelines.pipeline import load_stage

    stage = load_stage(kind, settings or [])
    make_directory(out)
    for name, value in stage.run(out).items():
        typer.echo(f"{name:<28} {value if isinstance(value, str) else f'{value:,.4g}'}")
    typer.echo(str(out / stage.output))
