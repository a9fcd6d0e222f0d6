"""Learning of the encoder objectives: sentence pairs, spans and boundaries, replaced tokens, static and dynamic masks. CPU.

    python -m bench.learning.encoders --run --threads 2             # every arm, three seeds; resumable (about 30 minutes)
    python -m bench.learning.encoders --run --limit 4               # in pieces: at most four new runs, then stop
    python -m bench.learning.encoders --table                       # markdown for docs/results/index.md
    python -m bench.learning.encoders --run --only nsp sop --scale 3     # some arms, three times as long

Hidden size 128 and 2,048 subwords; steps, learning rates and batches are the same for the arms of a comparison. Pairs are of
the Brown corpus (500 samples of many genres; segments of one author are hard to separate), 128 tokens, two blocks; all other
arms use Shakespeare's plays, 64 tokens, four blocks. Two arms start from MiniLM, because so small a run does not learn to
recognize neighbors. Whole documents are held out. Every arm is scored before its first step and after its last, on the same
held-out text:

    nsp, sop              accuracy on held-out pairs; chance is 1/2 (with MLM, from random weights)
    minilm-nsp, minilm-sop    the same from MiniLM, without MLM (see also bench.learning.order)
    iid, spans, sbo       masked spans (SpanBERT's, every token masked) that are filled in exactly, and single tokens
    rtd, adversarial      area under the ROC curve of the discriminator (chance is 1/2), for replacements of its own generator
                          and for replacements drawn by frequency; accuracy of the generator; both accuracies
    dynamic, ten, once    loss on held-out text after many epochs of a small text: new masks each epoch, ten, one

Each run writes one JSON into runs/learn_encoders; existing results are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import describe, machine
from firth.corpora import catalog
from firth.data.collate import Batches, collate
from firth.data.examples import DataConfig
from firth.data.source import Source, SubsetSource
from firth.data.token_store import TokenStore
from firth.data.windows import ChunksConfig, Documents, SegmentPairsConfig
from firth.evaluate import metrics
from firth.generate.decoding_batch import inference_mode
from firth.model.config import encoder_config
from firth.model.model import LM
from firth.objectives.masked_lm import MLM, SBO
from firth.objectives.objective import Objective, supervised
from firth.objectives.replaced_tokens import RTD, AdversarialRTD
from firth.objectives.sentence_pairs import NSP, SOP
from firth.pretrained.load_save import init_from, load_model
from firth.runs.build_model import init_head
from firth.runs.prepare import RunData, documents_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train as train_tokenizer
from firth.tokenizer.vocab import Vocab
from firth.training.logging import NullReporter
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule
from firth.training.step import validate
from firth.training.trainer import TrainerConfig, train
from firth.types import IGNORE

RESULTS = Path("runs/learn_encoders")
VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, LENGTH, ROWS = 2048, 128, 4, 64, 32
PAIR_LENGTH, PAIR_ROWS, PAIR_DEPTH = 128, 16, 2
"""Tokens of a pair, pairs per step, and blocks of the model for pairs."""
SEEDS = (0, 1, 2)
NUM_HELD_OUT = 512
"""Held-out examples to score, spread over the held-out plays."""
SMALL_CHUNKS = 900
"""Chunks of the small text: 28 steps per epoch."""


@dataclass(frozen=True, eq=False)
class Data:
    """Tokenized text.

    Args:
        train: Token store to train on.
        held_out: Held-out token store.
        vocab: Vocabulary.
        counts: Relative frequency of each token in the training text.
    """

    train: TokenStore
    held_out: TokenStore
    vocab: Vocab
    counts: np.ndarray


Scores = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """Training variant.

    Args:
        objective: Objective.
        scores: Scores a model with its objective on held-out text.
        steps: Optimizer steps.
        pairs: Train on pairs instead of chunks.
        small: Train on the small text alone.
        lr: Learning rate of AdamW for arms that start from MiniLM, with its tokenizer; 0 for random weights and Muon.
    """

    objective: Objective
    scores: Callable[[LM, Objective, Data], Scores]
    steps: int
    pairs: bool = False
    small: bool = False
    lr: float = 0.0

    @property
    def data_key(self) -> tuple[str, str]:
        """Corpus, and the model whose tokenizer is used ("" for a tokenizer of the corpus)."""
        return "brown" if self.pairs else "shakespeare", "minilm" if self.lr else ""


def load_data(corpus: str, base_model: str) -> Data:
    config, folder = DataConfig(corpus=corpus), RESULTS / f"{corpus}{base_model}"
    if base_model:
        Tokenizer.load(catalog.fetch(base_model, log=print)).save(folder / "tokenizer")
    elif not (folder / "tokenizer").exists():
        texts = (d.text for d in documents_of(config, config.paths(print), validation=False))
        train_tokenizer(texts, "byte-bpe", VOCAB_SIZE).save(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    train_store, held_out_store = RunData(config, tokenizer, folder).stores()
    assert held_out_store is not None
    counts = np.bincount(train_store.tokens[:], minlength=tokenizer.vocab.size) * ~tokenizer.vocab.special
    return Data(train_store, held_out_store, tokenizer.vocab, counts / counts.sum())


def spread_subset(source: Source, count: int = NUM_HELD_OUT) -> Source:
    return SubsetSource(source, np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)))


def chunks(store: TokenStore, vocab: Vocab) -> Source:
    return Documents(ChunksConfig(max_length=LENGTH), store, vocab)


# ------------------------------------------------------------------------------- scores


def held_out(model: LM, objective: Objective, source: Source, vocab: Vocab) -> Scores:
    """Return the losses and metrics of an objective on held-out examples."""
    return validate(model, objective, Batches(source, objective, vocab, batch_size=ROWS, seed=99).all_batches())


def pair_scores(model: LM, objective: Objective, data: Data) -> Scores:
    return held_out(
        model,
        objective,
        spread_subset(
            Documents(SegmentPairsConfig(max_length=PAIR_LENGTH), data.held_out, data.vocab), 4 * NUM_HELD_OUT
        ),
        data.vocab,
    )


def mask_scores(model: LM, objective: Objective, data: Data) -> Scores:
    """Return the MLM loss on masks of the same kind for all arms."""
    return held_out(model, MLM(), spread_subset(chunks(data.held_out, data.vocab)), data.vocab)


def span_scores(model: LM, objective: Objective, data: Data) -> Scores:
    """Return the share of masked spans filled in exactly, by length, and the metrics of the objective."""
    hide, rng = MLM(noise="geometric", mask_fraction=1.0, random_fraction=0.0), np.random.default_rng(7)
    source = spread_subset(chunks(data.held_out, data.vocab), 2 * NUM_HELD_OUT)
    hits_by_measure: dict[str, list[bool]] = {
        "span_exact": [],
        "spans_of_1": [],
        "spans_of_2_or_3": [],
        "token_exact": [],
    }
    with inference_mode(model):
        for start in range(0, len(source), ROWS):
            examples = [
                hide.build_example(source[i], data.vocab, rng) for i in range(start, min(start + ROWS, len(source)))
            ]
            batch = collate(examples)
            states, labels = supervised(model(batch), batch["labels"])
            hits = torch.zeros_like(batch["labels"], dtype=torch.bool)
            hits[batch["labels"] != IGNORE] = model.heads["lm"](states).argmax(-1) == labels
            for row, hit in zip(batch["labels"].numpy(), hits.numpy(), strict=True):
                edges = np.flatnonzero(np.diff((row != IGNORE).astype(int), prepend=0, append=0))
                for first, last in zip(edges[::2], edges[1::2], strict=True):
                    hits_by_measure["span_exact"].append(bool(hit[first:last].all()))
                    hits_by_measure["token_exact"].extend(hit[first:last].tolist())
                    if last - first <= 3:
                        name = "spans_of_1" if last - first == 1 else "spans_of_2_or_3"
                        hits_by_measure[name].append(hits_by_measure["span_exact"][-1])
    metrics = held_out(model, objective, spread_subset(chunks(data.held_out, data.vocab)), data.vocab)
    return {name: float(np.mean(hits)) for name, hits in hits_by_measure.items()} | metrics


def detector_scores(model: LM, objective: Objective, data: Data) -> Scores:
    source = spread_subset(chunks(data.held_out, data.vocab))
    batches = list(Batches(source, objective, data.vocab, batch_size=ROWS, seed=99).all_batches())
    rng = np.random.default_rng(8)
    own_samples: list[tuple[torch.Tensor, torch.Tensor]] = []
    frequency_samples: list[tuple[torch.Tensor, torch.Tensor]] = []
    with inference_mode(model):
        for batch in batches:
            real, masked = batch["real"], batch["labels"] != IGNORE
            drawn = torch.from_numpy(rng.choice(len(data.counts), int(masked.sum()), p=data.counts))
            for tokens, samples in (
                (objective.forward(model, batch)["shown"], own_samples),
                (batch["tokens"].masked_scatter(masked, drawn), frequency_samples),
            ):
                states, labels = supervised(model(batch | {"tokens": tokens}), real)
                samples.append((model.heads["replaced"](states)[:, 0].float(), tokens[real != IGNORE] != labels))
    found = held_out(model, objective, source, data.vocab)
    nats = found["surprise"] if "surprise" in found else found["loss/generator"]
    return found | {
        "detects_own": roc_auc(own_samples),
        "detects_by_frequency": roc_auc(frequency_samples),
        "generator_nats": nats,
    }


def roc_auc(scored: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the area under the ROC curve of replaced tokens over batches of (scores, whether replaced)."""
    scores, replaced = (torch.cat([pair[i] for pair in scored]).numpy() for i in (0, 1))
    return metrics.roc_auc(replaced, scores)


SPAN_MLM = MLM(noise="geometric", whole_span_replacement=True)
ARMS = {
    "nsp": Arm(NSP() + MLM(), pair_scores, 1500, pairs=True),
    "sop": Arm(SOP() + MLM(noise="ngrams"), pair_scores, 1500, pairs=True),
    "minilm-nsp": Arm(NSP(), pair_scores, 200, pairs=True, lr=1e-4),
    "minilm-sop": Arm(SOP(), pair_scores, 400, pairs=True, lr=5e-5),
    "iid": Arm(MLM(), span_scores, 600),
    "spans": Arm(SPAN_MLM, span_scores, 600),
    "sbo": Arm(SPAN_MLM + SBO(), span_scores, 600),
    "rtd": Arm(RTD(generator_size=0.5), detector_scores, 900),
    "adversarial": Arm(AdversarialRTD(generator_size=0.5), detector_scores, 900),
    "dynamic": Arm(MLM(), mask_scores, 500, small=True),
    "ten": Arm(MLM(num_maskings=10), mask_scores, 500, small=True),
    "once": Arm(MLM(num_maskings=1), mask_scores, 500, small=True),
}


# ------------------------------------------------------------------------------- runs


def train_once(name: str, seed: int, scale: float, data: Data) -> dict[str, Any]:
    """Train an arm; return its scores before and after."""
    arm = ARMS[name]
    source: Source = (
        Documents(SegmentPairsConfig(max_length=PAIR_LENGTH), data.train, data.vocab)
        if arm.pairs
        else chunks(data.train, data.vocab)
    )
    length, rows, depth = (PAIR_LENGTH, PAIR_ROWS, PAIR_DEPTH) if arm.pairs else (LENGTH, ROWS, NUM_LAYERS)
    if arm.small:
        source = spread_subset(source, SMALL_CHUNKS)
    config = encoder_config(VOCAB_SIZE, HIDDEN_SIZE, depth, max_positions=length).with_fields(
        {"embedding.type_vocab_size": 2 * arm.pairs}
    )
    base_model = catalog.fetch("minilm", log=print) if arm.lr else None
    torch.manual_seed(seed)
    if base_model is not None:
        config = load_model(base_model).config
    model = LM(config, arm.objective.heads(config))
    batches = Batches(source, arm.objective, data.vocab, batch_size=rows, seed=seed, pack_to_length=length)
    if base_model is None:
        init_head(model, arm.objective, batches)
    else:
        init_from(model, base_model)
    before, started = arm.scores(model, arm.objective, data), time.perf_counter()
    optimizer = OptimizerConfig("adamw", lr=arm.lr) if arm.lr else OptimizerConfig()
    schedule = Schedule("linear", warmup_ratio=0.1) if arm.lr else Schedule("wsd")
    with tempfile.TemporaryDirectory() as folder:
        done = train(
            model, arm.objective, batches, Path(folder), budget=Budget(max_steps=max(2, round(arm.steps * scale))),
            optimizer=optimizer, schedule=schedule, config=TrainerConfig(save_every=0), reporter=NullReporter(),
        )  # fmt: skip
    return {
        "arm": name, "seed": seed, "steps": done.step, "seconds": time.perf_counter() - started,
        "epochs": done.step * rows / len(source), "before": before, "after": arm.scores(model, arm.objective, data),
    }  # fmt: skip


def run(names: Sequence[str], seeds: Sequence[int], scale: float, limit: int) -> None:
    datasets = {key: load_data(*key) for key in sorted({ARMS[name].data_key for name in names})}
    machine_line = describe(machine())
    for seed in seeds:
        for name in names:
            file = RESULTS / "runs" / f"{name}-x{scale:g}-seed{seed}.json"
            if file.exists():
                continue
            if not limit:
                return
            limit -= 1
            result = train_once(name, seed, scale, datasets[ARMS[name].data_key]) | {"machine": machine_line}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1))
            print(f"{name} seed {seed}: {result['seconds']:.0f} s", flush=True)


TABLES = {
    "Sentence pairs": (("nsp", "sop", "minilm-nsp", "minilm-sop"), ("next_accuracy", "order_accuracy", "loss/tokens")),
    "Spans": (("iid", "spans", "sbo"), ("span_exact", "spans_of_1", "spans_of_2_or_3", "token_exact", "loss/boundary")),
    "Replaced tokens": (
        ("rtd", "adversarial"),
        (
            "detects_own",
            "detects_by_frequency",
            "replaced_accuracy",
            "original_accuracy",
            "original_share",
            "guessed",
            "generator_nats",
        ),
    ),
    "Masks": (("dynamic", "ten", "once"), ("loss",)),
}


def table(scale: float) -> str:
    """Return Markdown tables of means and standard deviations over seeds, with the scores of the untrained model."""
    lines = []
    for title, (names, measures) in TABLES.items():
        lines += [f"**{title}**", "", "| arm | seeds | epochs | " + " | ".join(measures) + " |"]
        lines.append("|---" * (3 + len(measures)) + "|")
        for name in names:
            runs = [json.loads(f.read_text()) for f in sorted((RESULTS / "runs").glob(f"{name}-x{scale:g}-seed*.json"))]
            if not runs:
                continue
            cells = [format_cell([r["before"] for r in runs], [r["after"] for r in runs], m) for m in measures]
            lines.append(f"| {name} | {len(runs)} | {runs[0]['epochs']:.1f} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def format_cell(before: Sequence[Scores], after: Sequence[Scores], measure: str) -> str:
    """Return `untrained -> trained ± sd`, or a dash if the arm has no such metric."""
    if measure not in after[0]:
        return "-"
    values = [scores[measure] for scores in after]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    untrained = [scores[measure] for scores in before if measure in scores]
    start = f"{statistics.mean(untrained):.3f} -> " if untrained else ""
    return f"{start}{statistics.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the steps of every arm")
    parser.add_argument("--limit", type=int, default=1000, help="maximum number of new runs")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run:
        run(args.only, args.seeds, args.scale, args.limit)
    if args.table:
        print(table(args.scale))


if __name__ == "__main__":
    main()
