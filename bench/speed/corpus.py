"""Prepared corpora: throughput and memory of `firth prepare`, and memory of a run that reads a corpus.

    python -m bench.speed.corpus prepare FILES --megabytes 200       # 1 and 2 workers, with and without near duplicates
    python -m bench.speed.corpus read                                # 0.5, 5 and 50 million documents

`prepare` copies the beginning of the files, repeated with numbers in between so that no two documents are equal, and prepares it with a
tokenizer that is trained before. The memory is the sum of the resident sizes of all its processes, sampled ten times a second.
`read` opens corpora whose parts are one part of 125,000 documents and 62.5 million tokens, linked many times: the files have the sizes of
real ones, with holes instead of tokens. Each measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import cpu_name
from firth.corpora import catalog, readers
from firth.data.collate import Batches
from firth.data.corpus import PreparedCorpus, open_stores, part_directory, write_manifest
from firth.data.filters import FilterConfig
from firth.data.prepare_corpus import TokenizerChoice, prepare_corpus
from firth.data.prepare_part import PartSettings
from firth.data.stored_arrays import BLOCK_BYTES, block_hash, block_hashes
from firth.data.token_store import FILES, TokenStore
from firth.data.windows import ChunksConfig, Documents, WindowsConfig
from firth.io.integrity import digest, with_digest
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train

CORPORA = ("shakespeare", "sotu", "wordnet")
PART_DOCUMENTS, DOCUMENT_TOKENS = 125_000, 500
DRAWN_BATCHES = 300


def write_text(paths: Sequence[str], target: Path, megabytes: float) -> int:
    """Write records of about 4 kB until there are so many megabytes of text; return the bytes of text."""
    written = number = 0
    while written < megabytes * 1e6:
        with (target / f"{number:03d}.jsonl").open("w", encoding="utf-8") as file:
            for document in readers.documents(paths):
                for start in range(0, len(document.text), 4000):
                    text = f"{number}. {document.text[start : start + 4000]}"
                    file.write(json.dumps({"text": text}) + "\n")
                    written += len(text.encode())
                if written >= megabytes * 1e6:
                    break
        number += 1
    return written


def resident_bytes(pid: int) -> int:
    """Return the resident size of a process and all its children, with shared pages counted in each."""
    total = 0
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        total = int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += sum(resident_bytes(int(child)) for child in (thread / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        pass
    return total


def measure_prepare(folder: Path, workers: int, filtered: bool) -> dict[str, Any]:
    """Prepare the text of a folder in this process; return seconds, peak bytes and the digest of the corpus."""
    peak, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.1):
            peak = max(peak, resident_bytes(os.getpid()))

    out = folder / f"out-{workers}-{filtered}"
    shutil.rmtree(out, ignore_errors=True)
    watcher = threading.Thread(target=sample)
    watcher.start()
    started = time.perf_counter()
    settings = PartSettings(
        "", validation_fraction=0.01, part_bytes=1 << 25, filters=FilterConfig(near_duplicates=filtered)
    )
    corpus = prepare_corpus(
        [str(folder / "text")], out, settings=settings, tokenizer=TokenizerChoice(str(folder / "tokenizer")), workers=workers,
        log=_silent,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    shutil.rmtree(out)
    return {"seconds": seconds, "peak": peak, "content": corpus.content}


def write_linked_corpus(folder: Path, documents: int) -> PreparedCorpus:
    """Write a corpus of the given size whose parts are links to one part with holes instead of tokens."""
    tokenizer = train(["some words of a text"] * 20, "byte-bpe", 300)
    one, offsets = folder / "one", np.arange(PART_DOCUMENTS + 1, dtype=np.int64) * DOCUMENT_TOKENS
    if not one.exists():
        one.mkdir(parents=True)
        sizes = (2 * int(offsets[-1]), offsets.nbytes, 8 * PART_DOCUMENTS)
        for name, size in zip(FILES, sizes, strict=True):
            (one / name).touch()
            os.truncate(one / name, size)
        (one / FILES[1]).write_bytes(offsets.tobytes())
        empty, rest = block_hash(bytes(BLOCK_BYTES)), block_hash(bytes(sizes[0] % BLOCK_BYTES))
        blocks = {FILES[0]: [empty] * (sizes[0] // BLOCK_BYTES) + [rest]} | {
            n: block_hashes(one / n) for n in FILES[1:]
        }
        manifest = {
            "format": 2, "tokenizer": tokenizer.digest, "dtype": "uint16", "opened": True, "documents": PART_DOCUMENTS,
            "tokens": int(offsets[-1]), "bytes": 4 * int(offsets[-1]), "counts": {}, "sizes": dict(zip(FILES, sizes, strict=True)),
            "content": digest(blocks), "blocks": blocks,
        }  # fmt: skip
        (one / "manifest.json").write_text(json.dumps(with_digest(manifest)))
    out = folder / f"linked-{documents}"
    shutil.rmtree(out, ignore_errors=True)
    numbers = range(documents // PART_DOCUMENTS)
    for number in numbers:
        part_directory(out, number).mkdir(parents=True)
        (part_directory(out, number) / "train").symlink_to(one)
    tokenizer.save(out / "tokenizer")
    return write_manifest(out, numbers, tokenizer, {}, {})


def memory() -> dict[str, int]:
    """Return the bytes of this process: resident, and without mapped files."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}


def measure_read(corpus: Path) -> dict[str, Any]:
    """Open a corpus and draw batches of windows and of chunks; return seconds and growth of the memory."""
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    before, started = memory(), time.perf_counter()
    store = open_stores([corpus], tokenizer)[0]
    result: dict[str, Any] = {
        "open": time.perf_counter() - started,
        "documents": len(store),
        "tokens": len(store.tokens),
    }
    result["opened"] = {name: size - before[name] for name, size in memory().items()}
    for name, seconds, source, objective in _sources(store, tokenizer):
        batches = Batches(source, objective, tokenizer.vocab, batch_size=16, seed=0)
        started = time.perf_counter()
        for step in range(DRAWN_BATCHES):
            batches.batches(step)
        result[name] = {
            "index": seconds, "batch": (time.perf_counter() - started) / DRAWN_BATCHES,
            **{field: size - before[field] for field, size in memory().items()},
        }  # fmt: skip
    return result


def _sources(store: TokenStore, tokenizer: Tokenizer) -> Iterator[tuple[str, float, Documents, Objective]]:
    for name, kind, objective in (
        ("windows", WindowsConfig(max_length=256), CausalLM()),
        ("chunks", ChunksConfig(), MLM()),
    ):
        started = time.perf_counter()
        source = Documents(kind, store, tokenizer.vocab)
        yield name, time.perf_counter() - started, source, objective


def _silent(_: str) -> None:
    """Drop messages."""


def run_one(*arguments: str) -> dict[str, Any]:
    """Run a measurement in a process of its own."""
    command = [sys.executable, "-m", "bench.speed.corpus", "one", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(arguments[1:], result, file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "read", "one"))
    parser.add_argument("paths", nargs="*", help="text files or directories; three corpora of `firth fetch` if none")
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--only", nargs="*", help="some of the measurements of prepare: WORKERS or WORKERS-filtered")
    parser.add_argument("--documents", type=int, nargs="*", default=[500_000, 5_000_000, 50_000_000])
    parser.add_argument("--folder", type=Path, help="where to write; a temporary directory by default")
    args = parser.parse_args()
    if args.what == "one":
        kind, *rest = args.paths
        found = (
            measure_read(Path(rest[0]))
            if kind == "read"
            else measure_prepare(Path(rest[0]), int(rest[1]), rest[2] == "yes")
        )
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.what == "prepare":
            _prepare(folder, args)
        else:
            _read(folder, args.documents)
    print(f"\n{cpu_name()}, {len(os.sched_getaffinity(0))} cores.")


def _prepare(folder: Path, args: argparse.Namespace) -> None:
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        write_text(args.paths or [p for name in CORPORA for p in catalog.paths(name, _silent)], text, args.megabytes)
        sample = (d.text for i, d in enumerate(readers.documents([str(text)])) if i % 20 == 0)
        train(sample, "byte-bpe", 8192, sample_bytes=10_000_000).save(folder / "tokenizer")
    size = sum(len(d.text.encode()) for d in readers.documents([str(text)]))
    print("| workers | near duplicates | seconds | MB/s | peak MB of all processes | content |")
    print("|---|---|---|---|---|---|")
    for row in args.only or ("1", "2", "1-filtered", "2-filtered"):
        workers, _, filtered = row.partition("-")
        found = run_one("prepare", str(folder), workers, "yes" if filtered else "no")
        print(
            f"| {workers} | {'dropped' if filtered else 'kept'} | {found['seconds']:.0f} | {size / 1e6 / found['seconds']:.1f} | "
            f"{found['peak'] / 1e6:.0f} | {found['content'][:8]} |"
        )


def _read(folder: Path, counts: Sequence[int]) -> None:
    print("| documents | tokens | open | memory | windows: batch | memory | chunks: index | batch | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for documents in counts:
        found = run_one("read", str(write_linked_corpus(folder, documents).directory))
        sizes = [found[name]["RssAnon"] / 1e6 for name in ("opened", "windows", "chunks")]
        print(
            f"| {found['documents']:,} | {found['tokens']:,} | {found['open'] * 1e3:.0f} ms | {sizes[0]:.1f} MB | "
            f"{found['windows']['batch'] * 1e3:.1f} ms | {sizes[1]:.1f} MB | {found['chunks']['index']:.2f} s | "
            f"{found['chunks']['batch'] * 1e3:.1f} ms | {sizes[2]:.1f} MB |"
        )


if __name__ == "__main__":
    main()
