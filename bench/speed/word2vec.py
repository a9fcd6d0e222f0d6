"""Training speed of word2vec in words per second: firth's own loop against gensim, on the same text and cores.

    python -m bench.speed.word2vec            # both algorithms; needs gensim
    python -m bench.speed.word2vec --check

All train vectors of size 100 for 20,000 words on the same random text (Zipf's law), with windows of up to 5, 5 negative
samples and subsampling at 1e-3, on all cores: gensim with as many workers, firth with as many threads. Words are counted
before subsampling. The programs do not do the same arithmetic: firth shares noise words within a row and takes one step for
many rows (`firth.objectives.word2vec`). `bench.learning.recurrent` measures the quality of the vectors.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.harness import EndSample, arguments, command

VOCAB_SIZE, HIDDEN_SIZE, ROWS, LENGTH = 20_000, 100, 16, 512
STEPS_PER_SAMPLE = 64
TEXT = STEPS_PER_SAMPLE * ROWS * LENGTH


def text() -> np.ndarray:
    """Return the words of a random text, (TEXT,): ids from 0 on by frequency."""
    probabilities = 1 / np.arange(1, VOCAB_SIZE + 1)
    return np.random.default_rng(0).choice(VOCAB_SIZE, TEXT, p=probabilities / probabilities.sum())


def gensim(end_sample: EndSample, skipgram: bool) -> None:
    from gensim.models import Word2Vec

    rows = [[str(word) for word in row] for row in text().reshape(-1, LENGTH)]
    model = Word2Vec(
        vector_size=HIDDEN_SIZE,
        window=5,
        negative=5,
        sample=1e-3,
        min_count=1,
        sg=int(skipgram),
        workers=os.cpu_count() or 1,
    )
    model.build_vocab(rows)
    while True:
        model.train(rows, total_examples=len(rows), epochs=1)
        end_sample(TEXT)


def setup(algorithm: Literal["skipgram", "cbow"]) -> tuple[Any, Any, Any]:
    """Return (model, objective, batches) as `firth train word2vec` builds them for this text."""
    import torch

    from firth.data.collate import Batches
    from firth.data.source import Source
    from firth.data.windows import word_counts, word_statistics
    from firth.model.config import word_vector_config
    from firth.model.model import LM
    from firth.objectives.word2vec import Word2Vec
    from firth.tokenizer.vocab import Vocab
    from firth.types import Example

    class Drawn(Source):
        rows = text().reshape(-1, LENGTH)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> Example:
            return {"tokens": self.rows[i]} | statistics

    torch.manual_seed(0)
    vocab = Vocab(VOCAB_SIZE, {}, np.zeros(VOCAB_SIZE, bool))
    objective, config = Word2Vec(algorithm=algorithm), word_vector_config(VOCAB_SIZE, HIDDEN_SIZE)
    source = Drawn()
    statistics = word_statistics(word_counts(source.rows.ravel(), vocab), 1e-3, 0.75)
    return LM(config, objective.heads(config)), objective, Batches(source, objective, vocab, batch_size=ROWS, seed=0)


def firth(end_sample: EndSample, algorithm: Literal["skipgram", "cbow"]) -> None:
    """Run firth's own loop with its progress, log and counting."""
    from firth.recipes.recurrent import word2vec
    from firth.training.logging import NullReporter
    from firth.training.schedule import Budget, Schedule
    from firth.training.trainer import TrainerConfig, train

    def evaluate(_: object, step: int) -> dict[str, float]:
        end_sample(TEXT)
        return {}

    model, objective, batches = setup(algorithm)
    with tempfile.TemporaryDirectory() as directory:
        train(
            model, objective, batches, Path(directory), budget=Budget(max_steps=1_000_000), reporter=NullReporter(),
            optimizer=word2vec().optimizer, schedule=Schedule("constant", warmup_ratio=0), evaluate=evaluate,
            config=TrainerConfig(eval_every=STEPS_PER_SAMPLE, save_every=0, precision="fp32"),
        )  # fmt: skip


CANDIDATES = {
    "gensim, skip-gram": partial(gensim, skipgram=True),
    "gensim, CBOW": partial(gensim, skipgram=False),
    "firth, CBOW": partial(firth, algorithm="cbow"),
    "firth, skip-gram": partial(firth, algorithm="skipgram"),
}


def check() -> None:
    """Assert that both keep words with the same probability, and have the same number of pairs per word."""
    from gensim.models import Word2Vec

    batches = setup("skipgram")[2]
    rows = [[str(word) for word in row] for row in text().reshape(-1, LENGTH)]
    theirs = Word2Vec(vector_size=2, sample=1e-3, min_count=1, epochs=1)
    theirs.build_vocab(rows)
    kept = batches.source[0]["kept"]
    for word in (0, 1, 10, 1000):
        share = theirs.wv.get_vecattr(str(word), "sample_int") / 2**32
        assert abs(min(share, 1.0) - kept[word]) < 1e-3, (word, share, kept[word])
    batch = batches.batches(0)[0]
    pairs = float((batch["left"] + batch["right"]).sum()) / float((batch["words"] >= 0).sum())
    assert 5.8 < pairs < 6.1, pairs  # twice the mean of 1 to 5, less the rows' ends
    print(f"fair: equal subsampling, {pairs:.2f} pairs per word, vectors of size {HIDDEN_SIZE}")


def main() -> None:
    args = arguments(__doc__, CANDIDATES).parse_args()
    if args.check:
        check()
    else:
        command(args, CANDIDATES, unit="words")


if __name__ == "__main__":
    main()
