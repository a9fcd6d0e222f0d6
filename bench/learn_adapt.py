"""How much must be trained? MiniLM on two labelled sets, six ways to adapt it, beside peft and transformers.

    python -m bench.learn_adapt                          # all that is not there yet; about 30 minutes on one thread
    python -m bench.learn_adapt --only lora prefix       # some of: full lora prefix prompt head frozen
    python -m bench.learn_adapt --sets sarcasm           # some of the sets: sarcasm, sentiment
    python -m bench.learn_adapt --table                  # markdown for docs/results/index.md, of what is there
    python -m bench.learn_adapt --scale 0.03 --results runs/try     # a trial of everything in a minute or two

Every run is a recipe in a directory of its own under runs/learn_adapt, as `firth train classification` makes them, and every peer
a file: stopped at any moment, the same command goes on. Both sides begin from the same weights, read the same 1,920 records
(the seed draws them and their order), make the same steps of 32 at the same rate of AdamW with the same schedule, read the
class off [CLS] by one linear map, and answer the same 600 held-out records. Ours runs in the precision that it chooses by
itself on this machine, the peer once in fp32 and once in bf16 autocast; its accuracy in the table is that of the faster. Ours
packs its texts into rows (but those with prompts, of which each text has its own); the peer pads each batch to its longest
text, as the library's own collator does. Seconds are of the training steps alone.
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
from firth.model.layer_mixture import ScalarMix
from firth.objectives.classification import Classification
from firth.runs.labeled_examples import LabeledConfig
from firth.runs.peft_options import (
    FrozenFeatures,
    FullFinetuning,
    HeadOnly,
    LoRA,
    PeftConfig,
    PrefixTuning,
    PromptTuning,
)
from firth.runs.prepare import DataConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe
from firth.runs.run import run
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule

SETS = ("sarcasm", "sentiment")
SEEDS = (0, 1, 2)
TRAIN, HELD, STEPS, ROWS, LONGEST = 1920, 600, 60, 32, 48


@dataclass(frozen=True)
class Way:
    """adapt: ours. rate: of both sides. peer: what peft is told; None where it is not asked. pack: our rows' tokens."""

    adapt: PeftConfig
    rate: float
    peer: Callable[[Any], Any] | None = None
    pack: int = 64


def lora(peft: Any) -> Any:
    return peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")


def prefix(peft: Any) -> Any:
    return peft.PrefixTuningConfig(num_virtual_tokens=16, task_type="FEATURE_EXTRACTION")


def prompt(peft: Any) -> Any:
    return peft.PromptTuningConfig(
        num_virtual_tokens=16, task_type="FEATURE_EXTRACTION", prompt_tuning_init="SAMPLE_VOCAB"
    )


WAYS: dict[str, Way] = {
    "full": Way(FullFinetuning(), 1e-4),
    "lora": Way(LoRA(rank=8, alpha=16.0), 2e-3, lora),
    "prefix": Way(PrefixTuning(num_virtual_tokens=16), 1e-2, prefix),
    "prompt": Way(PromptTuning(num_virtual_tokens=16), 1e-2, prompt, pack=0),
    "head": Way(HeadOnly(), 1e-2),
    "frozen": Way(FrozenFeatures(), 1e-2),
}


@dataclass(frozen=True)
class Place:
    """Where results are, and how long runs are against their full length."""

    results: Path
    scale: float

    @property
    def steps(self) -> int:
        return max(3, round(STEPS * self.scale))

    def file(self, corpus: str, seed: int, part: str) -> Path:
        """The records of a set that a seed learns from (`train`), and those that all are asked (`valid`)."""
        file = self.results / "records" / f"{corpus}-{part if part == 'valid' else f'{part}-{seed}'}.jsonl"
        if not file.exists():
            lines = [json.dumps(record) for _, record in readers.records(catalog.paths(corpus, print))]
            random.Random("held out").shuffle(lines)
            held, rest = lines[: max(32, round(HELD * self.scale))], lines[HELD:]
            random.Random(seed).shuffle(rest)
            file.parent.mkdir(parents=True, exist_ok=True)
            chosen = held if part == "valid" else rest[: max(64, round(TRAIN * self.scale))]
            file.write_text("\n".join(chosen) + "\n", "utf-8")
        return file


def ours(place: Place, corpus: str, way: str, seed: int) -> dict[str, float]:
    train, valid = (str(place.file(corpus, seed, part)) for part in ("train", "valid"))
    made = Recipe(
        name=f"{corpus}-{way}",
        objective=Classification(),
        examples=LabeledConfig(max_length=LONGEST),
        init_from=str(base()),
        data=DataConfig(path=(train,), validation_path=(valid,)),
        peft=WAYS[way].adapt,
        seed=seed,
        batch=BatchConfig(size=ROWS, pack_to_length=WAYS[way].pack),
        optimizer=OptimizerConfig(name="adamw", lr=WAYS[way].rate, weight_decay=0.0, beta2=0.999),
        schedule=Schedule("linear", warmup_ratio=0.1),
        budget=Budget(max_steps=place.steps),
        evaluation=EvalConfig(max_examples=HELD),
        checkpoint=CheckpointConfig(every=0),
    )
    said: list[str] = []
    directory = place.results / f"{corpus}-{way}-{seed}"
    done = run(made, directory, said.append)
    told = next((line for line in said if "parameters" in line), "")
    note = directory / "trained.json"
    if told:  # of a run that went on or began just now
        numbers = [int(word.replace(",", "")) for word in told.split() if word.replace(",", "").isdigit()]
        note.write_text(json.dumps(numbers[-1]))
    return {
        "accuracy": done.metrics["valid/accuracy"],
        "seconds": done.seconds,
        "trained": json.loads(note.read_text()),
    }


@functools.cache
def base() -> Path:
    """MiniLM's directory."""
    return catalog.fetch("minilm", print)


# ------------------------------------------------------------------------------- the peer


Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
"""Of the peer."""


def peer_file(place: Place, corpus: str, way: str, seed: int, precision: Precision) -> Path:
    return place.results / f"{corpus}-{way}-{seed}-peer-{precision}.json"


class Peer(nn.Module):
    """A transformers encoder, adapted as peft does it, and the same head."""

    def __init__(self, way: str, classes: int):
        super().__init__()
        import peft
        import transformers

        transformers.logging.set_verbosity_error()
        trunk = transformers.AutoModel.from_pretrained(base(), attn_implementation="sdpa", add_pooling_layer=False)
        self.frozen = way in ("head", "frozen")
        plan = WAYS[way].peer
        self.trunk = trunk if plan is None else peft.get_peft_model(trunk, plan(peft))
        self.trunk.requires_grad_(not self.frozen) if plan is None else None
        self.mixture = ScalarMix(trunk.config.num_hidden_layers + 1) if way == "frozen" else None
        self.head = nn.Linear(trunk.config.hidden_size, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.skipped = 16 if way == "prompt" else 0

    def forward(self, shown: Mapping[str, Tensor]) -> Tensor:
        if self.mixture is not None:
            self.trunk.eval()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out = self.trunk(**shown, output_hidden_states=self.mixture is not None)
        states = out["last_hidden_state"] if self.mixture is None else self.mixture(torch.stack(out["hidden_states"]))
        scores: Tensor = self.head(states[:, self.skipped])
        return scores


def theirs(place: Place, corpus: str, way: str, seed: int, precision: Precision) -> dict[str, float]:
    import transformers

    file = peer_file(place, corpus, way, seed, precision)
    if file.exists():
        found: dict[str, float] = json.loads(file.read_text())
        return found
    rows = {part: [r for _, r in readers.records([str(place.file(corpus, seed, part))])] for part in ("train", "valid")}
    names = sorted({str(r["label"]) for r in rows["train"]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(base())

    def batches(records: Sequence[Mapping[str, Any]], size: int) -> Iterator[tuple[Any, Tensor]]:
        for at in range(0, len(records), size):
            some = records[at : at + size]
            shown = tokenizer(
                [r["text"] for r in some], truncation=True, max_length=LONGEST, padding=True, return_tensors="pt"
            )
            shown.pop("token_type_ids", None)
            yield shown, torch.tensor([names.index(str(r["label"])) for r in some])

    torch.manual_seed(seed)
    model = Peer(way, len(names)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=WAYS[way].rate, weight_decay=0.0, fused=True)
    schedule, steps = Schedule("linear", warmup_ratio=0.1), place.steps
    order: list[Mapping[str, Any]] = []
    while len(order) < steps * ROWS:
        order += random.Random(f"{seed} {len(order)}").sample(rows["train"], len(rows["train"]))
    seconds = 0.0
    start = time.perf_counter()
    for number, (shown, labels) in enumerate(batches(order[: steps * ROWS], ROWS)):
        for group in optimizer.param_groups:
            group["lr"] = WAYS[way].rate * schedule.factor((number + 0.5) / steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = nn.functional.cross_entropy(model(shown), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        right = sum(int((model(shown).argmax(-1) == labels).sum()) for shown, labels in batches(rows["valid"], ROWS))
    found = {"accuracy": right / len(rows["valid"]), "seconds": seconds, "trained": sum(p.numel() for p in trained)}
    file.write_text(json.dumps(found))
    return found


def table(place: Place, sets: Sequence[str], ways: Sequence[str], seeds: Sequence[int]) -> str:
    """Mean and range over the seeds that are there; the ratio is of the peer's seconds in its faster precision to ours."""
    lines: list[str] = []
    for corpus in sets:
        lines += [
            f"**{corpus}**",
            "",
            "| | trained | accuracy, firth | peer | seconds, firth | peer in fp32 | in bf16 | firth over the faster |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for way in ways:
            mine: list[dict[str, float]] = []
            peers: dict[Precision, list[dict[str, float]]] = {p: [] for p in PRECISIONS}
            for seed in seeds:
                if (place.results / f"{corpus}-{way}-{seed}" / "done.json").exists():
                    mine.append(ours(place, corpus, way, seed))
                for p in PRECISIONS:
                    if peer_file(place, corpus, way, seed, p).exists():
                        peers[p].append(theirs(place, corpus, way, seed, p))
            if mine and all(peers.values()):
                lines.append(f"| {way} | {' | '.join(cells(mine, peers))} |")
        lines.append("")
    return "\n".join(lines)


def cells(mine: list[dict[str, float]], peers: dict[Precision, list[dict[str, float]]]) -> list[str]:
    """A row of the table: numbers that are trained, accuracies, seconds, and how many times as fast firth is."""

    def spread(runs: list[dict[str, float]], name: str, digits: int) -> str:
        values = [found[name] for found in runs]
        return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    took = {p: statistics.median(found["seconds"] for found in peers[p]) for p in PRECISIONS}
    faster = min(PRECISIONS, key=lambda p: took[p])
    counts = (f"{round(side[0]['trained']):,}" for side in (mine, peers[faster]))
    return [
        " and ".join(dict.fromkeys(counts)),
        *(spread(side, "accuracy", 3) for side in (mine, peers[faster])),
        *(spread(side, "seconds", 1) for side in (mine, *(peers[p] for p in PRECISIONS))),
        f"**{took[faster] / statistics.median(found['seconds'] for found in mine):.2f}x**",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", default=list(SETS), help="corpora of records with text and label")
    parser.add_argument("--only", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--scale", type=float, default=1.0, help="sets and runs of this share of their full length")
    parser.add_argument("--results", type=Path, default=Path("runs/learn_adapt"))
    parser.add_argument("--table", action="store_true", help="print what is there")
    given = parser.parse_args()
    place = Place(given.results, given.scale)
    for seed in given.seeds if not given.table else ():
        for corpus in given.sets:
            for way in given.only:
                # One after the other: what else the machine does falls on all.
                print(corpus, way, seed, "firth", ours(place, corpus, way, seed), flush=True)
                for p in PRECISIONS:
                    print(corpus, way, seed, "peer", p, theirs(place, corpus, way, seed, p), flush=True)
    print(table(place, given.sets, given.only, given.seeds))


if __name__ == "__main__":
    main()
