"""Held-out data stays held out: records of one prompt and documents of one content are in one split, in every data format."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firth.align.rewards import PreferencePair, Rollout, SampledPreferencesConfig, write_preference_pairs
from firth.corpora.readers import Document
from firth.data.dialogues import DialoguesConfig, PreferencesConfig, Seq2SeqConfig
from firth.data.examples import DataConfig, ExamplesConfig
from firth.data.labeled import LabeledConfig, MultipleChoiceConfig, ScoredConfig, TaggedConfig
from firth.data.question_answering import QuestionsConfig
from firth.data.semi_supervised import MultiAnnotatorConfig
from firth.data.source import Source
from firth.data.split import MIN_RECORDS, content_key, held_out_keys, hold_out
from firth.model.config import decoder_config
from firth.objectives.causal_lm import CausalLM
from firth.objectives.classification import Classification
from firth.objectives.objective import Objective
from firth.objectives.token_tasks import TokenClassification
from firth.runs.prepare import RunData
from firth.runs.recipe import load
from firth.runs.tokenizer import tokenizer_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train

PROMPTS, EACH = 40, 3
"""Prompts, and records per prompt; those of one prompt are not adjacent."""

Row = Callable[[int, int], dict[str, Any]]


def user(i: int) -> dict[str, str]:
    return {"role": "user", "content": f"what is p{i}q ?"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


FORMATS: dict[str, tuple[ExamplesConfig, Row]] = {
    "messages": (DialoguesConfig(), lambda i, k: {"messages": [user(i), assistant(f"answer {k}")]}),
    "a dialogue that goes on": (
        DialoguesConfig(),
        lambda i, k: {"messages": [user(i), assistant(f"answer {k}"), *([user(i + 999), assistant("so")] * k)]},
    ),
    "prompt and completion": (DialoguesConfig(), lambda i, k: {"prompt": f"what is p{i}q ?", "completion": f"answer {k}"}),
    "text to text": (Seq2SeqConfig(), lambda i, k: {"prompt": f"what is p{i}q ?", "completion": f"answer {k}"}),
    "a form of fields": (
        Seq2SeqConfig(prompt_template="in French: {en}", completion_template="{fr}"),
        lambda i, k: {"en": f"the word p{i}q", "fr": f"mot {k}"},
    ),
    "preferences": (
        PreferencesConfig(),
        lambda i, k: {"prompt": f"what is p{i}q ?", "chosen": f"good {k}", "rejected": f"bad {k}"},
    ),
    "whole dialogues": (
        PreferencesConfig(),
        lambda i, k: {"chosen": [user(i), assistant(f"good {k}")], "rejected": [user(i), assistant(f"bad {k}")]},
    ),
    "labeled rows": (LabeledConfig(), lambda i, k: {"text": f"a film p{i}q", "label": "ab"[k % 2]}),
    "pairs": (
        LabeledConfig(text_pair_field="other"),
        lambda i, k: {"text": f"a film p{i}q", "other": f"hypothesis {k}", "label": "ab"[k % 2]},
    ),
    "scores": (ScoredConfig(text_pair_field="other"), lambda i, k: {"text": f"a film p{i}q", "other": f"a book {k}", "label": k + 0.5}),
    "options": (MultipleChoiceConfig(), lambda i, k: {"text": f"she opens p{i}q", "options": [f"the door {k}", "a sea"], "label": 0}),
    "tags": (TaggedConfig(), lambda i, k: {"tokens": ["the", f"p{i}q"], "tags": ["O", f"B-{'XY'[k % 2]}"]}),
    "questions": (
        QuestionsConfig(max_length=64, max_question_length=16),
        lambda i, k: {"context": f"it is p{i}q .", "question": f"what is {k} ?", "answers": [{"text": "it", "start": 0}]},
    ),
    "votes": (MultiAnnotatorConfig(), lambda i, k: {"text": f"a film p{i}q", "labels": ["a", "ab"[k % 2]]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["what is the answer of a film ? good bad " * 9], "byte-bpe", vocab_size=400)


def run_data(tokenizer: Tokenizer, folder: Path, path: str, **source: Any) -> tuple[RunData, list[str]]:
    lines: list[str] = []
    return RunData(DataConfig(path=(path,), **source), tokenizer, folder / "run", log=lines.append), lines


def prompts(source: Source, tokenizer: Tokenizer) -> set[str]:
    """Return the numbers of the prompts that occur in the examples of a source."""
    found: set[str] = set()
    for i in range(len(source)):
        example = source[i]
        rows = [example, *example.get("options", [])]
        ids = [row[name] for row in rows for name in row if "tokens" in name or name in ("source", "target")]
        found |= {n for some in ids for n in re.findall(r"p(\d+)q", tokenizer.decode(some)) if int(n) < 999}
    return found


@pytest.mark.parametrize("data_format", FORMATS)
def test_a_prompt_is_in_one_split(data_format: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Regression: six pairs of one prompt were split so that every held-out prompt was trained on."""
    examples, row = FORMATS[data_format]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row(i, k)) + "\n" for k in range(EACH) for i in range(PROMPTS)))
    objective: Objective = (
        TokenClassification()
        if data_format == "tags"
        else Classification()
        if data_format == "labeled rows"
        else CausalLM()
    )
    made, _ = run_data(tokenizer, tmp_path, str(file), validation_fraction=0.2)
    splits = examples.build(made, objective.configure(lambda: examples.stats(made), decoder_config(300, 64, 1)))
    assert splits.validation is not None
    trained, held = prompts(splits.train, tokenizer), prompts(splits.validation, tokenizer)
    assert len(held) > 3 and len(trained | held) == PROMPTS
    assert trained.isdisjoint(held)


def test_the_split_of_a_prompt_is_the_same_in_every_stage(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Prompts held out in instruction tuning are held out from the reward model, in any order of records."""
    held = []
    for data_format in ("messages", "prompt and completion", "preferences", "whole dialogues"):
        examples, row = FORMATS[data_format]
        rows = [json.dumps(row(i, 1)) for i in range(PROMPTS)]
        (tmp_path / "records.jsonl").write_text("\n".join(rows if len(held) % 2 else rows[::-1]))
        made, _ = run_data(tokenizer, tmp_path, str(tmp_path / "records.jsonl"), validation_fraction=0.2)
        held.append(prompts(examples.build(made, CausalLM()).validation or made, tokenizer))  # type: ignore[arg-type]
    assert held[0] and all(one == held[0] for one in held)


def test_sampled_preferences_of_a_prompt_are_in_one_split(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = []
    for k in range(EACH):
        for i in range(PROMPTS):
            good, bad = (
                Rollout(tokenizer.encode(f"p{i}q ?"), tokenizer.encode(f"{word} {k}"), f"{word} {k}", True)
                for word in ("yes", "no")
            )
            rows.append(PreferencePair(good, bad, 1.0))
    write_preference_pairs(rows, tmp_path / "pairs.jsonl", tokenizer.decode)
    made, _ = run_data(tokenizer, tmp_path, str(tmp_path / "pairs.jsonl"), validation_fraction=0.2)
    splits = SampledPreferencesConfig().build(made, CausalLM())
    assert splits.validation is not None and prompts(splits.validation, tokenizer)
    assert prompts(splits.train, tokenizer).isdisjoint(prompts(splits.validation, tokenizer))


def test_duplicates_are_counted_and_the_first_is_reported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": f"a film {i % 40}", "label": "ab"[i % 2]} for i in range(60)]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, _ = run_data(tokenizer, tmp_path, str(file))
    splits = LabeledConfig().build(
        made, Classification().configure(lambda: LabeledConfig().stats(made), decoder_config(300, 64, 1))
    )
    assert splits.counts["duplicates"] == 20
    assert f"20 records have the same content as an earlier one; the first is {file}:41" in splits.notes


def test_one_prompt_for_all_records_holds_nothing_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "write a poem", "completion": f"rose {i}"} for i in range(30)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made, _ = run_data(tokenizer, tmp_path, str(tmp_path / "records.jsonl"))
    splits = DialoguesConfig().build(made, CausalLM())
    assert splits.validation is None and "they have 1 different prompts or texts" in splits.no_validation_reason


def texts_of(folder: Path, texts: list[str]) -> str:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text)
    return str(folder)


def documents(source: Any, tokenizer: Tokenizer) -> set[str]:
    if source is None:
        return set()
    ends = source.offsets
    return {tokenizer.decode(source.tokens[a:b]) for a, b in itertools.pairwise(ends)}


def test_duplicate_documents_are_in_one_split(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Some documents occur twice, one of the copies with other white space."""
    texts = [f"the film {i % 40} is good" for i in range(60)]
    texts[50] = texts[50].replace(" ", "\n  ")
    made, lines = run_data(tokenizer, tmp_path, texts_of(tmp_path / "texts", texts), validation_fraction=0.2)
    train_store, valid_store = made.stores()
    trained, held = ({" ".join(t.split()) for t in documents(s, tokenizer)} for s in (train_store, valid_store))
    assert held and trained.isdisjoint(held) and len(trained | held) == 40
    [line] = [line for line in lines if line.startswith("duplicates")]
    assert "20 of 60 documents" in line and line.endswith("the first is 040.txt")


def test_a_mixture_holds_out_a_text_from_all_paths(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same texts in another order have other names, so each path alone would hold out others."""
    texts = [f"the film {i} is good" for i in range(30)]
    paths = [texts_of(tmp_path / "first", texts), texts_of(tmp_path / "second", texts[::-1])]
    source = DataConfig(path=tuple(paths), weights=(1, 1), validation_fraction=0.2)
    per_path = RunData(source, tokenizer, tmp_path / "run", log=lambda _: None).per_path()
    stores = [data.stores() for data in per_path]
    trained = set().union(*(documents(train_store, tokenizer) for train_store, _ in stores))
    held = set().union(*(documents(valid_store, tokenizer) for _, valid_store in stores))
    assert len(held) > 4 and trained.isdisjoint(held) and len(trained | held) == 30


def test_documents_in_named_held_out_files_are_reported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    paths = [texts_of(tmp_path / name, [f"the film {i}" for i in some]) for name, some in
             (("train", range(10)), ("held", range(8, 12)))]  # fmt: skip
    made, lines = run_data(tokenizer, tmp_path, paths[0], validation_path=(paths[1],))
    made.stores()
    assert any(
        "2 documents in data.path have the content of a document in data.validation_path" in line for line in lines
    )


@pytest.mark.parametrize("kind", ["documents", "records"])
@pytest.mark.parametrize("marked", ["held out", "trained on"])
def test_the_tokenizer_is_not_trained_on_held_out_text(kind: str, marked: str, tmp_path: Path) -> None:
    """A character that occurs only in held-out text is in no token; one that occurs only in training text is."""
    texts = [f"the film {i} is good" for i in range(40)]
    if kind == "documents":
        names = hold_out((Document(f"{i:03d}.txt", text) for i, text in enumerate(texts)), 0.2).names
        held = [f"{i:03d}.txt" in names for i in range(40)]
    else:
        keys = [content_key(json.dumps([["user", text]])) for text in texts]
        held = held_out_keys(np.array(keys, np.uint64), 0.2, 40).tolist()
    assert 1 < sum(held) < 20
    characters = ["%" if out == (marked == "held out") else "." for out in held]
    if kind == "documents":
        path, recipe = (
            texts_of(tmp_path / "texts", [f"{t} {character}" for t, character in zip(texts, characters, strict=True)]),
            "gpt",
        )
    else:
        rows = [{"prompt": text, "completion": character} for text, character in zip(texts, characters, strict=True)]
        path, recipe = str(tmp_path / "records.jsonl"), "sft"
        Path(path).write_text("\n".join(map(json.dumps, rows)))
    settings = [
        f"data.path={path}",
        "data.validation_fraction=0.2",
        "tokenizer.vocab_size=400",
        "tokenizer.algorithm=wordpiece",
    ]
    made = tokenizer_of(load(recipe, settings), tmp_path / "run", lambda _: None)
    assert any("%" in token for token in made.engine.get_vocab()) == (marked == "trained on")


def test_few_records_hold_nothing_out() -> None:
    keys = np.array([content_key(str(i)) for i in range(MIN_RECORDS)], np.uint64)
    assert held_out_keys(keys, 0.5, MIN_RECORDS).any()
    assert not held_out_keys(keys[1:], 0.5, MIN_RECORDS - 1).any()
    assert not held_out_keys(keys[:1].repeat(30), 0.99999, 30).any()
