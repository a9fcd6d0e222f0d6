"""Every pretraining recipe at equal FLOPs on 60 MB of English, then six probes with few labels.

    python -m bench.learning.arena --tune                       # learning rates, at 1e12 FLOPs: 3 runs of each recipe
    python -m bench.learning.arena --run --flops 1e13 --seeds 3
    python -m bench.learning.arena --table

Thirteen recipes, and word2vec, an LSTM and ELMo, in one size: three blocks of hidden size 128 (two on each side of an
encoder-decoder), 4,096 subwords for all. The text is a mixture of the catalog: Shakespeare, addresses, a dictionary, glosses
and a book of essays. The tiny recipes' learning rates are multiplied by 1/2, 1 or 2, whichever has the lowest held-out loss
of its own objective at the smallest budget; `rates.json` keeps the whole search.

`roberta-15` and `electra` hide 15% of the tokens, as in the comparison of ELECTRA's paper; the other tiny recipes hide 30%.

A gain is the accuracy of a probe (`bench.learning.arena_probes`) on a pretrained model less that on the same architecture with
random weights, with the same labels. Its interval counts both the seeds and the draws of labels: the squared standard error is
the sum of those of the means over seeds and over draws, with Satterthwaite's degrees of freedom. MiniLM is the oracle: what a
much larger pretraining gains. Every run is recorded on its own; a stopped command can be repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.learning import arena_probes
from bench.learning.arena_probes import PROBES
from firth.compare.compare import ComparisonConfig, ComparisonRun, prepare
from firth.corpora import catalog
from firth.io.atomic import make_directory
from firth.model.model import LM
from firth.pretrained.load_save import load_model
from firth.recipes.common import VOCAB_SIZE
from firth.runs import config_io
from firth.runs.recipe import Recipe
from firth.runs.recipe import load as load_recipe
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.schedule import Budget

TEXTS = ("shakespeare", "sotu", "wordnet", "gcide", "anarchism")
STACKS = (
    "roberta",
    "bert",
    "albert",
    "spanbert",
    "electra",
    "xlnet",
    "mpnet",
    "linformer",
    "contrastive",
    "gpt",
    "prefix_lm",
    "t5",
    "bart",
)
RECIPES = (*STACKS, "roberta-15", "word2vec", "lstm", "elmo")
BODY = {"model.hidden_size": 128, "model.num_layers": 3, "model.num_heads": 2, "model.intermediate_size": 256}
OWN: dict[str, dict[str, Any]] = {
    "gpt": {"model.intermediate_size": 512}, "prefix_lm": {"model.intermediate_size": 512},
    "t5": {"model.num_layers": 2, "model.encoder.num_layers": 2}, "bart": {"model.num_layers": 2, "model.encoder.num_layers": 2},
    "roberta-15": {"objective.mlm_probability": 0.15}, "albert": {"model.embedding.size": 64}, "electra": {"model.embedding.size": 64},
    "lstm": {"model.hidden_size": 192}, "elmo": {"model.hidden_size": 256},
}  # fmt: skip
"""Two blocks on each side of an encoder-decoder cost as much as three; an ungated MLP is twice as wide as a gated one."""

MULTIPLIERS, TUNING_FLOPS = (0.5, 1.0, 2.0), 1e12
RATES = ("lr", "scalar_lr", "embedding_lr")
NO_PRETRAINING = "random weights"


def comparison(out: Path) -> ComparisonRun:
    """Return the recipes with one text and one tokenizer, by `firth compare`'s own preparation."""
    files = [path for name in TEXTS for path in catalog.paths(name, lambda _: None)]
    make_directory(out / "recipes")
    named = []
    for name in RECIPES:
        fields = (BODY if name in STACKS or name == "roberta-15" else {}) | OWN.get(name, {})
        recipe = load_recipe(name.partition("-")[0], [f"{key}={value}" for key, value in fields.items()])
        data = dataclasses.replace(recipe.data, corpus="", path=tuple(files), validation_fraction=0.02)
        assert recipe.model is not None
        shared = {
            "data": data,
            "tokenizer": load_recipe("gpt").tokenizer,
            "model": recipe.model.with_fields({"vocab_size": VOCAB_SIZE}),
        }
        file = out / "recipes" / f"{name}.yaml"
        file.write_text(config_io.write_yaml(dataclasses.replace(recipe, **shared)), "utf-8")
        named.append(str(file))
    config = ComparisonConfig(Budget(max_flops=TUNING_FLOPS), shares=(1.0,), probe="none")
    return prepare(named, [], config, out / "common", print)


def of_budget(recipe: Recipe, name: str, flops: float, seed: int, multiplier: float) -> Recipe:
    """Return a recipe with a budget, a seed and its learning rates multiplied."""
    rates = {key: getattr(recipe.optimizer, key) * multiplier for key in RATES if getattr(recipe.optimizer, key)}
    optimizer = dataclasses.replace(recipe.optimizer, **rates)
    return dataclasses.replace(recipe, name=name, budget=Budget(max_flops=flops), seed=seed, optimizer=optimizer)


def trained(recipe: Recipe, directory: Path) -> tuple[dict[str, Any], Path]:
    """Train a model and return what is recorded of it, and its directory."""
    ended = run(recipe, directory, log=lambda _: None)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    record = {"flops": ended.flops, "seconds": ended.seconds, "steps": ended.steps, "tokens": ended.tokens}
    return record | {"loss": ended.metrics.get("valid/loss", math.nan), "metrics": ended.metrics}, ended.model


def tune(out: Path, names: list[str]) -> None:
    """Search the learning rate of each recipe, or what is left of the search."""
    file = out / "rates.json"
    found: dict[str, dict[str, float]] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    recipes = comparison(out).recipes
    for name in names:
        for multiplier in MULTIPLIERS:
            if str(multiplier) in found.get(name, {}):
                continue
            recipe = of_budget(recipes[name], name, TUNING_FLOPS, 0, multiplier)
            record, _ = trained(recipe, out / "tuning" / f"{name}-{multiplier}")
            found.setdefault(name, {})[str(multiplier)] = record["loss"]
            print(f"{name}: rates times {multiplier}: {record['loss']:.4f}, {record['seconds']:.0f} s", flush=True)
            file.write_text(json.dumps(found, indent=1), "utf-8")
            shutil.rmtree(out / "tuning" / f"{name}-{multiplier}")


def best_rate(out: Path, name: str) -> float:
    """Return the multiplier with the lowest held-out loss."""
    search = json.loads((out / "rates.json").read_text("utf-8"))[name]
    return float(min(search, key=lambda m: search[m] if search[m] == search[m] else math.inf))


def scores(model: LM, tokenizer: Tokenizer) -> dict[str, dict[str, list[float]]]:
    """Return the accuracies of all probes."""
    found = {}
    for name, probe in PROBES.items():
        records = probe()
        found[name] = arena_probes.score(records, arena_probes.encode(model, tokenizer, records), arena_probes.linear)
    return found


def write(file: Path, record: dict[str, Any]) -> None:
    make_directory(file.parent)
    file.write_text(json.dumps(record, indent=1), "utf-8")


def evaluate(out: Path, names: list[str], flops: float, seeds: int) -> None:
    """Train and probe every recipe, or what is left: all recipes with one seed, then with the next."""
    run_of = comparison(out)
    done = out / "scores"
    if not (done / "words.json").exists():
        write(done / "words.json", {name: arena_probes.words_baseline(probe()) for name, probe in PROBES.items()})
    if not (done / "minilm.json").exists():
        oracle = catalog.fetch("minilm", lambda _: None)
        write(done / "minilm.json", scores(load_model(oracle), Tokenizer.load(oracle)))
    for seed in range(seeds):
        for name in names:
            recipe = run_of.recipes[name]
            untrained, file = done / "untrained" / f"{name}-{seed}.json", done / f"{flops:.0e}" / f"{name}-{seed}.json"
            if not untrained.exists():
                assert recipe.model is not None
                torch.manual_seed(seed)
                model = LM(recipe.model, recipe.objective.heads(recipe.model))
                model.set_token_characters([run_of.tokenizer.token(i) for i in range(recipe.model.vocab_size)])
                write(untrained, scores(model, run_of.tokenizer))
            if file.exists():
                continue
            directory = out / "runs" / f"{name}-{flops:.0e}-{seed}"
            record, saved = trained(of_budget(recipe, name, flops, seed, best_rate(out, name)), directory)
            record["scores"] = scores(load_model(saved), run_of.tokenizer)
            write(file, record)
            shutil.rmtree(directory)
            mean = {probe: round(float(np.mean(found["500"])), 3) for probe, found in record["scores"].items()}
            print(
                f"{name}, {flops:.0e}, seed {seed}: loss {record['loss']:.3f}, {record['seconds']:.0f} s, {mean}",
                flush=True,
            )


def interval(gains: np.ndarray) -> tuple[float, float]:
    """Return the mean of gains (seeds, draws) and half of its 95% interval; infinite with one seed.

    >>> interval(np.array([[0.1, 0.1], [0.1, 0.1]]))
    (0.1, 0.0)
    """
    from scipy.stats import t

    seeds, draws = gains.shape
    if seeds < 2:
        return float(gains.mean()), math.inf
    parts = [(float(gains.mean(axis).var(ddof=1)) / n, n - 1) for axis, n in ((1, seeds), (0, draws))]
    variance = sum(part for part, _ in parts)
    if variance < 1e-12:
        return round(float(gains.mean()), 9), 0.0
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    return float(gains.mean()), float(t.ppf(0.975, freedom) * math.sqrt(variance))


def _read(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def tables(out: Path) -> Iterator[str]:
    """Yield the lines of all tables."""
    done = out / "scores"
    if (out / "rates.json").exists():
        yield "| recipe | " + " | ".join(f"rates times {m:g}" for m in MULTIPLIERS) + " |"
        yield "|---" * (len(MULTIPLIERS) + 1) + "|"
        for name, search in _read(out / "rates.json").items():
            best = best_rate(out, name)
            cells = [f"{search[str(m)]:.3f}" if str(m) in search else "" for m in MULTIPLIERS]
            yield (
                f"| {name} | "
                + " | ".join(f"**{c}**" if m == best else c for m, c in zip(MULTIPLIERS, cells, strict=True))
                + " |"
            )
        yield ""
    budgets = sorted(
        (path for path in done.iterdir() if path.is_dir() and path.name != "untrained"), key=lambda p: float(p.name)
    )
    for labels in map(str, arena_probes.LABELS):
        yield f"Accuracy with {labels} labels:\n"
        yield "| | " + " | ".join(PROBES) + " |"
        yield "|---" * (len(PROBES) + 1) + "|"
        for title, file in (("word counts", "words"), ("MiniLM", "minilm")):
            found = _read(done / f"{file}.json")
            yield f"| {title} | " + " | ".join(f"{np.mean(found[p][labels]):.3f}" for p in PROBES) + " |"
        for budget in budgets:
            yield from _budget_table(done, budget, labels)
        yield ""


def _budget_table(done: Path, budget: Path, labels: str) -> Iterator[str]:
    """Yield a row for each recipe: accuracy and gain on every probe, then where the gain is above 0."""
    for name in RECIPES:
        seeds = sorted(int(path.stem.rpartition("-")[2]) for path in budget.glob(f"{name}-[0-9].json"))
        if not seeds:
            continue
        cells, above = [], 0
        for probe in PROBES:
            own = np.array([_read(budget / f"{name}-{s}.json")["scores"][probe][labels] for s in seeds])
            random = np.array([_read(done / "untrained" / f"{name}-{s}.json")[probe][labels] for s in seeds])
            gain, half = interval(own - random)
            above += gain > half
            width = "" if half == math.inf else f" ± {half:.3f}"
            cells.append(
                f"{own.mean():.3f} ({gain:+.3f}{width})"
                if gain <= half
                else f"{own.mean():.3f} (**{gain:+.3f}{width}**)"
            )
        runs = [_read(budget / f"{name}-{s}.json") for s in seeds]
        tokens = np.mean([run["tokens"] for run in runs])
        yield (
            f"| {name}, {budget.name}, {tokens / 1e6:.1f} M tokens, {len(seeds)} seeds, {above} of {len(PROBES)} | "
            + " | ".join(cells)
            + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/arena"))
    parser.add_argument("--tune", action="store_true", help="search the learning rates")
    parser.add_argument("--run", action="store_true", help="train and probe")
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--flops", type=float, default=1e13)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    args = parser.parse_args()
    if args.tune:
        tune(args.out, args.only)
    if args.run:
        evaluate(args.out, args.only, args.flops, args.seeds)
    if args.table:
        print("\n".join(tables(args.out)))


if __name__ == "__main__":
    main()
