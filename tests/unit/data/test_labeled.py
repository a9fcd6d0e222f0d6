"""Files of tasks become examples: tables, CoNLL columns, SQuAD's JSON; faults are reported with their line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from firth.corpora import readers
from firth.data.labeled import (
    LabeledConfig,
    MultipleChoiceConfig,
    ScoredConfig,
    TaggedConfig,
)
from firth.data.labels import has_spans, names, to_bio2
from firth.data.question_answering import QuestionsConfig, has_unanswerable, offsets_of, question_of
from firth.data.records import Records
from firth.evaluate.heads import by_question
from firth.evaluate.tasks import token_classification
from firth.tokenizer.train import train
from firth.types import IGNORE, UserError
from tests.support.tiny_corpus import tokenizer


def file(tmp_path: Path, name: str, text: str) -> str:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return str(path)


def rows(path: str, **options: object) -> list[dict[str, object]]:
    return [record for _, record in readers.records([path], **options)]  # type: ignore[arg-type]


def test_csv_has_quotes_and_line_breaks_within_cells(tmp_path: Path) -> None:
    text = '\ufefftext,label\r\n"a, ""b""\nc",yes\r\n\r\nd,no\r\n'
    path = file(tmp_path, "a.csv", text)
    assert rows(path) == [{"text": 'a, "b"\nc', "label": "yes"}, {"text": "d", "label": "no"}]
    assert [place for place, _ in readers.records([path])] == [f"{path}:2", f"{path}:5"]
    with gzip.open(tmp_path / "a.csv.gz", "wb") as packed:
        packed.write(text.encode())
    assert rows(str(tmp_path / "a.csv.gz")) == rows(path)
    assert rows(file(tmp_path, "b.csv", "text;label\na,b;c\n")) == [{"text": "a,b", "label": "c"}]
    assert rows(file(tmp_path, "c.tsv", 'text\tlabel\n"a" b\tc\n')) == [{"text": '"a" b', "label": "c"}]
    plain = rows(file(tmp_path, "d.tsv", "gj04\t1\t\tSo it is.\n"), columns=("source", "label", "mark", "sentence"))
    assert plain == [{"source": "gj04", "label": "1", "mark": "", "sentence": "So it is."}]


def test_few_rows_of_another_length_are_counted_and_reported(tmp_path: Path) -> None:
    good = "".join(f"text {i}\ta\n" for i in range(150))
    path = file(tmp_path, "a.tsv", "text\tlabel\n" + good + "too\tmany\tcells\n" + good)
    source = Records(LabeledConfig(max_length=32), [path], tokenizer())
    assert source.counts == {"examples": 300, "records": 300, "files": 1, "mismatched": 1, "duplicates": 150}
    assert any(f"the first is {path}:152 (3 cells under 2 columns)" in note for note in source.notes)
    with pytest.raises(UserError, match=r"b\.csv:3 \(1 cells under 2 columns\): so in 2 of 3 rows"):
        rows(file(tmp_path, "b.csv", "text,label\na,b\nc\nd\n"))
    with pytest.raises(UserError, match="two columns are called 'a'"):
        rows(file(tmp_path, "c.csv", "a,a\n1,2\n"))
    with pytest.raises(UserError, match=r"d\.csv:2: this row cannot be read"):
        rows(file(tmp_path, "d.csv", 'a,b\n"x" y,"z\n'))
    (tmp_path / "e.csv").write_bytes("a,b\n1,2\n".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        rows(str(tmp_path / "e.csv"))


def test_tables_in_a_directory_must_be_named(tmp_path: Path) -> None:
    file(tmp_path, "a.txt", "text")
    path = file(tmp_path, "b.csv", "text,label\nx,y\n")
    assert [p.name for p in readers.files([str(tmp_path)])] == ["a.txt"]
    assert [d.text for d in readers.documents([path])] == ["x"]


def test_unknown_labels_are_counted_and_the_first_is_reported(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "text,label\nx,good\ny,odd\nz,odd\nw,bad\n")
    with pytest.raises(
        UserError,
        match=r"a\.csv:3: the label odd is none of the classes \(bad, good\); 1 more record has the same problem",
    ):
        Records(LabeledConfig(max_length=32), [path], tokenizer(), classes=("bad", "good"))
    with pytest.raises(UserError, match=r"b\.csv:2: the label is empty"):
        Records(LabeledConfig(max_length=32), [file(tmp_path, "b.csv", "text,label\nx,\n")], tokenizer())
    source = Records(LabeledConfig(max_length=32), [path], tokenizer(), classes=("bad", "good", "odd", "never"))
    assert list(source.class_counts(np.arange(4)).values()) == [1, 1, 2, 0]
    assert source.notes == [f"no record of {path} has the class 'never'"]
    unlabeled = Records(LabeledConfig(max_length=32), [path], tokenizer(), classes=("bad", "good"), purpose="predict")
    assert len(unlabeled) == 4


def test_truncated_texts_are_reported(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "text,label\nx,good\n" + "long " * 50 + ",bad\n" + "long " * 60 + ",bad\n")
    source = Records(LabeledConfig(max_length=16), [path], tokenizer())
    assert source.counts["cut"] == 2
    assert source.notes == [f"2 texts were longer than 16 tokens and lost their end; the first is {path}:3"]


def test_scores_are_numbers(tmp_path: Path) -> None:
    path = file(tmp_path, "a.tsv", "index\tsentence1\tsentence2\tscore\n0\ta man\ta boy\t2.5\n1\ta\tb\t5\n")
    source = Records(
        ScoredConfig(max_length=32, text_field="sentence1", label_field="score", text_pair_field="sentence2"),
        [path],
        tokenizer(),
    )
    assert source.column("label").whole.tolist() == [2.5, 5.0]
    assert source[0]["score"] == 2.5
    assert sorted(source[0]) == ["score", "token_type_ids", "tokens"]
    for bad in ("high", "nan", ""):
        with pytest.raises(UserError, match=rf"b\.csv:2: the field 'label' is '{bad}' and must be a number"):
            Records(ScoredConfig(max_length=32), [file(tmp_path, "b.csv", f"text,label\nx,{bad}\n")], tokenizer())


def test_options_in_a_list_and_in_columns(tmp_path: Path) -> None:
    one = {"text": "She opens", "options": ["the door", "the sea", "it"], "label": 1}
    two = {"text": "He", "options": ["runs", "walks"], "label": "walks"}
    path = file(tmp_path, "a.jsonl", json.dumps(one) + "\n" + json.dumps(two) + "\n")
    source = Records(MultipleChoiceConfig(max_length=32), [path], tokenizer())
    assert (source.longest("lengths"), source[0]["label"], source[1]["label"]) == (3, 1, 1)
    texts = [tokenizer().decode(row["tokens"]) for row in source[0]["options"]]
    assert texts == ["She opensthe door", "She opensthe sea", "She opensit"]
    assert [int(row["token_type_ids"].sum()) for row in source[1]["options"]] == [
        len(tokenizer().encode(text)) + 1 for text in ("runs", "walks")
    ]
    swag = "sent1,sent2,ending0,ending1,label\nShe sits.,She,eats.,flies.,0\n"
    from_columns = Records(
        MultipleChoiceConfig(
            max_length=32, text_field="sent1", option_fields=("ending0", "ending1"), option_prefix_field="sent2"
        ),
        [file(tmp_path, "b.csv", swag)],
        tokenizer(),
    )
    assert tokenizer().decode(from_columns[0]["options"][1]["tokens"]) == "She sits.She flies."
    for change, message in (
        ({"label": 3}, "neither one of the 3"),
        ({"options": ["one"]}, "must be a list of two texts or more"),
    ):
        with pytest.raises(UserError, match=rf"c\.jsonl:1: .*{message}"):
            Records(
                MultipleChoiceConfig(max_length=32),
                [file(tmp_path, "c.jsonl", json.dumps(one | change) + "\n")],
                tokenizer(),
            )


CONLL = "-DOCSTART- -X- -X- O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\nGerman JJ I-NP I-MISC\n\nPeter NNP I-NP I-PER\n"


@pytest.mark.parametrize("name", ["a.conll", "a.txt"])
def test_conll_columns(tmp_path: Path, name: str) -> None:
    path = file(tmp_path, name, CONLL)
    source = Records(TaggedConfig(max_length=32), [path], tokenizer())
    assert source.classes == ("B-MISC", "B-ORG", "B-PER", "O")
    assert source.counts["begun"] == 2
    assert "IOB1" in source.notes[0]
    labels = [source[0]["tags"][source[0]["tags"] != IGNORE].tolist(), source.column("words")[0].tolist()]
    assert labels == [[1, 3, 0], [0, 1, 2]]
    parts_of_speech = Records(
        TaggedConfig(max_length=32, tags_field="pos", column_names=("tokens", "pos", "chunk", "ner")),
        [path],
        tokenizer(),
    )
    assert parts_of_speech.classes == ("JJ", "NNP", "VBZ")
    with pytest.raises(UserError, match=r"b\.conll:2 \(1 columns of 2\): so in 1 of 1 sentences"):
        Records(TaggedConfig(max_length=32), [file(tmp_path, "b.conll", "EU B-ORG\nrejects\n")], tokenizer())


def test_only_the_first_token_of_a_word_is_labeled(tmp_path: Path) -> None:
    path = file(tmp_path, "a.conll", "unquestionably A\nx B\n")
    source = Records(TaggedConfig(max_length=32), [path], tokenizer())
    pieces, behind = (len(tokenizer().encode(text)) for text in ("unquestionably", " x"))
    assert pieces > 1
    assert source[0]["tags"].tolist()[1:-1] == [0, *[IGNORE] * (pieces - 1), 1, *[IGNORE] * (behind - 1)]
    short = Records(TaggedConfig(max_length=pieces + 1), [path], tokenizer())
    assert short.column("words")[0].tolist() == [0]
    assert short.counts["cut"] == 1


SQUAD = {"data": [{"title": "t", "paragraphs": [{"context": "The play was written by Anne Lee in 1901.", "qas": [
    {"id": "a", "question": "Who wrote it?", "answers": [{"text": "Anne Lee", "answer_start": 24}]},
    {"id": "b", "question": "Who played?", "answers": [], "is_impossible": True},
    {"id": "c", "question": "When?", "answers": [{"text": "1902", "answer_start": 36}]},
    {"id": "d", "question": "When?", "answers": [{"text": "1901", "answer_start": 36}]},
]}]}]}  # fmt: skip


def test_squad_json(tmp_path: Path) -> None:
    path = file(tmp_path, "a.json", json.dumps(SQUAD))
    source = Records(QuestionsConfig(max_length=96, max_question_length=16), [path], tokenizer())
    assert source.counts == {
        "examples": 3, "records": 4, "misplaced": 1, "unanswered": 1, "unanswerable": 1, "files": 1,
    }  # fmt: skip
    assert (
        f"1 answer is not in its passage at the given character, and was left out; the first is {path}: question c"
        in source.notes
    )
    assert (has_unanswerable(source), source.record_ids.tolist()) == (True, [0, 1, 3])
    example, spans = source[0], offsets_of(source, 0)
    answer = spans[example["start"]][0], spans[example["end"]][1]
    assert "The play was written by Anne Lee in 1901."[answer[0] : answer[1]].strip() == "Anne Lee"
    assert (source[1]["start"], source[1]["end"]) == (-1, -1)
    assert example["token_type_ids"][example["start"]] == 1
    kept = Records(QuestionsConfig(max_length=96, max_question_length=16), [path], tokenizer(), purpose="evaluate")
    assert [question_of(kept, number).right for number in range(kept.num_records)] == [
        ("Anne Lee",),
        (),
        ("1902",),
        ("1901",),
    ]
    assert len(kept) == 4


def test_long_passages_are_read_in_overlapping_windows(tmp_path: Path) -> None:
    context = " ".join(f"word{i}" for i in range(80))
    at = context.index("word40")
    record = {"context": context, "question": "Which?", "answers": [{"text": "word40 word41", "start": at}], "id": "x"}
    path = file(tmp_path, "a.jsonl", json.dumps(record) + "\n")
    source = Records(QuestionsConfig(max_length=64, doc_stride=20, max_question_length=16), [path], tokenizer())
    whole = len(tokenizer().encode(context))
    seen: set[int] = set()
    found = 0
    for i in range(len(source)):
        example, spans = source[i], offsets_of(source, i)
        assert len(example["tokens"]) <= 64
        inside = np.flatnonzero(spans[:, 0] >= 0)
        seen.update(spans[inside, 0].tolist())
        if example["start"] >= 0:
            found += 1
            text = context[spans[example["start"]][0] : spans[example["end"]][1]]
            assert text.strip() == "word40 word41"
    assert found >= 2
    assert len(source) < found + len(source)
    assert len(seen) == whole
    assert set(source.record_ids.tolist()) == {0}


def test_answers_of_other_formats(tmp_path: Path) -> None:
    hub = {"context": "a b", "question": "?", "answers": {"text": ["b"], "answer_start": [2]}}
    assert (
        Records(
            QuestionsConfig(max_length=40, max_question_length=16),
            [file(tmp_path, "a.jsonl", json.dumps(hub) + "\n")],
            tokenizer(),
        )[0]["start"]
        > 0
    )
    bad = {"context": "a b", "question": "?", "answers": [{"text": "b"}]}
    with pytest.raises(UserError, match=r"b\.jsonl:1: an answer needs a 'text' and the character"):
        Records(
            QuestionsConfig(max_length=40, max_question_length=16),
            [file(tmp_path, "b.jsonl", json.dumps(bad) + "\n")],
            tokenizer(),
        )
    with pytest.raises(UserError, match="neither SQuAD's JSON nor a list"):
        Records(
            QuestionsConfig(max_length=40, max_question_length=16),
            [file(tmp_path, "c.json", '{"data": 3}')],
            tokenizer(),
        )
    with pytest.raises(UserError, match="this is not JSON"):
        Records(
            QuestionsConfig(max_length=40, max_question_length=16), [file(tmp_path, "d.json", '{"data"')], tokenizer()
        )


@pytest.mark.parametrize("algorithm", ["byte-bpe", "unigram"])
def test_an_answer_begins_at_its_word(tmp_path: Path, algorithm: str) -> None:
    """Tokens include the space before their word: "baker" is at 49, not " baker" at 48."""
    context = "In Leeds the otter paints the boat at dawn and a baker sells some bread.  "
    tokenizer = train([context], algorithm, vocab_size=400, num_sentinels=0)
    answers = [("baker", 49), (" baker", 48), ("baker ", 49)]
    records = [
        {"context": context, "question": "who?", "answers": [{"text": text, "start": start}]} for text, start in answers
    ]
    path = file(tmp_path, "a.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    items = Records(QuestionsConfig(max_length=128, max_question_length=16), [path], tokenizer)
    assert len(items) == 3
    scores = []
    for i in range(3):
        example, offsets = items[i], offsets_of(items, i)
        assert (offsets[example["start"]][0], offsets[example["end"]][1]) == (49, 54)
        words = [context[a:b] for a, b in offsets[offsets[:, 0] >= 0]]
        assert words == [word.strip() for word in words]
        scores.append(np.zeros((len(offsets), 2)))
        scores[i][example["start"], 0] = scores[i][example["end"], 1] = 5.0
    found = list(by_question(items, iter(scores), has_unanswerable=False))
    assert [(one["answer"], one["start"]) for one in found] == [("baker", 49)] * 3


def in_scheme(scheme: str, layout: list[tuple[str, int]]) -> list[str]:
    """Return the tags of a sentence. layout: (type or "", words) of each entity and of each stretch outside of entities."""
    tags: list[str] = []
    for at, (kind, n) in enumerate(layout):
        touches = at > 0 and layout[at - 1][0] == kind
        touched = at + 1 < len(layout) and layout[at + 1][0] == kind
        marks = {
            "IO": "I" * n, "IOB1": "BI"[not touches] + "I" * (n - 1), "IOB2": "B" + "I" * (n - 1),
            "IOE1": "I" * (n - 1) + "IE"[touched], "IOE2": "I" * (n - 1) + "E",
            "IOBES": "S" if n == 1 else "B" + "I" * (n - 2) + "E", "BILOU": "U" if n == 1 else "B" + "I" * (n - 2) + "L",
            "BMES": "S" if n == 1 else "B" + "M" * (n - 2) + "E", "BMEWO": "W" if n == 1 else "B" + "M" * (n - 2) + "E",
        }[scheme]  # fmt: skip
        tags += [f"{mark}-{kind}" for mark in marks] if kind else ["O"] * n
    return tags


@pytest.mark.oracle
@pytest.mark.parametrize("scheme", ["IO", "IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU", "BMES", "BMEWO"])
def test_entities_are_those_of_seqeval_in_every_scheme(scheme: str) -> None:
    """Random sentences written in a scheme have the entities that they were written from."""
    from seqeval import scheme as schemes
    from seqeval.metrics.sequence_labeling import get_entities

    oracle = getattr(schemes, scheme, None)
    shortest = 2 if scheme == "IOE1" else 1  # seqeval finds no entity of one word that is marked E
    rng = np.random.default_rng(0)
    for _ in range(200):
        layout = [(("", "PER", "ORG")[rng.integers(3)], int(rng.integers(shortest, 4))) for _ in range(6)]
        tags = in_scheme(scheme, layout)
        ends = np.cumsum([n for _, n in layout]).tolist()
        wanted = [(kind, end - n, end) for (kind, n), end in zip(layout, ends, strict=True) if kind]
        if scheme == "IO":  # adjacent entities of one type are one entity
            wanted = [(kind, first, last + 1) for kind, first, last in get_entities(tags)]
        elif oracle is not None:
            [entities] = schemes.Entities([tags], oracle).entities
            assert wanted == [(one.tag, one.start, one.end) for one in entities]
        assert has_spans(tags) and names(tags) == wanted
        assert names(to_bio2(tags)) == wanted


@pytest.mark.parametrize("scheme", ["IO", "IOBES", "BILOU"])
def test_tags_of_other_schemes_are_scored_as_entities(tmp_path: Path, scheme: str) -> None:
    layout = [("PER", 2), ("", 1), ("ORG", 1), ("", 2), ("PER", 3)]
    tags = in_scheme(scheme, layout)
    record = {"tokens": [f"word{i}" for i in range(len(tags))], "tags": tags}
    items = Records(
        TaggedConfig(max_length=64),
        [file(tmp_path, "a.jsonl", json.dumps(record) + "\n")],
        tokenizer(),
        purpose="evaluate",
    )
    right = to_bio2(tags)
    columns = token_classification.count_correct(items, iter([(right, ["O"] * 5 + right[5:], [1.0] * 9)]))
    found = {name: metric(*columns) for name, metric in token_classification.extra_metrics(items).items()}
    assert found == {"precision": 1.0, "recall": pytest.approx(1 / 3), "f1": pytest.approx(0.5)}


@pytest.mark.parametrize(
    ("tags", "wrong"),
    [
        (["PER-B", "PER-I", "O"], "the tags O, PER-B, PER-I mark entities in an unsupported format"),
        (["B_PER", "I_PER", "O"], "the tags B_PER, I_PER, O mark entities in an unsupported format"),
        (["B-PER", "X", "O"], "the tag 'X' marks no entity"),
    ],
)
def test_tags_of_another_format_are_rejected(tmp_path: Path, tags: list[str], wrong: str) -> None:
    record = {"tokens": ["a", "b", "c"], "tags": tags}
    with pytest.raises(UserError, match=wrong):
        Records(TaggedConfig(max_length=64), [file(tmp_path, "a.jsonl", json.dumps(record) + "\n")], tokenizer())
