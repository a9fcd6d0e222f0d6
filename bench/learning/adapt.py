"""Accuracy and speed of six ways to adapt MiniLM on two labeled data sets, against peft and transformers.

    python -m bench.learning.adapt                          # all missing runs; about 30 minutes on one thread
    python -m bench.learning.adapt --only lora prefix       # some of: full lora prefix prompt head frozen
    python -m bench.learning.adapt --sets sarcasm           # some of the data sets: sarcasm, sentiment
    python -m bench.learning.adapt --table                  # markdown of the existing results for docs/results/index.md
    python -m bench.learning.adapt --scale 0.03 --results runs/try     # a trial of everything in a minute or two

Every run of firth is a run directory of `firth train classification` under runs/learn_adapt, and every run of the peer a
file, so a stopped command can be repeated. Both sides start from the same weights, train on the same 1,920 records (selected
and ordered by the seed) for the same steps of 32 with AdamW at the same learning rate and schedule, classify with one linear
layer on [CLS], and are tested on the same 600 held-out records. firth runs in the precision that it chooses on this machine,
the peer once in fp32 and once in bf16 autocast; its accuracy in the table is that of the faster. firth packs its texts into
rows (except with prompts, which each text needs for itself); the peer pads each batch to its longest text, as the library's
collator does. Seconds are of the training steps alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from firth.corpora import catalog, readers
from firth.data.examples import DataConfig
from firth.data.labeled import LabeledConfig
from firth.model.variants import ScalarMix
from firth.objectives.classification import Classification
from firth.runs.peft_options import (
    FrozenFeatures,
    FullFinetuning,
    HeadOnly,
    LoRA,
    PeftConfig,
    PrefixTuning,
    PromptTuning,
)
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe
from firth.runs.run import run
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule

SETS = ("sarcasm", "sentiment")
SEEDS = (0, 1, 2)
NUM_TRAIN, NUM_HELD_OUT, STEPS, ROWS, MAX_LENGTH = 1920, 600, 60, 32, 48


@dataclass(frozen=True)
class Method:
    """Method of adaptation.

    Args:
        peft: Config of firth.
        lr: Learning rate of both sides.
        peer: Maps the module peft to its config; None for plain transformers.
        pack_to_length: Tokens of firth's packed rows; 0 for padding.
    """

    peft: PeftConfig
    lr: float
    peer: Callable[[Any], Any] | None = None
    pack_to_length: int = 64


def lora(peft: Any) -> Any:
    return peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")


def prefix(peft: Any) -> Any:
    return peft.PrefixTuningConfig(num_virtual_tokens=16, task_type="FEATURE_EXTRACTION")


def prompt(peft: Any) -> Any:
    return peft.PromptTuningConfig(
        num_virtual_tokens=16, task_type="FEATURE_EXTRACTION", prompt_tuning_init="SAMPLE_VOCAB"
    )


METHODS: dict[str, Method] = {
    "full": Method(FullFinetuning(), 1e-4),
    "lora": Method(LoRA(rank=8, alpha=16.0), 2e-3, lora),
    "prefix": Method(PrefixTuning(num_virtual_tokens=16), 1e-2, prefix),
    "prompt": Method(PromptTuning(num_virtual_tokens=16), 1e-2, prompt, pack_to_length=0),
    "head": Method(HeadOnly(), 1e-2),
    "frozen": Method(FrozenFeatures(), 1e-2),
}


@dataclass(frozen=True)
class Experiment:
    """Directory of the results, and the scale of data sets and runs."""

    results: Path
    scale: float

    @property
    def steps(self) -> int:
        return max(3, round(STEPS * self.scale))

    def file(self, corpus: str, seed: int, part: str) -> Path:
        """Return the training records of a data set for a seed (`train`), or the held-out records (`valid`)."""
        file = self.results / "records" / f"{corpus}-{part if part == 'valid' else f'{part}-{seed}'}.jsonl"
        if not file.exists():
            lines = [json.dumps(record) for _, record in readers.records(catalog.paths(corpus, print))]
            random.Random("held out").shuffle(lines)
            held_out, rest = lines[: max(32, round(NUM_HELD_OUT * self.scale))], lines[NUM_HELD_OUT:]
            random.Random(seed).shuffle(rest)
            file.parent.mkdir(parents=True, exist_ok=True)
            selected = held_out if part == "valid" else rest[: max(64, round(NUM_TRAIN * self.scale))]
            file.write_text("\n".join(selected) + "\n", "utf-8")
        return file


def ours(experiment: Experiment, corpus: str, method: str, seed: int) -> dict[str, float]:
    train, valid = (str(experiment.file(corpus, seed, part)) for part in ("train", "valid"))
    method_ = METHODS[method]
    recipe = Recipe(
        name=f"{corpus}-{method}",
        objective=Classification(),
        examples=LabeledConfig(max_length=MAX_LENGTH),
        init_from=str(base()),
        data=DataConfig(path=(train,), validation_path=(valid,)),
        peft=method_.peft,
        seed=seed,
        batch=BatchConfig(size=ROWS, pack_to_length=method_.pack_to_length),
        optimizer=OptimizerConfig(name="adamw", lr=method_.lr, weight_decay=0.0, beta2=0.999),
        schedule=Schedule("linear", warmup_ratio=0.1),
        budget=Budget(max_steps=experiment.steps),
        evaluation=EvalConfig(max_examples=NUM_HELD_OUT),
        checkpoint=CheckpointConfig(every=0),
    )
    lines: list[str] = []
    directory = experiment.results / f"{corpus}-{method}-{seed}"
    result = run(recipe, directory, lines.append)
    summary = next((line for line in lines if "parameters" in line), "")
    counts_file = directory / "trained.json"
    if summary:  # a run that was started or continued just now
        numbers = [int(word.replace(",", "")) for word in summary.split() if word.replace(",", "").isdigit()]
        counts_file.write_text(json.dumps(numbers[-1]))
    return {
        "accuracy": result.metrics["valid/accuracy"],
        "seconds": result.seconds,
        "trained": json.loads(counts_file.read_text()),
    }


@functools.cache
def base() -> Path:
    """Return the directory of MiniLM."""
    return catalog.fetch("minilm", print)


# ------------------------------------------------------------------------------- the peer


Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
"""Precisions of the peer."""


def peer_file(experiment: Experiment, corpus: str, method: str, seed: int, precision: Precision) -> Path:
    return experiment.results / f"{corpus}-{method}-{seed}-peer-{precision}.json"


class Peer(nn.Module):
    """Encoder of transformers adapted by peft, with the same head as firth."""

    def __init__(self, method: str, classes: int):
        super().__init__()
        import peft
        import transformers

        transformers.logging.set_verbosity_error()
        encoder = transformers.AutoModel.from_pretrained(base(), attn_implementation="sdpa", add_pooling_layer=False)
        self.frozen = method in ("head", "frozen")
        peft_config = METHODS[method].peer
        self.encoder = encoder if peft_config is None else peft.get_peft_model(encoder, peft_config(peft))
        self.encoder.requires_grad_(not self.frozen) if peft_config is None else None
        self.mixture = ScalarMix(encoder.config.num_hidden_layers + 1) if method == "frozen" else None
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.skipped = 16 if method == "prompt" else 0

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.mixture is not None:
            self.encoder.eval()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out = self.encoder(**inputs, output_hidden_states=self.mixture is not None)
        states = out["last_hidden_state"] if self.mixture is None else self.mixture(torch.stack(out["hidden_states"]))
        scores: Tensor = self.head(states[:, self.skipped])
        return scores


def theirs(experiment: Experiment, corpus: str, method: str, seed: int, precision: Precision) -> dict[str, float]:
    import transformers

    file = peer_file(experiment, corpus, method, seed, precision)
    if file.exists():
        found: dict[str, float] = json.loads(file.read_text())
        return found
    rows = {
        part: [r for _, r in readers.records([str(experiment.file(corpus, seed, part))])] for part in ("train", "valid")
    }
    names = sorted({str(r["label"]) for r in rows["train"]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(base())

    def batches(records: Sequence[Mapping[str, Any]], size: int) -> Iterator[tuple[Any, Tensor]]:
        for at in range(0, len(records), size):
            some = records[at : at + size]
            inputs = tokenizer(
                [r["text"] for r in some], truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
            )
            inputs.pop("token_type_ids", None)
            yield inputs, torch.tensor([names.index(str(r["label"])) for r in some])

    torch.manual_seed(seed)
    model = Peer(method, len(names)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=METHODS[method].lr, weight_decay=0.0, fused=True)
    schedule, steps = Schedule("linear", warmup_ratio=0.1), experiment.steps
    order: list[Mapping[str, Any]] = []
    while len(order) < steps * ROWS:
        order += random.Random(f"{seed} {len(order)}").sample(rows["train"], len(rows["train"]))
    seconds = 0.0
    start = time.perf_counter()
    for number, (inputs, labels) in enumerate(batches(order[: steps * ROWS], ROWS)):
        for group in optimizer.param_groups:
            group["lr"] = METHODS[method].lr * schedule.factor((number + 0.5) / steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        right = sum(int((model(inputs).argmax(-1) == labels).sum()) for inputs, labels in batches(rows["valid"], ROWS))
    found = {"accuracy": right / len(rows["valid"]), "seconds": seconds, "trained": sum(p.numel() for p in trained)}
    file.write_text(json.dumps(found))
    return found


def table(experiment: Experiment, sets: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> str:
    """Return a Markdown table of means and ranges over seeds; the speedup is over the peer in its faster precision."""
    lines: list[str] = []
    for corpus in sets:
        lines += [
            f"**{corpus}**",
            "",
            "| | trained parameters | accuracy, firth | peer | seconds, firth | peer in fp32 | in bf16 | speedup over the faster |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in methods:
            firth_runs: list[dict[str, float]] = []
            peers: dict[Precision, list[dict[str, float]]] = {p: [] for p in PRECISIONS}
            for seed in seeds:
                if (experiment.results / f"{corpus}-{method}-{seed}" / "done.json").exists():
                    firth_runs.append(ours(experiment, corpus, method, seed))
                for p in PRECISIONS:
                    if peer_file(experiment, corpus, method, seed, p).exists():
                        peers[p].append(theirs(experiment, corpus, method, seed, p))
            if firth_runs and all(peers.values()):
                lines.append(f"| {method} | {' | '.join(cells(firth_runs, peers))} |")
        lines.append("")
    return "\n".join(lines)


def cells(firth_runs: list[dict[str, float]], peers: dict[Precision, list[dict[str, float]]]) -> list[str]:
    """Return a row of the table: trained parameters, accuracies, seconds and the speedup of firth."""

    def spread(runs: list[dict[str, float]], name: str, digits: int) -> str:
        values = [found[name] for found in runs]
        return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    medians = {p: statistics.median(found["seconds"] for found in peers[p]) for p in PRECISIONS}
    faster = min(PRECISIONS, key=lambda p: medians[p])
    counts = (f"{round(side[0]['trained']):,}" for side in (firth_runs, peers[faster]))
    return [
        " and ".join(dict.fromkeys(counts)),
        *(spread(side, "accuracy", 3) for side in (firth_runs, peers[faster])),
        *(spread(side, "seconds", 1) for side in (firth_runs, *(peers[p] for p in PRECISIONS))),
        f"**{medians[faster] / statistics.median(found['seconds'] for found in firth_runs):.2f}x**",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", default=list(SETS), help="corpora of records with text and label")
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full data sets and runs")
    parser.add_argument("--results", type=Path, default=Path("runs/learn_adapt"))
    parser.add_argument("--table", action="store_true", help="print the existing results")
    args = parser.parse_args()
    experiment = Experiment(args.results, args.scale)
    for seed in args.seeds if not args.table else ():
        for corpus in args.sets:
            for method in args.only:
                # Interleaved, so that other load affects all.
                print(corpus, method, seed, "firth", ours(experiment, corpus, method, seed), flush=True)
                for p in PRECISIONS:
                    print(corpus, method, seed, "peer", p, theirs(experiment, corpus, method, seed, p), flush=True)
    print(table(experiment, args.sets, args.only, args.seeds))


if __name__ == "__main__":
    main()
