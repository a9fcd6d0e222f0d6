"""Small runs that the tests of firth.training share; a fork server imports this module, so that processes start quickly."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from firth.data.collate import Batches
from firth.data.source import Source
from firth.model.config import decoder_config
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.objective import num_correct, supervised
from firth.tokenizer.vocab import Vocab
from firth.training.logging import NullReporter
from firth.training.optimizer import OptimizerConfig
from firth.training.run_lock import Interrupted
from firth.training.schedule import Budget, Schedule
from firth.training.step import validate
from firth.training.trainer import TrainerConfig, TrainingResult, train
from firth.types import Batch, Example, Metric, Outputs

VOCAB = Vocab(size=40, roles={"pad": 0}, special=np.arange(40) < 4)


class Chains(Source):
    """Rows of varied length in which each token is the previous one plus 3."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        return {"tokens": (rng.integers(36) + 3 * np.arange(rng.integers(4, 24))) % 36 + 4}


class OnPolicy(Chains):
    """Every third step, samples tokens from the model with torch's random state and appends them to every row."""

    def __init__(self) -> None:
        self.sampled = np.full(4, 5)

    def prepare(self, model: LM, step: int) -> Mapping[str, float]:
        if step % 3:
            return {}
        with torch.no_grad():
            logits = model.heads["lm"](model({"tokens": torch.as_tensor(self.sampled)[None]}))[0]
        self.sampled = torch.multinomial(logits.softmax(-1), 1)[:, 0].numpy()
        return {"sum": float(self.sampled.sum())}

    def state(self) -> dict[str, np.ndarray]:
        return {"sampled": self.sampled}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.sampled = state["sampled"].copy()

    def __getitem__(self, index: int) -> Example:
        return {"tokens": np.concatenate((super().__getitem__(index)["tokens"], self.sampled))}


class WithAccuracy(CausalLM):
    """Causal language modeling with accuracy as a metric."""

    metrics = {"accuracy": Metric("labels")}  # noqa: RUF012

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, labels = supervised(outputs["hidden"], batch["labels"])
        with torch.no_grad():
            correct = num_correct(model.heads["lm"](states), labels)
        return super().loss(model, outputs, batch) | {"accuracy": correct}


def small_model(dropout: float = 0.1, seed: int = 0) -> LM:
    torch.manual_seed(seed)
    config = replace(decoder_config(vocab_size=40, hidden_size=32, num_layers=2, num_heads=2), dropout=dropout)
    return LM(config, WithAccuracy().heads(config))


def small_batches(source: Source | None = None, accumulate: int = 2, rank: int = 0, world: int = 1) -> Batches:
    source = source or OnPolicy()
    return Batches(
        source,
        WithAccuracy(),
        VOCAB,
        batch_size=7,
        seed=3,
        gradient_accumulation_steps=accumulate,
        rank=rank,
        world=world,
    )


def small_run(
    directory: Path, steps: int, config: TrainerConfig | None = None, recipe: str = "r", model: LM | None = None
) -> TrainingResult:
    """Train with dropout, an on-policy source, uneven micro-batches, Muon and AdamW, and validation."""
    torch.set_num_threads(1)
    validation = Batches(Chains(), WithAccuracy(), VOCAB, batch_size=9, seed=4)
    return train(
        small_model() if model is None else model, WithAccuracy(), small_batches(), directory,
        budget=Budget(max_steps=steps), optimizer=OptimizerConfig(lr=0.01), schedule=Schedule(warmup_ratio=0.1),
        config=config or TrainerConfig(save_every=3, eval_every=10, keep=2, precision="fp32"), recipe=recipe, reporter=NullReporter(),
        evaluate=lambda model, _: validate(model, WithAccuracy(), validation.all_batches(), bytes_per_target=2.0),
    )  # fmt: skip


def run_in_process(directory: str, steps: int) -> None:
    """Run in a child process and write how it ended to the file `ended`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.suppress(KeyboardInterrupt):
        try:
            small_run(Path(directory), steps)
            ended = "finished"
        except Interrupted as interrupted:
            ended = str(interrupted)
        Path(directory, "ended").write_text(ended)


class Stuck(Chains):
    """Takes a minute to prepare the third step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def prepare(self, model: LM, step: int) -> Mapping[str, float]:
        if step == 2:
            (self.directory / "stuck").touch()
            time.sleep(60)
        return {}


def stuck_in_process(directory: str) -> None:
    torch.set_num_threads(1)
    train(
        small_model(), WithAccuracy(), small_batches(Stuck(Path(directory))), Path(directory),
        budget=Budget(max_steps=9), config=TrainerConfig(save_every=1, keep=5, precision="fp32"), reporter=NullReporter(),
    )  # fmt: skip
