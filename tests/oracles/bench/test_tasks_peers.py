"""The peers of `bench.learning.tasks`: gold labels have perfect scores, and tokens are counted as in firth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from bench.learning import tasks_translate
from bench.learning.tasks import JOBS, Job, classes, split_rows
from bench.learning.tasks_peers import PEERS, Lesson, Rows, scored, trained
from firth.data.collate import Batches
from firth.data.source import Source
from firth.model.flops import real_tokens
from firth.runs.recipe import load
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import IGNORE, Example

PASSAGE = "The play was written by Anne Lee in the year 1901. " + "It was shown in many towns of the north. " * 6
RECORDS: dict[str, list[dict[str, Any]]] = {
    "classification": [{"text": "a fine film", "label": "good"}, {"text": "dull", "label": "bad"}] * 2,
    "token_classification": [
        {"tokens": ["Anne", "Lee", "of", "Shropshire", "wrote"], "tags": ["B-PER", "I-PER", "O", "B-LOC", "O"]},
        {"tokens": ["Unbelievably", "so"], "tags": ["O", "O"]},
    ],
    "question_answering": [
        {"context": "Anne Lee wrote it in 1901.", "question": "Who wrote it?", "answers": [{"text": "Anne Lee", "start": 0}]},
        {"context": PASSAGE, "question": "When?", "answers": [{"text": "1901", "start": PASSAGE.index("1901")}]},
    ],
    "multiple_choice": [
        {"text": "it grows", "options": ["up and up", "down"], "label": 0},
        {"text": "it sinks", "options": ["up", "down"], "label": 1},
    ],
}  # fmt: skip
SETTINGS = {
    "question_answering": ["examples.max_length=48", "examples.doc_stride=16", "examples.max_question_length=12"]
}


@pytest.fixture(scope="module")
def tokenizer(minilm: Path) -> Tokenizer:
    return Tokenizer.load(minilm)


def make_lesson(recipe: str, directory: Path) -> Lesson:
    path = directory / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in RECORDS[recipe]))
    named = classes(Job("", recipe, (), 0, 0), (path, path))
    return Lesson(
        path, path, load(recipe, SETTINGS.get(recipe, [])).examples, named, steps=2, rows=2, rate=1e-3, seed=0
    )


def gold_logits(recipe: str, rows: list[dict[str, Any]], kinds: int) -> Any:
    """Return the logits of a perfect model for rows, padded with -100."""
    if recipe == "question_answering":
        longest = max(len(row["input_ids"]) for row in rows)
        ends = [np.full((len(rows), longest), -100.0), np.full((len(rows), longest), -100.0)]
        for i, row in enumerate(rows):
            for end, name in zip(ends, ("start_positions", "end_positions"), strict=True):
                end[i, : len(row["input_ids"])] = 0
                end[i, row[name]] = 9
        return ends
    labels = [np.atleast_1d(row["labels"]) for row in rows]
    longest = max(map(len, labels))
    logits = np.full((len(rows), longest, kinds), -100.0)
    for i, row in enumerate(labels):
        logits[i, : len(row)] = np.where(row == IGNORE, 0, row)[:, None] == np.arange(kinds)
    return logits if recipe == "token_classification" else logits[:, 0]


@pytest.mark.parametrize("recipe", list(RECORDS))
def test_gold_labels_have_perfect_scores(recipe: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    peer, lesson = PEERS[recipe], make_lesson(recipe, tmp_path)
    examples = peer.read(lesson.test, tokenizer, lesson, True)
    rows = Rows(examples, peer.to_row)
    kinds = len(lesson.classes) or 2
    found = scored(peer, examples, gold_logits(recipe, [rows[i] for i in range(len(rows))], kinds))
    assert found and set(found.values()) == {1.0}
    wrong = [{**rows[i]} for i in range(len(rows))]
    for row in wrong:  # another class, tag and option everywhere, and another span
        for name in ("start_positions", "end_positions"):
            row[name] = len(row["input_ids"]) - 2
        row["labels"] = np.where(
            np.equal(row.get("labels", 0), IGNORE), IGNORE, (np.array(row.get("labels", 0)) + 1) % kinds
        )
    assert scored(peer, examples, gold_logits(recipe, wrong, kinds))[next(iter(found))] < 0.5


@pytest.mark.parametrize("recipe", list(RECORDS))
def test_rows_have_the_ids_of_transformers(recipe: str, tokenizer: Tokenizer, minilm: Path, tmp_path: Path) -> None:
    peer, lesson = PEERS[recipe], make_lesson(recipe, tmp_path)
    examples = peer.read(lesson.train, tokenizer, lesson, False)
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    rows = [peer.to_row(examples[i]) for i in range(len(examples))]
    objective = load(recipe, []).objective
    if recipe == "question_answering":
        assert len(rows) > len(RECORDS[recipe])  # windows are rows
        question, context = RECORDS[recipe][0]["question"], RECORDS[recipe][0]["context"]
        assert rows[0]["input_ids"] == theirs(question, context)["input_ids"]
        assert (
            theirs.decode(rows[0]["input_ids"][rows[0]["start_positions"] : rows[0]["end_positions"] + 1]) == "anne lee"
        )
    if recipe == "multiple_choice":
        first = RECORDS[recipe][0]
        both = theirs([first["text"]] * 2, first["options"])
        assert [rows[0][name] for name in ("input_ids", "token_type_ids")] == [
            both["input_ids"],
            both["token_type_ids"],
        ]
    if recipe == "token_classification":
        words = theirs(RECORDS[recipe][0]["tokens"], is_split_into_words=True)
        assert rows[0]["input_ids"] == words["input_ids"]
        at = [
            i
            for i, (a, b) in enumerate(zip([None, *words.word_ids()], words.word_ids(), strict=False))
            if b is not None and a != b
        ]
        assert [i for i, tag in enumerate(rows[0]["labels"]) if tag != IGNORE] == at
    if recipe == "classification":
        assert rows[0]["input_ids"] == theirs("a fine film")["input_ids"]
    collator = getattr(transformers, peer.collator)(theirs)
    batch = collator(rows[:2])
    [ours] = Batches(Firsts(examples), objective, tokenizer.vocab, batch_size=2, seed=0).batches(0)
    assert int(batch["attention_mask"].sum()) == real_tokens(ours)


class Firsts(Source):
    """The first two examples of a source, in their order."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Example:
        found: Example = self.of[index]
        return found

    def order(self, seed: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return positions // 2, positions % 2


def test_the_trainer_counts_source_and_target_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, pad_token_id=0, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    engine = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.engine, pad_token="[PAD]")
    pairs = [
        {"source": np.arange(3, 3 + n), "target": np.arange(4, 4 + m)} for n, m in ((2, 5), (6, 3), (4, 4), (1, 1))
    ]
    lesson = Lesson(tmp_path, tmp_path, None, (), steps=2, rows=2, rate=1e-3, seed=0)
    rows = Rows(pairs, tasks_translate.pair)  # type: ignore[arg-type]
    _, found = trained(
        model, rows, transformers.DataCollatorForSeq2Seq(engine, model=model), lesson, str(tmp_path), True
    )
    assert found["tokens"] == 2 + 5 + 6 + 3 + 4 + 4 + 1 + 1


def test_no_test_sentence_is_in_the_training_data() -> None:
    rows = [{"en": f"Sentence {i % 300}.", "es": f"Frase  {i % 170}."} for i in range(600)]
    rows += [{"en": "sentence 1.", "es": "x" * 200}]
    train, test = split_rows(rows, JOBS["translate"])
    for language in tasks_translate.LANGUAGES:
        assert not {row[language] for row in train} & {row[language] for row in test}
    assert train and test and max(len(row["es"]) for row in [*train, *test]) < 200


def test_tags_of_the_test_data_alone_are_classes_too(tmp_path: Path) -> None:
    parts = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for path, tags in zip(parts, (["nn", "at"], ["fw-dts", "nn"]), strict=True):
        path.write_text(json.dumps({"tokens": ["a", "b"], "tags": tags}) + "\n")
    assert classes(JOBS["speech"], parts) == ("at", "fw-dts", "nn")
