"""word2vec, words per second: firth's own loop beside gensim on the same text and the same cores.

    python -m bench.word2vec            # both algorithms; needs gensim
    python -m bench.word2vec --check

All learn vectors of 100 numbers for 20,000 words from the same drawn text (Zipf's law), windows of up to 5, 5 noise words,
subsampling at 1e-3, on all cores: gensim with as many workers, firth with as many threads. A word is a word of the text
before subsampling. The programs do not do the same arithmetic: firth shares noise words within a row and takes one
step for many rows (`firth.objectives.word2vec`). What the vectors are worth stands in `bench.learn_recurrent`.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.harness import EndSample, arguments, command

VOCAB, WIDTH, ROWS, LENGTH = 20_000, 100, 16, 512
STEPS_PER_SAMPLE = 64  # steps in a turn
TEXT = STEPS_PER_SAMPLE * ROWS * LENGTH


def text() -> np.ndarray:
    """Words of a drawn text: (TEXT,), ids from 0 on by frequency."""
    chance = 1 / np.arange(1, VOCAB + 1)
    return np.random.default_rng(0).choice(VOCAB, TEXT, p=chance / chance.sum())


def gensim(end_sample: EndSample, skipgram: bool) -> None:
    from gensim.models import Word2Vec

    rows = [[str(word) for word in row] for row in text().reshape(-1, LENGTH)]
    model = Word2Vec(
        vector_size=WIDTH, window=5, negative=5, sample=1e-3, min_count=1, sg=int(skipgram), workers=os.cpu_count() or 1
    )
    model.build_vocab(rows)
    while True:
        model.train(rows, total_examples=len(rows), epochs=1)
        end_sample(TEXT)


def made(algorithm: Literal["skipgram", "cbow"]) -> tuple[Any, Any, Any]:
    """(model, objective, batches): what `firth train word2vec` builds for this text."""
    import torch

    from firth.data.collate import Batches
    from firth.data.source import Source
    from firth.data.word_windows import WordWindows
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
            return {"tokens": self.rows[i]}

    torch.manual_seed(0)
    vocab = Vocab(VOCAB, {}, np.zeros(VOCAB, bool))
    objective, config = Word2Vec(algorithm=algorithm), word_vector_config(VOCAB, WIDTH)
    source = WordWindows(Drawn(), WordWindows.count(Drawn.rows.ravel(), vocab), sample=1e-3, power=0.75)
    return LM(config, objective.heads(config)), objective, Batches(source, objective, vocab, batch_size=ROWS, seed=0)


def firth(end_sample: EndSample, algorithm: Literal["skipgram", "cbow"]) -> None:
    """firth's own loop with its progress, log and counting."""
    from firth.recipes.recurrent import word2vec
    from firth.train.logging import NullReporter
    from firth.train.schedule import Budget, Schedule
    from firth.train.trainer import TrainerConfig, train

    def evaluate(_: object, step: int) -> dict[str, float]:
        end_sample(TEXT)
        return {}

    model, objective, batches = made(algorithm)
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
    """Both read the same words with the same chance to stay, and draw the same number of pairs for each."""
    from gensim.models import Word2Vec

    batches = made("skipgram")[2]
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
    print(f"fair: the same words stay, {pairs:.2f} pairs a word, vectors of {WIDTH} numbers")


def main() -> None:
    given = arguments(__doc__, CANDIDATES).parse_args()
    if given.check:
        check()
    else:
        command(given, CANDIDATES, unit="words")


if __name__ == "__main__":
    main()
