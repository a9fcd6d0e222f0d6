"""transformers' Trainer on the tasks of `bench.learn_tasks`: the arm "trainer", one entry of PEERS for each recipe.

    lesson = Lesson(train, test, load("token_classification", settings).examples, classes, steps=80, rows=16, rate=1e-4, seed=0)
    taught("token_classification", lesson, "runs/trainer")       {"f1", "accuracy", ..., "seconds", "tokens", "tested"}: a number each

The records are read by our own readers with MiniLM's tokenizer (whose ids are transformers' own: tests/test_text_foreign), so
both sides see the same rows: words' first pieces, windows of a passage, [CLS] text [SEP] option [SEP]. A row is what it is in
`batch.size` of ours: a text, a sentence, a window of a question, a question with all its options. The model, its head, the
padding collator, the loop and the prediction are transformers', in fp32 as they come; the scores are those of
`firth.evaluate` on its logits. Tokens are those that are no padding, counted batch by batch as ours are.
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

from firth.data.labeled import LabeledTexts, MultipleChoiceRecords, TaggedSentences
from firth.data.question_answering import QuestionRecords
from firth.data.source import Source
from firth.evaluate import answer_spans
from firth.evaluate.task import Answers, Task
from firth.evaluate.tasks import TASKS, question_answering, token_classification
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import IGNORE, Example

Row = dict[str, Any]
Logits = Sequence[np.ndarray]
"""Of each example: of a text (classes,), of a sentence (words asked, tags), of a window (T, 2), of a question (options,)."""


@dataclass(frozen=True)
class Lesson:
    """What both sides are given. examples: how the recipe reads records. classes: the names of labels or tags."""

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
    """How a recipe's task is put to transformers. model: its class. read: (files, tokenizer, lesson, whether to be scored) ->
    examples. shown: an example as its collator takes it. logits: what `predict` says, example by example. answers: as `task`
    scores them."""

    model: str
    collator: str
    task: Task
    read: Callable[[Path, Tokenizer, Lesson, bool], Any]
    shown: Callable[[Example], Row]
    logits: Callable[[Any, Any], Logits]
    answers: Callable[[Any, Logits], Answers]


class Rows(Dataset[Row]):
    """Examples as a Trainer reads them, one at a time."""

    def __init__(self, examples: Source, shown: Callable[[Example], Row]) -> None:
        self.examples, self.shown = examples, shown

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Row:
        return self.shown(self.examples[index])


class Counting(transformers.Trainer):
    """The Trainer, and how many tokens it has learnt from that were no padding, those that it writes among them."""

    tokens = 0
    writes = False

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.tokens += int(inputs["attention_mask"].sum())
        self.tokens += int((inputs["labels"] != IGNORE).sum()) if self.writes else 0
        return super().training_step(model, inputs, num_items_in_batch)


def trained(model: Any, rows: Rows, collator: Any, lesson: Lesson, out: str, writes: bool = False) -> tuple[Any, Row]:
    """(the Trainer behind its last step, {"seconds", "tokens"}): the set-up that all peers share."""
    arguments = transformers.TrainingArguments(
        output_dir=out, max_steps=lesson.steps, per_device_train_batch_size=lesson.rows, seed=lesson.seed,
        learning_rate=lesson.rate, weight_decay=lesson.decay, adam_beta2=lesson.beta2,
        warmup_steps=int(lesson.warmup * lesson.steps), lr_scheduler_type="linear", save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    loop = Counting(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    loop.writes = writes
    began = time.perf_counter()
    loop.train()
    return loop, {"seconds": time.perf_counter() - began, "tokens": loop.tokens}


def taught(recipe: str, lesson: Lesson, start: str, out: str) -> Row:
    """A run from the model in `start`, and all scores that the recipe's task has, on the test."""
    peer, tokenizer = PEERS[recipe], Tokenizer.load(start)
    learnt, asked = (peer.read(path, tokenizer, lesson, path == lesson.test) for path in (lesson.train, lesson.test))
    transformers.set_seed(lesson.seed)
    names = {"num_labels": len(lesson.classes)} if lesson.classes else {}
    model = getattr(transformers, peer.model).from_pretrained(start, **names)
    collator = getattr(transformers, peer.collator)(transformers.AutoTokenizer.from_pretrained(start))
    loop, told = trained(model, Rows(learnt, peer.shown), collator, lesson, out)
    said = loop.predict(Rows(asked, peer.shown)).predictions
    return scored(peer, asked, said) | told | {"tested": tested(asked)}


def scored(peer: Peer, examples: Any, said: Any) -> dict[str, float]:
    """All numbers of the peer's task, of what `predict` says of the examples."""
    columns = peer.answers(examples, peer.logits(examples, said))
    return {name: f(*columns) for name, f in {**peer.task.metrics, **peer.task.extra_metrics(examples)}.items()}


def tested(examples: Any) -> int:
    """Records: several windows may be of one."""
    return len(np.unique(examples.record_ids))


def ids(example: Example) -> Row:
    """The fields that every model of BERT's reads."""
    tokens = example["tokens"].tolist()
    segments = example["token_type_ids"].tolist() if "token_type_ids" in example else [0] * len(tokens)
    return {"input_ids": tokens, "token_type_ids": segments, "attention_mask": [1] * len(tokens)}


def options(example: Example) -> Row:
    """A question's options beside each other."""
    rows = [ids(option) for option in example["options"]]
    return {name: [row[name] for row in rows] for name in rows[0]} | {"labels": example["label"]}


def window(example: Example) -> Row:
    """A window's answer; one that is not in it begins and ends at [CLS]."""
    return ids(example) | {f"{end}_positions": max(0, example[end]) for end in ("start", "end")}


def first_pieces(examples: TaggedSentences, said: np.ndarray) -> Logits:
    """Of the padded logits of sentences, (N, T, tags), those of each word's first piece."""
    found = []
    for i in range(len(examples)):
        tags = examples[i]["tags"]
        found.append(said[i, : len(tags)][tags != IGNORE])
    return found


def both_ends(examples: QuestionRecords, said: Sequence[np.ndarray]) -> Logits:
    """Of the padded logits of first and of last tokens, each (N, T), those of each window's own tokens."""
    lengths = [len(examples[i]["tokens"]) for i in range(len(examples))]
    return [np.stack((start[:n], end[:n]), -1) for start, end, n in zip(*said, lengths, strict=True)]


def chosen(names: Callable[[Any], Sequence[str]]) -> Callable[[Any, Logits], Answers]:
    """What is right and what has the highest logit, by name."""

    def answers(examples: Any, logits: Logits) -> Answers:
        told = names(examples)
        right = [told[examples[i]["label"]] for i in range(len(examples))]
        return right, [told[int(row.argmax())] for row in logits]

    return answers


def labelled(path: Path, tokenizer: Tokenizer, lesson: Lesson, asked: bool) -> LabeledTexts:
    how = lesson.examples
    return LabeledTexts([str(path)], tokenizer, how.max_length, how, classes=lesson.classes)


def tagged(path: Path, tokenizer: Tokenizer, lesson: Lesson, asked: bool) -> TaggedSentences:
    how = lesson.examples
    return TaggedSentences([str(path)], tokenizer, how.max_length, how, classes=lesson.classes, keep=asked)


def windows(path: Path, tokenizer: Tokenizer, lesson: Lesson, asked: bool) -> QuestionRecords:
    how = lesson.examples
    return QuestionRecords(
        [str(path)],
        tokenizer,
        how.max_length,
        stride=how.doc_stride,
        question=how.max_question_length,
        context=how.context_field,
        keep=asked,
    )


def offered(path: Path, tokenizer: Tokenizer, lesson: Lesson, asked: bool) -> MultipleChoiceRecords:
    how = lesson.examples
    return MultipleChoiceRecords([str(path)], tokenizer, how.max_length, how)


PEERS: Mapping[str, Peer] = {
    "classification": Peer(
        "AutoModelForSequenceClassification", "DataCollatorWithPadding", TASKS["classification"], labelled,
        lambda example: ids(example) | {"labels": int(example["label"])},
        lambda examples, said: list(said), chosen(lambda examples: examples.classes),
    ),
    "token_classification": Peer(
        "AutoModelForTokenClassification", "DataCollatorForTokenClassification", TASKS["token_classification"], tagged,
        lambda example: ids(example) | {"labels": example["tags"].tolist()},
        first_pieces,
        lambda examples, logits: token_classification.count_correct(
            examples, token_classification.by_word(examples, iter(logits))
        ),
    ),
    "question_answering": Peer(
        "AutoModelForQuestionAnswering", "DataCollatorWithPadding", TASKS["question_answering"], windows, window, both_ends,
        lambda examples, logits: question_answering.score_answers(
            examples, answer_spans.by_question(examples, iter(logits), has_unanswerable=False)
        ),
    ),
    "multiple_choice": Peer(
        "AutoModelForMultipleChoice", "DataCollatorForMultipleChoice", TASKS["multiple_choice"], offered, options,
        lambda examples, said: list(said), chosen(lambda examples: [str(place) for place in range(examples.most)]),
    ),
}  # fmt: skip
"""Recipe -> its peer."""
