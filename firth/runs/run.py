"""Run a recipe: prepare the tokenizer and the data, train, export the model and write the report.

    recipe.yaml  inputs.json  metrics.jsonl  checkpoints/step-N/  tokenizer/  model/  report.html

The same call on the same directory resumes an unfinished run, and returns at once if the run is finished.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from firth import kernel_choice
from firth.align.held_out import PromptSplits
from firth.align.rewards import RewardError
from firth.corpora import catalog
from firth.data import text_cache
from firth.data.collate import Batches
from firth.data.examples import DatasetSplits, class_summary
from firth.evaluate.tokenizer_match import check_same_tokenizer
from firth.io.atomic import make_directory, new_directory, write_text
from firth.io.integrity import read_record, write_record
from firth.model.config import ModelConfig
from firth.model.heads import StandardizedHead, export_heads
from firth.model.model import LM, Critic
from firth.objectives import name_of
from firth.objectives.objective import components
from firth.peft.lora import num_trainable_parameters
from firth.pretrained.load_save import describe_model, save_model
from firth.report.page import write as write_report
from firth.report.run_report import run_report
from firth.runs import config_io, examples, model_card, report_texts
from firth.runs.build_model import BuiltModel, assemble_model, builds_in_shards, init_head
from firth.runs.compatibility import check_available_memory, check_built, is_users
from firth.runs.evaluation import EvalTasks, PromptValidator, Validator, vocab
from firth.runs.loaded_model import Model
from firth.runs.peft_options import FullFinetuning
from firth.runs.prepare import RunData
from firth.runs.recipe import MODEL_CONFIG_HINT, Recipe, ResolvedRecipe, load_resolved
from firth.runs.resolve import resolve
from firth.runs.run_context import RunContext, RunIdentity, start_from_checkpoint
from firth.runs.start_model import StartModel, model_directory
from firth.runs.step_estimate import certainly_fits, check_fits, step_estimate
from firth.runs.tokenizer import check_vocab, fallbacks, tokenizer_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.training import checkpoint, trainer
from firth.training.device import choose_precision, default_device
from firth.training.distributed import Ranks, join
from firth.training.logging import OnMetrics, ProgressReporter, check_loggers, clock, metrics_loggers, short
from firth.training.step import SINGLE
from firth.training.trainer import TrainerConfig, TrainingResult
from firth.types import LOGGER, LogLine, UserError

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
        mfu: Model FLOPs utilization: counted FLOPs per second over the machine's peak.
    """

    directory: Path
    steps: int
    exported_step: int
    tokens: int
    seconds: float
    flops: float
    metrics: dict[str, float]
    mfu: float = 0.0

    @property
    def model(self) -> Path:
        """The directory of the exported model."""
        return self.directory / "model"


def run(
    recipe: Recipe,
    directory: Path,
    log: LogLine = LOGGER.info,
    reporter: ProgressReporter | None = None,
    on_metrics: OnMetrics | None = None,
    start_from: Path | None = None,
) -> RunResult:
    """Train a recipe in a directory, or resume or return the run that the directory holds.

    Args:
        recipe: The recipe.
        directory: The run directory.
        log: Receives messages of the first rank.
        reporter: Receives the progress of training; by default a bar on a terminal, else the logger.
        on_metrics: Called with each row of metrics.jsonl, on the first rank.
        start_from: A checkpoint of another run with the same first steps (`firth.runs.run_context`), for a new run.

    Raises:
        UserError: The directory holds a run of another recipe, or the recipe is invalid.
    """
    kernel_choice.check_forced()
    ranks = join(default_device())
    with ranks.together():
        check_start_models(recipe)
        check_loggers(recipe.loggers)
        if recipe.model is not None:
            check_weights_fit(recipe, recipe.model, ranks)
        make_directory(directory)
        context = RunContext.open(recipe, directory, log, ranks)
        data = prepare_tokenizer(recipe, context)
        resolved = resolve(recipe, data, context)
        identity = context.identify(resolved)
        finished = finished_run(resolved, identity, context)
        if finished is not None:
            return finished
        check_weights_fit(resolved, resolved.model, ranks)
        datasets = build_data(resolved, data, context)
        check_memory(resolved, datasets)
        ranks.wait()  # what one rank builds is not free for another one's check
        built = build_model(resolved, datasets, context)
        ended = train(resolved, built, datasets, identity, context, reporter, on_metrics, start_from)
        return export(resolved, built, datasets, ended, identity, context)


@dataclass(frozen=True, eq=False)
class RunDatasets:
    """What a run trains and validates on.

    Args:
        data: The data of the run, with the precision and the memory of its model.
        splits: The training and validation examples.
        validator: Evaluates on the validation examples; None if there are none.
        tasks: Tasks of `evaluation.tasks`; None if there are none.
        batches: The training batches.
        notes: Sentences on the words, names and sentences that the objective does not find.
    """

    data: RunData
    splits: DatasetSplits
    validator: Validator | PromptValidator | None
    tasks: EvalTasks | None
    batches: Batches
    notes: list[str]


def prepare_tokenizer(recipe: Recipe, context: RunContext) -> RunData:
    """Load or train the tokenizer of a run and return the data that it reads.

    Raises:
        UserError: The tokenizer is not that of the start model or of the resumed run, or has another size than the model.
    """
    tokenizer = context.ranks.first_rank_first(
        lambda: tokenizer_of(recipe, context.directory, context.log, context.inputs)
    )
    context.inputs.digests["tokenizer"] = tokenizer.digest
    context.check_inputs()
    check_start_tokenizers(tokenizer, recipe)
    check_vocab(recipe, tokenizer)
    context.verify_models([recipe.init_from])
    start = StartModel(recipe.init_from, tokenizer if recipe.tokenizer.extend else None)
    return RunData(
        recipe.data, tokenizer, context.directory, recipe.batch.size, recipe.seed, context.log, start=start, ranks=context.ranks
    )  # fmt: skip


def finished_run(resolved: ResolvedRecipe, identity: RunIdentity, context: RunContext) -> RunResult | None:
    """Return the result of a finished run, after writing its report if that is missing; None for a run to train or export."""
    directory, log = context.directory, context.log
    if not (directory / DONE).exists():
        return None
    if not (directory / "model" / "firth.json").exists():
        log(f"{resolved.name}: {directory / 'model'} is missing, so it is exported again from the last checkpoint")
        return None
    finished = _read_result(directory, identity.run)
    if context.ranks.first and not (directory / REPORT).exists():
        write_report(run_report(directory), directory / REPORT)
    log(f"{resolved.name}: {directory} is finished, after {finished.steps:,} steps; its model is {finished.model}")
    return finished


def build_data(resolved: ResolvedRecipe, data: RunData, context: RunContext) -> RunDatasets:
    """Build the training and validation examples, and report what was read.

    Raises:
        UserError: There is nothing to train on, nothing is held out and `evaluation` needs it, or a user's objective builds
            examples that a model cannot be trained on.
    """
    context.verify_models(path for _, kind, path in config_io.paths(resolved) if kind == "model")
    chosen = checkpoint.precision(context.directory) or choose_precision(resolved.precision, default_device())
    data = dataclasses.replace(data, memory_length=resolved.model.attention.memory_length, precision=chosen)
    splits = context.ranks.first_rank_first(
        lambda: examples.build_datasets(resolved.examples, data, resolved.objective)
    )
    text_cache.forget()
    validator: Validator | PromptValidator | None = (
        Validator(resolved, splits.validation, splits.bytes_per_target, data.tokenizer, context.ranks)
        if splits.validation and len(splits.validation)
        else None
    )
    if isinstance(splits, PromptSplits) and splits.prompts is not None:
        validator = PromptValidator(resolved, splits.prompts)
    tasks = EvalTasks.of(resolved, splits.validation, context.directory, data.tokenizer)
    notes = fallbacks(resolved.objective, resolved.examples, splits.train, data.tokenizer.vocab)
    for line in (*_data_notes(resolved, splits, validator), *notes, *(tasks.notes if tasks else ())):
        context.log(f"{resolved.name}: {line}")
    batches = Batches(
        splits.train, resolved.objective, vocab(resolved, data.tokenizer), batch_size=resolved.batch.size, seed=resolved.seed,
        gradient_accumulation_steps=resolved.batch.gradient_accumulation_steps, pack_to_length=resolved.batch.packed_length,
        group_by_length=resolved.batch.group_by_length, rank=context.ranks.rank, world=context.ranks.world,
    )  # fmt: skip
    if is_users(resolved.objective) and not splits.train.on_policy:
        first = splits.train.order(resolved.seed, batches.positions(0)[:8])
        check_built(resolved.objective, batches.shown(*first), resolved.model.vocab_size)
    return RunDatasets(data, splits, validator, tasks, batches, notes)


def check_weights_fit(recipe: Recipe, config: ModelConfig, ranks: Ranks) -> None:
    """Raise a UserError if the weights of a run, their gradients and the optimizer state do not fit into the free memory."""
    full = isinstance(recipe.peft, FullFinetuning)
    degree, whole = recipe.distributed.degree(ranks), not builds_in_shards(recipe)
    check_available_memory(config, recipe.optimizer.name, full, default_device(), degree, whole)


def check_memory(resolved: ResolvedRecipe, datasets: RunDatasets) -> None:
    """Raise a UserError if a training step does not fit into the free memory, before the model is built.

    A step that may not fit by a generous bound is run on tensors without data. Rollouts are not known before the run, and the
    estimate is that of a model that is not sharded.
    """
    device, source = default_device(), datasets.batches.source
    if source.on_policy or (resolved.distributed.shard != "none" and datasets.batches.world > 1):
        return
    batches = datasets.batches.batches(0)
    if not certainly_fits(resolved, batches, device):
        plain = dataclasses.replace(resolved, compile=False)
        build = partial(assemble_model, plain, datasets.data, lambda _: None)
        check_fits(step_estimate(lambda: build().model, resolved, [batches]), device, resolved.budget.max_steps or 1)


def build_model(resolved: ResolvedRecipe, datasets: RunDatasets, context: RunContext) -> BuiltModel:
    """Build the model, with the weights of the start model if there is one, and shard it.

    A sharded model never exists as a whole: its weights are initialized one by one, and those of the start model are read one
    by one. Adapters, added tokens, and embeddings of another model are exceptions (`builds_in_shards`).
    """
    log = context.log
    torch.manual_seed(resolved.seed)
    built = assemble_model(resolved, datasets.data, log, context.ranks)
    datasets.data.start.release()
    model = built.model
    trainable, total = num_trainable_parameters(model), sum(p.numel() for p in model.parameters())
    log(
        f"{resolved.name}: {total:,} parameters"
        + (f", of which {trainable:,} are trained" if trainable < total else "")
    )
    new_head = "lm" in built.added_heads and getattr(model.heads["lm"], "bias", None) is not None
    if resolved.init_head_from_frequencies and (new_head or not resolved.init_from):
        counted = init_head(model, resolved.objective, datasets.batches, built.shards or SINGLE)
        if counted:
            log(f"{resolved.name} starts with an LM head that predicts the frequencies of {counted:,} labels")
    return built


def train(
    resolved: ResolvedRecipe,
    built: BuiltModel,
    datasets: RunDatasets,
    identity: RunIdentity,
    context: RunContext,
    reporter: ProgressReporter | None,
    on_metrics: OnMetrics | None,
    start_from: Path | None = None,
) -> TrainingResult:
    """Train the model, with checkpoints and metrics in the run directory; record the recipe and its inputs first.

    Raises:
        UserError: A user's reward function fails; the run can be resumed after it is corrected.
    """
    directory, model, validator, tasks = context.directory, built.model, datasets.validator, datasets.tasks
    evaluation, saving = resolved.evaluation, resolved.checkpoint
    if context.ranks.first:
        if not context.resumed:
            report_texts.delete_texts(directory)
        if not context.resumed or load_resolved(directory) != resolved:  # the same inputs at another path
            write_text(directory / "recipe.yaml", config_io.write_yaml(resolved))
        context.inputs.write(directory, identity.recipe)
        if start_from is not None and not context.resumed:
            start_from_checkpoint(start_from, resolved, context, identity)
    texts = report_texts.texts_of(resolved, datasets.splits)
    if isinstance(validator, Validator):
        validator = dataclasses.replace(validator, parallel=built.shards or SINGLE)
    wanted = bool(resolved.sample_prompts or texts or tasks)
    with model.whole() if wanted else nullcontext():  # a sharded model is gathered on every rank
        if context.ranks.first:
            report_texts.write_texts(resolved, model, datasets.data, datasets.splits, 0)
        task_names = tasks.check(model) if tasks is not None else []
    if validator is not None and evaluation.best_metric not in task_names:
        validator.check_best_metric(model)
    context.ranks.wait()
    config = TrainerConfig(
        eval_every=evaluation.every, save_every=saving.every, save_seconds=60 * saving.every_minutes, keep=saving.keep,
        best_metric=evaluation.best_metric or "loss", load_best_at_end=bool(evaluation.best_metric or evaluation.patience),
        patience=evaluation.patience, precision=datasets.data.precision,
    )  # fmt: skip

    def evaluate(model: LM, step: int) -> dict[str, float]:
        found = validator.measure(model, step) if validator else {}
        if tasks is None:
            return found
        with model.whole():
            return found | tasks.measure(model)

    loggers, fields = resolved.loggers if context.ranks.first else (), config_io.to_dict(resolved)
    try:
        with metrics_loggers(loggers, fields, directory, context.resumed, on_metrics) as on_row:
            return trainer.train(
                model, resolved.objective, datasets.batches, directory,
                budget=resolved.budget, optimizer=resolved.optimizer, schedule=resolved.schedule, config=config,
                evaluate=evaluate if validator or tasks else None, ranks=context.ranks, shards=built.shards, recipe=identity.run,
                name=resolved.name, reporter=reporter, on_metrics=on_row,
                description=_description(resolved, model, datasets.data.tokenizer, identity),
            )  # fmt: skip
    except UserError as error:
        if context.ranks.first and isinstance(error.__cause__, RewardError):
            # The user may correct the function and resume the run.
            dataclasses.replace(context.inputs, functions={}).write(directory, identity.recipe)
        raise


def _description(
    resolved: ResolvedRecipe, model: LM, tokenizer: Tokenizer, identity: RunIdentity
) -> dict[str, Any] | None:
    """Return what a model is, for its checkpoints; None if they lack weights or have heads in another form than the export."""
    kinds = {name: type(head) for name, head in model.heads.items()}
    if StandardizedHead in kinds.values() or not all(p.requires_grad for p in model.parameters()):
        return None
    record = describe_model(model, tokenizer) | {"facts": _facts(resolved, identity)}
    return record | {"heads": {name: one for name, one in record["heads"].items() if kinds[name] is not Critic}}


def _facts(resolved: ResolvedRecipe, identity: RunIdentity) -> dict[str, Any]:
    """Return the metadata of the model of a run that is known before it is trained."""
    classes = resolved.objective.constraints.class_names
    facts: dict[str, Any] = {"recipe": identity.run}
    facts["objective"] = [name_of(type(one)) for one in components(resolved.objective)]
    return facts | ({"classes": classes} if classes else {})


def export(
    resolved: ResolvedRecipe,
    built: BuiltModel,
    datasets: RunDatasets,
    ended: TrainingResult,
    identity: RunIdentity,
    context: RunContext,
) -> RunResult:
    """Write the model, its adapter, its model card, the result and the report, on the first rank; return the result."""
    result = RunResult(
        context.directory,
        ended.step,
        ended.exported_step,
        ended.tokens,
        ended.seconds,
        ended.flops,
        ended.metrics,
        ended.mfu,
    )
    whole = built.model if built.shards is None else built.shards.unsharded()
    if context.ranks.first and whole is not None:
        _write_files(resolved, dataclasses.replace(built, model=whole), datasets, result, identity, context)
    context.ranks.wait()
    return result


def _write_files(
    resolved: ResolvedRecipe,
    built: BuiltModel,
    datasets: RunDatasets,
    result: RunResult,
    identity: RunIdentity,
    context: RunContext,
) -> None:
    """Write the files of a finished run."""
    directory, log, model, splits = context.directory, context.log, built.model, datasets.splits
    tokenizer, objective = datasets.data.tokenizer, resolved.objective
    report_texts.write_texts(resolved, model, datasets.data, splits, result.steps)
    facts = _facts(resolved, identity) | {
        "steps": result.steps,
        "exported_step": result.exported_step,
        "tokens": result.tokens,
        "metrics": result.metrics,
    }
    if datasets.validator is not None:
        write_record(directory / CLASS_REPORT, datasets.validator.class_report(model))
    export_heads(model)
    start = model_directory(resolved.init_from)
    adapter = resolved.peft.export(model, directory / "adapter", start, built.added_heads, tokenizer, facts)
    if adapter:
        log(f"{resolved.name}: {directory / 'adapter'} ({adapter})")
    checks = [metric.remark for metric in objective.metrics.values() if metric.remark is not None]
    remarks = [*filter(None, (check(result.metrics) for check in checks)), *splits.notes]
    for remark in remarks:
        log(f"{resolved.name}: {remark}")
    # These were printed at the start.
    remarks += [*datasets.notes, *([splits.no_validation_reason] if splits.no_validation_reason else [])]
    done = dataclasses.asdict(result) | {"directory": str(directory), "counts": splits.counts, "remarks": remarks}
    done["next_command"] = Model.of(model, tokenizer, objective).next_command
    with new_directory(directory / "model") as place:
        summary = save_model(model, tokenizer, place, facts)
        card = model_card.of_run(directory, place, model, summary, facts, config_io.to_dict(resolved), done)
        model_card.write(card, place / "README.md")
    write_record(directory / DONE, done)
    rate = result.flops / max(result.seconds, 1e-9)
    log(
        f"{resolved.name}: {result.steps:,} steps, {result.tokens:,} tokens and {short(result.flops)}FLOPs in {clock(result.seconds)}: "
        f"{short(rate)}FLOP/s, {result.mfu:.1%} of this machine's peak (MFU)"
    )
    write_report(run_report(directory), directory / REPORT)
    log(f"{resolved.name}: {directory / 'model'} ({summary}); report: {directory / REPORT}")


def _data_notes(
    recipe: ResolvedRecipe, splits: DatasetSplits, validator: Validator | PromptValidator | None
) -> list[str]:
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
    line = class_summary(splits.train, splits.validation)
    return [line] * bool(line) + [splits.no_validation_reason] * bool(splits.no_validation_reason)


def check_start_models(recipe: Recipe) -> None:
    """Raise a UserError if the run has no model, or if a model that it starts from does not exist or is not finished."""
    if recipe.model is None and not recipe.init_from:
        raise UserError(f"the recipe {recipe.name!r} has neither a model config nor init_from: {MODEL_CONFIG_HINT}")
    for name, base in (("init_from", recipe.init_from), ("init_embeddings_from", recipe.init_embeddings_from)):
        place = Path(base)
        if base and not place.exists():
            raise UserError(
                f"{name}={base}: there is no such run or model directory, no GGUF file and no model of "
                f"the catalog ({', '.join(catalog.model_names())})"
            )
        if base and (place / "recipe.yaml").is_file() and not (place / "model").is_dir():
            raise UserError(f"{name}={base}: this run has no model yet: finish it with `firth train {base}`")


def check_start_tokenizers(tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Raise a UserError if a model that the run starts from has another tokenizer, even one of the same size."""
    for name, base in (("init_from", recipe.init_from), ("init_embeddings_from", recipe.init_embeddings_from)):
        if base and not recipe.tokenizer.extend:
            hint = "leave out tokenizer.path, and the run takes that one"
            check_same_tokenizer(tokenizer, model_directory(base), f"{name}:", hint)


def _read_result(directory: Path, known: str) -> RunResult:
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
        directory,
        done["steps"],
        exported,
        done["tokens"],
        done["seconds"],
        done["flops"],
        done["metrics"],
        done.get("mfu", 0.0),
    )
