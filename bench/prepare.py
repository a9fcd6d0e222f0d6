"""From text to the first step: how fast it is read, a tokenizer is trained on it, and it is encoded.

    python -m bench.prepare                          # three corpora of `firth fetch`, 27 MB
    python -m bench.prepare FILES --megabytes 20 --only encode train-byte-bpe --rounds 1

Three questions, each a ratio within a round: all cores against one, of the whole way (hash, held-out documents, tokenizer,
token stores) and of encoding alone; firth's trainer against the tokenizers library's own on the same sample with the same
pre-tokenizer; and how often each file is opened. Each share of work is a process of its own, and one core means that the
process may use no other. What each does is checked: stores on one core and on all have the same hash, and so do merges.
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
from firth.runs.inputs import RunInputs
from firth.runs.prepare import RunData
from firth.runs.recipe import load
from firth.runs.tokenizer import tokenizer_of
from firth.tokenizer import train

CORPORA = ("shakespeare", "sotu", "wordnet")
SIZE = 8192
TRAINED = ("byte-bpe", "bpe", "wordpiece", "unigram")


def documents(paths: Sequence[str], megabytes: float) -> list[Document]:
    """The first documents of the files, so many megabytes of text."""
    found: list[Document] = []
    size = 0
    for document in readers.documents(paths):
        found.append(document)
        size += len(document.text.encode())
        if size >= megabytes * 1e6:
            break
    return found


def encode(some: list[Document]) -> Callable[[], str]:
    """Build a token store; return its hash."""
    tokenizer = train.train((d.text for d in some[:: max(1, len(some) // 100)]), "byte-bpe", SIZE)
    folder = tempfile.TemporaryDirectory()

    def work() -> str:
        with folder:
            return str(TokenStore.build(some, tokenizer, Path(folder.name) / "store").manifest["content"])

    return work


def prepare(some: list[Document]) -> Callable[[], str]:
    """Do all that a run does before its model is made; return the hashes of its stores and how often files are opened."""
    folder = tempfile.TemporaryDirectory()
    texts = Path(folder.name) / "texts"
    texts.mkdir()
    for i, document in enumerate(some):
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
            recipe = load("gpt", [f"data.path={texts}", f"tokenizer.vocab_size={SIZE}"])
            inputs = RunInputs.read(recipe, directory, _silent)
            tokenizer = tokenizer_of(recipe, directory, _silent, inputs)
            stores = RunData(recipe.data, tokenizer, directory, log=_silent).stores()
            times = dict(collections.Counter(opened.values()))
            return f"{[store and store.manifest['content'][:12] for store in stores]}; opened {times}"

    return work


def _silent(_: str) -> None:
    """Nothing is said while the clock runs."""


def trained(some: list[Document], algorithm: str) -> Callable[[], str]:
    """Train a tokenizer; return a hash of its merges, where it has some."""

    def work() -> str:
        made = train.train((d.text for d in some), algorithm, SIZE, byte_fallback=False)
        return _hash([(m.left, m.right) for m in made.merges]) if made.merges else ""

    return work


def by_library(some: list[Document], algorithm: str) -> Callable[[], str]:
    """The same by the library's own trainer, which is given the same first ids."""
    from tokenizers import Tokenizer, models, trainers

    sample = list(train.reservoir((d.text for d in some), 200_000_000, 0))
    engine = train.blank(algorithm, "<unk>")
    made = train.train((d.text for d in some), algorithm, SIZE, byte_fallback=False) if algorithm != "unigram" else None

    def work() -> str:
        if made is None:
            learner = Tokenizer(models.Unigram())
            trainer = trainers.UnigramTrainer(
                vocab_size=SIZE, special_tokens=list(train.CONTROL), unk_token="<unk>", show_progress=False
            )
        else:
            learner = Tokenizer(models.BPE())
            marks = {
                "bpe": {"end_of_word_suffix": train.END},
                "wordpiece": {"continuing_subword_prefix": train.CONTINUATION},
            }
            first = [made.token(i) for i in range(made.vocab.size - len(made.merges))]
            trainer = trainers.BpeTrainer(
                vocab_size=SIZE, special_tokens=first, show_progress=False, **marks.get(algorithm, {})
            )
        learner.normalizer, learner.pre_tokenizer = engine.normalizer, engine.pre_tokenizer
        learner.train_from_iterator(sample, trainer)
        return "" if made is None else _hash(json.loads(learner.to_str())["model"]["merges"])

    return work


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def contenders() -> dict[str, tuple[str, str]]:
    """Question -> the two shares of work that it compares: the one in question, and its peer."""
    return {"prepare": ("prepare@all", "prepare@1"), "encode": ("encode@all", "encode@1")} | {
        f"train-{algorithm}": (f"ours-{algorithm}@all", f"library-{algorithm}@all") for algorithm in TRAINED
    }


def one(name: str, paths: Sequence[str], megabytes: float) -> None:
    """Do one share of work and print its seconds, megabytes and result. The setting up is not timed."""
    what, _, cores = name.partition("@")
    if cores == "1":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    some = documents(paths, megabytes)
    kind, _, algorithm = what.partition("-")
    plain = {"prepare": prepare, "encode": encode}
    work = plain[what](some) if what in plain else (trained if kind == "ours" else by_library)(some, algorithm)
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    size = sum(len(d.text.encode()) for d in some) / 1e6
    print(json.dumps({"seconds": seconds, "megabytes": size, "result": result}))


def share(name: str, given: argparse.Namespace, paths: Sequence[str]) -> dict[str, Any]:
    """Run one share of work in a process of its own."""
    command = [sys.executable, "-m", "bench.prepare", *paths, "--one", name, "--megabytes", str(given.megabytes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name:22s} {found['seconds']:7.2f} s  {found['result']}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="text files or directories; three corpora of `firth fetch` if none")
    parser.add_argument("--megabytes", type=float, default=27, help="of text, from its beginning")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(contenders()), help="some of the questions")
    parser.add_argument("--one", help="do one share of work (this is how the others are started)")
    given = parser.parse_args()
    paths = given.paths or [path for name in CORPORA for path in catalog.paths(name, _silent)]
    if given.one:
        one(given.one, paths, given.megabytes)
        return
    rows = []
    for question in given.only or contenders():
        mine, peer = contenders()[question]
        rounds = [(share(mine, given, paths), share(peer, given, paths)) for _ in range(given.rounds)]
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
    print(f"\n{given.rounds} rounds of {given.megabytes:g} MB; {cpu_name()}, {len(os.sched_getaffinity(0))} cores.")


if __name__ == "__main__":
    main()
