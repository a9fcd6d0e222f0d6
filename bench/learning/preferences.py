"""DPO, IPO, SimPO, ORPO and KTO on one set of comparisons: true reward, KL and held-out accuracy.

    firth demo --out demo                                    # the start and the comparisons, seven minutes
    python -m bench.learning.preferences                     # all missing runs; about 15 minutes on two idle cores
    python -m bench.learning.preferences --only dpo kto      # some of the methods
    python -m bench.learning.preferences --table             # markdown of the existing results

The demo's finetuned decoder (Shakespeare, 1.6 M parameters) wrote two answers to each of 700 prompts, and a known score of the
text chose between them with noise (`firth.demo.data.thou`). Each method trains on these pairs from the same start; KTO reads
both answers of a pair as two labeled ones. Every training is a run, so a stopped command can be continued.

Measured on prompts that nothing was trained on: the score of a sampled answer; the KL to the start in nats an answer,
log p - log p_start of the sampled answers; their length; and the accuracy, the share of held-out comparisons in which the
preferred answer gained more probability than the other, compared with the start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.learning.critic import read_prompts, sample_answers
from firth.align.rewards import PreferencePair, PreferencePairs
from firth.data.collate import collate
from firth.data.dialogues import PreferencesConfig
from firth.data.records import Records
from firth.data.source import Source
from firth.demo.data import SCORERS
from firth.generate.decoding_batch import inference_mode
from firth.model.model import LM
from firth.objectives.preferences import answer_logprobs, build_comparison
from firth.pretrained.load_save import load_model
from firth.runs.recipe import Recipe, load
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer

STEPS, PAIRS = 60, 16
SEEDS = (0, 1, 2)
LRS = (2e-4,)
SCORER = SCORERS["thou"]


@dataclass(frozen=True)
class Method:
    """A method of preference optimization.

    Args:
        recipe: Name of the recipe.
        settings: Settings that differ from the recipe's.
        labeled: Whether it reads labeled answers in place of pairs.
    """

    recipe: str
    settings: tuple[str, ...] = field(default=())
    labeled: bool = False


METHODS = {
    "dpo": Method("dpo"),
    "ipo": Method("dpo", ("objective.loss_type=ipo",)),
    "simpo": Method("simpo"),
    "orpo": Method("orpo"),
    "kto": Method("kto", labeled=True),
}


def write_labeled(pairs: Path, labeled: Path) -> None:
    """Write both answers of each preference as a record with a label."""
    with labeled.open("w", encoding="utf-8") as out:
        for line in pairs.read_text("utf-8").splitlines():
            row = json.loads(line)
            for side, label in (("chosen", True), ("rejected", False)):
                out.write(json.dumps({"prompt": row["prompt"], "completion": row[side], "label": label}) + "\n")


def recipe_of(name: str, lr: float, seed: int, demo: Path, results: Path) -> Recipe:
    """Return the recipe of a method, with the files of the demo, or the labeled answers among the results."""
    method = METHODS[name]
    place, records = (results, "labeled") if method.labeled else (demo / "material", "preferences")
    files = [place / f"{records}-{part}.jsonl" for part in ("train", "valid")]
    return load(method.recipe, [
        *method.settings, f"init_from={demo / 'sft'}", f"data.path={files[0]}", f"data.validation_path=[{files[1]}]",
        f"examples.{'base.' if method.recipe == 'dpo' else ''}max_length=128", f"optimizer.lr={lr}", f"seed={seed}",
        f"max_steps={STEPS}", f"batch.size={2 * PAIRS if method.labeled else PAIRS}", "checkpoint.every=0", f"evaluation.every={STEPS}",
    ])  # fmt: skip


def log_probabilities(model: LM, pairs: Source) -> np.ndarray:
    """Return the log-probability of both answers of each pair: (n, 2)."""
    rows = [build_comparison(pairs[i]) for i in range(len(pairs))]
    with inference_mode(model):
        return torch.cat([answer_logprobs(model, collate(rows[i : i + 16])) for i in range(0, len(rows), 16)]).numpy()


@dataclass(frozen=True)
class Measurement:
    """What a policy is measured with.

    Args:
        start: The model that all methods start from.
        tokenizer: Its tokenizer.
        prompts: Held-out prompts.
        pairs: Held-out comparisons.
    """

    start: LM
    tokenizer: Tokenizer
    prompts: Sequence[np.ndarray]
    pairs: Source

    def __call__(self, policy: LM) -> dict[str, float]:
        """Return true reward, KL, length, accuracy, and the change of both answers of held-out comparisons."""
        answers = sample_answers(policy, self.tokenizer, self.prompts, seed=7)
        sampled = PreferencePairs([PreferencePair(a, a, 0.0) for a in answers if len(a.answer)])
        ratio = (log_probabilities(policy, sampled) - log_probabilities(self.start, sampled))[:, 0]
        gained = log_probabilities(policy, self.pairs) - log_probabilities(self.start, self.pairs)  # (n, 2)
        return {
            "reward": float(np.mean([SCORER(a.text) for a in answers])),
            "kl": float(ratio.mean()),
            "length": float(np.mean([len(a.answer) for a in answers])),
            "accuracy": float((gained[:, 0] > gained[:, 1]).mean()),
            "chosen": float(gained[:, 0].mean()),
            "rejected": float(gained[:, 1].mean()),
        }


def measure_all(demo: Path, results: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Train and measure what is missing."""
    results.mkdir(parents=True, exist_ok=True)
    material = demo / "material"
    for part in ("train", "valid"):
        write_labeled(material / f"preferences-{part}.jsonl", results / f"labeled-{part}.jsonl")
    tokenizer = Tokenizer.load(demo / "tokenizer")
    prompts = read_prompts(tokenizer, material / "dialogues-valid.jsonl")[:128]
    held = Records(PreferencesConfig(max_length=128), [str(material / "preferences-valid.jsonl")], tokenizer)
    start = load_model(demo / "sft" / "model")
    measure = Measurement(start, tokenizer, prompts, held)
    if not (results / "start.json").exists():
        write(results / "start.json", measure(start))
    for seed, lr in itertools.product(seeds, LRS):
        for name in names:
            at = results / f"{name}-{lr:g}-{seed}"
            if not (at / "measured.json").exists():
                done = run(recipe_of(name, lr, seed, demo, results), at)
                found = measure(load_model(at / "model")) | {"seconds": done.seconds}
                write(at / "measured.json", found)
                print(name, lr, seed, found, flush=True)


def write(path: Path, found: dict[str, float]) -> None:
    path.write_text(json.dumps(found, indent=1))


def table(results: Path) -> str:
    """Return the results as markdown: the mean over seeds, with minimum and maximum."""
    columns = {"reward": 2, "kl": 1, "accuracy": 2, "chosen": 1, "rejected": 1, "length": 1}
    lines = ["| method | learning rate | seeds | true reward | KL | accuracy | preferred, nats | rejected, nats | tokens |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    start = json.loads((results / "start.json").read_text())
    lines.append(f"| the start | | | {start['reward']:.2f} | 0 | | 0 | 0 | {start['length']:.1f} |")
    for name in METHODS:
        for lr in LRS:
            files = [results / f"{name}-{lr:g}-{seed}" / "measured.json" for seed in SEEDS]
            rows: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files if file.exists()]
            if rows:
                cells = [interval([row[c] for row in rows], digits) for c, digits in columns.items()]
                lines.append(f"| {name} | {lr:g} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="the directory of `firth demo`")
    parser.add_argument("--results", type=Path, default=Path("runs/preferences"))
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--table", action="store_true", help="print markdown and measure nothing")
    given = parser.parse_args()
    if not given.table:
        measure_all(given.demo, given.results, given.only, given.seeds)
    print(table(given.results))


if __name__ == "__main__":
    main()
