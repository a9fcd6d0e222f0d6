"""Run a recipe: prepare the tokenizer and the data, train, export the model and write the report.

    recipe.yaml  inputs.json  metrics.jsonl  events...  checkpoints/step-N/  tokenizer/  model/  report.html

The same call on the same directory resumes an unfinished run, and returns at once if the run is finished.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from firth import kernel_choice
from firth.align.rewards import RewardError
from firth.data import text_cache
from firth.data.collate import Batches
from firth.doctor import device as best_device
from firth.evaluate.tokenizer_match import check_same_tokenizer
from firth.generate import word_vectors
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.io.atomic import make_directory, new_directory, write_text
from firth.io.integrity import read_record, write_record
from firth.io.json_files import read_rows, row_line
from firth.model.compilation import compile_blocks
from firth.model.empty_weights import init_empty_weights
from firth.model.head_descriptions import export_heads
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS
from firth.objectives import name_of
from firth.objectives.objective import components
from firth.peft.lora import num_trainable_parameters
from firth.pretrained.load_save import check_vocab_fits, init_from, load_model, save_model
from firth.report.page import write as write_report
from firth.report.run_report import run_report
from firth.runs import class_counts, config_io, examples, held_out_texts, model_card
from firth.runs.compatibility import (
    check_available_memory,
    check_batching,
    check_fields,
    check_memory,
    check_pattern,
    limit_lengths,
)
from firth.runs.examples import DatasetSplits, ExamplesConfig, model_directory
from firth.runs.inference import LoadedModel
from firth.runs.init_head import init_head
from firth.runs.input_hashes import RunInputs, content_hash, has_begun, recorded_hash
from firth.runs.peft_options import FullFinetuning, add_layer_mixture, check_peft
from firth.runs.prepare import RunData
from firth.runs.recipe import MODEL_CONFIG_HINT, Recipe, load, published
from firth.runs.recipe_names import RECIPES
from firth.runs.segmentation_warnings import Segmentation, fallbacks, resolve_segmentation
from firth.runs.tokenizer import check_vocab, resolved_size, tokenizer_of
from firth.runs.validation import Validator, vocab
from firth.tokenizer.tokenizer import Tokenizer
from firth.training import checkpoint, precision
from firth.training.distributed import Ranks, join
from firth.training.logging import OnMetrics, ProgressReporter
from firth.training.trainer import TrainerConfig, train
from firth.types import LogLine, UserError

T = TypeVar("T")

CLASS_REPORT = "held_out.json"
"""Per-class results of the exported model on the held-out examples, for the report."""

REPORT = "report.html"

DONE = "done.json"
"""Steps, seconds, metrics, remarks. The file exists if the run is finished; only the report is written after it."""


@dataclass(frozen=True)
class RunResult:
    """Result of a training run.

    Args:
        directory: The run directory.
        steps: Optimizer steps.
        exported_step: The step of the exported model: the last or the best one.
        tokens: Training tokens.
        seconds: Training time.
        flops: Counted FLOPs.
        metrics: Metrics of the exported step; held-out ones are named `valid/NAME`.
    """

    directory: Path
    steps: int
    exported_step: int
    tokens: int
    seconds: float
    flops: float
    metrics: dict[str, float]

    @property
    def model(self) -> Path:
        """The directory of the exported model."""
        return self.directory / "model"


def run(
    recipe: Recipe,
    directory: Path,
    log: LogLine = print,
    reporter: ProgressReporter | None = None,
    on_metrics: OnMetrics | None = None,
) -> RunResult:
    """Train a recipe in a directory, or resume or return the run that the directory holds.

    Args:
        recipe: The recipe.
        directory: The run directory.
        log: Receives messages of the first rank.
        reporter: Receives the progress of training; by default it is printed.
        on_metrics: Called with each row of metrics.jsonl, on the first rank.

    Raises:
        UserError: The directory holds a run of another recipe, or the recipe is invalid.
    """
    kernel_choice.check_forced()
    ranks = join(best_device())
    with ranks.together():
        return _run(recipe, directory, log, ranks, reporter, on_metrics)


def _run(
    recipe: Recipe,
    directory: Path,
    log: LogLine,
    ranks: Ranks,
    reporter: ProgressReporter | None,
    on_metrics: OnMetrics | None,
) -> RunResult:
    """Execute `run` on one rank."""
    log = log if ranks.first else _silent
    if recipe.model is None and not recipe.init_from:
        raise UserError(f"the recipe {recipe.name!r} has neither a model config nor init_from: {MODEL_CONFIG_HINT}")
    _check_models(recipe)
    make_directory(directory)
    inputs = _first_rank_first(ranks, lambda: RunInputs.read(recipe, directory, log, ranks.first))
    continued = has_begun(directory)
    if continued:
        inputs.check(directory)
    tokenizer = _first_rank_first(ranks, lambda: tokenizer_of(recipe, directory, log, inputs))
    inputs.digests["tokenizer"] = tokenizer.digest
    if continued:
        inputs.check(directory)
    _check_tokenizer(tokenizer, recipe)
    check_vocab(recipe, tokenizer)
    data = RunData(recipe.data, tokenizer, directory, recipe.init_from, recipe.batch.size, recipe.seed, log)
    resolved = _first_rank_first(
        ranks, lambda: _resolve(recipe, data)
    )  # it may read class names from a corpus that has to be downloaded first
    resolved = dataclasses.replace(
        resolved,
        precision=_precision(recipe, directory, continued, ranks),
        word_segmentation=_segmentation(resolved, directory, continued),
    )
    assert resolved.model is not None
    check_batching(
        resolved.objective,
        resolved.model,
        pack=resolved.batch.packed_length,
        accumulate=resolved.batch.gradient_accumulation_steps,
        ranks=ranks.world,
    )
    check_available_memory(
        resolved.model, resolved.optimizer.name, isinstance(resolved.peft, FullFinetuning), best_device()
    )
    recipe_hash = recorded_hash(directory, resolved) if continued else content_hash(resolved)
    known = inputs.identity(recipe_hash)
    if (directory / DONE).exists() and not (directory / "model" / "firth.json").exists():
        log(f"{resolved.name}: {directory / 'model'} is missing, so it is exported again from the last checkpoint")
    elif (directory / DONE).exists():
        finished = _finished(directory, known)
        if ranks.first and not (directory / REPORT).exists():
            write_report(run_report(directory), directory / REPORT)
        log(f"{resolved.name}: {directory} is finished, after {finished.steps:,} steps; its model is {finished.model}")
        return finished
    chosen = checkpoint.precision(directory) or precision.choose(resolved.precision, best_device())
    data = dataclasses.replace(data, memory_length=resolved.model.memory_length, precision=chosen)
    splits = _first_rank_first(ranks, lambda: examples.build_datasets(resolved.examples, data, resolved.objective))
    text_cache.forget()
    validator = (
        Validator(resolved, splits.validation, splits.bytes_per_target, tokenizer, ranks)
        if splits.validation and len(splits.validation)
        else None
    )
    fallback_notes = fallbacks(resolved.objective, resolved.examples, splits.train, tokenizer.vocab)
    for line in (*_data_notes(resolved, splits, validator), *fallback_notes):
        log(f"{resolved.name}: {line}")
    torch.manual_seed(resolved.seed)
    model = LM(resolved.model, resolved.objective.heads(resolved.model))
    added: list[str] = []
    if resolved.init_from:
        dropped, added = init_from(model, model_directory(resolved.init_from))
        changed = [f"{what} {', '.join(names)}" for what, names in (("drops", dropped), ("adds", added)) if names]
        log(f"{resolved.name} starts from {resolved.init_from}" + (f": {'; '.join(changed)}" if changed else ""))
    else:
        model.set_token_characters([tokenizer.token(i) for i in range(tokenizer.vocab.size)])
    if resolved.init_embeddings_from:
        loaded = word_vectors.load_embeddings(model, model_directory(resolved.init_embeddings_from))
        log(f"{resolved.name} takes {loaded}; everything else is initialized at random")
    model.restrict_vocab(tokenizer.vocab)
    resolved.peft.apply(model, added, tokenizer, resolved.seed)
    for stack in model.stacks():
        stack.gradient_checkpointing = resolved.gradient_checkpointing
    model.to(best_device())
    if resolved.compile:
        compile_blocks(model)
    trainable, total = num_trainable_parameters(model), sum(p.numel() for p in model.parameters())
    log(
        f"{resolved.name}: {total:,} parameters"
        + (f", of which {trainable:,} are trained" if trainable < total else "")
    )
    batches = _batches(resolved, splits, tokenizer, ranks)
    if resolved.init_head_from_frequencies and not resolved.init_from:
        counted = init_head(model, resolved.objective, batches)
        if counted:
            log(f"{resolved.name} starts with an LM head that predicts the frequencies of {counted:,} labels")
    if ranks.first:
        if not continued:
            for name in ("samples.jsonl", held_out_texts.FILE):  # of a run that ended before its first checkpoint
                (directory / name).unlink(missing_ok=True)
        if not continued or load(str(directory)) != resolved:  # the same inputs at another path
            write_text(directory / "recipe.yaml", config_io.write_yaml(resolved))
        inputs.write(directory, recipe_hash)
        _write_samples(resolved, model, tokenizer, directory, 0)
        _write_held_out_texts(resolved, splits, model, data, 0)
    if validator is not None:
        validator.check_best_metric(model)
    evaluation = resolved.evaluation
    try:
        ended = train(
            model, resolved.objective, batches, directory,
            budget=resolved.budget, optimizer=resolved.optimizer, schedule=resolved.schedule,
            config=TrainerConfig(eval_every=evaluation.every, save_every=resolved.checkpoint.every, keep=resolved.checkpoint.keep,
                      best_metric=evaluation.best_metric or "loss",
                      load_best_at_end=bool(evaluation.best_metric or evaluation.patience),
                      patience=evaluation.patience, precision=chosen),
            evaluate=validator.measure if validator is not None else None, ranks=ranks, recipe=known, name=resolved.name,
            reporter=reporter, on_metrics=on_metrics,
        )  # fmt: skip
    except UserError as error:
        if ranks.first and isinstance(error.__cause__, RewardError):  # the user may fix the function and resume the run
            dataclasses.replace(inputs, functions={}).write(directory, recipe_hash)
        raise
    finished = RunResult(
        directory, ended.step, ended.exported_step, ended.tokens, ended.seconds, ended.flops, ended.metrics
    )
    if ranks.first:
        _write_samples(resolved, model, tokenizer, directory, ended.step)
        _write_held_out_texts(resolved, splits, model, data, ended.step)
        facts: dict[str, Any] = {
            "recipe": known,
            "objective": [name_of(type(one)) for one in components(resolved.objective)],
            "steps": ended.step,
            "exported_step": ended.exported_step,
            "tokens": ended.tokens,
            "metrics": ended.metrics,
        }
        if classes := resolved.objective.constraints.class_names:
            facts["classes"] = classes
        if validator is not None:
            write_record(directory / CLASS_REPORT, validator.class_report(model))
        export_heads(model)
        adapter = resolved.peft.export(
            model, directory / "adapter", model_directory(resolved.init_from), added, tokenizer, facts
        )
        if adapter:
            log(f"{resolved.name}: {directory / 'adapter'} ({adapter})")
        checks = [metric.remark for metric in resolved.objective.metrics.values() if metric.remark is not None]
        remarks = [*filter(None, (check(ended.metrics) for check in checks)), *splits.notes]
        for remark in remarks:
            log(f"{resolved.name}: {remark}")
        remarks += [
            *fallback_notes,
            *([splits.no_validation_reason] if splits.no_validation_reason else []),
        ]  # these were printed at the start
        done = dataclasses.asdict(finished) | {
            "directory": str(directory), "counts": splits.counts, "remarks": remarks,
        }  # fmt: skip
        with new_directory(directory / "model") as place:
            summary = save_model(model, tokenizer, place, facts)
            model_card.write(model_card.of_run(directory, place, model, summary, facts, done), place / "README.md")
        write_record(directory / DONE, done)
        write_report(run_report(directory), directory / REPORT)
        log(f"{resolved.name}: {directory / 'model'} ({summary}); report: {directory / REPORT}")
    ranks.wait()
    return finished


def _data_notes(recipe: Recipe, splits: DatasetSplits, validator: Validator | None) -> list[str]:
    """Return remarks on the data before a run: its classes, and why nothing is held out.

    Raises:
        UserError: `evaluation.best_metric` or `evaluation.patience` is set and nothing is held out.
    """
    evaluation = recipe.evaluation
    best, patience = evaluation.best_metric, evaluation.patience
    if validator is None and (best or patience):
        setting = f"evaluation.best_metric={best}" if best else f"evaluation.patience={patience}"
        why = f" ({splits.no_validation_reason})" if splits.no_validation_reason else ""
        raise UserError(
            f"{setting} needs held-out examples, and nothing is held out{why}: name data.validation_path=FILES, or raise "
            "data.validation_fraction"
        )
    line = class_counts.class_summary(splits.train, splits.validation)
    return [line] * bool(line) + [splits.no_validation_reason] * bool(splits.no_validation_reason)


def _silent(_: str) -> None:
    """Ignore a message: only the first rank prints."""


def _first_rank_first(ranks: Ranks, make: Callable[[], T]) -> T:
    """Call `make` on the first rank, which writes the files, and then on the others, which find them."""
    if not ranks.first:
        ranks.wait()
        return make()
    made = make()
    ranks.wait()
    return made


def _check_models(recipe: Recipe) -> None:
    """Raise a UserError if a model that the run starts from does not exist or is not finished."""
    for name, base in (("init_from", recipe.init_from), ("init_embeddings_from", recipe.init_embeddings_from)):
        place = Path(base)
        if base and not place.exists():
            raise UserError(f"{name}={base}: there is no such run or model directory, nor a GGUF file")
        if base and (place / "recipe.yaml").is_file() and not (place / "model").is_dir():
            raise UserError(f"{name}={base}: this run has no model yet: finish it with `firth train {base}`")


def _check_tokenizer(tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Raise a UserError if a model that the run starts from has another tokenizer, even one of the same size."""
    for name, base in (("init_from", recipe.init_from), ("init_embeddings_from", recipe.init_embeddings_from)):
        if base:
            hint = "leave out tokenizer.path, and the run takes that one"
            check_same_tokenizer(tokenizer, model_directory(base), f"{name}:", hint)


def _resolve(recipe: Recipe, data: RunData) -> Recipe:
    """Return the resolved recipe: every open setting filled in (model config, vocabulary size, classes, batching, paths)."""
    check_peft(recipe.peft, recipe.init_from)
    config, base = recipe.model, None
    if recipe.init_from:
        base = load_model(model_directory(recipe.init_from))
        base_config = base.config
        if (
            not recipe.examples.gives_memory or recipe.batch.packed_length
        ):  # records have no preceding text: fine-tune without memory
            base_config = dataclasses.replace(base_config, memory_length=0)
        config = base_config if config is None else config
    assert config is not None
    if recipe.init_from:
        check_vocab_fits(data.tokenizer, config, recipe.init_from)
    else:
        config = dataclasses.replace(config, vocab_size=data.tokenizer.vocab.size)
    added = recipe.objective.constraints.added_tokens
    examples = limit_lengths(recipe.examples, _published_examples(recipe), recipe.peft, base, config, added, data.log)
    examples = examples.limit_to(config.max_positions)
    check_pattern(recipe.objective, config, examples, fixed=bool(recipe.init_from))
    stats = functools.cache(lambda: examples.stats(data, recipe.objective.constraints.class_names))
    objective = recipe.peft.configure_objective(recipe.objective.configure(stats, config))
    with init_empty_weights():
        kept = objective.heads(config).keys() & (base.heads.keys() - PREFIX_HEADS if base is not None else ())
    if kept and base is not None and "mixture" in base.heads:
        objective = add_layer_mixture(objective, frozen=False)  # the head of the base model reads it
    check_pattern(objective, config, examples, fixed=bool(recipe.init_from))
    check_fields(objective, examples, config)
    if (reads := objective.attention) != "any":
        # Record how the model was trained: its model family may define another attention pattern.
        config = dataclasses.replace(config, causal=config.causal or reads == "causal", prefix_lm=reads == "prefix")
    packs = config.packable and not config.memory_length and objective.constraints.packable and recipe.peft.packable
    packs = packs and (base is None or base.prompt is None)  # each text of a packed row would need its own
    batch = recipe.batch.resolve(examples.max_tokens, packs)
    check_memory(config, examples, batch.packed_length)
    with init_empty_weights():
        model = LM(config, objective.heads(config))
    recipe.peft.check_model(model, base)
    tokenizer = dataclasses.replace(recipe.tokenizer, vocab_size=resolved_size(data.directory))
    resolved: Recipe = config_io.absolute_paths(
        dataclasses.replace(
            recipe, model=config, objective=objective, examples=examples, batch=batch, tokenizer=tokenizer
        )
    )
    return resolved


def _published_examples(recipe: Recipe) -> ExamplesConfig:
    """Return the examples config of the published recipe with this name, or else the defaults of its kind."""
    return published(recipe.name).examples if recipe.name in RECIPES else type(recipe.examples)()


def _precision(recipe: Recipe, directory: Path, continued: bool, ranks: Ranks) -> Literal["fp32", "bf16"]:
    """Resolve `precision`: a resumed run keeps its precision, and all ranks take that of the first."""
    before = load(str(directory)).precision if continued and recipe.precision == "auto" else recipe.precision
    device = best_device()
    return "bf16" if ranks.from_first(precision.choose(before, device)) == "bf16" else "fp32"


def _segmentation(recipe: Recipe, directory: Path, continued: bool) -> Segmentation:
    """Resolve `word_segmentation`: a resumed run keeps its own, also an "auto" that an older version wrote."""
    if not continued or recipe.word_segmentation != "auto":
        return resolve_segmentation(recipe.objective, recipe.word_segmentation)
    before = load(str(directory)).word_segmentation
    return before if before == "auto" else resolve_segmentation(recipe.objective, before)


def _finished(directory: Path, known: str) -> RunResult:
    """Return the result in done.json; UserError if it belongs to a recipe with another hash."""
    hint = f"delete {directory / DONE}, and the same command exports the model again"
    facts = read_record(directory / "model" / "firth.json", {"facts": dict}, hint)["facts"]
    if facts.get("recipe") != known:
        raise UserError(
            f"{directory} holds a finished run of another recipe (its recipe.yaml tells which); "
            "choose another directory with --out, or delete that one"
        )
    number = (int, float)
    needs = {"steps": int, "tokens": int, "seconds": number, "flops": number, "metrics": dict}
    done = read_record(directory / DONE, needs, hint)
    exported = done.get("exported_step", done["steps"])  # missing in older runs
    return RunResult(
        directory, done["steps"], exported, done["tokens"], done["seconds"], done["flops"], done["metrics"]
    )


def _batches(recipe: Recipe, splits: DatasetSplits, tokenizer: Tokenizer, ranks: Ranks) -> Batches:
    return Batches(
        splits.train, recipe.objective, vocab(recipe, tokenizer), batch_size=recipe.batch.size, seed=recipe.seed,
        gradient_accumulation_steps=recipe.batch.gradient_accumulation_steps, pack_to_length=recipe.batch.packed_length,
        group_by_length=recipe.batch.group_by_length, rank=ranks.rank, world=ranks.world,
    )  # fmt: skip


def _write_samples(recipe: Recipe, model: LM, tokenizer: Tokenizer, directory: Path, step: int) -> None:
    """Write the model's samples for the recipe's prompts at a step to samples.jsonl, once per step."""
    loaded = LoadedModel(model, tokenizer, Engine(model, tokenizer), recipe.objective)
    sampling = Sampling(max_new_tokens=64, temperature=0.8, seed=recipe.seed)

    def rows() -> Iterator[dict[str, Any]]:
        for prompt in recipe.sample_prompts:
            if not loaded.supports(prompt):  # the prompts of a recipe may not suit the objective that the user sets
                continue
            try:
                text = loaded.sample(prompt, sampling)
            except UserError as error:  # a failed sample must not stop a run
                text = f"({error})"
            yield {"step": step, "prompt": prompt, "text": text}

    if recipe.sample_prompts:
        _add_rows(directory / "samples.jsonl", step, rows)


def _write_held_out_texts(recipe: Recipe, splits: DatasetSplits, model: LM, data: RunData, step: int) -> None:
    """Write the model's answers to held-out prompts at a step, for the report, if the run trains on answers to prompts."""
    texts = splits.texts or held_out_texts.choose(splits.train, splits.validation, recipe.examples.fields)
    if texts is not None:

        def rows() -> Iterable[dict[str, Any]]:
            with data.autocast():
                return texts.rows(model, data.tokenizer, step, recipe.seed)

        _add_rows(data.directory / held_out_texts.FILE, step, rows)


def _add_rows(path: Path, step: int, make: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """Add the rows of a step to a JSONL file, once per step; the random state of training is unchanged."""
    rows = read_rows(path, {"step": int, "prompt": str}, "delete the file: it is for the report alone")
    if not any(row["step"] == step for row in rows):
        with torch.random.fork_rng():
            rows += make()
        write_text(path, "".join(row_line(row, ascii_only=False) for row in rows))
