"""Commands that prepare data: tokenizers and corpora. `firth.cli` registers them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from firth.cli.options import Seed, number_option
from firth.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ShareBelowOne, VocabSize


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


def prepare(
    texts: Annotated[list[str], typer.Argument(help="Files, directories or globs: text, JSONL, Parquet; .gz, .zst.")],
    out: Annotated[Path, typer.Option(help="The directory of the corpus.")],
    workers: Annotated[
        int | None, number_option(PositiveInt, help="Worker processes; by default one per core.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="A tokenizer, model or run directory; without it one is trained on a sample.")
    ] = "",
    algorithm: Annotated[
        str, typer.Option(help="Algorithm of a tokenizer that is trained: byte-bpe, bpe, wordpiece, unigram or word.")
    ] = "byte-bpe",
    vocab_size: Annotated[int, number_option(VocabSize, help="Ids of a tokenizer that is trained.")] = 8192,
    text_field: Annotated[str, typer.Option(help="The field of JSONL and Parquet rows that holds the text.")] = "text",
    split_by: Annotated[
        Literal["file", "blank", "line"],
        typer.Option(help="A text file is one document (file), or one per paragraph (blank) or line."),
    ] = "file",
    validation_fraction: Annotated[
        float, number_option(ShareBelowOne, help="Fraction of the documents to hold out, by their content.")
    ] = 0.01,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="Keep the first of documents with the same text.")
    ] = False,
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates", help="Keep the first of documents with almost the same text (MinHash).")
    ] = False,
    language: Annotated[
        str, typer.Option(help="Keep documents in this language, for example en (py3langid if installed, else script).")
    ] = "",
    max_repetition: Annotated[
        float,
        number_option(
            NonNegativeFloat, help="Drop repetitive documents: 1 has Gopher's limits, 2 twice these; 0 keeps all."
        ),
    ] = 0.0,
    part_megabytes: Annotated[
        float, number_option(PositiveFloat, help="Megabytes of text in a part, about: what a worker builds at once.")
    ] = 128.0,
) -> None:
    """Prepare a large corpus: token ids in parts, built in parallel. Run the same command again to resume or to add files.

    Train on it with data.path=OUT.
    """
    from firth.data.filters import FilterConfig
    from firth.data.prepare_corpus import TokenizerChoice, prepare_corpus
    from firth.data.prepare_part import PartSettings

    filters = FilterConfig(deduplicate, near_duplicates, language, "", max_repetition)
    settings = PartSettings("", text_field, split_by, validation_fraction, max(1, int(part_megabytes * 1e6)), filters)
    choice = TokenizerChoice(tokenizer, algorithm, vocab_size)
    prepare_corpus(texts, out, settings=settings, tokenizer=choice, workers=workers)
    typer.echo(f"Train on it:  firth train gpt data.path={shlex.quote(str(out))}")
