"""What is held out stays out: records of one prompt and documents of one content are on one side, in every shape of data."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firth.align.rewards import PreferencePair, Rollout, write_preference_pairs
from firth.corpora.readers import Document
from firth.data.source import Source
from firth.data.split import MIN_RECORDS, content_key, held_out_keys, hold_out
from firth.objectives.causal_lm import CausalLM
from firth.objectives.classification import Classification
from firth.objectives.objective import Objective
from firth.objectives.token_classification import TokenClassification
from firth.runs.alignment_examples import SampledPreferencesConfig
from firth.runs.examples import DialoguesConfig, ExamplesConfig, PreferencesConfig, Seq2SeqConfig
from firth.runs.labeled_examples import LabeledConfig, MultipleChoiceConfig, QuestionsConfig, ScoredConfig, TaggedConfig
from firth.runs.noisy_label_examples import MultiAnnotatorConfig
from firth.runs.prepare import DataConfig, RunData
from firth.runs.recipe import load
from firth.runs.tokenizer import tokenizer_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train

PROMPTS, EACH = 40, 3
"""Prompts, and records of each: not one after the other."""

Row = Callable[[int, int], dict[str, Any]]


def user(i: int) -> dict[str, str]:
    return {"role": "user", "content": f"what is p{i}q ?"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SHAPES: dict[str, tuple[ExamplesConfig, Row]] = {
    "messages": (DialoguesConfig(), lambda i, k: {"messages": [user(i), says(f"answer {k}")]}),
    "a dialogue that goes on": (
        DialoguesConfig(),
        lambda i, k: {"messages": [user(i), says(f"answer {k}"), *([user(i + 999), says("so")] * k)]},
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
        lambda i, k: {"chosen": [user(i), says(f"good {k}")], "rejected": [user(i), says(f"bad {k}")]},
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


def material(tokenizer: Tokenizer, folder: Path, path: str, **source: Any) -> tuple[RunData, list[str]]:
    said: list[str] = []
    return RunData(DataConfig(path=(path,), **source), tokenizer, folder / "run", log=said.append), said


def prompts(source: Source, tokenizer: Tokenizer) -> set[str]:
    """The numbers of the prompts that are anywhere in the examples of a source."""
    found: set[str] = set()
    for i in range(len(source)):
        example = source[i]
        rows = [example, *example.get("options", [])]
        ids = [row[name] for row in rows for name in row if "tokens" in name or name in ("source", "target")]
        found |= {n for some in ids for n in re.findall(r"p(\d+)q", tokenizer.decode(some)) if int(n) < 999}
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_is_on_one_side(shape: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Six pairs of one prompt were split so that every held-out prompt was trained on."""
    examples, row = SHAPES[shape]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row(i, k)) + "\n" for k in range(EACH) for i in range(PROMPTS)))
    objective: Objective = (
        TokenClassification() if shape == "tags" else Classification() if shape == "labeled rows" else CausalLM()
    )
    made, _ = material(tokenizer, tmp_path, str(file), held_out=0.2)
    cut = examples.build(made, examples.configure_objective(objective, made))
    assert cut.validation is not None
    learnt, held = prompts(cut.train, tokenizer), prompts(cut.validation, tokenizer)
    assert len(held) > 3 and len(learnt | held) == PROMPTS
    assert learnt.isdisjoint(held)


def test_the_side_of_a_prompt_is_the_same_in_every_stage(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Instruction tuning, a reward model and their order of records: what one holds out, the next does not train on."""
    held = []
    for shape in ("messages", "prompt and completion", "preferences", "whole dialogues"):
        examples, row = SHAPES[shape]
        rows = [json.dumps(row(i, 1)) for i in range(PROMPTS)]
        (tmp_path / "records.jsonl").write_text("\n".join(rows if len(held) % 2 else rows[::-1]))
        made, _ = material(tokenizer, tmp_path, str(tmp_path / "records.jsonl"), held_out=0.2)
        held.append(prompts(examples.build(made, CausalLM()).validation or made, tokenizer))  # type: ignore[arg-type]
    assert held[0] and all(one == held[0] for one in held)


def test_sampled_comparisons_of_a_prompt_are_on_one_side(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = []
    for k in range(EACH):
        for i in range(PROMPTS):
            good, bad = (
                Rollout(tokenizer.encode(f"p{i}q ?"), tokenizer.encode(f"{word} {k}"), f"{word} {k}", True)
                for word in ("yes", "no")
            )
            rows.append(PreferencePair(good, bad, 1.0))
    write_preference_pairs(rows, tmp_path / "pairs.jsonl", tokenizer.decode)
    made, _ = material(tokenizer, tmp_path, str(tmp_path / "pairs.jsonl"), held_out=0.2)
    cut = SampledPreferencesConfig().build(made, CausalLM())
    assert cut.validation is not None and prompts(cut.validation, tokenizer)
    assert prompts(cut.train, tokenizer).isdisjoint(prompts(cut.validation, tokenizer))


def test_duplicates_are_counted_and_the_first_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": f"a film {i % 40}", "label": "ab"[i % 2]} for i in range(60)]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, _ = material(tokenizer, tmp_path, str(file))
    cut = LabeledConfig().build(made, LabeledConfig().configure_objective(Classification(), made))
    assert cut.counts["duplicates"] == 20
    assert f"20 records have the same content as an earlier one; the first is {file}:41" in cut.notes


def test_one_prompt_for_all_records_holds_nothing_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "write a poem", "completion": f"rose {i}"} for i in range(30)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made, _ = material(tokenizer, tmp_path, str(tmp_path / "records.jsonl"))
    cut = DialoguesConfig().build(made, CausalLM())
    assert cut.validation is None and "they have 1 different prompts or texts" in cut.no_validation_reason


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


def test_duplicate_documents_are_on_one_side(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two of three documents occur twice, one of the copies with other white space."""
    texts = [f"the film {i % 40} is good" for i in range(60)]
    texts[50] = texts[50].replace(" ", "\n  ")
    made, said = material(tokenizer, tmp_path, texts_of(tmp_path / "texts", texts), held_out=0.2)
    train_store, valid_store = made.stores()
    learnt, held = ({" ".join(t.split()) for t in documents(s, tokenizer)} for s in (train_store, valid_store))
    assert held and learnt.isdisjoint(held) and len(learnt | held) == 40
    [line] = [line for line in said if line.startswith("duplicates")]
    assert "20 of 60 documents" in line and line.endswith("the first is 040.txt")


def test_a_mixture_does_not_train_on_what_another_path_holds_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same texts in another order have other names, so each path would hold out others."""
    texts = [f"the film {i} is good" for i in range(30)]
    paths = [texts_of(tmp_path / "first", texts), texts_of(tmp_path / "second", texts[::-1])]
    source = DataConfig(path=tuple(paths), weights=(1, 1), validation_fraction=0.2)
    parts = RunData(source, tokenizer, tmp_path / "run", log=lambda _: None).per_path()
    stores = [part.stores() for part in parts]
    learnt = set().union(*(documents(train_store, tokenizer) for train_store, _ in stores))
    held = set().union(*(documents(valid_store, tokenizer) for _, valid_store in stores))
    assert len(held) > 4 and learnt.isdisjoint(held) and len(learnt | held) == 30


def test_documents_in_named_held_out_files_are_reported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    paths = [texts_of(tmp_path / name, [f"the film {i}" for i in some]) for name, some in
             (("learnt", range(10)), ("held", range(8, 12)))]  # fmt: skip
    made, said = material(tokenizer, tmp_path, paths[0], valid=(paths[1],))
    made.stores()
    assert any(
        "2 documents in data.path have the content of a document in data.validation_path" in line for line in said
    )


@pytest.mark.parametrize("kind", ["documents", "records"])
@pytest.mark.parametrize("marked", ["held out", "trained on"])
def test_the_tokenizer_is_not_trained_on_held_out_text(kind: str, marked: str, tmp_path: Path) -> None:
    """A sign that only held-out text has is in no token, and one that only training text has is."""
    texts = [f"the film {i} is good" for i in range(40)]
    if kind == "documents":
        names = hold_out((Document(f"{i:03d}.txt", text) for i, text in enumerate(texts)), 0.2).names
        held = [f"{i:03d}.txt" in names for i in range(40)]
    else:
        keys = [content_key(json.dumps([["user", text]])) for text in texts]
        held = held_out_keys(np.array(keys, np.uint64), 0.2, 40).tolist()
    assert 1 < sum(held) < 20
    signs = ["%" if out == (marked == "held out") else "." for out in held]
    if kind == "documents":
        path, recipe = (
            texts_of(tmp_path / "texts", [f"{t} {sign}" for t, sign in zip(texts, signs, strict=True)]),
            "gpt",
        )
    else:
        rows = [{"prompt": text, "completion": sign} for text, sign in zip(texts, signs, strict=True)]
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
