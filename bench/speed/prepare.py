"""Speed of data preparation: reading text, training a tokenizer, and encoding.

    python -m bench.speed.prepare                          # three corpora of `firth fetch`, 27 MB
    python -m bench.speed.prepare FILES --megabytes 20 --only encode train-byte-bpe --rounds 1

Comparisons, each a ratio within a round: all cores against one, for the whole preparation (hash, held-out documents,
tokenizer, token stores) and for encoding alone; firth's tokenizer training against that of the tokenizers library on the same
sample with the same pre-tokenizer. The output also has the number of times that each file is opened. Each measurement is a
process of its own; on one core its CPU affinity is set. Results are checked: stores of one core and of all cores have the
same hash, and so have the merges.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.harness import cpu_name
from firth.corpora import catalog, readers
from firth.corpora.readers import Document
from firth.data.token_store import TokenStore
from firth.runs.input_hashes import RunInputs
from firth.runs.prepare import RunData
from firth.runs.recipe import load
from firth.runs.tokenizer import tokenizer_of
from firth.tokenizer import train

CORPORA = ("shakespeare", "sotu", "wordnet")
VOCAB_SIZE = 8192
ALGORITHMS = ("byte-bpe", "bpe", "wordpiece", "unigram")


def documents(paths: Sequence[str], megabytes: float) -> list[Document]:
    """Return the first documents of the files, up to so many megabytes of text."""
    result: list[Document] = []
    size = 0
    for document in readers.documents(paths):
        result.append(document)
        size += len(document.text.encode())
        if size >= megabytes * 1e6:
            break
    return result


def encode(selected: list[Document]) -> Callable[[], str]:
    """Build a token store; return its hash."""
    tokenizer = train.train((d.text for d in selected[:: max(1, len(selected) // 100)]), "byte-bpe", VOCAB_SIZE)
    folder = tempfile.TemporaryDirectory()

    def work() -> str:
        with folder:
            return str(TokenStore.build(selected, tokenizer, Path(folder.name) / "store").manifest["content"])

    return work


def prepare(selected: list[Document]) -> Callable[[], str]:
    """Prepare the data of a run; return the hashes of its stores and how often files are opened."""
    folder = tempfile.TemporaryDirectory()
    texts = Path(folder.name) / "texts"
    texts.mkdir()
    for i, document in enumerate(selected):
        (texts / f"{i:06d}.txt").write_text(document.text, "utf-8")
    opened: collections.Counter[str] = collections.Counter()

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).startswith(str(texts)):
            opened[str(args[0])] += 1

    sys.addaudithook(note)

    def work() -> str:
        with folder:
            directory = Path(folder.name) / "run"
            directory.mkdir()
            recipe = load("gpt", [f"data.path={texts}", f"tokenizer.vocab_size={VOCAB_SIZE}"])
            inputs = RunInputs.read(recipe, directory, _silent)
            tokenizer = tokenizer_of(recipe, directory, _silent, inputs)
            stores = RunData(recipe.data, tokenizer, directory, log=_silent).stores()
            times = dict(collections.Counter(opened.values()))
            return f"{[store and store.manifest['content'][:12] for store in stores]}; opened {times}"

    return work


def _silent(_: str) -> None:
    """Drop progress lines."""


def train_firth(selected: list[Document], algorithm: str) -> Callable[[], str]:
    """Train a tokenizer; return a hash of its merges, or "" without merges."""

    def work() -> str:
        tokenizer = train.train((d.text for d in selected), algorithm, VOCAB_SIZE, byte_fallback=False)
        return _hash([(m.left, m.right) for m in tokenizer.merges]) if tokenizer.merges else ""

    return work


def train_library(selected: list[Document], algorithm: str) -> Callable[[], str]:
    """Train with the library's trainer, with the same initial ids."""
    from tokenizers import Tokenizer, models, trainers

    sample = list(train.reservoir((d.text for d in selected), 200_000_000, 0))
    engine = train.blank(algorithm, "<unk>")
    tokenizer = (
        train.train((d.text for d in selected), algorithm, VOCAB_SIZE, byte_fallback=False)
        if algorithm != "unigram"
        else None
    )

    def work() -> str:
        if tokenizer is None:
            library_tokenizer = Tokenizer(models.Unigram())
            trainer = trainers.UnigramTrainer(
                vocab_size=VOCAB_SIZE, special_tokens=list(train.CONTROL), unk_token="<unk>", show_progress=False
            )
        else:
            library_tokenizer = Tokenizer(models.BPE())
            affixes = {
                "bpe": {"end_of_word_suffix": train.END},
                "wordpiece": {"continuing_subword_prefix": train.CONTINUATION},
            }
            initial_ids = [tokenizer.token(i) for i in range(tokenizer.vocab.size - len(tokenizer.merges))]
            trainer = trainers.BpeTrainer(
                vocab_size=VOCAB_SIZE, special_tokens=initial_ids, show_progress=False, **affixes.get(algorithm, {})
            )
        library_tokenizer.normalizer, library_tokenizer.pre_tokenizer = engine.normalizer, engine.pre_tokenizer
        library_tokenizer.train_from_iterator(sample, trainer)
        return "" if tokenizer is None else _hash(json.loads(library_tokenizer.to_str())["model"]["merges"])

    return work


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def candidates() -> dict[str, tuple[str, str]]:
    """Return the two measurements of each comparison: the one in question, and its peer."""
    return {"prepare": ("prepare@all", "prepare@1"), "encode": ("encode@all", "encode@1")} | {
        f"train-{algorithm}": (f"ours-{algorithm}@all", f"library-{algorithm}@all") for algorithm in ALGORITHMS
    }


def measure(name: str, paths: Sequence[str], megabytes: float) -> None:
    """Print seconds, megabytes and result of a measurement. The setup is not timed."""
    what, _, cores = name.partition("@")
    if cores == "1":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    selected = documents(paths, megabytes)
    kind, _, algorithm = what.partition("-")
    setups = {"prepare": prepare, "encode": encode}
    work = (
        setups[what](selected)
        if what in setups
        else (train_firth if kind == "ours" else train_library)(selected, algorithm)
    )
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    size = sum(len(d.text.encode()) for d in selected) / 1e6
    print(json.dumps({"seconds": seconds, "megabytes": size, "result": result}))


def run_one(name: str, args: argparse.Namespace, paths: Sequence[str]) -> dict[str, Any]:
    """Run a measurement in a process of its own."""
    command = [sys.executable, "-m", "bench.speed.prepare", *paths, "--one", name, "--megabytes", str(args.megabytes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name:22s} {result['seconds']:7.2f} s  {result['result']}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="text files or directories; three corpora of `firth fetch` if none")
    parser.add_argument("--megabytes", type=float, default=27, help="megabytes of text, from the start")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(candidates()), help="some of the comparisons")
    parser.add_argument("--one", help="run one measurement in this process")
    args = parser.parse_args()
    paths = args.paths or [path for name in CORPORA for path in catalog.paths(name, _silent)]
    if args.one:
        measure(args.one, paths, args.megabytes)
        return
    rows = []
    for question in args.only or candidates():
        ours, peer = candidates()[question]
        rounds = [(run_one(ours, args, paths), run_one(peer, args, paths)) for _ in range(args.rounds)]
        ratios = [b["seconds"] / a["seconds"] for a, b in rounds]
        speeds = [statistics.median(side[i]["megabytes"] / side[i]["seconds"] for side in rounds) for i in (0, 1)]
        same = "yes" if len({side["result"] for pair in rounds for side in pair}) == 1 else "NO"
        rows.append(
            f"| {question} | {speeds[0]:.1f} | {speeds[1]:.1f} | **{statistics.median(ratios):.2f}x** "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {same if rounds[0][0]['result'] else ''} |"
        )
    print("| | MB/s, all cores (training: firth's) | MB/s, one core (training: the library's) | ratio | same result |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\n{args.rounds} rounds of {args.megabytes:g} MB; {cpu_name()}, {len(os.sched_getaffinity(0))} cores.")


if __name__ == "__main__":
    main()
