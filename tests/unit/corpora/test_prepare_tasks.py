"""Multiple choice, similarity and translation corpora, from packages in their original formats."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from firth.corpora import prepare, reference_works
from firth.types import UserError


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def given(*texts: str, name: str = "a.jsonl") -> list[tuple[str, io.BytesIO]]:
    return [(name, io.BytesIO("\n".join(texts).encode()))]


def sample(text: str, ideal: str) -> str:
    return json.dumps({"input": [{"role": "system", "content": "x"}, {"content": text}], "ideal": ideal})


def test_quartz(tmp_path: Path) -> None:
    summary = prepare.quartz(given(sample("It grows\n\n A: up\n B: down", "B"), sample("no options", "A")), tmp_path)
    assert rows(tmp_path / "quartz.jsonl") == [{"text": "It grows", "options": ["up", "down"], "label": 1}]
    assert summary == "1 questions in quartz.jsonl (1 of another form left out)"


def test_logiqa(tmp_path: Path) -> None:
    text = "\nPassage: All men.Question: So?\nA. A.One.\nB. B.Two.\nC. C.Three.\nD. Four.\nAnswer:"
    prepare.logiqa(given(sample(text, "C")), tmp_path)
    [row] = rows(tmp_path / "logiqa.jsonl")
    assert row == {"text": "All men. So?", "options": ["One.", "Two.", "Three.", "Four."], "label": 2}


def test_lee(tmp_path: Path) -> None:
    members = given("a", "b", "c", name="x/lee.cor") + given("1\t.2\t.3", "0\t1\t.4", "0\t0\t1", name="x/s.txt")
    assert prepare.lee(members, tmp_path) == "3 pairs of 3 texts in lee.jsonl"
    assert [row["label"] for row in rows(tmp_path / "lee.jsonl")] == [0.2, 0.3, 0.4]
    assert rows(tmp_path / "lee.jsonl")[2] == {"text": "c", "other": "b", "label": 0.4}


def sentences(language: str, *texts: str, label: str = "neutral") -> tuple[str, io.BytesIO]:
    scores = {name: int(name == label) for name in ("ambivalent", "neutral", "positive")}
    task = {"examples": [{"input": text, "target_scores": scores} for text in texts]}
    return f"bench/multiemo/all_sentence_{language}/task.json", io.BytesIO(json.dumps(task).encode())


def test_multiemo(tmp_path: Path) -> None:
    summary = prepare.multiemo([sentences("fr", "Oui. ", "Non."), sentences("en", "Yes.", " ")], tmp_path)
    assert rows(tmp_path / "multiemo.jsonl") == [{"en": "Yes.", "fr": "Oui.", "label": "neutral"}]
    assert summary == "1 sentences in en, fr in multiemo.jsonl (1 with an empty one left out)"


def test_multiemo_with_different_labels_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sentence 0"):
        prepare.multiemo([sentences("fr", "Oui."), sentences("en", "No.", label="positive")], tmp_path)


def test_bigbench_unpacks_small_tasks_below_their_names(tmp_path: Path) -> None:
    root = "bigbench-1.0.0/bigbench/benchmark_tasks"
    members = [
        (f"{root}/one/task.json", io.BytesIO(b"{}")),
        (f"{root}/two/part/task.json", io.BytesIO(b"[]")),
        (f"{root}/multiemo/x/task.json", io.BytesIO(b"{}")),
        (f"{root}/big/task.json", io.BytesIO(bytes(prepare.LARGEST_TASK + 1))),
    ]
    summary = prepare.bigbench(members, tmp_path)
    assert summary == "2 tasks, NAME/task.json each (2 large ones, and those of other corpora, left out)"
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert found == {"one/task.json": b"{}", "two/part/task.json": b"[]"}


def test_bigbench_never_writes_outside_of_the_cache(tmp_path: Path) -> None:
    members = [("x/benchmark_tasks/../../task.json", io.BytesIO(b"{}"))]
    with pytest.raises(UserError, match="outside of the cache"):
        prepare.bigbench(members, tmp_path / "out")


def test_mmlu(tmp_path: Path) -> None:
    prompt = (
        "The following are questions.\n\nQ: 1 + 1?\n(A) 1 (B) 2 (C) 3 (D) 4\nA: Let's think step by step. One more. "
        "The answer is (B).\n\nQ: Which?\n(A) a\n(B) b\n(C) c\n(D) d\nA: Let's think step by step. Last. The answer is (D)."
        "\n\nQ: Five?\n(A) 1 (B) 2 (C) 3 (D) 4 (E) 5\nA: Let's think step by step. No. The answer is (E).\n\n"
    )
    summary = prepare.mmlu(given(json.dumps({"sums": prompt}), name="p.json"), tmp_path)
    assert summary == "2 questions in mmlu.jsonl (1 with five choices left out)"
    assert rows(tmp_path / "mmlu.jsonl") == [
        {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "sums", "rationale": "One more."},
        {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 3, "subject": "sums", "rationale": "Last."},
    ]  # fmt: skip


def test_entries_of_a_dictionary(tmp_path: Path) -> None:
    text = (
        "00-database-info\n   about the file itself\n\n"
        "Bathe \\Bathe\\ (b[=a][th]), v. t. [OE. ba[eth]ien, see\n   {Bay}.]\n   1. To wash by immersion.\n      [1913 Webster]\n\n"
        "Baths \\Baths\\, n.\n   pl. of bath.\n\nX-ray \\X-ray\\, n.\n   See {Ray}.\n"
    )
    file = io.BytesIO(gzip.compress(text.encode()))
    assert reference_works.write_dictionary([("gcide.dict.dz", file)], tmp_path) == "2 entries in gcide.jsonl"
    assert rows(tmp_path / "gcide.jsonl") == [
        {"text": "Bathe: To wash by immersion."}, {"text": "Baths: pl. of bath."},
    ]  # fmt: skip
