"""Do they learn? Contrastive pairs, few labels, noisy labels, the text VAE: three seeds each, beside what they must beat.

    python -m bench.learn_represent                      # all that is not there yet; about 20 minutes on two threads
    python -m bench.learn_represent --only few weak      # some of: contrastive few weak vae linformer
    python -m bench.learn_represent --table              # markdown for docs/results/index.md, of what is there
    python -m bench.learn_represent --scale 0.02 --results runs/try     # a trial of everything in a minute or two

Every run is a recipe in a directory of its own under runs/learn_represent, as `firth train` makes them: stopped at any
moment, the same command goes on. Text: Shakespeare's plays (pairs, Linformer), and the headlines of `firth fetch sarcasm`
(sarcastic or serious), of which 3,000 are held out; labels are drawn by the seed. Every classifier begins from MiniLM,
reads from 2,000 headlines, and is scored on 1,000 of those held out.

    contrastive  held-out pairs: is the neighbour nearer than the stranger? untrained, margin, InfoNCE, SimCSE
    few          accuracy with 50 labels and 1,950 texts without: labels alone, a teacher's pseudo-labels, consistency
    weak         accuracy from one true label each, one annotator, the majority of five, all five votes; annotators are right
                 six times of ten, and eight
    vae          held-out ELBO: untrained, KL at its full weight from the start, annealed, and with word dropout and free nats
    linformer    held-out masked LM, beside the same encoder with full attention
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

from firth.corpora import catalog, readers
from firth.data.collate import Batches
from firth.model.config import ModelConfig, encoder_config, encoder_decoder_config
from firth.objectives.classification import Classification
from firth.objectives.contrastive import Contrastive, InfoNCE
from firth.objectives.masked_lm import MLM
from firth.objectives.multi_annotator import MultiAnnotator
from firth.objectives.objective import Objective
from firth.objectives.semi_supervised import Consistency, PseudoLabels
from firth.objectives.vae import VAE
from firth.pretrained.load_save import load_model
from firth.runs.examples import ChunksConfig, ExamplesConfig, SegmentPairsConfig, spread
from firth.runs.labeled_examples import LabeledConfig
from firth.runs.noisy_label_examples import PartiallyLabeledConfig, PseudoLabeledConfig, SimulatedAnnotatorsConfig
from firth.runs.prepare import DataConfig, RunData
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule
from firth.train.validate import validate

SEEDS = (0, 1, 2)
HELD = 3000
TESTED = 1000
NOISE = (0.6, 0.8)
FEW = (50,)
TUNED = OptimizerConfig(name="adamw", lr=1e-4, scalar_lr=5e-4, weight_decay=0.01, beta2=0.98)
"""A head begins from nearly nothing, so it and the norms move five times as fast as the rest."""
STILL = OptimizerConfig(name="adamw", lr=1e-12)


@dataclass(frozen=True)
class Place:
    """Where results are, and how long runs are against their full length."""

    results: Path
    scale: float

    def steps(self, full: int) -> Budget:
        return Budget(max_steps=max(2, round(full * self.scale)))

    @property
    def many(self) -> str:
        """The headlines that stand beside few labels: all but those held out; 2,000 in a trial."""
        return "train" if self.scale == 1 else "some"

    def headlines(self, part: str) -> str:
        """`train`, `valid` or `some` (2,000 of train) of the headlines, in an order that has nothing of the file's."""
        path = self.results / f"{part}.jsonl"
        if not path.exists():
            lines = [json.dumps(record) for _, record in readers.records(catalog.paths("sarcasm", print))]
            random.Random(0).shuffle(lines)
            parts = {"valid": lines[:HELD], "train": lines[HELD:], "some": lines[HELD : HELD + 2000]}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(parts[part]) + "\n", "utf-8")
        return str(path)

    def text(self, part: str = "") -> DataConfig:
        part = part or self.many
        return DataConfig(
            path=(self.headlines(part),),
            validation_path=(self.headlines("valid"),),
            cache_dir=str(self.results / "stores"),
        )


def recipe(
    place: Place, name: str, objective: Objective, examples: ExamplesConfig, source: DataConfig, config: ModelConfig | None, *, steps: int,
    rows: int, seed: int, optimizer: OptimizerConfig | None = None, schedule: Schedule | None = None, start: str = "",
    pack: int = 0, vocab: int = 4096, tokenizer: str = "",
) -> Recipe:  # fmt: skip
    return Recipe(
        name=name, objective=objective, examples=examples, data=source, model=config, init_from=start, seed=seed,
        tokenizer=TokenizerConfig(vocab_size=vocab, path=tokenizer), batch=BatchConfig(size=rows, pack_to_length=pack),
        optimizer=optimizer or OptimizerConfig(), schedule=schedule or Schedule("wsd"), budget=place.steps(steps),
        evaluation=EvalConfig(max_examples=max(64, round(HELD * place.scale))),
        checkpoint=CheckpointConfig(every=0),
    )  # fmt: skip


def done(place: Place, name: str, seed: int, made: Recipe) -> tuple[Path, dict[str, Any]]:
    """Run it, or find it done; its directory and its last metrics."""
    directory = place.results / f"{name}-{seed}"
    return directory, run(made, directory).metrics


# ------------------------------------------------------------------------------- representations of pairs


def contrastive(place: Place, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    source = DataConfig(corpus="shakespeare", cache_dir=str(place.results / "stores"))
    body = encoder_config(4096, 128, 3, num_heads=2, max_positions=128)
    pairs, pieces = SegmentPairsConfig(max_length=64), ChunksConfig(max_length=34)
    tokenizer = ""
    for name, objective, examples, config, optimizer in (
        ("untrained", Contrastive(), pairs, body, STILL),
        ("margin", Contrastive(), pairs, body, OptimizerConfig(lr=1e-3)),
        ("infonce, neighbors", InfoNCE(positives="neighbors"), pairs, body, OptimizerConfig(lr=1e-3)),
        ("infonce, dropout", InfoNCE(), pieces, replace(body, dropout=0.1), OptimizerConfig(lr=1e-3)),
    ):
        made = recipe(
            place, "contrastive", objective, examples, source, config, steps=2 if name == "untrained" else 300, rows=48,
            seed=seed, optimizer=optimizer, tokenizer=tokenizer,
        )  # fmt: skip
        directory, _ = done(place, f"contrastive-{name.replace(', ', '-')}", seed, made)
        tokenizer = tokenizer or str(directory / "tokenizer")
        yield name, nearer(directory, source, pairs)


def nearer(directory: Path, source: DataConfig, examples: SegmentPairsConfig) -> dict[str, float]:
    """Held-out pairs of a run's text, whatever it was trained on: shares and mean squared distance."""
    tokenizer = Tokenizer.load(str(directory / "tokenizer"))
    held = examples.build(RunData(source, tokenizer, directory), Contrastive()).validation
    assert held is not None
    batches = Batches(spread(held, 2000), Contrastive(), tokenizer.vocab, batch_size=64, seed=0)
    return validate(load_model(directory / "model"), Contrastive(), batches.all_batches())


# ------------------------------------------------------------------------------- classifiers


def classifier(
    place: Place, name: str, objective: Objective, examples: ExamplesConfig, seed: int, *, rows: int, steps: int
) -> tuple[Path, dict[str, float]]:
    """MiniLM with a head for the classes: its directory, and its accuracy on TESTED headlines held out."""
    made = recipe(
        place, "classifier", objective, examples, place.text("some"), None, steps=steps, rows=rows, seed=seed,
        optimizer=TUNED, schedule=Schedule("linear", warmup_ratio=0.1), start=str(catalog.fetch("minilm", print)),
    )  # fmt: skip
    tested = replace(made.evaluation, max_examples=max(64, round(TESTED * place.scale)))
    directory, metrics = done(place, name, seed, replace(made, evaluation=tested))
    return directory, {"accuracy": metrics["valid/accuracy"]}


def few(place: Place, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    for count in FEW:
        partly = PartiallyLabeledConfig(base=LabeledConfig(max_length=48), num_labeled=count, unlabeled_ratio=3.0)
        alone = replace(partly, unlabeled_ratio=0.001)  # next to nothing else is read, and nothing is asked of it
        teacher, found = classifier(place, f"few-alone-{count}", Classification(), alone, seed, rows=16, steps=80)
        yield f"{count} labels, alone", found
        runs: list[tuple[str, Objective, ExamplesConfig]] = [
            (
                "pseudo-labels",
                PseudoLabels(confidence=0.8, ramp_steps=30),
                PseudoLabeledConfig(base=partly.base, num_labeled=count, teacher=str(teacher)),
            ),
            ("consistency", Consistency(ramp_steps=30), partly),
        ]
        for name, objective, examples in runs:  # sixteen of the 64 have a label, as many as those alone
            _, found = classifier(place, f"few-{name}-{count}", objective, examples, seed, rows=64, steps=80)
            yield f"{count} labels, {name}", found


def weak(place: Place, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    labelled = LabeledConfig(max_length=48)
    runs: list[tuple[str, Objective, ExamplesConfig]] = [("true labels, softmax", Classification(), labelled)]
    for accuracy in NOISE:
        five, one = (
            SimulatedAnnotatorsConfig(base=labelled, num_annotators=k, annotator_accuracy=accuracy) for k in (5, 1)
        )
        runs += [
            (f"one annotator of {accuracy:g}, softmax", Classification(), one),
            (f"five of {accuracy:g}, the majority, softmax", Classification(), five),
            (f"five of {accuracy:g}, all votes, one against all", MultiAnnotator(), five),
        ]
    for name, objective, examples in runs:
        slug = "weak-" + name.replace(", ", "-").replace(" ", "_")
        yield name, classifier(place, slug, objective, examples, seed, rows=32, steps=60)[1]


# ------------------------------------------------------------------------------- the text VAE, the Linformer


def vae(place: Place, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    body = replace(encoder_decoder_config(4096, 128, 2, num_heads=2, max_positions=64), latent_size=32)
    anneal = place.steps(250).max_steps or 0
    for name, objective, optimizer in (
        ("untrained", VAE(), STILL),
        ("full weight from the start", VAE(), None),
        ("annealed", VAE(kl_anneal_steps=anneal), None),
        ("annealed, 40% hidden, 4 nats free", VAE(kl_anneal_steps=anneal, word_dropout=0.4, free_bits=4.0), None),
    ):
        made = recipe(
            place, "vae", objective, ChunksConfig(max_length=32, add_special_tokens=False), place.text(), body,
            steps=2 if name == "untrained" else 400, rows=64, seed=seed, optimizer=optimizer or OptimizerConfig(scalar_lr=1e-2),
        )  # fmt: skip
        slug = "vae-" + name.replace(", ", "-").replace(" ", "_").replace("%", "")
        _, m = done(place, slug, seed, made)
        yield name, {key: m[f"valid/{key}"] for key in ("elbo", "kl", "active")}


def linformer(place: Place, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    source = DataConfig(corpus="shakespeare", cache_dir=str(place.results / "stores"))
    body = encoder_config(4096, 128, 3, num_heads=2, max_positions=256)
    tokenizer = ""
    for name, config, optimizer in (
        ("untrained", replace(body, linformer_k=64), STILL),
        ("linformer, 64 slots", replace(body, linformer_k=64), None),
        ("full attention", body, None),
    ):
        made = recipe(
            place,
            "linformer",
            MLM(mlm_probability=0.3),
            ChunksConfig(max_length=256),
            source,
            config,
            steps=2 if name == "untrained" else 400,
            rows=16,
            seed=seed,
            optimizer=optimizer,
            tokenizer=tokenizer,
        )
        directory, m = done(place, f"linformer-{name.replace(', ', '-').replace(' ', '_')}", seed, made)
        tokenizer = tokenizer or str(directory / "tokenizer")
        yield name, {"loss": m["valid/loss"]}


STUDIES: dict[str, Callable[[Place, int], Iterator[tuple[str, dict[str, float]]]]] = {
    "contrastive": contrastive,
    "few": few,
    "weak": weak,
    "vae": vae,
    "linformer_k": linformer,
}


def table(results: Path) -> str:
    """Mean and range over the seeds that are there."""
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
    parser.add_argument("--scale", type=float, default=1.0, help="runs of this share of their full length")
    parser.add_argument("--results", type=Path, default=Path("runs/learn_represent"))
    parser.add_argument("--table", action="store_true", help="print what is there")
    given = parser.parse_args()
    place = Place(given.results, given.scale)
    for seed in given.seeds if not given.table else ():
        for study in given.only:
            file = given.results / f"{study}-seed{seed}.json"
            if not file.exists():
                found = dict(STUDIES[study](place, seed))
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(found, indent=1))
    print(table(given.results))


if __name__ == "__main__":
    main()
