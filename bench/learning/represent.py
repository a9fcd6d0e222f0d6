"""Learning of contrastive, semi-supervised, weakly supervised and VAE objectives and Linformer, against baselines, 3 seeds.

    python -m bench.learning.represent                      # all missing runs; about 20 minutes on two threads
    python -m bench.learning.represent --only few weak      # some of: contrastive few weak vae linformer
    python -m bench.learning.represent --table              # markdown of the existing results for docs/results/index.md
    python -m bench.learning.represent --scale 0.02 --results runs/try     # a trial of everything in a minute or two

Every run is a run directory of `firth train` under runs/learn_represent, so a stopped command can be repeated. Text:
Shakespeare's plays (pairs, Linformer), and the headlines of `firth fetch sarcasm` (sarcastic or serious), of which 3,000 are
held out; the seed selects the labels. Every classifier starts from MiniLM, trains on 2,000 headlines, and is tested on 1,000
of those held out.

    contrastive  held-out pairs: is the neighbor nearer than a random segment? untrained, margin, InfoNCE, SimCSE
    few          accuracy with 50 labels and 1,950 unlabeled texts: labels alone, pseudo-labels of a teacher, consistency
    weak         accuracy from one true label each, one annotator, the majority of five, all five votes; annotators are right
                 in 60% and 80% of the cases
    vae          held-out ELBO: untrained, full KL weight from the start, annealed, and with word dropout and free nats
    linformer    held-out masked LM, against the same encoder with full attention
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firth.align.precompute import PseudoLabeledConfig
from firth.corpora import catalog, readers
from firth.data.collate import Batches
from firth.data.examples import DataConfig, ExamplesConfig
from firth.data.labeled import LabeledConfig
from firth.data.semi_supervised import PartiallyLabeledConfig, SimulatedAnnotatorsConfig
from firth.data.windows import ChunksConfig, SegmentPairsConfig
from firth.model.config import ModelConfig, encoder_config, encoder_decoder_config
from firth.objectives.classification import Classification
from firth.objectives.contrastive import Contrastive, InfoNCE
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.semi_supervised import Consistency, MultiAnnotator, PseudoLabels
from firth.objectives.vae import VAE
from firth.pretrained.load_save import load_model
from firth.runs.examples import spread
from firth.runs.prepare import RunData
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule
from firth.training.step import validate

SEEDS = (0, 1, 2)
NUM_HELD_OUT = 3000
NUM_TESTED = 1000
NOISE = (0.6, 0.8)
LABEL_COUNTS = (50,)
FINETUNE_OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-4, scalar_lr=5e-4, weight_decay=0.01, beta2=0.98)
"""The new head and the norms have five times the learning rate of the rest."""
UNTRAINED_OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-12)


@dataclass(frozen=True)
class Experiment:
    """Directory of the results, and the scale of the runs."""

    results: Path
    scale: float

    def steps(self, full: int) -> Budget:
        return Budget(max_steps=max(2, round(full * self.scale)))

    @property
    def unlabeled_part(self) -> str:
        """Part of the headlines to train on: all that are not held out, or 2,000 of them in a trial."""
        return "train" if self.scale == 1 else "some"

    def headlines(self, part: str) -> str:
        """Return the file of a part of the shuffled headlines: `train`, `valid` or `some` (2,000 of train)."""
        path = self.results / f"{part}.jsonl"
        if not path.exists():
            lines = [json.dumps(record) for _, record in readers.records(catalog.paths("sarcasm", print))]
            random.Random(0).shuffle(lines)
            parts = {
                "valid": lines[:NUM_HELD_OUT],
                "train": lines[NUM_HELD_OUT:],
                "some": lines[NUM_HELD_OUT : NUM_HELD_OUT + 2000],
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(parts[part]) + "\n", "utf-8")
        return str(path)

    def text(self, part: str = "") -> DataConfig:
        part = part or self.unlabeled_part
        return DataConfig(
            path=(self.headlines(part),),
            validation_path=(self.headlines("valid"),),
            cache_dir=str(self.results / "stores"),
        )


def recipe(
    experiment: Experiment, name: str, objective: Objective, examples: ExamplesConfig, source: DataConfig, config: ModelConfig | None,
    *, steps: int,
    rows: int, seed: int, optimizer: OptimizerConfig | None = None, schedule: Schedule | None = None, start: str = "",
    pack: int = 0, vocab: int = 4096, tokenizer: str = "",
) -> Recipe:  # fmt: skip
    return Recipe(
        name=name, objective=objective, examples=examples, data=source, model=config, init_from=start, seed=seed,
        tokenizer=TokenizerConfig(vocab_size=vocab, path=tokenizer), batch=BatchConfig(size=rows, pack_to_length=pack),
        optimizer=optimizer or OptimizerConfig(), schedule=schedule or Schedule("wsd"), budget=experiment.steps(steps),
        evaluation=EvalConfig(max_examples=max(64, round(NUM_HELD_OUT * experiment.scale))),
        checkpoint=CheckpointConfig(every=0),
    )  # fmt: skip


def run_recipe(experiment: Experiment, name: str, seed: int, recipe_: Recipe) -> tuple[Path, dict[str, Any]]:
    """Run a recipe, unless it is complete; return its directory and final metrics."""
    directory = experiment.results / f"{name}-{seed}"
    return directory, run(recipe_, directory).metrics


# ------------------------------------------------------------------------------- representations of pairs


def contrastive(experiment: Experiment, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    source = DataConfig(corpus="shakespeare", cache_dir=str(experiment.results / "stores"))
    base_config = encoder_config(4096, 128, 3, num_heads=2, max_positions=128)
    pairs, pieces = SegmentPairsConfig(max_length=64), ChunksConfig(max_length=34)
    tokenizer = ""
    for name, objective, examples, config, optimizer in (
        ("untrained", Contrastive(), pairs, base_config, UNTRAINED_OPTIMIZER),
        ("margin", Contrastive(), pairs, base_config, OptimizerConfig(lr=1e-3)),
        ("infonce, neighbors", InfoNCE(positives="neighbors"), pairs, base_config, OptimizerConfig(lr=1e-3)),
        ("infonce, dropout", InfoNCE(), pieces, replace(base_config, dropout=0.1), OptimizerConfig(lr=1e-3)),
    ):
        recipe_ = recipe(
            experiment, "contrastive", objective, examples, source, config, steps=2 if name == "untrained" else 300, rows=48,
            seed=seed, optimizer=optimizer, tokenizer=tokenizer,
        )  # fmt: skip
        directory, _ = run_recipe(experiment, f"contrastive-{name.replace(', ', '-')}", seed, recipe_)
        tokenizer = tokenizer or str(directory / "tokenizer")
        yield name, score_pairs(directory, source, pairs)


def score_pairs(directory: Path, source: DataConfig, examples: SegmentPairsConfig) -> dict[str, float]:
    """Return the contrastive metrics of a run on held-out pairs of its text."""
    tokenizer = Tokenizer.load(str(directory / "tokenizer"))
    held_out = examples.build(RunData(source, tokenizer, directory), Contrastive()).validation
    assert held_out is not None
    batches = Batches(spread(held_out, 2000), Contrastive(), tokenizer.vocab, batch_size=64, seed=0)
    return validate(load_model(directory / "model"), Contrastive(), batches.all_batches())


# ------------------------------------------------------------------------------- classifiers


def classifier(
    experiment: Experiment,
    name: str,
    objective: Objective,
    examples: ExamplesConfig,
    seed: int,
    *,
    rows: int,
    steps: int,
) -> tuple[Path, dict[str, float]]:
    """Train MiniLM with a classification head; return its directory and its accuracy on NUM_TESTED held-out headlines."""
    recipe_ = recipe(
        experiment, "classifier", objective, examples, experiment.text("some"), None, steps=steps, rows=rows, seed=seed,
        optimizer=FINETUNE_OPTIMIZER, schedule=Schedule("linear", warmup_ratio=0.1), start=str(catalog.fetch("minilm", print)),
    )  # fmt: skip
    evaluation = replace(recipe_.evaluation, max_examples=max(64, round(NUM_TESTED * experiment.scale)))
    directory, metrics = run_recipe(experiment, name, seed, replace(recipe_, evaluation=evaluation))
    return directory, {"accuracy": metrics["valid/accuracy"]}


def few(experiment: Experiment, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    for count in LABEL_COUNTS:
        partially_labeled = PartiallyLabeledConfig(
            base=LabeledConfig(max_length=48), num_labeled=count, unlabeled_ratio=3.0
        )
        # Almost no unlabeled texts, and none has a loss.
        labels_only = replace(partially_labeled, unlabeled_ratio=0.001)
        teacher, scores = classifier(
            experiment, f"few-alone-{count}", Classification(), labels_only, seed, rows=16, steps=80
        )
        yield f"{count} labels, alone", scores
        runs: list[tuple[str, Objective, ExamplesConfig]] = [
            (
                "pseudo-labels",
                PseudoLabels(confidence=0.8, ramp_steps=30),
                PseudoLabeledConfig(base=partially_labeled.base, num_labeled=count, teacher=str(teacher)),
            ),
            ("consistency", Consistency(ramp_steps=30), partially_labeled),
        ]
        for name, objective, examples in runs:  # 16 of the 64 rows have a label, as many as with labels alone
            _, scores = classifier(experiment, f"few-{name}-{count}", objective, examples, seed, rows=64, steps=80)
            yield f"{count} labels, {name}", scores


def weak(experiment: Experiment, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    labeled = LabeledConfig(max_length=48)
    runs: list[tuple[str, Objective, ExamplesConfig]] = [("true labels, softmax", Classification(), labeled)]
    for accuracy in NOISE:
        five, one = (
            SimulatedAnnotatorsConfig(base=labeled, num_annotators=k, annotator_accuracy=accuracy) for k in (5, 1)
        )
        runs += [
            (f"one annotator of {accuracy:g}, softmax", Classification(), one),
            (f"five of {accuracy:g}, the majority, softmax", Classification(), five),
            (f"five of {accuracy:g}, all votes, one against all", MultiAnnotator(), five),
        ]
    for name, objective, examples in runs:
        slug = "weak-" + name.replace(", ", "-").replace(" ", "_")
        yield name, classifier(experiment, slug, objective, examples, seed, rows=32, steps=60)[1]


# ------------------------------------------------------------------------------- the text VAE, the Linformer


def vae(experiment: Experiment, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    base_config = encoder_decoder_config(4096, 128, 2, num_heads=2, max_positions=64).with_fields(
        {"encoder.latent_size": 32}
    )
    anneal = experiment.steps(250).max_steps or 0
    for name, objective, optimizer in (
        ("untrained", VAE(), UNTRAINED_OPTIMIZER),
        ("full weight from the start", VAE(), None),
        ("annealed", VAE(kl_anneal_steps=anneal), None),
        ("annealed, 40% hidden, 4 nats free", VAE(kl_anneal_steps=anneal, word_dropout=0.4, free_bits=4.0), None),
    ):
        recipe_ = recipe(
            experiment, "vae", objective, ChunksConfig(max_length=32, add_special_tokens=False), experiment.text(), base_config,
            steps=2 if name == "untrained" else 400, rows=64, seed=seed, optimizer=optimizer or OptimizerConfig(scalar_lr=1e-2),
        )  # fmt: skip
        slug = "vae-" + name.replace(", ", "-").replace(" ", "_").replace("%", "")
        _, metrics = run_recipe(experiment, slug, seed, recipe_)
        yield name, {key: metrics[f"valid/{key}"] for key in ("elbo", "kl", "active")}


def linformer(experiment: Experiment, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    source = DataConfig(corpus="shakespeare", cache_dir=str(experiment.results / "stores"))
    base_config = encoder_config(4096, 128, 3, num_heads=2, max_positions=256)
    tokenizer = ""
    for name, config, optimizer in (
        ("untrained", base_config.with_fields({"attention.linformer.k": 64}), UNTRAINED_OPTIMIZER),
        ("linformer, 64 slots", base_config.with_fields({"attention.linformer.k": 64}), None),
        ("full attention", base_config, None),
    ):
        recipe_ = recipe(
            experiment, "linformer", MLM(mlm_probability=0.3), ChunksConfig(max_length=256), source, config,
            steps=2 if name == "untrained" else 400, rows=16, seed=seed, optimizer=optimizer, tokenizer=tokenizer,
        )  # fmt: skip
        directory, metrics = run_recipe(
            experiment, f"linformer-{name.replace(', ', '-').replace(' ', '_')}", seed, recipe_
        )
        tokenizer = tokenizer or str(directory / "tokenizer")
        yield name, {"loss": metrics["valid/loss"]}


STUDIES: dict[str, Callable[[Experiment, int], Iterator[tuple[str, dict[str, float]]]]] = {
    "contrastive": contrastive,
    "few": few,
    "weak": weak,
    "vae": vae,
    "linformer": linformer,
}


def table(results: Path) -> str:
    """Return Markdown tables of means and ranges over the existing seeds."""
    lines = []
    for study in STUDIES:
        files = sorted(results.glob(f"{study}-seed*.json"))
        if not files:
            continue
        runs = [json.loads(file.read_text()) for file in files]
        names = list(next(iter(runs[0].values())))
        lines += [f"**{study}**, {len(files)} seeds", "", f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for row in runs[0]:
            cells = []
            for name in names:
                values = [r[row][name] for r in runs if row in r]
                cells.append(f"{statistics.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})")
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full length of the runs")
    parser.add_argument("--results", type=Path, default=Path("runs/learn_represent"))
    parser.add_argument("--table", action="store_true", help="print the existing results")
    args = parser.parse_args()
    experiment = Experiment(args.results, args.scale)
    for seed in args.seeds if not args.table else ():
        for study in args.only:
            file = args.results / f"{study}-seed{seed}.json"
            if not file.exists():
                scores = dict(STUDIES[study](experiment, seed))
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(scores, indent=1))
    print(table(args.results))


if __name__ == "__main__":
    main()
