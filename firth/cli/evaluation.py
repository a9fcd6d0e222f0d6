"""Commands that evaluate models and score votes. `firth.cli` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from firth.cli.options import Seed, number_option
from firth.fields import NonNegativeFloat, NonNegativeInt, OptionalTokenCount, PositiveInt
from firth.types import UserError


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
        from firth.runs.evaluate_prompts import board as compare_results

        typer.echo(compare_results(models, out, json))
        return
    from firth.evaluate.prompting.task_files import is_prompt_task

    tasks = task or []
    prompted = [one for one in tasks if is_prompt_task(one)]
    if prompted and len(prompted) == len(tasks):
        from firth.evaluate.prompting.prompt_task import PromptConfig
        from firth.runs.evaluate_prompts import evaluate_and_report

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
