"""Scaling laws of small models on a CPU: sweeps, a prediction made before its run, repeated text, and a plan that is followed.

    python -m bench.learning.scaling runs/scaling decoder encoder lstm     the sweeps
    python -m bench.learning.scaling runs/scaling predict                  fit, predict the largest run, train it
    python -m bench.learning.scaling runs/scaling repeats                  one model on texts of 1, 3 and 10 M tokens
    python -m bench.learning.scaling runs/scaling texts                    short runs on other texts: the error of the comparison by bzip2
    python -m bench.learning.scaling runs/scaling vocabulary               one width and budget with several vocabularies
    python -m bench.learning.scaling runs/scaling encoder-start            when does a masked encoder learn more than frequencies?
    python -m bench.learning.scaling runs/scaling follow                   `firth plan` for a text that no fit has seen
    python -m bench.learning.scaling runs/scaling ship                     write the default law into the package

Each part runs commands of firth and can be stopped and started again. The text is the State of the Union addresses, WordNet's glosses and
the Brown corpus (28 MB), with 1,024 subwords. docs/results/scaling.md has the results.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from firth.corpora import catalog
from firth.data.token_store import TokenStore
from firth.io.json_files import row_line
from firth.runs.recipe import load
from firth.runs.run import run
from firth.scaling.fitted import FittedLaw
from firth.scaling.plan import FILES
from firth.scaling.sizes import scaled
from firth.tokenizer.tokenizer import Tokenizer

CORPORA = ("sotu", "wordnet", "brown")
MORE_CORPORA = ("gcide", "anarchism")
"""Corpora that the encoders read too: the smallest need more than twice the tokens of the decoders."""
COMMON = ("tokenizer.vocab_size=1024", "examples.max_length=128", "batch.size=8", "evaluation.max_examples=512")
GRID = {
    "3e10": "16,24,32,40,48",
    "1e11": "16,24,32,40,48,64",
    "3e11": "24,32,40,48,64,96",
    "1e12": "32,40,48,64,96,128",
}
ENCODER_GRID = {
    "3e11": "16,24,32,40,48",
    "6e11": "16,24,32,40,48",
    "1.2e12": "24,32,40,48,64",
    "2.4e12": "32,40,48,64,96",
}
"""Budget -> widths."""
LARGEST = {"decoder": "2e12", "encoder": "4.8e12"}
"""Sweep -> budget of the run that is predicted."""
SHIPPED_FROM = "3e11"
"""Smallest budget of the default law: with smaller ones it is too high by 5.6% at 4e12 FLOPs, without them by 1.6%."""
SHORT_HEADS = ("model.num_heads=12", "model.num_kv_heads=12", "model.head_dim=16")
"""Heads of 16 numbers at every width: an encoder with one wide head learns late to attend to the neighbors of a masked token."""
PARTS = {
    "decoder": ("gpt", GRID, ("optimizer.lr=0.005",)),
    "encoder": ("roberta", ENCODER_GRID, ("batch.size=32", "model.num_layers=8", *SHORT_HEADS)),
    "lstm": ("lstm", {"1e11,3e11,1e12": "32,64,128"}, ()),
}
"""Name -> recipe, widths by budget, settings. The decoder's rate is between the best of 0.0015, 0.003 and 0.006 at widths 32 and 128."""
PROCESSES = 2
"""Processes of one sweep, each with one thread: so small a model is no faster with two."""
CUTS = {1_000_000: 3, 3_000_000: 3, 10_000_000: 1}
"""Tokens of the texts that are read again -> seeds."""
REPEATS_WIDTH, REPEATS_BUDGETS = "32", "5e11,1.5e12,3e12"
TEXTS, TEXT_WIDTH, TEXT_BUDGET = ("shakespeare", "moby-dick"), "32", "2e11"
"""Other texts, and the runs on them."""
VOCABULARIES, VOCABULARY_WIDTH, VOCABULARY_BUDGET = (512, 1024, 2048, 4096), "64", "6e11"
ENCODER_WIDTH, ENCODER_STARTS = (
    48,
    {
        "one head": ("batch.size=32", "max_steps=1000"),
        "half the rate": ("batch.size=32", "max_steps=1000", "optimizer.lr=0.0015"),
        "batches of 540 tokens, 3 times the rate": (
            "batch.size=8",
            "max_steps=3500",
            "optimizer.lr=0.01",
            "optimizer.embedding_lr=0.01",
        ),
        "batches of 4,300 tokens": ("batch.size=64", "max_steps=600"),
        "heads of 16": ("batch.size=32", "max_steps=1000", *SHORT_HEADS),
        "two layers, heads of 16": ("batch.size=32", "max_steps=1000", "model.num_layers=8", *SHORT_HEADS),
    },
)
"""Width, and settings of runs over some 2 M tokens. The recipe has one head and one layer at this width."""
UNSEEN, MINUTES = "anarchism", 2
"""The text of the plan that is followed, and the minutes of the run."""


def firth(*words: str, processes: int = 0) -> str:
    """Run a command of firth, print what it writes, and return its standard output.

    Args:
        words: The command.
        processes: Processes that run it at once, each with one thread; 0 for one process with all threads.
    """
    print("$", shlex.join(["firth", *words]), flush=True)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if processes else {})
    command = [sys.executable, "-m", "firth", *words]
    more = [subprocess.Popen(command, env=environment) for _ in range(processes - 1)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if sum(one.wait() for one in more) or process.returncode:
        sys.exit(1)
    return "".join(lines)


def text(part: str = "decoder") -> str:
    """Return the setting of the data: the files of the corpora of a part."""
    names = (*CORPORA, *MORE_CORPORA) if part == "encoder" else CORPORA
    return f"data.path=[{','.join(path for name in names for path in catalog.paths(name, print))}]"


def sweep(out: Path, part: str, grid: Mapping[str, str] | None = None) -> None:
    """Run a sweep, or what is left of it."""
    recipe, all_sizes, own = PARTS[part]
    for budgets, sizes in (grid or all_sizes).items():
        options = ["--sizes", sizes, "--budgets", budgets, "--max-epochs", "1", "--out", str(out / part)]
        firth("scale", "run", recipe, text(part), *COMMON, *own, *options, processes=PROCESSES)


def rows(table: Path) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    return [json.loads(line) for line in table.read_text().splitlines()]


def write_rows(table: Path, some: list[dict[str, Any]]) -> None:
    """Write a table."""
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("".join(json.dumps(row) + "\n" for row in some))


def fit(out: Path, name: str, some: list[dict[str, Any]], part: str = "decoder") -> Path:
    """Fit some rows of a sweep and return the law's file."""
    home = out / name
    write_rows(home / "table.jsonl", some)
    for file in ("sweep.json", "text.json"):
        shutil.copy(out / part / file, home / file)
    firth("scale", "fit", str(home / "table.jsonl"), "--budgets", LARGEST[part])
    return home / "fit.json"


def predict(out: Path, part: str) -> None:
    """Fit the smaller budgets, write down the loss of the largest run, train it, and compare."""
    file, largest = out / f"predict-{part}" / "prediction.json", float(LARGEST[part])
    if not file.exists():
        below = [row for row in rows(out / part / "table.jsonl") if row["budget"] < largest]
        law = FittedLaw.load(fit(out, f"predict-{part}", below, part))
        sizes = {row["width"]: row["parameters"] for row in rows(out / part / "table.jsonl")}
        best = law.optimum(largest)
        width = min(sizes, key=lambda w: abs(np.log(sizes[w] / best.parameters.value)))
        D = float(law.rule.tokens(sizes[width], largest))
        loss = law.loss(sizes[width], D)
        stated = {
            "width": width,
            "parameters": sizes[width],
            "tokens": D,
            "loss": [loss.value, loss.low, loss.high],
            "drift": law.drift,
            "time": time.ctime(),
        }
        file.write_text(json.dumps(stated))
    stated = json.loads(file.read_text())
    print(f"predicted {stated}", flush=True)
    sweep(out, part, {LARGEST[part]: str(stated["width"])})
    reached = next(row for row in rows(out / part / "table.jsonl") if row["budget"] == largest)
    print(f"reached loss {reached['loss']:.4f} after {reached['tokens']:,} tokens, {reached['flops']:.4g} FLOPs")


def cut(out: Path, tokens: int) -> tuple[Path, Path]:
    """Write the first documents of the decoder's training text, and its held-out text; return both files."""
    tokenizer = Tokenizer.load(out / "decoder" / "tokenizer")
    (store,) = (out / "decoder" / "data").iterdir()
    files = []
    for part, limit in (("train", tokens), ("valid", 1 << 60)):
        path = out / "repeats" / f"{part}-{tokens if part == 'train' else 'all'}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            documents, order = TokenStore.open(store / part, tokenizer), np.random.default_rng(0)
            index = order.permutation(len(documents)) if part == "train" else np.arange(len(documents))
            read, lines = 0, []
            for i in index:
                ids = np.asarray(documents.tokens[int(documents.offsets[i]) : int(documents.offsets[i + 1])])
                ids = ids[~tokenizer.vocab.special[ids]]
                if read >= limit:
                    break
                read += len(ids)
                lines.append(row_line({"text": tokenizer.decode(ids)}))
            path.write_text("".join(lines))
        files.append(path)
    return files[0], files[1]


def repeats(out: Path) -> None:
    """Train one size on small texts, and fit what a repeat is worth."""
    found = []
    for seed in range(max(CUTS.values())):
        for tokens in (tokens for tokens, seeds in CUTS.items() if seed < seeds):
            train, valid = cut(out, tokens)
            home = out / "repeats" / f"{tokens}-{seed}"
            own = [
                f"data.path=[{train}]",
                f"data.validation_path=[{valid}]",
                f"tokenizer.path={out / 'decoder' / 'tokenizer'}",
                f"seed={seed}",
            ]
            options = [
                "--sizes",
                REPEATS_WIDTH,
                "--budgets",
                REPEATS_BUDGETS,
                "--max-epochs",
                "100",
                "--out",
                str(home),
            ]
            firth("scale", "run", "gpt", *own, *COMMON, *PARTS["decoder"][2], *options, processes=1)
            found += rows(home / "table.jsonl")
    fit(out, "repeats", [*rows(out / "decoder" / "table.jsonl"), *found])


def texts(out: Path) -> None:
    """Train short runs on other texts: how far are the bits per byte from those of the law times the ratio under bzip2?"""
    law = FittedLaw.load(out / "predict-decoder" / "fit.json")
    errors = {}
    for name in TEXTS:
        home = out / "texts" / name
        path = f"data.path=[{','.join(catalog.paths(name, print))}]"
        options = ["--sizes", TEXT_WIDTH, "--budgets", TEXT_BUDGET, "--max-epochs", "4", "--out", str(home)]
        firth("scale", "run", "gpt", path, *COMMON, *PARTS["decoder"][2], *options, processes=1)
        (row,) = rows(home / "table.jsonl")
        ratio = json.loads((home / "text.json").read_text())["compressed_bits"] / law.source["compressed_bits"]
        by_law = law.loss(row["parameters"], row["tokens"]).value * law.bits_per_nat
        errors[name] = float(np.log(row["bits_per_byte"] / (by_law * ratio)))
        print(
            f"{name}: {row['bits_per_byte']:.3f} bits per byte, {by_law * ratio:.3f} by bzip2, {by_law:.3f} of the law's text"
        )
    (out / "texts" / "errors.json").write_text(json.dumps(errors))
    print({name: f"{error:+.1%}" for name, error in errors.items()})


def vocabulary(out: Path) -> None:
    """Train one width at one budget with several vocabularies."""
    for size in VOCABULARIES:
        home = out / "vocabulary" / str(size)
        own = [f"tokenizer.vocab_size={size}", *COMMON[1:], *PARTS["decoder"][2]]
        options = ["--sizes", VOCABULARY_WIDTH, "--budgets", VOCABULARY_BUDGET, "--out", str(home)]
        firth("scale", "run", "gpt", text(), *own, *options, processes=1)
        (row,) = rows(home / "table.jsonl")
        print(f"{size:,} subwords: {row['bits_per_byte']:.3f} bits per byte, {row['tokens']:,} tokens", flush=True)


def encoder_start(out: Path) -> None:
    """Train a masked encoder for some 2 M tokens in several ways."""
    for name, settings in ENCODER_STARTS.items():
        common = (
            text(),
            "schedule.kind=wsd",
            "schedule.warmup_steps=20",
            "evaluation.every=0",
            "evaluation.max_examples=128",
        )
        common += ("tokenizer.vocab_size=1024", "examples.max_length=128", "sample_prompts=[]", "precision=fp32")
        recipe = scaled(load("roberta", [*common, *settings]), ENCODER_WIDTH)
        done = run(recipe, out / "encoder-start" / name.replace(" ", "-"), log=lambda _: None)
        print(f"{name}: loss {done.metrics['valid/loss']:.3f} after {done.tokens:,} tokens", flush=True)


def follow(out: Path) -> None:
    """Plan a run for a text that no fit has seen, type the command, and compare."""
    path = catalog.paths(UNSEEN, print)[0]
    run = out / "follow" / "text"
    hours = f"{MINUTES / 60:.4f}"
    law = str(out / "predict-decoder" / "fit.json")
    options = ["--for", "text", "--calibrate", "--law", law, "--out", str(out / "follow")]
    planned = firth("plan", "--text", path, "--hours", hours, *options)
    command = next(line.strip() for line in planned.splitlines() if line.strip().startswith("firth train"))
    start = time.perf_counter()
    firth(*shlex.split(command)[1:])
    done = json.loads((run / "done.json").read_text())
    print(f"{done['seconds']:.0f} s of training, {time.perf_counter() - start:.0f} s in all, {done['metrics']}")


def ship(out: Path) -> None:
    """Write the law that `firth plan` uses by default, without the paths of this machine; its budgets are those from SHIPPED_FROM on."""
    upper = [row for row in rows(out / "decoder" / "table.jsonl") if row["budget"] >= float(SHIPPED_FROM)]
    law = FittedLaw.load(fit(out, "law-decoder", upper))
    of_all = FittedLaw.load(out / "predict-decoder" / "fit.json")
    source = dict(law.source)
    errors = json.loads((out / "texts" / "errors.json").read_text())
    source["text_error"] = max(map(abs, errors.values()))
    source["recipe"] = source["recipe"] | {"data": source["recipe"]["data"] | {"path": []}}
    source["text"] = ", ".join(CORPORA)
    FILES.mkdir(exist_ok=True)
    replace(law, draws=law.draws[:200], source=source, drift=max(law.drift, of_all.drift)).save(FILES / "decoder.json")


def main(out: Path, parts: list[str]) -> None:
    """Run the parts in order."""
    for part in parts:
        if part in PARTS:
            sweep(out, part)
        elif part in MORE_PARTS:
            MORE_PARTS[part](out)
        else:
            sys.exit(f"there is no part {part}: {', '.join([*PARTS, *MORE_PARTS])}")


MORE_PARTS: dict[str, Callable[[Path], None]] = {
    "predict": lambda out: predict(out, "decoder"),
    "predict-encoder": lambda out: predict(out, "encoder"),
    "repeats": repeats,
    "texts": texts,
    "vocabulary": vocabulary,
    "encoder-start": encoder_start,
    "follow": follow,
    "ship": ship,
}
"""Name -> what runs commands besides those of a sweep."""


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
