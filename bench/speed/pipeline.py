"""Speed of the input pipeline alone: data source, examples and batches on one core, in tokens per second.

    python -m bench.speed.pipeline

The text is Python's own help (in every installation, 465 kB), its tokens repeated to 2 M; sentences are its lines and
sentences, 27 tokens on average. The goal (docs/results/index.md): 5 M tokens per second for causal language modeling, 1 M
for masked (1.5 M packed), so that the accelerators in use do not wait for their input.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch

from firth.corpora.readers import Document
from firth.data.collate import Batches
from firth.data.source import Source
from firth.data.token_store import TokenStore
from firth.data.windows import ChunksConfig, Documents, SegmentPairsConfig, WindowsConfig
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.sentence_pairs import NSP
from firth.objectives.seq2seq import SpanCorruption
from firth.tokenizer.train import train

SECONDS = 1.0
ROUNDS = 3


def sentences() -> Iterator[Document]:
    """Yield lines and sentences of at least 40 characters."""
    for name, text in topics.items():
        for number, sentence in enumerate(re.split(r"\n\n|(?<=[.:]) ", text)):
            if len(sentence) >= 40:
                yield Document(f"{name}:{number}", " ".join(sentence.split())[:400])


def speed(batches: Batches) -> float:
    """Return tokens without padding per second of CPU time (one thread), so that other load does not matter."""
    tokens = done = 0
    start = time.process_time()
    while (spent := time.process_time() - start) < SECONDS:
        for batch in batches.batches(done):
            tokens += sum(real(batch, side) for side in ("", "source_") if side + "tokens" in batch)
        done += 1
    return tokens / spent


def real(batch: dict[str, torch.Tensor], side: str) -> int:
    """Return the tokens that are not padding."""
    if side + "key_time" not in batch:
        return batch[side + "tokens"].numel()
    return int((batch[side + "key_time"] < 1 << 30).sum())


class JoinedWindows(WindowsConfig):
    """Windows whose documents attend to each other."""

    isolate = False


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    tokenizer = train(topics.values(), "byte-bpe", vocab_size=8192, seed=0, num_sentinels=100)
    vocab = tokenizer.vocab
    long = [Document(f"{copy}:{name}", text) for copy in range(20) for name, text in topics.items()]
    store = TokenStore.build(long, tokenizer, folder / "long")
    short = TokenStore.build(list(sentences()) * 10, tokenizer, folder / "short")
    print(f"{len(store.tokens)} tokens in {len(store)} documents; {len(short)} sentences of "
          f"{len(short.tokens) / len(short) - 2:.1f} tokens")  # fmt: skip

    def make_batches(source: Source, objective: Objective, batch_size: int, pack_to_length: int = 0) -> Batches:
        return Batches(source, objective, vocab, batch_size=batch_size, seed=0, pack_to_length=pack_to_length)

    pairs = SegmentPairsConfig(max_length=128, whole_sentences=False)
    plain = ChunksConfig(max_length=256, add_special_tokens=False)
    cases = {
        "causal, windows of 256, isolated": (
            5,
            make_batches(Documents(WindowsConfig(max_length=256), store, vocab), CausalLM(), 64),
        ),
        "causal, windows of 256": (
            5,
            make_batches(Documents(JoinedWindows(max_length=256), store, vocab), CausalLM(), 64),
        ),
        "mlm, chunks of 128, padded": (
            1,
            make_batches(Documents(ChunksConfig(max_length=128), store, vocab), MLM(), 64),
        ),
        "mlm, chunks of 256, padded": (
            1,
            make_batches(Documents(ChunksConfig(max_length=256), store, vocab), MLM(), 64),
        ),
        "mlm, sentences packed into 128": (
            1.5,
            make_batches(Documents(ChunksConfig(max_length=128), short, vocab), MLM(), 512, pack_to_length=128),
        ),
        "mlm by words, sentences packed": (
            0,
            make_batches(
                Documents(ChunksConfig(max_length=128), short, vocab), MLM(noise="words"), 512, pack_to_length=128
            ),
        ),
        "nsp + mlm, pairs of 128, padded": (0, make_batches(Documents(pairs, store, vocab), NSP() + MLM(), 64)),
        "span corruption, 256, packed": (
            0,
            make_batches(Documents(plain, store, vocab), SpanCorruption(), 64, pack_to_length=256),
        ),
    }
    too_slow = []
    for name, (goal, batches) in cases.items():
        best = max(speed(batches) for _ in range(ROUNDS))
        print(f"{name:36s} {best / 1e6:6.2f} M tokens/s" + (f"   (goal {goal:g})" if goal else ""), flush=True)
        too_slow += [name] if best < goal * 1e6 else []
    if too_slow:
        sys.exit(f"below the goal: {', '.join(too_slow)}")


if __name__ == "__main__":
    main()
