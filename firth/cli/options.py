"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from firth.fields import NonNegativeFloat, NonNegativeInt, PositiveInt, Share, ShareAboveZero, TokenCount, check_value

Run = Annotated[
    Path,
    typer.Argument(
        help="A run directory, a checkpoint in it, a directory of a model or an adapter as transformers and peft write them, "
        "or a GGUF file."
    ),
]


def number_option(hint: Any, *names: str, help: str) -> Any:
    """Return an option for a number of the type `hint`, which rejects values out of range."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None:
            check_value(param.opts[0], value, hint)
        return value

    return typer.Option(*names, help=help, callback=check)


Temperature = Annotated[
    float,
    number_option(NonNegativeFloat, help="0 takes the most likely token; 1 samples from the model's distribution."),
]
TopK = Annotated[int, number_option(NonNegativeInt, help="Sample from the K most likely tokens; 0: all.")]
TopP = Annotated[
    float, number_option(ShareAboveZero, help="Sample from the most likely tokens that together have this probability.")
]
MinP = Annotated[
    float,
    number_option(Share, help="Drop tokens with less than this share of the most likely token's probability."),
]
Tokens = Annotated[int, number_option(TokenCount, "--max-new-tokens", "-n", help="Most new tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop when this text appears; may be given several times.")]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        help="Data type of the weights: fp32, bf16 or int8; auto takes bf16 if it is faster here.",
    ),
]
Workers = Annotated[int, number_option(PositiveInt, help="Processes on this machine, which divide its threads.")]
Seed = Annotated[int, number_option(NonNegativeInt, help="The same seed gives the same result.")]
Input = Annotated[
    str,
    typer.Option("--input", help="Format of FILE: lines, csv, tsv, jsonl, conll or squad; auto detects it."),
]
