"""NSP and SOP learn what there is to learn, on texts made so that it shows: the drift of a text, and its topic.

Whole documents are held out, so lengths, places and remembered texts give nothing away: a fault that leaks the answer in
training alone, or one that keeps it from the model, would fail here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.corpora.readers import Document
from firth.data.collate import Batches
from firth.data.token_store import TokenStore
from firth.data.windows import SegmentPairs
from firth.model.config import encoder_config
from firth.model.model import LM
from firth.objectives.next_sentence import NSP
from firth.objectives.sentence_order import SOP
from firth.objectives.sentence_pairs import SentencePairObjective
from firth.tokenizer.train import train as train_tokenizer
from firth.train.logging import NullReporter
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule
from firth.train.trainer import TrainerConfig, train
from firth.train.validate import validate

WORDS, LONG = 160, 100
STEPS = {SOP: 60, NSP: 400}
"""Comparing two topics takes longer than seeing a drift: nothing for some 200 steps, then nearly all at once."""


def drifting(rng: np.random.Generator) -> np.ndarray:
    """A text whose words move through the vocabulary from its first to its last."""
    return (np.arange(LONG) * (WORDS - 8) // LONG + rng.integers(0, 8, LONG)).clip(0, WORDS - 1)


def topical(rng: np.random.Generator) -> np.ndarray:
    """A text of one of four topics, each with words of its own."""
    return rng.integers(0, WORDS // 4, LONG) + WORDS // 4 * int(rng.integers(0, 4))


@pytest.mark.parametrize(
    ("objective", "text", "measure", "most"),
    # Every fourth stranger is of the same topic, and nobody can tell.
    [(SOP(), drifting, "order_accuracy", 1.0), (NSP(), topical, "next_accuracy", 0.875)],
)
def test_what_shows_is_learnt_and_holds_in_other_documents(
    objective: SentencePairObjective,
    text: Callable[[np.random.Generator], np.ndarray],
    measure: str,
    most: float,
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    made = [Document(str(i), " ".join(f"w{w:03d}" for w in text(rng))) for i in range(300)]
    tokenizer = train_tokenizer([d.text for d in made[:60]], "word", WORDS - 40)
    stores = [
        TokenStore.build(part, tokenizer, tmp_path / n) for n, part in (("learn", made[:240]), ("held", made[240:]))
    ]
    sources = [SegmentPairs(each, 48) for each in stores]
    torch.manual_seed(0)
    config = replace(encoder_config(tokenizer.vocab.size, 64, 2, max_positions=48), type_vocab_size=2)
    model = LM(config, objective.heads(config))

    def held_out() -> float:
        return validate(
            model, objective, Batches(sources[1], objective, tokenizer.vocab, batch_size=32, seed=9).all_batches()
        )[measure]

    assert held_out() < 0.65
    batches = Batches(sources[0], objective, tokenizer.vocab, batch_size=32, seed=0, pack_to_length=48)
    train(
        model, objective, batches, tmp_path / "run", budget=Budget(max_steps=STEPS[type(objective)]), optimizer=OptimizerConfig("adamw", lr=1e-3),
        schedule=Schedule("linear", warmup_ratio=0.1), config=TrainerConfig(save_every=0), reporter=NullReporter(),
    )  # fmt: skip
    assert held_out() > most - 0.08
