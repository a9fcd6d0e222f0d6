"""NSP and SOP learn from synthetic texts: the drift of a text, and its topic.

Whole documents are held out, so that lengths, positions and memorized texts do not help: a bug that leaks the label in
training only, or one that hides it from the model, would fail here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.corpora.readers import Document
from firth.data.collate import Batches
from firth.data.token_store import TokenStore
from firth.data.windows import Documents, SegmentPairsConfig
from firth.model.config import encoder_config
from firth.model.model import LM
from firth.objectives.sentence_pairs import NSP, SOP, SentencePairObjective
from firth.tokenizer.train import train as train_tokenizer
from firth.training.logging import NullReporter
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule
from firth.training.step import validate
from firth.training.trainer import TrainerConfig, train

VOCAB_WORDS, TEXT_WORDS = 160, 100
STEPS = {SOP: 60, NSP: 400}
"""Comparing two topics takes longer than detecting a drift: chance for some 200 steps, then a sudden rise."""


def drifting(rng: np.random.Generator) -> np.ndarray:
    """A text whose words move through the vocabulary from its first to its last."""
    return (np.arange(TEXT_WORDS) * (VOCAB_WORDS - 8) // TEXT_WORDS + rng.integers(0, 8, TEXT_WORDS)).clip(
        0, VOCAB_WORDS - 1
    )


def topical(rng: np.random.Generator) -> np.ndarray:
    """A text on one of four topics, each with its own words."""
    return rng.integers(0, VOCAB_WORDS // 4, TEXT_WORDS) + VOCAB_WORDS // 4 * int(rng.integers(0, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "text", "metric", "best"),
    # Every fourth random segment has the same topic and cannot be detected.
    [(SOP(), drifting, "order_accuracy", 1.0), (NSP(), topical, "next_accuracy", 0.875)],
)
def test_signal_is_learned_and_generalizes(
    objective: SentencePairObjective,
    text: Callable[[np.random.Generator], np.ndarray],
    metric: str,
    best: float,
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    made = [Document(str(i), " ".join(f"w{w:03d}" for w in text(rng))) for i in range(300)]
    tokenizer = train_tokenizer([d.text for d in made[:60]], "word", VOCAB_WORDS - 40)
    stores = [
        TokenStore.build(part, tokenizer, tmp_path / n) for n, part in (("learn", made[:240]), ("held", made[240:]))
    ]
    sources = [
        Documents(SegmentPairsConfig(max_length=48, whole_sentences=False), each, tokenizer.vocab) for each in stores
    ]
    torch.manual_seed(0)
    config = encoder_config(tokenizer.vocab.size, 64, 2, max_positions=48).with_fields({"embedding.type_vocab_size": 2})
    model = LM(config, objective.heads(config))

    def held_out() -> float:
        return validate(
            model, objective, Batches(sources[1], objective, tokenizer.vocab, batch_size=32, seed=9).all_batches()
        )[metric]

    assert held_out() < 0.65
    batches = Batches(sources[0], objective, tokenizer.vocab, batch_size=32, seed=0, pack_to_length=48)
    train(
        model, objective, batches, tmp_path / "run", budget=Budget(max_steps=STEPS[type(objective)]),
        optimizer=OptimizerConfig("adamw", lr=1e-3),
        schedule=Schedule("linear", warmup_ratio=0.1), config=TrainerConfig(save_every=0), reporter=NullReporter(),
    )  # fmt: skip
    assert held_out() > best - 0.08
