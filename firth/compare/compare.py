"""The arena: recipes that learn from one text, with one tokenizer and equal compute, and are then asked the same.

    firth compare roberta electra gpt t5 --max-flops 4e12 --seeds 3
    firth compare gpt lstm data.path=mine/ --max-seconds 120 --probe none

Every recipe is trained from nothing for each share of the compute and each seed. Each is then finetuned on the same labels
(`Classification`, read where the shape has it read), beside the same shape from random numbers; asked for the same hidden
tokens (`firth.evaluate.cloze`); and, where its objective asks every token from the left, scored in bits per byte of held-out
text. This is figure 1 of ELECTRA (Clark 2020) on one's own text. Each point is a run of its own and no checkpoint of a
longer one: the rate falls towards the end of a run, and what it had in the middle looks poorer than the same compute can do.

    OUT/runs/NAME/share-0.25/seed-0/      a run directory; its checkpoints go when it has ended
    OUT/scores/NAME/...json               what came of it; what is there is not done again
    OUT/table.md  results.json  report.html

What would not fit is refused before anything is trained. Labels drawn anew for each seed are the same for all recipes,
so differences between two recipes are taken seed by seed (`firth.compare.statistics`).
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

from firth.compare.probe_dataset import MOST, ProbeDataset, draw_probe
from firth.compare.report import write_comparison
from firth.compare.statistics import Score
from firth.evaluate import cloze
from firth.evaluate.cloze import ClozeItem
from firth.io.atomic import make_directory
from firth.io.integrity import read_record, write_record
from firth.model.model import LM
from firth.objectives.classification import Classification, readout_of
from firth.pretrained.load_save import load_model
from firth.report.charts import number
from firth.runs import config_io, examples
from firth.runs import recipe as recipes
from firth.runs.compatibility import check_pattern
from firth.runs.labeled_examples import LabeledConfig
from firth.runs.prepare import DataConfig, RunData
from firth.runs.recipe import CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.runs.run import run
from firth.runs.tokenizer import check_vocab, sentinels_of, tokenizer_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.train.schedule import Budget
from firth.types import LogLine, UserError
from firth.validated import PositiveInt, Ranged, ShareAboveZero

PROBE = "probe."
"""How the settings of the finetuning begin on the command line."""

NONE = "none"
"""The probe that is none."""

HIDDEN, LONGEST = 512, 64
"""Hidden tokens that are asked, and the tokens of the text that each stands in, at most."""


@dataclass(frozen=True)
class ComparisonConfig(Ranged):
    """On what terms the recipes meet.

    compute: what each run gets, seconds or FLOPs. shares: of it, each a run of its own. seeds: how many.
    probe: records with a class, by file or name (`firth.compare.probe_dataset`); "none" for no finetuning. labels: to learn from.
    """

    compute: Budget
    shares: tuple[ShareAboveZero, ...] = (0.25, 0.5, 1.0)
    seeds: PositiveInt = 3
    probe: str = ""
    labels: PositiveInt = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compute.max_steps:
            raise UserError("steps of two recipes are not equally dear: compare them by --seconds or --flops")
        if not self.shares:
            raise UserError("--shares is empty: give at least one share of the compute, as in 0.25,0.5,1")

    def length(self, share: float) -> Budget:
        """A share of the compute."""
        return Budget(max_seconds=self.compute.max_seconds * share, max_flops=self.compute.max_flops * share)


def parse_shares(text: str) -> tuple[float, ...]:
    """
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
    """Everything settled: what each contender runs, the hidden tokens that they are asked (`floor`: what the commonest token
    gets), and by what they are finetuned (`drawn` None: by nothing)."""

    terms: ComparisonConfig
    out: Path
    tokenizer: Tokenizer
    contenders: Mapping[str, Recipe]
    hidden: Sequence[ClozeItem]
    floor: float
    probe: Recipe
    drawn: ProbeDataset | None

    def pretraining(self, name: str, share: float, seed: int) -> Recipe:
        """A contender's run."""
        return dataclasses.replace(self.contenders[name], name=name, budget=self.terms.length(share), seed=seed)

    def finetuning(self, name: str, seed: int, start: str = "") -> Recipe:
        """Its finetuning from a run, or from random weights; the answer is read where its objective has it read."""
        contender = self.contenders[name]
        assert contender.model is not None and self.drawn is not None
        at = readout_of(contender.model, contender.objective.attention_pattern())
        return dataclasses.replace(
            self.probe, objective=Classification(class_names=self.drawn.classes, position=at), data=self.drawn.source(seed), init_from=start,
            examples=dataclasses.replace(self.drawn.cut, max_length=min(self.drawn.cut.max_length, contender.model.max_positions)),
            model=None if start else dataclasses.replace(contender.model, memory_length=0),
            tokenizer=contender.tokenizer, seed=seed,
        )  # fmt: skip


def compare(
    names: Sequence[str], settings: Sequence[str], terms: ComparisonConfig, out: Path, echo: LogLine = print
) -> str:
    """Do all that is left to do in `out`, write what came of it there, and return it for reading.

    settings: field=value for every recipe, NAME.field=value for one of them, probe.field=value for the finetuning.
    Raises UserError for what does not fit, before anything is trained.
    """
    arena = prepare(names, settings, terms, out, once(echo))
    plan = list(units(arena))
    echo(
        f"{sum(share > 0 for _, share, _ in plan)} runs, each then asked and finetuned"
        + (
            f": {sum(share for _, share, _ in plan) * terms.compute.max_seconds / 60:.0f} minutes of pretraining"
            if terms.compute.max_seconds
            else f": {number(sum(share for _, share, _ in plan) * terms.compute.max_flops, 3)} FLOPs of pretraining"
        )
    )
    done: list[Score] = []
    for i, (name, share, seed) in enumerate(plan):
        what = f"{name}, {share:.0%} of the compute" if share else f"{name} from scratch"
        echo(f"[{i + 1}/{len(plan)}] {what}, seed {seed}")
        done.append(train_once(arena, name, share, seed, done))
    return write_comparison(done, list(arena.contenders), facts(arena), out, seconds=terms.compute.max_seconds > 0)


def train_once(arena: ComparisonRun, name: str, share: float, seed: int, done: Sequence[Score]) -> Score:
    """The score of one contender at one share of the compute with one seed; what lies on disk is not done again.

    Two contenders of one shape are the same from scratch: what `done` holds of the one serves the other.
    """
    file = arena.out / "scores" / name / f"share-{share:g}-seed-{seed}.json"
    recipe = arena.pretraining(name, share, seed) if share else arena.finetuning(name, seed)
    key = recipe.hash()
    if file.exists():
        cure = "delete it, and this score is measured again"
        needs = {field.name: object for field in fields(Score)}
        kept = read_record(file, needs, cure)
        found = Score(**{name: kept[name] for name in needs})
        if found.key != key:
            raise UserError(
                f"{file} is a score of {name} with other settings: choose another --out, or delete {arena.out}"
            )
        return found
    twin = [s for s in done if (s.key, s.seed, s.share) == (key, seed, 0.0)]
    if twin:
        score = dataclasses.replace(twin[0], recipe=name)
    elif share:
        score = _pretrained(arena, recipe, Score(name, share, seed, key))
    else:
        score = Score(name, share, seed, key, accuracy=_finetuned(arena, name, seed, ""))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_record(file, asdict(score))
    return score


def _pretrained(arena: ComparisonRun, recipe: Recipe, blank: Score) -> Score:
    """Train, ask, finetune."""
    directory = arena.out / "runs" / blank.recipe / f"share-{blank.share:g}" / f"seed-{blank.seed}"
    ended = run(recipe, directory, log=_silent)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)  # the weights are in model/, the moments weigh more
    model = load_model(ended.model)
    answered = cloze.score(model, recipe.objective, arena.hidden, arena.tokenizer.vocab)
    return dataclasses.replace(
        blank, flops=ended.flops, seconds=ended.seconds, steps=ended.steps, tokens=ended.tokens,
        parameters=sum(p.numel() for p in model.parameters()),
        accuracy=_finetuned(arena, blank.recipe, blank.seed, str(directory)) if arena.drawn else None,
        hidden=answered.get("accuracy"), hidden_bits=answered.get("bits"),
        bits_per_byte=ended.metrics.get("valid/bits_per_byte"),
    )  # fmt: skip


def _finetuned(arena: ComparisonRun, name: str, seed: int, start: str) -> float:
    """Accuracy on the records that are tested on; the run itself is not kept."""
    recipe = arena.finetuning(name, seed, start)
    directory = arena.out / "probes" / recipe.hash()
    ended = run(recipe, directory, log=_silent)
    shutil.rmtree(directory)
    return ended.metrics["valid/accuracy"]


def once(echo: LogLine) -> LogLine:
    """Says a thing once: several recipes open one corpus."""
    said: set[str] = set()

    def tell(text: str) -> None:
        if text not in said:
            said.add(text)
            echo(text)

    return tell


def _silent(_: str) -> None:
    """What a run says beside its progress."""


def units(arena: ComparisonRun) -> Iterator[tuple[str, float, int]]:
    """(contender, share, seed) in the order they are done; share 0 is the probe from random weights."""
    shares = ([0.0] if arena.drawn else []) + sorted(arena.terms.shares)
    return ((name, share, seed) for seed in range(arena.terms.seeds) for share in shares for name in arena.contenders)


def facts(arena: ComparisonRun) -> dict[str, str]:
    """What they had in common, for the report."""
    source, compute = next(iter(arena.contenders.values())).data, arena.terms.compute
    told = {
        "text": ", ".join(source.path) or source.corpus,
        "tokenizer": f"{arena.tokenizer.vocab.size:,} ids, trained once for all",
        "compute": f"{number(compute.max_flops)} FLOPs"
        if compute.max_flops
        else f"{compute.max_seconds:g} seconds of training",
        "seeds": str(arena.terms.seeds),
        "hidden tokens": f"{len(arena.hidden)}, in held-out text; the commonest token alone gets {arena.floor:.3f}",
    }
    if arena.drawn:
        told["probe"] = (
            f"{arena.drawn.name}, {len(arena.drawn.classes)} classes: {arena.terms.labels} labels drawn for each seed, "
            f"{arena.drawn.tested} records tested, {arena.probe.budget.max_steps} steps of finetuning; the commonest class alone "
            f"gets {arena.drawn.commonest:.3f}"
        )
    return told


def prepare(
    names: Sequence[str], settings: Sequence[str], terms: ComparisonConfig, out: Path, echo: LogLine
) -> ComparisonRun:
    """Read the recipes, refuse what does not fit, make the tokenizer, the token stores and the probe's files."""
    loaded = _loaded(names, [s for s in settings if not s.startswith(PROBE)])
    probe = recipes.load("classification", [s.removeprefix(PROBE) for s in settings if s.startswith(PROBE)])
    probe = dataclasses.replace(
        probe,
        name="probe",
        evaluation=EvalConfig(every=0, max_examples=MOST),
        checkpoint=CheckpointConfig(every=0, keep=1),
    )
    first, *others = loaded
    plan, source = loaded[first].tokenizer, loaded[first].data
    shared = {
        "text": config_io.to_dict(source), "tokenizer": config_io.to_dict(plan), "finetuning": config_io.to_dict(probe),
        "probe": terms.probe, "number of labels": terms.labels, "compute": asdict(terms.compute),
    }  # fmt: skip
    _same_terms(out, shared)
    for name in others:
        if loaded[name].tokenizer != plan:
            echo(f"{name} takes the tokenizer of {first}: {plan.algorithm} of {plan.vocab_size:,} ids")
    paths = source.paths(echo)
    drawn = None
    if terms.probe != NONE:
        if not isinstance(probe.examples, LabeledConfig):
            raise UserError("the probe reads records with a class: probe.segment must be labelled")
        drawn = draw_probe(
            terms.probe, probe.examples, source, paths, labels=terms.labels, seeds=terms.seeds, folder=out / "probe",
            echo=echo,
        )  # fmt: skip
    tokenizer = tokenizer_of(loaded[first], out, echo, sentinels=max(map(sentinels_of, loaded.values())))
    source = dataclasses.replace(source, cache_dir=str(out / "data"))
    contenders = {
        name: _fitted(name, recipe, source, tokenizer, out, echo, drawn is not None) for name, recipe in loaded.items()
    }
    learnt, held = RunData(source, tokenizer, out, log=echo).stores()
    longest = min(LONGEST, *(c.model.max_positions - 2 for c in contenders.values() if c.model is not None))
    hidden = [] if held is None else cloze.items(held, tokenizer.vocab, HIDDEN, longest)
    return ComparisonRun(
        terms, out, tokenizer, contenders, hidden, cloze.most_frequent_baseline(learnt, hidden), probe, drawn
    )


GOES_ON = "goes on from another run, and what is compared begins from nothing: take recipes that pretrain"


def _loaded(names: Sequence[str], settings: Sequence[str]) -> dict[str, Recipe]:
    """The recipes by the names they have in tables; refused where they cannot stand side by side."""
    loaded: dict[str, Recipe] = {}
    labels = {name: Path(name).name.removesuffix(".yaml").removesuffix(".yml").replace(":", "-") for name in names}
    common = [s for s in settings if not s.startswith(tuple(f"{label}." for label in labels.values()))]
    for name in names:
        label = labels[name]
        bare = recipes.load(name)
        if bare.model is None or bare.init_from:
            raise UserError(f"{name} {GOES_ON}")
        if label in loaded:
            raise UserError(f"{label} is named twice: compare different recipes")
        own = [s.removeprefix(f"{label}.") for s in settings if s.startswith(f"{label}.")]
        try:
            loaded[label] = recipes.load(name, [*common, *own])
        except UserError as error:
            raise UserError(f"{label}: {error}") from None
        if loaded[label].init_from:
            raise UserError(f"{name} {GOES_ON}")
    if not loaded:
        raise UserError("name the recipes to compare, for example: firth compare roberta gpt --max-seconds 60")
    first, *rest = loaded
    for other in rest:
        if loaded[other].data != loaded[first].data:
            raise UserError(
                f"{first} and {other} read different texts: give both one with data.path=FILES or data.corpus=NAME"
            )
    return loaded


def _same_terms(out: Path, shared: Mapping[str, Any]) -> None:
    """More recipes, shares and seeds may join a comparison; what they have in common may not change once one has run."""
    file, told = out / "compare.json", json.loads(json.dumps(shared))
    if not file.exists() and out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is there already and holds no comparison: choose another --out")
    before = read_record(file) if file.exists() else told
    changed = [name for name in told if before.get(name) != told[name]]
    if changed and any((out / room).exists() for room in ("runs", "probes", "scores")):
        raise UserError(
            f"{out} holds a comparison on other terms (another {' and '.join(changed)}): choose another --out, or "
            "delete that one"
        )
    if changed:  # it was refused before anything ran: what was made of another text goes
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
    make_directory(out)
    write_record(file, told)


def _fitted(
    name: str, recipe: Recipe, source: DataConfig, tokenizer: Tokenizer, out: Path, echo: LogLine, probed: bool
) -> Recipe:
    """The recipe on the common text with the common tokenizer. What would fail later fails here, under its name: the text
    is cut, one example is shown, and the model is built without memory."""
    assert recipe.model is not None
    config = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab.size)
    try:
        check_vocab(recipe, tokenizer)
        check_pattern(recipe.objective, config)
        if probed:
            check_pattern(
                Classification(
                    class_names=("a", "b"), position=readout_of(config, recipe.objective.attention_pattern())
                ),
                config,
            )
        data = RunData(source, tokenizer, out, batch_size=recipe.batch.size, log=echo)
        shown = examples.build_datasets(recipe.examples, data, recipe.objective).train[0]
        recipe.objective.build_example(shown, tokenizer.vocab, np.random.default_rng(0))
        with torch.device("meta"):
            model = LM(config, recipe.objective.heads(config))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    echo(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return dataclasses.replace(
        recipe, model=config, data=source, tokenizer=TokenizerConfig(path=str(out / "tokenizer")), sample_prompts=(),
        evaluation=dataclasses.replace(recipe.evaluation, every=0),
        checkpoint=dataclasses.replace(recipe.checkpoint, keep=1),
    )  # fmt: skip
