"""Records of every common format become examples; truncated and omitted ones are counted; errors name file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from firth.data.collate import Batches
from firth.data.conversations import comparison
from firth.data.dialogues import DialoguesConfig, PreferencesConfig, Seq2SeqConfig, prompts
from firth.data.labeled import LabeledConfig
from firth.data.records import Records, RecordsConfig
from firth.objectives.classification import Classification
from firth.objectives.preferences import DPO
from firth.objectives.reward_model import RewardModeling
from firth.objectives.sft import SFT, Seq2SeqSFT
from firth.tokenizer import chat
from firth.types import IGNORE, UserError
from tests.support.tiny_corpus import tokenizer

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows to a JSONL file and return its path."""

    def lines(*rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return lines


def text(ids: np.ndarray) -> str:
    return tokenizer().decode(ids)


def test_labeled_texts(write: Write) -> None:
    path = write(*({"text": f"text {i}", "label": ("good", "bad", "odd")[i % 3]} for i in range(9)))
    source = Records(LabeledConfig(max_length=32), [path], tokenizer())
    assert source.classes == ("bad", "good", "odd")
    vocab = tokenizer().vocab
    for i in range(9):
        example = source[i]
        assert set(example) == {"tokens", "label"}
        assert (example["tokens"][0], example["tokens"][-1]) == (vocab.cls, vocab.sep)
        assert text(example["tokens"]) == f"text {i}"
        assert source.classes[example["label"]] == ("good", "bad", "odd")[i % 3]
    held = Records(
        LabeledConfig(max_length=32),
        [write({"text": "x", "label": "odd"}, name="held.jsonl")],
        tokenizer(),
        classes=source.classes,
    )
    assert held[0]["label"] == 2
    assert source.counts == {"examples": 9, "records": 9, "files": 1}


def test_labels_may_be_numbers(write: Write) -> None:
    path = write(*({"text": "x", "label": n} for n in (10, 2, 2, 0)))
    source = Records(LabeledConfig(max_length=32), [path], tokenizer())
    assert source.classes == ("0", "2", "10")
    assert [int(source[i]["label"]) for i in range(4)] == [2, 1, 1, 0]
    named = Records(
        LabeledConfig(max_length=32),
        [write({"text": "x", "label": 1}, {"text": "x", "label": "no"})],
        tokenizer(),
        classes=("no", "yes"),
    )
    assert [int(named[i]["label"]) for i in range(2)] == [1, 0]


@pytest.mark.parametrize(("first", "second"), [(40, 40), (40, 3), (3, 40), (5, 5), (9, 8), (0, 40)])
def test_pairs_truncate_the_longer_text(write: Write, first: int, second: int) -> None:
    words = [tokenizer().token(i) for i in range(300)]
    assert words
    path = write({"a": "x " * first, "b": "y " * second, "label": "same"})
    source = Records(LabeledConfig(max_length=20, text_field="a", text_pair_field="b"), [path], tokenizer())
    example = source[0]
    lengths = [len(tokenizer().encode(s)) for s in ("x " * first, "y " * second)]
    kept = int((example["token_type_ids"] == 0).sum()) - 2, int((example["token_type_ids"] == 1).sum()) - 1
    assert len(example["tokens"]) <= 20
    if sum(lengths) <= 17:
        assert kept == tuple(lengths)
        assert "cut" not in source.counts
    else:
        assert sum(kept) == 17
        assert all(k == n or k >= 8 for k, n in zip(kept, lengths, strict=True))
        assert source.counts["cut"] == 1


FORMATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello you"}]},
    {"conversations": [{"from": "human", "value": "hi there"}, {"from": "gpt", "value": "hello you"}]},
    {"prompt": "hi there", "completion": "hello you"},
    {
        "prompt": [{"role": "user", "content": "hi there"}],
        "completion": [{"role": "assistant", "content": "hello you"}],
    },
    {"instruction": "hi there", "input": "", "output": "hello you"},
]


def test_dialogues_of_every_format_are_equal(write: Write) -> None:
    source = Records(DialoguesConfig(max_length=64), [write(*FORMATS)], tokenizer())
    expected, mask = chat.encode(tokenizer(), FORMATS[0]["messages"])
    for i in range(len(FORMATS)):
        assert np.array_equal(source[i]["tokens"], expected)
        assert np.array_equal(source[i]["mask"], mask)
    assert text(expected[mask]) == "hello you"
    batch = Batches(source, SFT(), tokenizer().vocab, batch_size=4, seed=0, pack_to_length=64).batches(0)[0]
    assert int((batch["labels"] != IGNORE).sum()) == 4 * mask.sum()


def test_long_records_are_truncated_and_unanswered_left_out(write: Write) -> None:
    long = {"prompt": "why " * 200, "completion": "because"}
    half = {"prompt": "why", "completion": "because " * 200}
    unanswered = {"messages": [{"role": "user", "content": "hello?"}]}
    source = Records(DialoguesConfig(max_length=64), [write(long, half, unanswered, FORMATS[0])], tokenizer())
    assert source.counts == {"examples": 2, "records": 4, "cut": 2, "unanswered": 2, "files": 1}
    assert len(source[0]["tokens"]) == 64
    assert source[0]["mask"][-1]  # the truncated answer has no stop token
    with pytest.raises(UserError, match=r"no record can be used \(.*2 unanswered\)"):
        Records(DialoguesConfig(max_length=64), [write(long, unanswered)], tokenizer())


def test_text_to_text(write: Write) -> None:
    source = Records(
        Seq2SeqConfig(max_length=32, max_target_length=16),
        [write(*FORMATS, {"prompt": "a " * 90, "completion": "b " * 90})],
        tokenizer(),
    )
    eos = tokenizer().vocab.eos
    for i in range(len(FORMATS)):
        assert text(source[i]["source"]) == "hi there"
        assert text(source[i]["target"]) == "hello you"
        assert source[i]["source"][-1] == source[i]["target"][-1] == eos
    assert (len(source[5]["source"]), len(source[5]["target"])) == (32, 16)
    assert source[5]["target"][-1] != eos
    assert (source.counts["cut"], source.counts["long_answers"]) == (1, 1)
    batch = Batches(source, Seq2SeqSFT(), tokenizer().vocab, batch_size=6, seed=0, pack_to_length=48).batches(0)[0]
    assert batch["source_tokens"].shape[0] == batch["tokens"].shape[0]
    with pytest.raises(UserError, match=r"rows.jsonl:1: a text-to-text record needs a prompt"):
        Records(
            Seq2SeqConfig(max_length=32, max_target_length=32),
            [write({"messages": [{"role": "user", "content": "hello?"}]})],
            tokenizer(),
        )


def test_preferences(write: Write) -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    good, bad = ({"role": "assistant", "content": c} for c in ("four", "fish"))
    rows = [
        {"prompt": turns, "chosen": [good], "rejected": [bad]},
        {"chosen": [*turns, good], "rejected": [*turns, bad]},
        {"prompt": turns, "chosen": "four", "rejected": "fish"},
    ]
    source = Records(
        PreferencesConfig(max_length=64),
        [write(*rows, {"prompt": "x", "chosen": "same", "rejected": "same"})],
        tokenizer(),
    )
    assert source.counts["unanswered"] == 1
    for i in range(3):
        example = source[i]
        assert text(example["chosen_tokens"][example["chosen_mask"]]) == "four"
        assert text(example["rejected_tokens"][example["rejected_mask"]]) == "fish"
        assert np.array_equal(example["chosen_tokens"], source[0]["chosen_tokens"])
    batch = Batches(source, RewardModeling(), tokenizer().vocab, batch_size=3, seed=0).batches(0)[0]
    assert batch["tokens"].shape[:2] == (3, 2)
    assert DPO().labels
    with pytest.raises(UserError, match=r"rows.jsonl:1: a preference needs `chosen` and `rejected`"):
        Records(PreferencesConfig(max_length=64), [write({"prompt": "x", "chosen": "y"})], tokenizer())
    with pytest.raises(UserError, match="needs a `prompt`"):
        comparison({"chosen": "a", "rejected": "b"})


def test_a_margin_is_read_with_its_preference(write: Write) -> None:
    pair = {"prompt": "x", "chosen": "y", "rejected": "z"}
    source = Records(
        PreferencesConfig(max_length=64), [write(pair | {"margin": 0.5}, pair, pair | {"margin": "2"})], tokenizer()
    )
    assert [float(source[i]["margin"][0]) for i in (0, 2)] == [0.5, 2.0]
    assert np.isnan(source[1]["margin"][0])
    for margin in ("large", [1], "inf"):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: the `margin` of a preference must be a number"):
            Records(PreferencesConfig(max_length=64), [write(pair | {"margin": margin})], tokenizer())


def test_prompts_end_with_the_start_of_the_answer(write: Write) -> None:
    found, keys, counts = prompts([write(*FORMATS, {"prompt": "long " * 99})], tokenizer(), 40)
    assert len(found) == len(FORMATS) == len(keys)
    assert counts == {"records": len(FORMATS) + 1, "too_long": 1}
    assert len(set(keys.tolist())) == 1
    for prompt in found:
        assert np.array_equal(prompt.tokens, found[0].tokens)
        assert text(prompt.tokens).endswith("assistant\n")


def test_file_types_give_the_same_examples(write: Write, tmp_path: Path) -> None:
    rows = [{"text": f"text number {i}", "label": i % 2} for i in range(3000)]
    path = write(*rows)
    plain = Records(LabeledConfig(max_length=32), [path], tokenizer())
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    table = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=100)
    for other in (packed, table):
        source = Records(LabeledConfig(max_length=32), [str(other)], tokenizer())
        assert len(source) == 3000
        for i in (0, 1, 1023, 1024, 2999):
            assert np.array_equal(source[i]["tokens"], plain[i]["tokens"])
            assert source[i]["label"] == plain[i]["label"]


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        (LabeledConfig(), '{"text": "x", "label": "a"', "rows.jsonl:2: this line is not JSON"),
        (LabeledConfig(), '["x"]', "rows.jsonl:2: a record is a JSON object"),
        (LabeledConfig(), '{"txt": "x", "label": "a"}', "rows.jsonl:2: there is no field 'text'; did you mean 'txt'"),
        (LabeledConfig(), '{"text": "x"}', "rows.jsonl:2: there is no field 'label'"),
        (LabeledConfig(), '{"text": "x", "label": [1]}', r"rows.jsonl:2: the label is \[1\] and must be a name"),
        (LabeledConfig(), '{"text": 5, "label": "a"}', "rows.jsonl:2: the field 'text' holds int"),
        (DialoguesConfig(), '{"text": "x"}', "rows.jsonl:2: a dialogue needs"),
        (DialoguesConfig(), '{"messages": [{"role": "queen", "content": "x"}]}', "rows.jsonl:2: a turn needs a role"),
        (Seq2SeqConfig(), '{"prompt": 3, "completion": "x"}', "rows.jsonl:2: text was expected"),
        (
            PreferencesConfig(),
            '{"prompt": "x", "chosen": ["y"], "rejected": "z"}',
            "rows.jsonl:2: a turn of a dialogue",
        ),
    ],
)
def test_errors_name_file_and_line(write: Write, kind: RecordsConfig, line: str, message: str) -> None:
    good = {"text": "x", "label": "a", "prompt": "p", "completion": "c", "chosen": "d", "rejected": "e"}
    with pytest.raises(UserError, match=message) as raised:
        Records(kind, [write(good, line)], tokenizer())
    assert str(raised.value).count("rows.jsonl:2") == 1
    assert "\n" not in str(raised.value)


def test_a_label_outside_of_the_classes_is_rejected(write: Write) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:2: the label maybe is none of the classes \(no, yes\)"):
        Records(
            LabeledConfig(max_length=32),
            [write({"text": "x", "label": "yes"}, {"text": "x", "label": "maybe"})],
            tokenizer(),
            classes=("no", "yes"),
        )
    with pytest.raises(UserError, match=r"no record can be used \(1 empty\)"):
        Records(LabeledConfig(max_length=32), [write()], tokenizer())


def test_lone_surrogates_and_nul_are_text(write: Write) -> None:
    source = Records(LabeledConfig(max_length=32), [write('{"text": "a \\ud800 b\\u0000", "label": 1}')], tokenizer())
    assert "a" in text(source[0]["tokens"])
    objective = Classification(class_names=source.classes)
    batch = Batches(source, objective, tokenizer().vocab, batch_size=1, seed=0).batches(0)[0]
    assert int((batch["class"] != IGNORE).sum()) == 1


def test_a_source_of_records_keeps_no_text_in_memory(write: Write) -> None:
    """Only the memory map and 8 bytes per record and column remain."""
    source = Records(DialoguesConfig(max_length=64), [write(*FORMATS)], tokenizer())
    tokens = source[0]["tokens"]
    assert tokens.base is not None
    assert not tokens.flags.writeable
