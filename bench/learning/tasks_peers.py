"""transformers' Trainer on the tasks of `bench.learning.tasks` (the arm "trainer"), with an entry of PEERS per recipe.

    lesson = Lesson(train, test, load("token_classification", settings).examples, classes, steps=80, rows=16, rate=1e-4, seed=0)
    train_and_score("token_classification", lesson, start, "runs/trainer")   # {"f1", "accuracy", ..., "seconds", "tokens", "tested"}

firth's readers read the records with MiniLM's tokenizer (whose ids equal those of transformers: see
tests/oracles/tokenizer/test_hf_tokenizers.py), so both sides train on the same rows: first pieces of words, windows of a
passage, [CLS] text [SEP] option [SEP]. A row is what
firth counts in `batch.size`: a text, a sentence, a window of a question, a question with all its options. The model, its
head, the padding collator, the loop and the prediction are those of transformers, in fp32 with their defaults; the scores
are those of `firth.evaluate` on the logits. Tokens are counted per batch without padding, as in firth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset

from firth.data.records import Purpose, Records
from firth.data.source import Source
from firth.evaluate import heads
from firth.evaluate.task import Answers, Task
from firth.evaluate.tasks import TASKS, question_answering, token_classification
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import IGNORE, Example

Row = dict[str, Any]
Logits = Sequence[np.ndarray]
"""Logits per example: of a text (classes,), a sentence (labeled words, tags), a window (T, 2), a question (options,)."""


@dataclass(frozen=True)
class Lesson:
    """Task and settings of a run.

    Args:
        train: File of training records.
        test: File of test records.
        examples: Examples config of the recipe.
        classes: Names of labels or tags.
        steps: Optimizer steps.
        rows: Rows per step.
        rate: Learning rate.
        seed: Seed.
        decay: Weight decay.
        beta2: Second beta of AdamW.
        warmup: Warmup as a fraction of the steps.
    """

    train: Path
    test: Path
    examples: Any
    classes: tuple[str, ...]
    steps: int
    rows: int
    rate: float
    seed: int
    decay: float = 0.01
    beta2: float = 0.98
    warmup: float = 0.1


@dataclass(frozen=True)
class Peer:
    """Counterpart of a recipe in transformers.

    Args:
        model: Model class.
        collator: Collator class.
        task: Evaluation task of firth.
        read: Maps (file, tokenizer, lesson, whether to score) to examples.
        to_row: Converts an example to a row for the collator.
        logits: Splits the output of `predict` by example.
        answers: Converts logits to the arguments of the metrics of `task`.
    """

    model: str
    collator: str
    task: Task
    read: Callable[[Path, Tokenizer, Lesson, bool], Any]
    to_row: Callable[[Example], Row]
    logits: Callable[[Any, Any], Logits]
    answers: Callable[[Any, Logits], Answers]


class Rows(Dataset[Row]):
    """Data set of examples for a Trainer."""

    def __init__(self, examples: Source, to_row: Callable[[Example], Row]) -> None:
        self.examples, self.to_row = examples, to_row

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Row:
        return self.to_row(self.examples[index])


class Counting(transformers.Trainer):
    """Trainer that counts training tokens without padding; with `count_targets` also those of the targets."""

    tokens = 0
    count_targets = False

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.tokens += int(inputs["attention_mask"].sum())
        self.tokens += int((inputs["labels"] != IGNORE).sum()) if self.count_targets else 0
        return super().training_step(model, inputs, num_items_in_batch)


def trained(
    model: Any, rows: Rows, collator: Any, lesson: Lesson, out: str, count_targets: bool = False
) -> tuple[Any, Row]:
    """Train a model with the settings that all peers share; return the Trainer and {"seconds", "tokens"}."""
    arguments = transformers.TrainingArguments(
        output_dir=out, max_steps=lesson.steps, per_device_train_batch_size=lesson.rows, seed=lesson.seed,
        learning_rate=lesson.rate, weight_decay=lesson.decay, adam_beta2=lesson.beta2,
        warmup_steps=int(lesson.warmup * lesson.steps), lr_scheduler_type="linear", save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    loop = Counting(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    loop.count_targets = count_targets
    started = time.perf_counter()
    loop.train()
    return loop, {"seconds": time.perf_counter() - started, "tokens": loop.tokens}


def train_and_score(recipe: str, lesson: Lesson, start: str, out: str) -> Row:
    """Train from the model in `start`; return all scores of the recipe's task on the test records."""
    peer, tokenizer = PEERS[recipe], Tokenizer.load(start)
    train_examples, test_examples = (
        peer.read(path, tokenizer, lesson, path == lesson.test) for path in (lesson.train, lesson.test)
    )
    transformers.set_seed(lesson.seed)
    names = {"num_labels": len(lesson.classes)} if lesson.classes else {}
    model = getattr(transformers, peer.model).from_pretrained(start, **names)
    collator = getattr(transformers, peer.collator)(transformers.AutoTokenizer.from_pretrained(start))
    loop, stats = trained(model, Rows(train_examples, peer.to_row), collator, lesson, out)
    predictions = loop.predict(Rows(test_examples, peer.to_row)).predictions
    return scored(peer, test_examples, predictions) | stats | {"tested": count_records(test_examples)}


def scored(peer: Peer, examples: Any, predictions: Any) -> dict[str, float]:
    """Return all metrics of the peer's task for the output of `predict`."""
    columns = peer.answers(examples, peer.logits(examples, predictions))
    return {name: f(*columns) for name, f in {**peer.task.metrics, **peer.task.extra_metrics(examples)}.items()}


def count_records(examples: Any) -> int:
    """Return the number of records; a record may have several windows."""
    return len(np.unique(examples.record_ids))


def ids(example: Example) -> Row:
    """Return the input fields of BERT models."""
    tokens = example["tokens"].tolist()
    segments = example["token_type_ids"].tolist() if "token_type_ids" in example else [0] * len(tokens)
    return {"input_ids": tokens, "token_type_ids": segments, "attention_mask": [1] * len(tokens)}


def options(example: Example) -> Row:
    """Return the row of a question with its options."""
    rows = [ids(option) for option in example["options"]]
    return {name: [row[name] for row in rows] for name in rows[0]} | {"labels": example["label"]}


def window(example: Example) -> Row:
    """Return the row of a window; an answer outside it starts and ends at [CLS]."""
    return ids(example) | {f"{end}_positions": max(0, example[end]) for end in ("start", "end")}


def first_pieces(examples: Records, predictions: np.ndarray) -> Logits:
    """Select the logits of the first piece of each word from padded logits of sentences, (N, T, tags)."""
    found = []
    for i in range(len(examples)):
        tags = examples[i]["tags"]
        found.append(predictions[i, : len(tags)][tags != IGNORE])
    return found


def both_ends(examples: Records, predictions: Sequence[np.ndarray]) -> Logits:
    """Select the logits of the tokens of each window from padded start and end logits, each (N, T)."""
    lengths = [len(examples[i]["tokens"]) for i in range(len(examples))]
    return [np.stack((start[:n], end[:n]), -1) for start, end, n in zip(*predictions, lengths, strict=True)]


def compare_labels(names: Callable[[Any], Sequence[str]]) -> Callable[[Any, Logits], Answers]:
    """Return a function that yields the names of the gold and of the predicted class of each example."""

    def answers(examples: Any, logits: Logits) -> Answers:
        stats = names(examples)
        gold = [stats[examples[i]["label"]] for i in range(len(examples))]
        return gold, [stats[int(row.argmax())] for row in logits]

    return answers


def read(path: Path, tokenizer: Tokenizer, lesson: Lesson, keep: bool) -> Records:
    purpose: Purpose = "evaluate" if keep else "train"
    return Records(lesson.examples, [str(path)], tokenizer, classes=lesson.classes, purpose=purpose)


PEERS: Mapping[str, Peer] = {
    "classification": Peer(
        "AutoModelForSequenceClassification", "DataCollatorWithPadding", TASKS["classification"], read,
        lambda example: ids(example) | {"labels": int(example["label"])},
        lambda examples, predictions: list(predictions), compare_labels(lambda examples: examples.classes),
    ),
    "token_classification": Peer(
        "AutoModelForTokenClassification", "DataCollatorForTokenClassification", TASKS["token_classification"], read,
        lambda example: ids(example) | {"labels": example["tags"].tolist()},
        first_pieces,
        lambda examples, logits: token_classification.count_correct(
            examples, token_classification.by_word(examples, iter(logits))
        ),
    ),
    "question_answering": Peer(
        "AutoModelForQuestionAnswering", "DataCollatorWithPadding", TASKS["question_answering"], read, window, both_ends,
        lambda examples, logits: question_answering.score_answers(
            examples, heads.by_question(examples, iter(logits), has_unanswerable=False)
        ),
    ),
    "multiple_choice": Peer(
        "AutoModelForMultipleChoice", "DataCollatorForMultipleChoice", TASKS["multiple_choice"], read, options,
        lambda examples, predictions: list(predictions),
        compare_labels(lambda examples: [str(index) for index in range(examples.longest("lengths"))]),
    ),
}  # fmt: skip
"""Recipe -> peer."""
