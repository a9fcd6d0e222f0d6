"""Commands that use a trained model: text, gaps, vectors, predictions. `firth.cli` registers them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from firth.cli.options import Input, MinP, Run, Seed, Stop, Temperature, Tokens, TopK, TopP, Weights, number_option
from firth.fields import OptionalTokenCount, PositiveInt, TokenCount
from firth.types import LOGGER


def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")] = "",
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    stop: Stop = None,
    seed: Seed = 0,
    weights: Weights = "auto",
    between: Annotated[
        tuple[str, str] | None, typer.Option(help="Variational autoencoder: texts between these two.")
    ] = None,
    count: Annotated[int, number_option(PositiveInt, help="How many texts between two, or from the prior.")] = 5,
) -> None:
    """Continue a text (decoders), or answer one (encoder-decoders).

    A variational autoencoder reconstructs a text, samples from its prior if there is no text, or interpolates between two
    texts.
    """
    from firth.generate.sampling import Sampling
    from firth.runs.inference import generate_texts

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_new_tokens=max_new_tokens,
        stop_strings=tuple(stop or ()),
        seed=seed,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    for piece in generate_texts(run, text, between, count, sampling, weights):
        typer.echo(piece, nl=False)
    typer.echo()


def fill(
    run: Run,
    text: Annotated[str, typer.Argument(help="A text with <mask> where a token is missing.")],
    top: Annotated[int, number_option(PositiveInt, help="Candidates per gap.")] = 5,
) -> None:
    """Fill the gaps of a text: tokens (masked models, ELMo), spans (T5), or the whole text (BART)."""
    from firth.runs.inference import fill_text

    typer.echo(fill_text(run, text, top))


def vectors(
    run: Run,
    words: Annotated[list[str] | None, typer.Argument(help="Words whose neighbors are printed.")] = None,
    top: Annotated[int, number_option(PositiveInt, help="How many neighbors of each.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write all vectors to this file, in word2vec's text format.")] = None,
) -> None:
    """Print the nearest neighbors of words among a run's token vectors, or write all vectors in word2vec's format."""
    from firth.runs.inference import nearest_words

    for line in nearest_words(run, words or [], top, out):
        typer.echo(line)


def chat(
    run: Run,
    max_new_tokens: Annotated[
        int | None,
        number_option(
            TokenCount,
            "--max-new-tokens",
            "-n",
            help="Most tokens of an answer; 256 by default, or half of the context.",
        ),
    ] = None,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    weights: Weights = "auto",
    system: Annotated[str, typer.Option(help="A system turn before the first line; it stays in the context.")] = "",
) -> None:
    """Chat with an instruction-tuned model. An empty line or Ctrl-D exits.

    When the context is full, the oldest exchanges are dropped, each with its answer.
    """
    from firth.generate.sampling import Sampling
    from firth.runs.inference import Conversation, PromptTooLongError

    longest = 256 if max_new_tokens is None else max_new_tokens
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, max_new_tokens=longest, seed=seed
    )
    talk = Conversation(run, sampling, weights, system, capped=max_new_tokens is None)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if not line.strip():
            break
        before = talk.dropped
        try:
            for piece in talk.answer(line):
                typer.echo(piece, nl=False)
        except PromptTooLongError as error:
            LOGGER.warning(str(error))
            continue
        typer.echo()
        if talk.dropped and not before:
            LOGGER.warning("the context is full: the oldest exchanges are dropped from here on")


def predict(
    run: Run,
    file: Annotated[
        str,
        typer.Argument(
            help="Records (JSONL, CSV, TSV, Parquet; CoNLL's columns; SQuAD's JSON), lines of text, or - for standard input."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write: .csv, else JSON lines; printed by default."),
    ] = None,
    input: Input = "auto",
) -> None:
    """Predict for each record: a class, a number, a choice, tags or an answer, with its probability.

    One row per record, in order, with its number and id.
    """
    from firth.corpora.input_files import many
    from firth.evaluate.predict import check_output_path, write
    from firth.evaluate.predict import predict as rows

    if out is not None:
        check_output_path(out)
    count = write(rows(run, file, sys.stdin.buffer, form=input), out, typer.echo)
    if out is not None:
        typer.echo(f"{out}: {many(count, 'row')}")


def embed(
    run: Run,
    file: Annotated[str, typer.Argument(help="Records with a text, lines of text, or - for standard input.")],
    out: Annotated[
        Path,
        typer.Option(help="The file to write: .npy, else JSON lines of {row, embedding}."),
    ] = Path("embeddings.npy"),
    text_field: Annotated[str, typer.Option(help="The field of records that holds the text.")] = "text",
    normalize: Annotated[bool, typer.Option(help="Scale every vector to length 1.")] = True,
    max_length: Annotated[int, number_option(OptionalTokenCount, help="Most tokens of a text; 0: as in training.")] = 0,
    input: Input = "auto",
) -> None:
    """Write a vector for each text, the mean of its hidden states, for search, clustering and similarity."""
    from firth.runs.inference import embed_file

    typer.echo(
        embed_file(run, file, sys.stdin.buffer, out, field=text_field, unit=normalize, length=max_length, form=input)
    )
