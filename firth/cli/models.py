"""Commands that read and write the files of other programs. `firth.cli` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firth.cli.options import Run


def import_(
    directory: Annotated[Path, typer.Argument(help="A model directory or a GGUF file of another program.")],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
) -> None:
    """Read a published model and its tokenizer, check them, and write a directory that all commands read."""
    from firth.runs.import_export import import_model

    import_model(directory, out)


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
    form: Annotated[
        str, typer.Option("--format", help="hf: what transformers loads; gguf: what llama.cpp loads.")
    ] = "hf",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16 (gguf: or q8_0, q4_0); unchanged by default.")] = "",
    shard_size: Annotated[str, typer.Option(help="Most bytes in one file, for example 2GB; one file by default.")] = "",
) -> None:
    """Write the model of a run, or of one of its checkpoints, in a format that other programs load, with a model card."""
    from firth.runs.import_export import export_model

    export_model(run, out, form=form, dtype=dtype, shard=shard_size)
