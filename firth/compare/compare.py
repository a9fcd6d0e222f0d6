"""Compare pretraining recipes on one text with one tokenizer and equal compute.

    firth compare roberta electra gpt t5 --max-flops 4e12 --seeds 3
    firth compare gpt lstm data.path=mine/ --max-seconds 120 --probe none

Every recipe is trained from scratch for each share of the compute and each seed. Each model is then finetuned on the same
labeled records (`Classification`), as is a randomly initialized model of the same config; evaluated on the same hidden
tokens (`firth.evaluate.perplexity`); and, if its objective is causal, scored in bits per byte of held-out text. This is figure 1
of ELECTRA (Clark 2020) on your own text. Each point is a run of its own, not a checkpoint of a longer run: the learning
rate decays over a run, so a checkpoint from its middle is worse than a run with the same compute.

    OUT/runs/NAME/share-0.25/seed-0/      a run directory; its checkpoints are deleted when it has ended
    OUT/scores/NAME/...json               its scores; existing scores are not computed again
    OUT/table.md  results.json  report.html

Incompatible recipes are rejected before anything is trained. The labeled records are drawn for each seed and are the same
for all recipes, so two recipes are compared by their differences per seed (`firth.compare.report`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firth.compare.probe_dataset import MAX_TEST_RECORDS, ProbeDataset, draw_probe
from firth.compare.report import Score, write_comparison
from firth.data.examples import DataConfig
from firth.data.labeled import LabeledConfig
from firth.evaluate import perplexity
from firth.evaluate.perplexity import ClozeItem
from firth.fields import PositiveInt, ShareAboveZero, Validated
from firth.io.atomic import make_directory
from firth.io.integrity import read_record, write_record
from firth.model.model import LM
from firth.objectives.classification import Classification, readout_of
from firth.pretrained.load_save import load_model
from firth.report.charts import number
from firth.runs import config_io, examples
from firth.runs.compatibility import check_pattern
from firth.runs.prepare import RunData
from firth.runs.recipe import CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.runs.recipe import load as load_recipe
from firth.runs.run import run
from firth.runs.tokenizer import check_vocab, sentinels_of, tokenizer_of
from firth.runs.workers import Claim, Claims, WorkUnit, preparing, start_workers, work
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.logging import OnMetrics
from firth.training.schedule import Budget
from firth.types import LOGGER, LogLine, UserError

PROBE = "probe."
"""Prefix of the finetuning settings on the command line."""

RECORD, CLAIMS = "compare.json", "claims"
"""The file of the common settings, and the directory of the claims of processes on the runs."""

NONE = "none"
"""Value of `probe` for no finetuning."""

CLOZE_ITEMS, MAX_CLOZE_TOKENS = 512, 64
"""Most hidden tokens, and most tokens of the text around each."""


@dataclass(frozen=True)
class ComparisonConfig(Validated):
    """Configuration of a comparison.

    Args:
        compute: Budget of each run, in seconds or FLOPs.
        shares: Shares of the compute, each a run of its own.
        seeds: Number of seeds.
        probe: Labeled records, by file or name (`firth.compare.probe_dataset`); "none" for no finetuning.
        labels: Number of labeled records to finetune on.
    """

    compute: Budget
    shares: tuple[ShareAboveZero, ...] = (0.25, 0.5, 1.0)
    seeds: PositiveInt = 3
    probe: str = ""
    labels: PositiveInt = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compute.max_steps:
            raise UserError("steps of two recipes do not cost the same: compare them by --seconds or --flops")
        if not self.shares:
            raise UserError("--shares is empty: give at least one share of the compute, as in 0.25,0.5,1")

    def budget(self, share: float) -> Budget:
        """Return the budget of a run at a share of the compute."""
        return Budget(max_seconds=self.compute.max_seconds * share, max_flops=self.compute.max_flops * share)


def parse_shares(text: str) -> tuple[float, ...]:
    """Parse comma-separated shares of the compute.

    >>> parse_shares("0.25, 1")
    (0.25, 1.0)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--shares is {text!r}: write numbers with commas between them, for example 0.25,0.5,1"
        ) from None


@dataclass(frozen=True)
class ComparisonRun:
    """Comparison with all recipes and data resolved.

    Args:
        config: The configuration.
        out: Output directory.
        tokenizer: The common tokenizer.
        recipes: The pretraining recipes by name.
        cloze_items: The hidden tokens.
        cloze_baseline: Accuracy of always predicting the most frequent token.
        probe_recipe: The finetuning recipe.
        probe_data: The finetuning data; None for no finetuning.
    """

    config: ComparisonConfig
    out: Path
    tokenizer: Tokenizer
    recipes: Mapping[str, Recipe]
    cloze_items: Sequence[ClozeItem]
    cloze_baseline: float
    probe_recipe: Recipe
    probe_data: ProbeDataset | None

    def pretraining(self, name: str, share: float, seed: int) -> Recipe:
        """Return the recipe of a pretraining run."""
        return dataclasses.replace(self.recipes[name], name=name, budget=self.config.budget(share), seed=seed)

    def finetuning(self, name: str, seed: int, start: str = "") -> Recipe:
        """Return the recipe of a finetuning run.

        The head reads the position that suits the attention pattern of the pretraining objective.

        Args:
            name: The pretraining recipe.
            seed: The seed.
            start: The pretraining run; empty for random weights.
        """
        pretraining, probe = self.recipes[name], self.probe_data
        assert pretraining.model is not None and probe is not None
        position = readout_of(pretraining.model, pretraining.objective.attention)
        max_length = min(probe.examples.max_length, pretraining.model.max_positions)
        return dataclasses.replace(
            self.probe_recipe, objective=Classification(class_names=probe.classes, position=position),
            data=probe.data(seed), init_from=start, examples=dataclasses.replace(probe.examples, max_length=max_length),
            model=None if start else pretraining.model.with_fields({"attention.memory_length": 0}),
            tokenizer=pretraining.tokenizer, seed=seed,
        )  # fmt: skip


def compare(
    names: Sequence[str],
    settings: Sequence[str],
    config: ComparisonConfig,
    out: Path,
    log: LogLine = LOGGER.info,
    workers: int = 1,
) -> str:
    """Run a comparison, or what is left of it, together with other processes, and write its table and report.

    Args:
        names: The recipes.
        settings: field=value for every recipe, NAME.field=value for one of them, probe.field=value for the finetuning.
        config: Configuration of the comparison.
        out: Output directory.
        log: Prints a line of progress.
        workers: Processes to start; 1 runs the comparison in this one.

    Returns:
        The table and the conclusions as text.

    Raises:
        UserError: The recipes, settings or data do not fit; nothing has been trained then.
    """
    comparison = _prepare_alone(names, settings, config, out, once(log))
    plan = list(units(comparison))
    total, num_runs = sum(share for _, share, _ in plan), sum(share > 0 for _, share, _ in plan)
    if config.compute.max_seconds:
        cost = f"{total * config.compute.max_seconds / 60:.0f} minutes"
    else:
        cost = f"{number(total * config.compute.max_flops, 3)} FLOPs"
    log(f"{num_runs} runs, each followed by its evaluation: {cost} of pretraining")
    if workers > 1:
        start_workers(workers, _work, (names, settings, config, out))
    else:
        _run_units(comparison, log)
    done = [score for unit in plan if (score := _read_score(comparison, *unit)) is not None]
    by_time = config.compute.max_seconds > 0
    with Claims(out / CLAIMS).exclusive("table"):
        return write_comparison(done, list(comparison.recipes), facts(comparison), out, seconds=by_time)


def _work(names: Sequence[str], settings: Sequence[str], config: ComparisonConfig, out: Path) -> None:
    """Run a part of a comparison in a process of its own."""
    _run_units(_prepare_alone(names, settings, config, out, _silent), LOGGER.info)


def _prepare_alone(
    names: Sequence[str], settings: Sequence[str], config: ComparisonConfig, out: Path, log: LogLine
) -> ComparisonRun:
    """Prepare a comparison while no other process does."""
    with preparing(out / CLAIMS, RECORD, "comparison"):
        return prepare(names, settings, config, out, log)


def _run_units(comparison: ComparisonRun, log: LogLine) -> None:
    """Run what no other process runs, until all is finished. Units with one recipe, which share a score, are one group."""
    jobs = {}
    for name, share, seed in units(comparison):
        what = f"{name}, {share:.0%} of the compute" if share else f"{name} from scratch"
        key = _recipe_of(comparison, name, share, seed).hash()
        jobs[WorkUnit(f"{what}, seed {seed}", key)] = (name, share, seed)

    def run_unit(job: WorkUnit, claim: Claim) -> None:
        train_once(comparison, *jobs[job], claim)

    def finished(job: WorkUnit) -> bool:
        return _read_score(comparison, *jobs[job]) is not None

    work(list(jobs), Claims(comparison.out / CLAIMS), finished, run_unit, log)


def _recipe_of(comparison: ComparisonRun, name: str, share: float, seed: int) -> Recipe:
    """Return the recipe of a unit, whose hash its score holds."""
    return comparison.pretraining(name, share, seed) if share else comparison.finetuning(name, seed)


def _score_file(comparison: ComparisonRun, name: str, share: float, seed: int) -> Path:
    return comparison.out / "scores" / name / f"share-{share:g}-seed-{seed}.json"


def _read_score(comparison: ComparisonRun, name: str, share: float, seed: int) -> Score | None:
    """Return the score on disk; None if there is none yet.

    Raises:
        UserError: It is of other settings.
    """
    file = _score_file(comparison, name, share, seed)
    if not file.exists():
        return None
    needs = {field.name: object for field in fields(Score)}
    record = read_record(file, needs, "delete it to compute this score again")
    found = Score(**{name: record[name] for name in needs})
    if found.key != _recipe_of(comparison, name, share, seed).hash():
        raise UserError(
            f"{file} is a score of {name} with other settings: choose another --out, or delete {comparison.out}"
        )
    return found


def train_once(comparison: ComparisonRun, name: str, share: float, seed: int, claim: Claim | None = None) -> Score:
    """Return the score of one recipe at one share of the compute with one seed; a score on disk is reused.

    Two recipes with one model config have the same score from scratch, which is computed once.

    Args:
        comparison: The comparison.
        name: The recipe.
        share: Share of the compute; 0 for finetuning from scratch.
        seed: The seed.
        claim: The claim of this process on it.
    """
    found = _read_score(comparison, name, share, seed)
    if found is not None:
        return found
    recipe = _recipe_of(comparison, name, share, seed)
    key = recipe.hash()
    if share:
        score = _pretrain(comparison, recipe, Score(name, share, seed, key), claim)
    else:
        others = (_read_score(comparison, other, 0.0, seed) for other in comparison.recipes)
        same = next((score for score in others if score is not None and score.key == key), None)
        score = dataclasses.replace(
            same or Score(name, share, seed, key, accuracy=_finetune(comparison, name, seed, "", claim)), recipe=name
        )
    file = _score_file(comparison, name, share, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_record(file, asdict(score))
    return score


def _pretrain(comparison: ComparisonRun, recipe: Recipe, score: Score, claim: Claim | None) -> Score:
    """Pretrain a model, evaluate and finetune it; return the score with its results filled in."""
    directory = comparison.out / "runs" / score.recipe / f"share-{score.share:g}" / f"seed-{score.seed}"
    ended = run(recipe, directory, log=_silent, on_metrics=_checks(claim))
    shutil.rmtree(
        directory / "checkpoints", ignore_errors=True
    )  # the weights are in model/, optimizer states are larger
    model = load_model(ended.model)
    found = perplexity.cloze_score(model, recipe.objective, comparison.cloze_items, comparison.tokenizer.vocab)
    return dataclasses.replace(
        score, flops=ended.flops, seconds=ended.seconds, steps=ended.steps, tokens=ended.tokens,
        parameters=sum(p.numel() for p in model.parameters()),
        accuracy=_finetune(comparison, score.recipe, score.seed, str(directory), claim) if comparison.probe_data else None,
        cloze_accuracy=found.get("accuracy"), cloze_bits=found.get("bits"),
        bits_per_byte=ended.metrics.get("valid/bits_per_byte"),
    )  # fmt: skip


def _finetune(comparison: ComparisonRun, name: str, seed: int, start: str, claim: Claim | None) -> float:
    """Finetune a model and return its accuracy on the test records; the run is deleted."""
    recipe = comparison.finetuning(name, seed, start)
    directory = comparison.out / "probes" / recipe.hash()
    ended = run(recipe, directory, log=_silent, on_metrics=_checks(claim))
    shutil.rmtree(directory)
    return ended.metrics["valid/accuracy"]


def _checks(claim: Claim | None) -> OnMetrics | None:
    """Return a function for each row of metrics that ends a run whose claim another process has replaced."""
    return None if claim is None else lambda _: claim.check()


def once(log: LogLine) -> LogLine:
    """Return a function that prints each line once, since several recipes open one corpus."""
    printed: set[str] = set()

    def echo_once(text: str) -> None:
        if text not in printed:
            printed.add(text)
            log(text)

    return echo_once


def _silent(_: str) -> None:
    """Print nothing."""


def units(comparison: ComparisonRun) -> Iterator[tuple[str, float, int]]:
    """Yield recipe, share and seed in the order of the runs; share 0 is finetuning from random weights."""
    config = comparison.config
    shares = ([0.0] if comparison.probe_data else []) + sorted(config.shares)
    return ((name, share, seed) for seed in range(config.seeds) for share in shares for name in comparison.recipes)


def facts(comparison: ComparisonRun) -> dict[str, str]:
    """Return the common settings of all runs for the report."""
    data, config = next(iter(comparison.recipes.values())).data, comparison.config
    compute = config.compute
    found = {
        "text": ", ".join(data.path) or data.corpus,
        "tokenizer": f"{comparison.tokenizer.vocab.size:,} ids, the same for all recipes",
        "compute": f"{number(compute.max_flops)} FLOPs"
        if compute.max_flops
        else f"{compute.max_seconds:g} seconds of training",
        "seeds": str(config.seeds),
        "hidden tokens": f"{len(comparison.cloze_items)}, in held-out text; always predicting the most frequent token gives "
        f"{comparison.cloze_baseline:.3f}",
    }
    probe = comparison.probe_data
    if probe:
        found["probe"] = (
            f"{probe.name}, {len(probe.classes)} classes: {config.labels} labeled records drawn for each seed, "
            f"{probe.num_tested} test records, {comparison.probe_recipe.budget.max_steps} steps of finetuning; always "
            f"predicting the majority class gives {probe.majority_share:.3f}"
        )
    return found


def prepare(
    names: Sequence[str], settings: Sequence[str], config: ComparisonConfig, out: Path, log: LogLine
) -> ComparisonRun:
    """Load and check the recipes and make the tokenizer, the token stores and the files of the probe."""
    loaded = _load_recipes(names, [s for s in settings if not s.startswith(PROBE)])
    probe = load_recipe("classification", [s.removeprefix(PROBE) for s in settings if s.startswith(PROBE)])
    probe = dataclasses.replace(
        probe,
        name="probe",
        evaluation=EvalConfig(every=0, max_examples=MAX_TEST_RECORDS),
        checkpoint=CheckpointConfig(every=0, keep=1),
    )
    first, *others = loaded
    tokenizer_config, data = loaded[first].tokenizer, loaded[first].data
    shared = {
        "text": config_io.to_dict(data), "tokenizer": config_io.to_dict(tokenizer_config),
        "finetuning": config_io.to_dict(probe), "probe": config.probe, "number of labels": config.labels,
        "compute": asdict(config.compute),
    }  # fmt: skip
    _check_same_settings(out, shared)
    for name in others:
        if loaded[name].tokenizer != tokenizer_config:
            algorithm, size = tokenizer_config.algorithm, tokenizer_config.vocab_size
            log(f"{name} uses the tokenizer of {first}: {algorithm} of {size:,} ids")
    paths = data.paths(log)
    probe_data = None
    if config.probe != NONE:
        if not isinstance(probe.examples, LabeledConfig):
            raise UserError("the probe reads records with a class: probe.examples must be labeled")
        probe_data = draw_probe(
            config.probe, probe.examples, data, paths, labels=config.labels, seeds=config.seeds, folder=out / "probe",
            log=log,
        )  # fmt: skip
    tokenizer = tokenizer_of(loaded[first], out, log, sentinels=max(map(sentinels_of, loaded.values())))
    data = dataclasses.replace(data, cache_dir=str(out / "data"))
    recipes = {
        name: _with_common_data(name, recipe, data, tokenizer, out, log, probe_data is not None)
        for name, recipe in loaded.items()
    }
    train, validation = RunData(data, tokenizer, out, log=log).stores()
    longest = min(MAX_CLOZE_TOKENS, *(r.model.max_positions - 2 for r in recipes.values() if r.model is not None))
    questions = [] if validation is None else perplexity.cloze_items(validation, tokenizer.vocab, CLOZE_ITEMS, longest)
    baseline = perplexity.most_frequent_baseline(train, questions)
    return ComparisonRun(config, out, tokenizer, recipes, questions, baseline, probe, probe_data)


NOT_FROM_SCRATCH = "starts from another run, but a comparison trains from scratch: use recipes that pretrain"


def _load_recipes(names: Sequence[str], settings: Sequence[str]) -> dict[str, Recipe]:
    """Return the recipes by their names in tables; UserError if they cannot be compared."""
    loaded: dict[str, Recipe] = {}
    labels = {name: Path(name).name.removesuffix(".yaml").removesuffix(".yml").replace(":", "-") for name in names}
    common = [s for s in settings if not s.startswith(tuple(f"{label}." for label in labels.values()))]
    for name in names:
        label = labels[name]
        unchanged = load_recipe(name)
        if unchanged.model is None or unchanged.init_from:
            raise UserError(f"{name} {NOT_FROM_SCRATCH}")
        if label in loaded:
            raise UserError(f"{label} is named twice: compare different recipes")
        own = [s.removeprefix(f"{label}.") for s in settings if s.startswith(f"{label}.")]
        try:
            loaded[label] = load_recipe(name, [*common, *own])
        except UserError as error:
            raise UserError(f"{label}: {error}") from None
        if loaded[label].init_from:
            raise UserError(f"{name} {NOT_FROM_SCRATCH}")
    if not loaded:
        raise UserError("name the recipes to compare, for example: firth compare roberta gpt --max-seconds 60")
    first, *rest = loaded
    for other in rest:
        if loaded[other].data != loaded[first].data:
            raise UserError(
                f"{first} and {other} read different texts: set the same for both with data.path=FILES or data.corpus=NAME"
            )
    return loaded


def _check_same_settings(out: Path, shared: Mapping[str, Any]) -> None:
    """Write the common settings of a comparison, or check them against those of an earlier call.

    Recipes, shares and seeds may be added to a comparison; the common settings may not change once a run has started.
    """
    file, settings = out / RECORD, json.loads(json.dumps(shared))
    before = read_record(file) if file.exists() else settings
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed and any((out / folder).exists() for folder in ("runs", "probes", "scores")):
        raise UserError(
            f"{out} holds a comparison with other settings (another {' and '.join(changed)}): choose another --out, or "
            "delete that one"
        )
    if changed:  # nothing was trained yet, and the tokenizer is of another text
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
    make_directory(out)
    write_record(file, settings)


def _with_common_data(
    name: str, recipe: Recipe, data: DataConfig, tokenizer: Tokenizer, out: Path, log: LogLine, probed: bool
) -> Recipe:
    """Return a recipe with the common text and tokenizer.

    Errors of later steps are raised here with the name of the recipe: datasets and one example are built, and the model is
    built on the meta device.
    """
    assert recipe.model is not None
    config = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab.size)
    try:
        check_vocab(recipe, tokenizer)
        check_pattern(recipe.objective, config)
        if probed:
            check_pattern(
                Classification(class_names=("a", "b"), position=readout_of(config, recipe.objective.attention)),
                config,
            )
        run_data = RunData(data, tokenizer, out, batch_size=recipe.batch.size, log=log)
        example = examples.build_datasets(recipe.examples, run_data, recipe.objective).train[0]
        recipe.objective.build_example(example, tokenizer.vocab, np.random.default_rng(0))
        with torch.device("meta"):
            model = LM(config, recipe.objective.heads(config))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    log(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return dataclasses.replace(
        recipe, model=config, data=data, tokenizer=TokenizerConfig(path=str(out / "tokenizer")), sample_prompts=(),
        evaluation=dataclasses.replace(recipe.evaluation, every=0),
        checkpoint=dataclasses.replace(recipe.checkpoint, keep=1),
    )  # fmt: skip
