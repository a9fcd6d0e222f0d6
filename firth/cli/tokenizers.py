"""Commands that train and show tokenizers. `firth.cli` registers them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from firth.cli.options import Seed, number_option
from firth.fields import NonNegativeInt, PositiveInt, VocabSize


def tokenizer_train(
    paths: Annotated[list[str], typer.Argument(help="Files, directories or globs: text, JSONL, Parquet; .gz, .zst.")],
    out: Annotated[Path, typer.Option(help="Directory to write tokenizer.json into.")] = Path("tokenizer"),
    algorithm: Annotated[
        str, typer.Option(help="bpe, byte-bpe, wordpiece, unigram or word (whole words).")
    ] = "byte-bpe",
    vocab_size: Annotated[int, number_option(VocabSize, help="Number of ids.")] = 8192,
    text_field: Annotated[str, typer.Option(help="The field of JSONL and Parquet rows that holds the text.")] = "text",
    sample_bytes: Annotated[
        int, number_option(PositiveInt, help="Bytes of text to train on, sampled from the whole corpus.")
    ] = 200_000_000,
    num_sentinels: Annotated[
        int, number_option(NonNegativeInt, help="Number of <extra_id_n> tokens; T5 needs 100.")
    ] = 0,
    byte_fallback: Annotated[
        bool, typer.Option(help="Encode rare characters as bytes, so that nothing is unknown (bpe, unigram).")
    ] = True,
    seed: Seed = 0,
) -> None:
    """Train a tokenizer: BPE, byte-level BPE, WordPiece, Unigram or whole words."""
    from firth.runs.prepare import train_tokenizer

    train_tokenizer(
        paths,
        out,
        algorithm=algorithm,
        vocab_size=vocab_size,
        text_field=text_field,
        sample_bytes=sample_bytes,
        seed=seed,
        num_sentinels=num_sentinels,
        byte_fallback=byte_fallback,
    )
    typer.echo(f"Inspect it:  firth tokenizer show {shlex.quote(str(out))} some words")


def tokenizer_show(
    directory: Annotated[Path, typer.Argument(help="A tokenizer, model or run directory.")],
    words: Annotated[list[str] | None, typer.Argument(help="Words to split.")] = None,
    first: Annotated[int, number_option(NonNegativeInt, help="How many merges to print.")] = 20,
) -> None:
    """Print the first merges in the order they were learned, with their counts, and how words split."""
    from firth.tokenizer import inspection

    typer.echo(inspection.report(directory, words or ["taaaaasty", "laern", "Transformerify"], first=first))
