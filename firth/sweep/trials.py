"""The trials of a sweep: runs of one recipe whose settings optuna chooses, divided among processes.

    OUT/study.json          recipe, varied fields, metric: what a second call must agree with
    OUT/journal.log         optuna's study: every trial, its values while it trains, and how it ended
    OUT/tokenizer/  data/   what all trials share, if the varied fields allow it
    OUT/trials/0007/        a run directory for each trial
    OUT/seeds/best/seed-1/  runs of the best trial and of the recipe with other seeds (`--seeds`)
    OUT/claims/             which process runs which trial (`firth.runs.workers`)
    OUT/report.html

Trial n is sampled by TPE (Bergstra et al. 2011) with a generator seeded by the sweep's seed and n, from the trials before it. So
a sweep of one process depends on nothing else, and one that was killed continues as if it had not been. Trial 0 has the recipe's
own values where the ranges hold them.

A trial is pruned by the median rule: at a share of its budget (after WARMUP_PERCENT), its best validation so far is worse than the
median of the finished trials there. Successive halving (ASHA) would prune more, but compares early: a low learning rate is
behind until the schedule decays, and twenty trials are few for its rungs (docs/decisions/0122-median-pruning.md).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from firth.fields import NonNegativeInt, PositiveInt, Validated
from firth.io.atomic import FULL, make_directory
from firth.io.integrity import read_done, read_record, write_record
from firth.runs import config_io, examples
from firth.runs.prepare import RunData
from firth.runs.recipe import Recipe, TokenizerConfig, expand_assignment, load
from firth.runs.resolve import resolve
from firth.runs.run import build_data, build_model, prepare_tokenizer, run
from firth.runs.run_context import RunContext
from firth.runs.tokenizer import tokenizer_of
from firth.runs.workers import Claim, Claims, WorkUnit, preparing, work
from firth.sweep.space import Parameter, parse, validated
from firth.training.device import choose_precision, default_device
from firth.training.distributed import Ranks
from firth.training.logging import FILE, NullReporter, read_metrics
from firth.training.run_lock import LockedError
from firth.training.trainer import DivergedError, lower_is_better
from firth.types import LOGGER, LogLine, UserError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

STUDY, JOURNAL, CLAIMS, TRIALS = "study.json", "journal.log", "claims", "trials"
"""Files and directories of a sweep; `trials` exists once the metric has been checked."""
VALIDATIONS = 8
"""Validations of a trial whose recipe validates less than twice."""
STARTUP_TRIALS = 5
"""Finished trials before any is pruned."""
WARMUP_PERCENT = 30
"""Share of the budget, in percent, before which no trial is pruned."""
MAX_FAILURES = 3
"""The sweep stops when this many trials fail with an error and none has finished."""
REASON = "reason"
"""Attribute of a trial that diverged or failed: why."""
DIVERGED = "diverged.json"
"""File in the directory of a seed that diverged, with the reason."""
OF_TOKENS = ("tokenizer", "data", "objective", "examples", "init_from", "init_embeddings_from")
"""Varied fields with which trials have tokenizers or data of their own."""


@dataclass(frozen=True)
class StudyConfig(Validated):
    """Configuration of a sweep of settings.

    Args:
        trials: Trials in all, also those of earlier calls.
        metric: The metric of a trial: a validation metric, or train/NAME for the last training step.
        direction: Whether a lower or a higher value is better; empty follows the metric's name.
        prune: Whether trials that fall behind are stopped.
        seed: Seed of the sampler; runs have the recipe's seed.
        seeds: Other seeds with which the best trial and the recipe are trained at the end.
    """

    trials: PositiveInt = 20
    metric: str = "loss"
    direction: Literal["", "minimize", "maximize"] = ""
    prune: bool = True
    seed: NonNegativeInt = 0
    seeds: NonNegativeInt = 0

    @property
    def minimizes(self) -> bool:
        """Whether a lower value is better."""
        return self.direction == "minimize" or (
            not self.direction and lower_is_better(self.metric.removeprefix("train/"))
        )


class PrunedError(Exception):
    """The trial that is training is worse than the others were at this point."""


def optuna_module(name: str = "") -> Any:
    """Return optuna or a module of it.

    Raises:
        UserError: It is not installed.
    """
    try:
        module = importlib.import_module("optuna" + (f".{name}" if name else ""))
    except ModuleNotFoundError:
        raise UserError("a sweep needs optuna: pip install 'firth[scale]'") from None
    importlib.import_module("optuna").logging.set_verbosity(30)
    return module


@dataclass(frozen=True, eq=False)
class Sweeper:
    """A sweep with its recipe checked and its data prepared.

    Args:
        name: The recipe: its name or file.
        fixed: Settings of all trials.
        parameters: The varied fields.
        config: The configuration.
        out: The directory.
        shared: Fields of a recipe -> what all trials share.
    """

    name: str
    fixed: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    config: StudyConfig
    out: Path
    shared: Mapping[str, Any]

    def settings(self, trial: FrozenTrial) -> list[str]:
        """Return the settings that a trial varies."""
        return [one.setting(trial.params[one.field]) for one in self.parameters if one.field in trial.params]

    def recipe(self, settings: Sequence[str]) -> Recipe:
        """Return the recipe with settings, and with what all trials share.

        Raises:
            UserError: The settings do not fit each other.
        """
        recipe = load(self.name, [*self.fixed, *settings])
        tokens = self.shared.get("vocab_size")
        if tokens is not None and recipe.model is not None:
            recipe = dataclasses.replace(
                recipe, model=dataclasses.replace(recipe.model, vocab_size=tokens), tokenizer=TokenizerConfig(str(self.out / "tokenizer")),
                data=dataclasses.replace(recipe.data, cache_dir=str(self.out / "data")),
            )  # fmt: skip
        if "precision" in self.shared and recipe.precision == "auto":
            recipe = dataclasses.replace(recipe, precision=self.shared["precision"])
        return _with_validations(recipe)

    def directory(self, number: int) -> Path:
        """Return the run directory of a trial."""
        return self.out / TRIALS / f"{number:04d}"

    def command(self, settings: Sequence[str], out: str) -> str:
        """Return the command that trains the recipe with settings."""
        return shlex.join(["firth", "train", self.name, *self.fixed, *settings, "--out", out])

    def study(self) -> Study:
        """Open optuna's study, which is created by the first call."""
        optuna, journal = optuna_module(), optuna_module("storages.journal")
        path = self.out / JOURNAL
        lock = journal.JournalFileOpenLock(str(path))
        lock.acquire()
        try:
            _cut_torn_line(path)
        finally:
            lock.release()
        storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path), lock))
        pruner: Any = optuna.pruners.NopPruner()
        if self.config.prune:
            pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=WARMUP_PERCENT)
        direction = "minimize" if self.config.minimizes else "maximize"
        study: Study = optuna.create_study(
            storage=storage, study_name="sweep", direction=direction, pruner=pruner, load_if_exists=True
        )
        return study


def _cut_torn_line(path: Path) -> None:
    """Cut off a last line without an end: its writer died or its disk was full, and the next line would join it."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _with_validations(recipe: Recipe) -> Recipe:
    """Return a recipe that validates and saves often enough to be compared and resumed; the weights are the same."""
    steps, evaluation, saving = recipe.budget.max_steps, recipe.evaluation, recipe.checkpoint
    if not steps:
        return recipe
    every = max(1, steps // VALIDATIONS)
    rare = 2 * evaluation.every > steps or not evaluation.every
    if rare and not (evaluation.best_metric or evaluation.patience):  # these depend on when it is validated
        evaluation = dataclasses.replace(evaluation, every=every)
    if 2 * saving.every > steps or not saving.every:
        saving = dataclasses.replace(saving, every=every, keep=1)
    return dataclasses.replace(recipe, evaluation=evaluation, checkpoint=saving)


def prepare(name: str, settings: Sequence[str], config: StudyConfig, out: Path, log: LogLine = LOGGER.info) -> Sweeper:
    """Check the recipe, the varied fields, the metric and the directory, and make what all trials share.

    Raises:
        UserError: One of them is wrong; nothing has been trained then.
    """
    optuna_module()
    if not config.metric:
        raise UserError("--metric is empty: name a metric of the validation, for example loss")
    fixed, parameters = parse(settings)
    parameters = validated(name, fixed, parameters)
    base = load(name, fixed)
    record = {
        "recipe": json.loads(json.dumps(config_io.to_dict(config_io.absolute_paths(base)))),
        "search space": {one.field: str(one) for one in parameters}, "metric": config.metric,
        "direction": "minimize" if config.minimizes else "maximize", "seed": config.seed, "pruning": config.prune,
    }  # fmt: skip
    file = out / STUDY
    with preparing(out / CLAIMS, STUDY, "sweep of settings"):
        before, begun = read_record(file) if file.exists() else {}, (out / TRIALS).exists()
        changed = [key for key, value in record.items() if before.get(key) != value]
        if begun and changed:
            raise UserError(
                f"{out} holds a sweep with another {' and '.join(changed)}: choose another --out, or delete that one"
            )
        if not begun:
            (out / JOURNAL).unlink(missing_ok=True)  # of a sweep whose settings were wrong
            place = str(Path(name).absolute()) if Path(name).exists() else name
            precision = choose_precision(base.precision, default_device())
            kept = {
                "name": place,
                "settings": _from_anywhere(settings, base),
                "trials": config.trials,
                "precision": precision,
            }
            write_record(file, record | kept)
        elif config.trials > before["trials"]:
            write_record(file, before | {"trials": config.trials})  # so that the directory alone continues all of them
        shared = {"precision": read_record(file)["precision"]} | _shared(base, parameters, out, log)
        sweeper = Sweeper(name, tuple(fixed), tuple(parameters), config, out, shared)
        if not begun:
            _check_metric(sweeper)
            make_directory(out / TRIALS)
        sweeper.study()
    return sweeper


def _from_anywhere(settings: Sequence[str], base: Recipe) -> list[str]:
    """Return the settings with the recipe's files as absolute paths, so that the directory continues from any working directory."""
    own = {name: value for name, _, value in config_io.paths(base)}
    whole = {
        name: value
        for name, kind, value in config_io.paths(config_io.absolute_paths(base))
        if value != own[name] and (kind == "files" or Path(value).exists())
    }
    kept = [one for one in settings if expand_assignment(one).partition("=")[0] not in whole]
    return [*kept, *(f"{name}={json.dumps(value)}" for name, value in whole.items())]


def reopen(out: Path, trials: int | None, seeds: int) -> tuple[str, list[str], StudyConfig]:
    """Return recipe, settings and configuration of the sweep in a directory."""
    record = read_record(out / STUDY, {"name": str, "settings": list, "trials": int})
    config = StudyConfig(
        trials or record["trials"], record["metric"], record["direction"], record["pruning"], record["seed"], seeds
    )
    return record["name"], record["settings"], config


def _shared(base: Recipe, parameters: Sequence[Parameter], out: Path, log: LogLine) -> dict[str, Any]:
    """Make the tokenizer and the token stores that all trials share, unless a varied field changes them; return the vocabulary size.

    Raises:
        UserError: Nothing is held out.
    """
    if base.model is None or base.init_from or any(one.field.split(".")[0] in OF_TOKENS for one in parameters):
        return {}
    tokenizer = tokenizer_of(base, out, log)
    if base.examples.reads_documents:
        data = dataclasses.replace(base.data, cache_dir=str(out / "data"))
        run_data = RunData(data, tokenizer, out, batch_size=base.batch.size, log=log)
        splits = examples.build_datasets(base.examples, run_data, base.objective)
        if splits.validation is None:
            raise UserError(
                f"{base.name}: nothing is held out to compare trials by ({splits.no_validation_reason}): set data.validation_path=FILES, "
                "or raise data.validation_fraction"
            )
    return {"vocab_size": tokenizer.vocab.size}


def _check_metric(sweeper: Sweeper) -> None:
    """Raise a UserError if the metric is not among those of the recipe's validation, which an untrained model shows."""
    metric = sweeper.config.metric
    if metric.startswith("train/"):
        return
    recipe = sweeper.recipe([])
    recipe = dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, best_metric=metric))
    with tempfile.TemporaryDirectory(dir=sweeper.out) as directory:
        context = RunContext.open(recipe, Path(directory), _silent, Ranks())
        try:
            data = prepare_tokenizer(recipe, context)
            resolved = resolve(recipe, data, context)
            datasets = build_data(resolved, data, context)
            model = build_model(resolved, datasets, context).model
            tasks = datasets.tasks.check(model) if datasets.tasks is not None else []
            if datasets.validator is not None and metric not in tasks:
                datasets.validator.check_best_metric(model.eval())
        except UserError as error:
            raise UserError(str(error).replace("evaluation.best_metric=", "--metric ")) from None


def run_trials(sweeper: Sweeper, log: LogLine = LOGGER.info) -> None:
    """Run trials that no other process runs, until all have ended; then the seeds, if any are wanted.

    Raises:
        UserError: No trial has finished.
        Interrupted: Ctrl-C; the same call continues.
    """
    study, claims = sweeper.study(), Claims(sweeper.out / CLAIMS)
    jobs = [WorkUnit(f"trial {n}", f"trial-{n:04d}") for n in range(sweeper.config.trials)]
    numbers = {job: n for n, job in enumerate(jobs)}

    def finished(job: WorkUnit) -> bool:
        trials = study.get_trials(deepcopy=False)
        return len(trials) > numbers[job] and trials[numbers[job]].state.is_finished()

    def run_trial(job: WorkUnit, claim: Claim) -> None:
        with claims.exclusive("sample"):
            _sample(sweeper, study, numbers[job])
        _run_trial(sweeper, study, numbers[job], claim, log)
        _check_failures(study)

    work(jobs, claims, finished, run_trial, log)
    if not completed(study):
        raise UserError(f"none of {sweeper.config.trials} trials has finished: {_reasons(study)}")
    work_seeds(sweeper, best_trial(sweeper, study), claims, log)


def _sample(sweeper: Sweeper, study: Study, number: int) -> None:
    """Create the trials up to a number that do not exist yet, each with its values."""
    while (n := len(study.get_trials(deepcopy=False))) <= number:
        if not n:
            base = load(sweeper.name, sweeper.fixed)
            own = {one.field: one.own_value(base) for one in sweeper.parameters}
            study.enqueue_trial({field: value for field, value in own.items() if value is not None})
        study.sampler = _sampler(sweeper, n)
        _suggest(sweeper, study.ask())
    study.sampler = _sampler(sweeper, number)  # what follows does something only if a process died in the lines above
    if study.get_trials(deepcopy=False)[number].state.name == "WAITING":
        study.ask()
    _suggest(sweeper, _open(study, number))


def _sampler(sweeper: Sweeper, number: int) -> Any:
    """Return the sampler of a trial."""
    with warnings.catch_warnings(action="ignore"):  # of experimental arguments
        return optuna_module().samplers.TPESampler(seed=sweeper.config.seed * 100_003 + number, constant_liar=True)


def _suggest(sweeper: Sweeper, trial: Trial) -> None:
    """Sample the values of a trial that it does not have yet."""
    for one in sweeper.parameters:
        one.suggest(trial)


def _open(study: Study, number: int) -> Trial:
    """Return a trial that this or another process has begun."""
    trial: Trial = optuna_module("trial").Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)
    return trial


def _run_trial(sweeper: Sweeper, study: Study, number: int, claim: Claim, log: LogLine) -> None:
    """Train a trial, or continue it, and write down how it ended."""
    states = optuna_module("trial").TrialState
    trial, directory = _open(study, number), sweeper.directory(number)
    settings = sweeper.settings(study.get_trials(deepcopy=False)[number])
    log(f"trial {number}: {' '.join(settings)}")
    try:
        recipe = sweeper.recipe(settings)
        run(recipe, directory, log=_silent, reporter=NullReporter(), on_metrics=_watcher(sweeper, recipe, trial, claim))
        value = metric_of(sweeper.config.metric, directory)
        study.tell(number, value)
        log(f"trial {number}: {sweeper.config.metric} {value:.4g}")
    except PrunedError as error:
        study.tell(number, state=states.PRUNED)
        log(f"trial {number}: pruned, {error}")
    except DivergedError as error:
        # TPE ranks pruned trials behind all finished ones; it would ignore a failed one and come back to its values.
        trial.set_user_attr(REASON, f"diverged: {error}")
        study.tell(number, state=states.PRUNED)
        log(f"trial {number}: diverged: {error}")
    except LockedError:
        raise
    except UserError as error:
        claim.check()
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
            raise  # it says nothing about the trial, which a later call continues
        trial.set_user_attr(REASON, str(error))
        study.tell(number, state=states.FAIL)
        log(f"trial {number}: failed: {error}")
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def _watcher(sweeper: Sweeper, recipe: Recipe, trial: Trial, claim: Claim) -> Callable[[dict[str, Any]], None]:
    """Return a function for each row of metrics, which reports validations to optuna and raises a PrunedError."""
    metric, seen = sweeper.config.metric, set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    latest: dict[str, float] = {}

    def watch(row: dict[str, Any]) -> None:
        claim.check()
        latest.update(
            {f"{row['split']}/{name}": value for name, value in row.items() if isinstance(value, int | float)}
        )
        name = metric if metric.startswith("train/") else f"valid/{metric}"
        if row["split"] == "train" and name.startswith("train/") and name not in latest:
            raise UserError(f"--metric {metric} is not among the metrics of a training step: {', '.join(latest)}")
        percent = 100 * recipe.budget.passed(row["step"], row["seconds"], latest.get("train/flops", 0.0))
        if not recipe.budget.max_steps:
            percent = 10 * (percent // 10)  # trials validate at different shares; those of one tenth are compared
        point = round(percent)
        if row["split"] != "valid" or name not in latest or point in seen:
            return
        seen.add(point)
        trial.report(latest[name], point)
        if point < 100 and trial.should_prune():
            raise PrunedError(f"with {metric} {latest[name]:.4g} after {point}% of its budget")

    return watch


def metric_of(metric: str, directory: Path) -> float:
    """Return a metric of a finished run.

    Raises:
        UserError: It was not recorded.
    """
    if metric.startswith("train/"):
        rows = [row for row in read_metrics(directory / FILE) if row["split"] == "train"]
        found = {f"train/{name}": value for name, value in rows[-1].items()} if rows else {}
    else:
        found = {name.removeprefix("valid/"): value for name, value in read_done(directory)["metrics"].items()}
    value = found.get(metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{metric} was not recorded as a number: choose one of {', '.join(found)}")
    return float(value)


def completed(study: Study) -> list[FrozenTrial]:
    """Return the trials that were trained to the end."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]


def best_trial(sweeper: Sweeper, study: Study) -> FrozenTrial:
    """Return the best finished trial, the earliest if several are equal."""
    sign = 1 if sweeper.config.minimizes else -1
    return min(completed(study), key=lambda trial: (sign * (trial.value or 0.0), trial.number))


def _check_failures(study: Study) -> None:
    """Raise a UserError if the first trials have all failed with an error, as the others would."""
    failed = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "FAIL"]
    if len(failed) >= MAX_FAILURES and not completed(study):
        raise UserError(f"{len(failed)} trials failed and none has finished: {_reasons(study)}")


def _reasons(study: Study) -> str:
    """Return how many trials ended early in each way, with the first reason."""
    trials = study.get_trials(deepcopy=False)
    reasons = [(trial.number, trial.user_attrs[REASON]) for trial in trials if REASON in trial.user_attrs]
    if not reasons:
        return "all were pruned"
    return f"{len(reasons)} diverged or failed, the first of them trial {reasons[0][0]}: {reasons[0][1]}"


def arms(best: FrozenTrial) -> tuple[str, str]:
    """Return the names of what is trained with other seeds: the settings of the best trial, and those of the recipe."""
    return f"trial-{best.number:04d}", "recipe"


def seed_directory(out: Path, arm: str, seed: int) -> Path:
    """Return the run directory of a seed."""
    return out / "seeds" / arm / f"seed-{seed}"


def work_seeds(sweeper: Sweeper, best: FrozenTrial, claims: Claims, log: LogLine) -> None:
    """Train the best trial and the recipe with seeds that no trial had, since the best of many trials was also lucky."""
    first = load(sweeper.name, sweeper.fixed).seed + 1
    settings = dict(zip(arms(best), (sweeper.settings(best), []), strict=True))
    jobs = {
        WorkUnit(f"{arm}, seed {seed}", f"seeds-{arm}-{seed}"): (arm, seed)
        for seed in range(first, first + sweeper.config.seeds)
        for arm in settings
    }

    def run_seed(job: WorkUnit, claim: Claim) -> None:
        arm, seed = jobs[job]
        recipe = dataclasses.replace(sweeper.recipe(settings[arm]), seed=seed)
        directory = seed_directory(sweeper.out, arm, seed)
        try:
            run(recipe, directory, log=_silent, reporter=NullReporter(), on_metrics=lambda _: claim.check())
        except DivergedError as error:
            write_record(directory / DIVERGED, {REASON: str(error)})
            log(f"{job.name}: diverged: {error}")
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)

    def ended(job: WorkUnit) -> bool:
        directory = seed_directory(sweeper.out, *jobs[job])
        return bool(read_done(directory)) or (directory / DIVERGED).is_file()

    work(list(jobs), claims, ended, run_seed, log)


def _silent(_: str) -> None:
    """Print nothing."""
