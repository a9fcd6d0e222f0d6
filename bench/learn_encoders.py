"""What the encoders' objectives learn: sentence pairs, spans and their ends, replaced tokens, masks old and new. CPU.

    python -m bench.learn_encoders --run --threads 2             # every arm, three seeds; resumable (about 30 minutes)
    python -m bench.learn_encoders --run --limit 4               # in pieces: at most four new runs, then stop
    python -m bench.learn_encoders --table                       # markdown for docs/results/index.md
    python -m bench.learn_encoders --run --only nsp sop --scale 3     # some arms, three times as long

Width 128 and 2,048 subwords; steps, rates and batches are the same for the arms of a question. Pairs are of the Brown
corpus (500 samples of many kinds, for a play's neighbour and a stranger of the same hand are hard to tell), 128 tokens, two
blocks; all else is of Shakespeare's plays, 64 tokens, four blocks. Two arms begin from MiniLM in place of nothing, for what
tells neighbours is more than so small a run learns. Whole documents are held out. Every arm is scored before its first step
and after its last, on the same held-out text:

    nsp, sop              accuracy on held-out pairs; chance is 1/2 (with MLM, from nothing)
    minilm-nsp, minilm-sop    the same, from MiniLM, without MLM (what order can be learnt from: bench.learn_order)
    iid, spans, sbo       hidden spans (SpanBERT's, all of it masked) that are filled in exactly, and single tokens
    rtd, adversarial      how well the discriminator tells replaced tokens (area under the curve: 1/2 is chance), of its own
                          generator and of draws by frequency; how often the generator guesses right; both accuracies
    dynamic, ten, once    loss on held-out text after many epochs of a small one: masks drawn anew, ten times, once

Each run leaves one JSON in runs/learn_encoders; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import describe, machine
from firth.corpora import catalog
from firth.data.collate import Batches, collate
from firth.data.source import Source, SubsetSource
from firth.data.token_store import TokenStore
from firth.data.windows import DocumentChunks, SegmentPairs
from firth.generate.decoding import inference_mode
from firth.model.config import encoder_config
from firth.model.model import LM
from firth.objectives.masked_lm import MLM
from firth.objectives.next_sentence import NSP
from firth.objectives.objective import Objective, supervised
from firth.objectives.replaced_tokens import RTD, AdversarialRTD
from firth.objectives.sentence_order import SOP
from firth.objectives.span_boundary import SBO
from firth.pretrained.load_save import init_from, load_model
from firth.runs.init_head import init_head
from firth.runs.prepare import DataConfig as Where
from firth.runs.prepare import RunData, documents_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train as train_tokenizer
from firth.tokenizer.vocab import Vocab
from firth.train.logging import NullReporter
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule
from firth.train.trainer import TrainerConfig, train
from firth.train.validate import validate
from firth.types import IGNORE

RESULTS = Path("runs/learn_encoders")
VOCAB, WIDTH, DEPTH, LENGTH, ROWS = 2048, 128, 4, 64, 32
PAIR, PAIRS, SHALLOW = 128, 16, 2
"""Tokens of a pair, pairs of a step, and the blocks that read them."""
SEEDS = (0, 1, 2)
HELD = 512
"""Held-out examples that are scored, spread over the held-out plays."""
SMALL = 900
"""Pieces of the small text: 28 steps an epoch."""


@dataclass(frozen=True, eq=False)
class Data:
    """What is learnt from and what is held out, and the frequencies of the tokens."""

    train: TokenStore
    held: TokenStore
    vocab: Vocab
    counts: np.ndarray


Scores = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """One way to train. steps: optimizer steps. pairs: of pairs and not of pieces. small: on the small text alone. rate: of
    AdamW, of those that begin from MiniLM, with its tokenizer; 0 begins from nothing, with Muon."""

    objective: Objective
    scores: Callable[[LM, Objective, Data], Scores]
    steps: int
    pairs: bool = False
    small: bool = False
    rate: float = 0.0

    @property
    def attention_pattern(self) -> tuple[str, str]:
        """The corpus, and the model whose tokenizer reads it."""
        return "brown" if self.pairs else "shakespeare", "minilm" if self.rate else ""


def data(corpus: str, theirs: str) -> Data:
    where, folder = Where(corpus=corpus), RESULTS / f"{corpus}{theirs}"
    if theirs:
        Tokenizer.load(catalog.fetch(theirs, echo=print)).save(folder / "tokenizer")
    elif not (folder / "tokenizer").exists():
        texts = (d.text for d in documents_of(where, where.paths(print), apart=False))
        train_tokenizer(texts, "byte-bpe", VOCAB).save(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    learnt, held = RunData(where, tokenizer, folder).stores()
    assert held is not None
    counts = np.bincount(learnt.tokens[:], minlength=tokenizer.vocab.size) * ~tokenizer.vocab.special
    return Data(learnt, held, tokenizer.vocab, counts / counts.sum())


def some(source: Source, count: int = HELD) -> Source:
    return SubsetSource(source, np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)))


def pieces(store: TokenStore, vocab: Vocab) -> Source:
    return DocumentChunks(store, LENGTH, vocab)


# ------------------------------------------------------------------------------- scores


def held_out(model: LM, objective: Objective, source: Source, vocab: Vocab) -> Scores:
    """The objective's own terms and measures on held-out examples."""
    return validate(model, objective, Batches(source, objective, vocab, batch_size=ROWS, seed=99).all_batches())


def pair_scores(model: LM, objective: Objective, given: Data) -> Scores:
    return held_out(model, objective, some(SegmentPairs(given.held, PAIR, given.vocab), 4 * HELD), given.vocab)


def mask_scores(model: LM, objective: Objective, given: Data) -> Scores:
    """Loss on masks drawn in one way for all arms."""
    return held_out(model, MLM(), some(pieces(given.held, given.vocab)), given.vocab)


def span_scores(model: LM, objective: Objective, given: Data) -> Scores:
    """Spans of held-out text, every token of them masked: filled in exactly, by length; and the objective's own terms."""
    hide, rng = MLM(noise="geometric", mask_fraction=1.0, random_fraction=0.0), np.random.default_rng(7)
    source = some(pieces(given.held, given.vocab), 2 * HELD)
    right: dict[str, list[bool]] = {"span_exact": [], "spans_of_1": [], "spans_of_2_or_3": [], "token_exact": []}
    with inference_mode(model):
        for start in range(0, len(source), ROWS):
            shown = [
                hide.build_example(source[i], given.vocab, rng) for i in range(start, min(start + ROWS, len(source)))
            ]
            batch = collate(shown)
            states, labels = supervised(model(batch), batch["labels"])
            hits = torch.zeros_like(batch["labels"], dtype=torch.bool)
            hits[batch["labels"] != IGNORE] = model.heads["lm"](states).argmax(-1) == labels
            for row, hit in zip(batch["labels"].numpy(), hits.numpy(), strict=True):
                edges = np.flatnonzero(np.diff((row != IGNORE).astype(int), prepend=0, append=0))
                for first, last in zip(edges[::2], edges[1::2], strict=True):
                    right["span_exact"].append(bool(hit[first:last].all()))
                    right["token_exact"].extend(hit[first:last].tolist())
                    if last - first <= 3:
                        name = "spans_of_1" if last - first == 1 else "spans_of_2_or_3"
                        right[name].append(right["span_exact"][-1])
    own = held_out(model, objective, some(pieces(given.held, given.vocab)), given.vocab)
    return {name: float(np.mean(hits)) for name, hits in right.items()} | own


def detector_scores(model: LM, objective: Objective, given: Data) -> Scores:
    source = some(pieces(given.held, given.vocab))
    batches = list(Batches(source, objective, given.vocab, batch_size=ROWS, seed=99).all_batches())
    rng = np.random.default_rng(8)
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    common: list[tuple[torch.Tensor, torch.Tensor]] = []
    with inference_mode(model):
        for batch in batches:
            real, at = batch["real"], batch["labels"] != IGNORE
            drawn = torch.from_numpy(rng.choice(len(given.counts), int(at.sum()), p=given.counts))
            for shown, into in (
                (objective.forward(model, batch)["shown"], own),
                (batch["tokens"].masked_scatter(at, drawn), common),
            ):
                states, wanted = supervised(model(batch | {"tokens": shown}), real)
                into.append((model.heads["replaced"](states)[:, 0].float(), shown[real != IGNORE] != wanted))
    measured = held_out(model, objective, source, given.vocab)
    nats = measured["surprise"] if "surprise" in measured else measured["loss/generator"]
    return measured | {"detects_own": curve(own), "detects_by_frequency": curve(common), "generator_nats": nats}


def curve(scored: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The area under the curve: how often a replaced token scores above an original one, ties counted half."""
    scores, replaced = (torch.cat([pair[i] for pair in scored]).numpy() for i in (0, 1))
    _, place, many = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (many.cumsum() - (many - 1) / 2)[place]
    above, below = int(replaced.sum()), int((~replaced).sum())
    return float((ranks[replaced].sum() - above * (above + 1) / 2) / max(1, above * below))


SPANS = MLM(noise="geometric", whole_span_replacement=True)
ARMS = {
    "nsp": Arm(NSP() + MLM(), pair_scores, 1500, pairs=True),
    "sop": Arm(SOP() + MLM(noise="ngrams"), pair_scores, 1500, pairs=True),
    "minilm-nsp": Arm(NSP(), pair_scores, 200, pairs=True, rate=1e-4),
    "minilm-sop": Arm(SOP(), pair_scores, 400, pairs=True, rate=5e-5),
    "iid": Arm(MLM(), span_scores, 600),
    "spans": Arm(SPANS, span_scores, 600),
    "sbo": Arm(SPANS + SBO(), span_scores, 600),
    "rtd": Arm(RTD(generator_size=0.5), detector_scores, 900),
    "adversarial": Arm(AdversarialRTD(generator_size=0.5), detector_scores, 900),
    "dynamic": Arm(MLM(), mask_scores, 500, small=True),
    "ten": Arm(MLM(num_maskings=10), mask_scores, 500, small=True),
    "once": Arm(MLM(num_maskings=1), mask_scores, 500, small=True),
}


# ------------------------------------------------------------------------------- runs


def one(name: str, seed: int, scale: float, given: Data) -> dict[str, Any]:
    """Train an arm once: its scores before and after."""
    arm = ARMS[name]
    source: Source = SegmentPairs(given.train, PAIR, given.vocab) if arm.pairs else pieces(given.train, given.vocab)
    length, rows, depth = (PAIR, PAIRS, SHALLOW) if arm.pairs else (LENGTH, ROWS, DEPTH)
    if arm.small:
        source = some(source, SMALL)
    config = replace(encoder_config(VOCAB, WIDTH, depth, max_positions=length), type_vocab_size=2 * arm.pairs)
    theirs = catalog.fetch("minilm", echo=print) if arm.rate else None
    torch.manual_seed(seed)
    if theirs is not None:
        config = load_model(theirs).config
    model = LM(config, arm.objective.heads(config))
    batches = Batches(source, arm.objective, given.vocab, batch_size=rows, seed=seed, pack_to_length=length)
    if theirs is None:
        init_head(model, arm.objective, batches)
    else:
        init_from(model, theirs)
    before, started = arm.scores(model, arm.objective, given), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = train(
            model,
            arm.objective,
            batches,
            Path(folder),
            budget=Budget(max_steps=max(2, round(arm.steps * scale))),
            optimizer=OptimizerConfig("adamw", lr=arm.rate) if arm.rate else OptimizerConfig(),
            schedule=Schedule("linear", warmup_ratio=0.1) if arm.rate else Schedule("wsd"),
            config=TrainerConfig(save_every=0),
            reporter=NullReporter(),
        )
    return {
        "arm": name, "seed": seed, "steps": done.step, "seconds": time.perf_counter() - started,
        "epochs": done.step * rows / len(source), "before": before, "after": arm.scores(model, arm.objective, given),
    }  # fmt: skip


def run(names: Sequence[str], seeds: Sequence[int], scale: float, limit: int) -> None:
    known = {reads: data(*reads) for reads in sorted({ARMS[name].reads for name in names})}
    where = describe(machine())
    for seed in seeds:
        for name in names:
            file = RESULTS / "runs" / f"{name}-x{scale:g}-seed{seed}.json"
            if file.exists():
                continue
            if not limit:
                return
            limit -= 1
            told = one(name, seed, scale, known[ARMS[name].reads]) | {"machine": where}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(told, indent=1))
            print(f"{name} seed {seed}: {told['seconds']:.0f} s", flush=True)


SHOWN = {
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
    """Means over seeds, the standard deviation behind them, and what the untrained model has."""
    lines = []
    for title, (names, measures) in SHOWN.items():
        lines += [f"**{title}**", "", "| arm | seeds | epochs | " + " | ".join(measures) + " |"]
        lines.append("|---" * (3 + len(measures)) + "|")
        for name in names:
            runs = [json.loads(f.read_text()) for f in sorted((RESULTS / "runs").glob(f"{name}-x{scale:g}-seed*.json"))]
            if not runs:
                continue
            cells = [cell([r["before"] for r in runs], [r["after"] for r in runs], m) for m in measures]
            lines.append(f"| {name} | {len(runs)} | {runs[0]['epochs']:.1f} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def cell(before: Sequence[Scores], after: Sequence[Scores], measure: str) -> str:
    """`untrained -> trained ± sd`; a dash where the arm has no such measure."""
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
    parser.add_argument("--scale", type=float, default=1.0, help="of every arm's steps")
    parser.add_argument("--limit", type=int, default=1000, help="at most so many new runs")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.run:
        run(given.only, given.seeds, given.scale, given.limit)
    if given.table:
        print(table(given.scale))


if __name__ == "__main__":
    main()
