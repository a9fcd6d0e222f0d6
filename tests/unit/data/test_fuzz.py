"""Records, tables, recipes and files of every kind, changed at random: each is read, or rejected with a one-line error.

The suite runs a few hundred examples, the same ones each time; FIRTH_FUZZ=5000 runs as many as given.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firth.corpora import readers
from firth.data.conversations import comparison, messages_of, prompt_of
from firth.data.dialogues import DialoguesConfig, PreferencesConfig, Seq2SeqConfig
from firth.data.labeled import LabeledConfig, MultipleChoiceConfig, ScoredConfig, TaggedConfig
from firth.data.question_answering import QuestionsConfig
from firth.data.records import Records, RecordsConfig
from firth.data.semi_supervised import MultiAnnotatorConfig
from firth.io.yaml_files import parse_yaml
from firth.runs import config_io
from firth.runs.recipe import Recipe, published
from firth.types import UserError
from tests.support.tiny_corpus import tokenizer

EXAMPLES = int(os.environ.get("FIRTH_FUZZ", "0"))


def examples(count: int) -> Any:
    """Return Hypothesis settings: the same examples each time, and more with FIRTH_FUZZ."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=EXAMPLES or count, derandomize=True, deadline=None, database=None, suppress_health_check=quiet
    )


def is_rejected(action: Callable[[], Any]) -> bool:
    """Return whether the action ended in a UserError without empty lines (a recipe has one per error).

    Any other exception fails the test.
    """
    try:
        action()
    except UserError as error:
        return all(map(str.strip, str(error).split("\n"))) or pytest.fail(f"an empty line: {error}")
    return False


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "there"}]


DIALOGUES, PREFERENCES = DialoguesConfig(max_length=32), PreferencesConfig(max_length=32)

GOOD: dict[str, tuple[RecordsConfig, dict[str, Any]]] = {
    "messages": (DIALOGUES, {"messages": TURNS}),
    "conversations": (DIALOGUES, {"system": "be short", "conversations": SHARED}),
    "Alpaca": (DIALOGUES, {"instruction": "say", "input": "x", "output": "y", "history": [["a", "b"]]}),
    "parts": (DIALOGUES, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TURNS[1]]}),
    "prompt": (DIALOGUES, {"prompt": "hi", "completion": "there"}),
    "prompted": (Seq2SeqConfig(max_length=32, max_target_length=32), {"prompt": TURNS[:1], "completion": TURNS[1:]}),
    "preference": (PREFERENCES, {"prompt": "hi", "chosen": "there", "rejected": "no"}),
    "UltraFeedback": (PREFERENCES, {"prompt": "hi", "chosen": TURNS, "rejected": [TURNS[0], TURNS[0] | {"role": "assistant"}]}),
    "HH-RLHF": (PREFERENCES, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}),
    "label": (LabeledConfig(max_length=32), {"text": "x", "label": "good"}),
    "score": (ScoredConfig(max_length=32), {"text": "x", "label": 0.5}),
    "options": (MultipleChoiceConfig(max_length=32), {"text": "x", "options": ["a", "b"], "label": 1}),
    "tags": (TaggedConfig(max_length=32), {"tokens": ["EU", "x"], "tags": ["B-ORG", "O"]}),
    "votes": (MultiAnnotatorConfig(max_length=32, labels_field="label"), {"text": "x", "label": ["good", "bad"]}),
    "answers": (
        QuestionsConfig(max_length=64, max_question_length=16),
        {"context": "a b", "question": "?", "answers": [{"text": "b", "start": 2}], "id": "1"},
    ),
}  # fmt: skip
"""Format -> the kind of examples that reads it, and a record."""

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(allow_subnormal=False), st.text(max_size=6), st.just({}),
    st.sampled_from(["", " ", "\n", "\0", "\ud83d", "user", "assistant", "x" * 300, [], [[]], [None], {"role": "user"}, [TURNS]]),
)  # fmt: skip


def value_paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a value."""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, one in inner for path in value_paths(one, (*at, key)))]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """Replace, remove or double one to three of the values inside a value."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(value_paths(value)))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "remove", "double"])):
            case "replace":
                holder[path[-1]] = copy.deepcopy(draw(LEAVES))
            case "remove":
                del holder[path[-1]]
            case "double" if isinstance(holder, list):
                holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
    return value


def read_all(kind: RecordsConfig, path: Path) -> None:
    source = Records(kind, [str(path)], tokenizer())
    for i in range(len(source)):
        source[i]


@pytest.mark.slow
@examples(250)
@given(st.data())
def test_records_of_every_format(tmp_path: Path, data: st.DataObject) -> None:
    kind, record = GOOD[data.draw(st.sampled_from(sorted(GOOD)))]
    some = [record, data.draw(changed(record))]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in some))
    is_rejected(lambda: read_all(kind, path))
    for function in (messages_of, prompt_of, comparison):
        is_rejected(lambda function=function: function(some[1]))


@pytest.mark.slow
@examples(150)
@given(st.data())
def test_files_of_records_with_flipped_bytes(tmp_path: Path, data: st.DataObject) -> None:
    name, text = data.draw(st.sampled_from([
        ("a.csv", 'text,label\n"x, y",a\nz,b\n'), ("a.tsv", "text\tlabel\nx\ta\n"), ("a.conll", "EU B-ORG\nx O\n\ny O\n"),
        ("a.json", json.dumps([{"text": "x", "label": "a"}])), ("a.jsonl", json.dumps({"messages": TURNS}) + "\n"),
        ("b.json", json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": [{"id": "1", "question": "?", "answers": []}]}]}]})),
    ]))  # fmt: skip
    raw = bytearray(text.encode())
    for at, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        raw[at] = byte
    (tmp_path / name).write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    is_rejected(lambda: list(readers.records([str(tmp_path / name)])))
    is_rejected(lambda: list(readers.documents([str(tmp_path / name)])))


@pytest.mark.slow
@examples(40)
@given(st.data())
def test_recipes_with_changed_values(data: st.DataObject) -> None:
    plain = config_io.to_dict(published(data.draw(st.sampled_from(["gpt", "bert", "t5", "dpo"]))))
    is_rejected(lambda: config_io.from_dict(Recipe, data.draw(changed(plain))))


YAML = [
    "a: ",
    "- ",
    "&x ",
    "*x",
    "[",
    "]",
    "{",
    "}",
    "\n",
    "  ",
    "1",
    "'",
    '"',
    "? ",
    "!!set ",
    "\t",
    "<<: ",
    "é",
    "2001-01-01",
]


@examples(150)
@given(st.lists(st.sampled_from(YAML), max_size=25))
def test_random_yaml(pieces: Sequence[str]) -> None:
    is_rejected(lambda: parse_yaml("".join(pieces), "a.yaml"))


def test_records_are_readable_before_fuzzing(tmp_path: Path) -> None:
    for name, (kind, record) in GOOD.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(record) + "\n")
        rejected = is_rejected(lambda kind=kind, path=path: read_all(kind, path))
        assert not rejected, name
