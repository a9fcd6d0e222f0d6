"""Collected preferences: who gets which prompt, undo, kills, statistics, and training on the file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firth.data.conversations import comparison, messages_of
from firth.data.rankings import ranking
from firth.evaluate.ratings import bradley_terry
from firth.serve.preference_statistics import agreement, run_scores, run_votes, statistics
from firth.serve.preferences import JudgedItem, Preferences, make_item
from firth.types import UserError


def items(count: int, answers: int = 3) -> list[JudgedItem]:
    made = [
        make_item(f"question {i}", [(f"run{k % 2}", f"answer {k} to {i}") for k in range(answers)])
        for i in range(count)
    ]
    return [item for item in made if item is not None]


def collection(tmp_path: Path, count: int = 4, twice: float = 0.0, answers: int = 3) -> Preferences:
    found = Preferences(tmp_path / "preferences.jsonl", twice)
    found.add(items(count, answers))
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def judge(preferences: Preferences, annotator: str, best_first: bool = True) -> JudgedItem | None:
    """Rank the answers by their text, and return the item; None if there is none."""
    item = preferences.next(annotator)
    if item is not None:
        order = preferences.order(item, annotator)
        ranks = [place + 1 if best_first else len(order) - place for place in order]
        preferences.judge(annotator, item.id, ranks)
    return item


def test_equal_answers_are_shown_once() -> None:
    item = make_item("q", [("a", "yes"), ("b", " yes\n"), ("a", "no"), ("a", "yes")])
    assert item is not None
    assert [(one.text, one.runs) for one in item.answers] == [("yes", ("a", "b")), ("no", ("a",))]
    assert make_item("q", [("a", "yes"), ("b", "yes")]) is None


def test_ranks_are_recorded_for_the_answers_and_not_their_places(tmp_path: Path) -> None:
    preferences = collection(tmp_path, 20)
    orders = set()
    while (item := preferences.next("ann")) is not None:
        orders.add(tuple(preferences.order(item, "ann")))
        judge(preferences, "ann")
    rows = lines(tmp_path / "preferences.jsonl")
    assert len(rows) == 20 and len(orders) > 3
    for i, row in enumerate(rows):
        assert row["answers"] == [f"answer {k} to {i}" for k in range(3)] and row["ranks"] == [1, 2, 3]
        assert (row["chosen"], row["rejected"]) == (f"answer 0 to {i}", f"answer 2 to {i}")
        assert row["runs"] == [["run0"], ["run1"], ["run0"]] and row["annotator"] == "ann"


def test_the_file_is_read_as_preferences_and_as_rankings(tmp_path: Path) -> None:
    preferences = collection(tmp_path)
    item = preferences.next("ann")
    assert item is not None
    order = preferences.order(item, "ann")
    preferences.judge("ann", item.id, [{0: 1, 1: 3, 2: 1}[i] for i in order], comment="two are fine")
    [row] = lines(tmp_path / "preferences.jsonl")
    prompt, chosen, rejected = comparison(row)
    assert prompt == [{"role": "user", "content": "question 0"}] and rejected[0]["content"] == "answer 1 to 0"
    _, answers, ranks = ranking(row)
    assert [answer[0]["content"] for answer in answers] == ["answer 0 to 0", "answer 2 to 0", "answer 1 to 0"]
    assert ranks == [0, 0, 1] and row["comment"] == "two are fine" and chosen[0]["content"] == "answer 0 to 0"


def test_a_tie_of_all_answers_is_kept_as_an_event_only(tmp_path: Path) -> None:
    preferences = collection(tmp_path)
    item = preferences.next("ann")
    assert item is not None
    preferences.judge("ann", item.id, [1, 1, 1])
    assert lines(tmp_path / "preferences.jsonl") == [] and len(preferences.judgments()) == 1
    votes = run_votes(preferences.judgments())
    assert votes is not None and votes.outcome.tolist() == [0.5, 0.5]


def test_undo_gives_the_prompt_back(tmp_path: Path) -> None:
    preferences = collection(tmp_path)
    first, second = judge(preferences, "ann"), judge(preferences, "ann")
    judge(preferences, "bob")
    assert first is not None and second is not None
    before = preferences.order(second, "ann")
    assert preferences.undo("ann") == second
    assert preferences.order(second, "ann") != before  # that of the first time again
    preferences.skip("ann", second.id)
    assert [preferences.undo("ann") for _ in range(3)] == [second, first, None]
    assert [row["annotator"] for row in lines(tmp_path / "preferences.jsonl")] == ["bob"]
    assert preferences.next("ann") == first
    assert len(lines(tmp_path / "preferences.events.jsonl")) == 7  # nothing is removed


def test_a_skipped_prompt_is_given_to_others(tmp_path: Path) -> None:
    preferences = collection(tmp_path, 2)
    item = preferences.next("ann")
    assert item is not None
    preferences.skip("ann", item.id)
    assert preferences.next("ann") != item and preferences.next("bob") == item


def test_two_annotators_get_different_prompts_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preferences = collection(tmp_path, 2)
    first, second = preferences.next("ann"), preferences.next("bob")
    assert first != second and preferences.next("ann") == first and preferences.next("eve") is None
    later = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert preferences.next("eve") in (first, second)  # whoever had it has left


def test_a_share_of_prompts_is_given_twice(tmp_path: Path) -> None:
    preferences = collection(tmp_path, 200, twice=0.3)
    for _ in range(300):
        for name in ("ann", "bob", "eve"):
            judge(preferences, name)
    judged = Counter(one["item"] for one in preferences.judgments())
    twice = [id for id, count in judged.items() if count == 2]
    assert len(judged) == 200 and set(judged.values()) == {1, 2} and 40 <= len(twice) <= 80
    for id in twice:
        assert len({one["annotator"] for one in preferences.judgments() if one["item"] == id}) == 2


def test_one_annotator_gets_the_share_again_at_the_end(tmp_path: Path) -> None:
    preferences = collection(tmp_path, 30, twice=0.3)
    order = []
    while (item := judge(preferences, "ann")) is not None:
        order.append(item.id)
    assert order[:30] == list(preferences.items) and 0 < len(order[30:]) < 30
    assert all(preferences.wanted(id) == 2 for id in order[30:])
    found = statistics(preferences, 30)["agreement"]
    assert (found["share"], found["cohen"][0]["first"], found["cohen"][0]["second"]) == (1.0, "ann", "ann")


def test_corrections_become_demonstrations(tmp_path: Path) -> None:
    preferences = collection(tmp_path)
    item = preferences.next("ann")
    assert item is not None
    place = preferences.order(item, "ann").index(1)
    preferences.correct("ann", item.id, place, "  a better answer ")
    [row] = lines(tmp_path / "preferences.corrections.jsonl")
    assert row["original"] == "answer 1 to 0"
    assert [one["content"] for one in messages_of(row)] == ["question 0", "a better answer"]
    assert preferences.undo("ann") == item and lines(tmp_path / "preferences.corrections.jsonl") == []


def test_wrong_judgments_are_refused(tmp_path: Path) -> None:
    preferences = collection(tmp_path)
    item = preferences.next("ann")
    assert item is not None
    for ranks in ([], [1, 2], [0, 1, 2], [1, 2, 4], [1, 2, 3, 4]):
        with pytest.raises(UserError, match="give each of the 3 answers a rank"):
            preferences.judge("ann", item.id, ranks)
    for place, text in ((3, "x"), (-1, "x"), (0, " ")):
        with pytest.raises(UserError, match="a correction needs"):
            preferences.correct("ann", item.id, place, text)
    with pytest.raises(UserError, match="reload the page"):
        preferences.judge("ann", "0" * 16, [1, 2, 3])
    assert preferences.journal.events == []


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "preferences.jsonl"
    out.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match="was not written by `firth annotate`"):
        Preferences(out)
    assert "chosen" in out.read_text()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = collection(tmp_path)
    with pytest.raises(UserError, match="another process collects"):
        Preferences(tmp_path / "preferences.jsonl")
    first.close()
    Preferences(tmp_path / "preferences.jsonl").close()


def test_a_cut_last_line_is_removed(tmp_path: Path) -> None:
    preferences = collection(tmp_path)
    judge(preferences, "ann")
    judge(preferences, "ann")
    preferences.close()
    events = tmp_path / "preferences.events.jsonl"
    whole = events.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (first, first + 1, len(whole) // 2 + first // 2, len(whole) - 1):
        events.write_bytes(whole[:end])
        again = collection(tmp_path)
        assert len(again.judgments()) == 1 and len(lines(tmp_path / "preferences.jsonl")) == 1
        judge(again, "ann")
        again.close()
        assert [row["prompt"] for row in lines(tmp_path / "preferences.jsonl")] == ["question 0", "question 1"]


KILLED = """
import sys
from pathlib import Path
from firth.serve.preferences import Preferences, make_item
preferences = Preferences(Path(sys.argv[1]), twice=0.0)
preferences.add([make_item(f"question {i}", [("a", f"{i} yes"), ("b", f"{i} no")]) for i in range(10_000)])
while (item := preferences.next("ann")) is not None:
    preferences.judge("ann", item.id, [1, 2])
    print(item.prompt, flush=True)
"""


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "preferences.jsonl"
    shown: list[str] = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(15):
            shown.append(process.stdout.readline().strip())
        os.kill(process.pid, signal.SIGKILL)
        shown += process.stdout.read().split("\n")[:-1]
        process.wait()
    preferences = Preferences(out)
    recorded = [one["prompt"] for one in preferences.judgments()]
    assert recorded[: len(shown)] != [] and set(shown) - {""} <= set(recorded) and len(recorded) == len(set(recorded))
    assert [row["prompt"] for row in lines(out)] == recorded


def test_scores_of_runs_are_those_of_bradley_terry(tmp_path: Path) -> None:
    """Two answers of two runs; run0 wins 15 of 20: a log-odds of ln 3, or 191 points of Elo's scale."""
    preferences = collection(tmp_path, 20, answers=2)
    for i in range(20):
        judge(preferences, "ann", best_first=i < 15)
    judgments = preferences.judgments()
    votes = run_votes(judgments)
    assert votes is not None and votes.names == ("run0", "run1") and votes.outcome.sum() == 15
    score = bradley_terry(votes, penalty=0)
    assert score[0] - score[1] == pytest.approx(np.log(3), abs=1e-6)
    first, second = run_scores(judgments)
    assert (first["name"], first["votes"], first["win_rate"]) == ("run0", 20, 0.75)
    assert first["low"] < first["score"] < first["high"] and second["high"] > second["score"]
    assert first["score"] - second["score"] == pytest.approx(400 * np.log10(3), rel=0.03)  # with the penalty


def test_agreement_counts_decisions_on_two_answers(tmp_path: Path) -> None:
    """Two annotators on two prompts of three answers: on one they agree, on the other the order is reversed."""
    rows: list[dict[str, Any]] = [
        {"item": item, "annotator": name, "answers": ["a", "b", "c"], "ranks": ranks}
        for item, name, ranks in [("1", "ann", [1, 2, 3]), ("1", "bob", [1, 2, 3]), ("2", "ann", [1, 2, 3]), ("2", "bob", [3, 2, 1])]
    ]  # fmt: skip
    rows.append({"item": "3", "annotator": "ann", "answers": ["a", "b"], "ranks": [1, 1]})
    found = agreement(rows)
    assert (found["decisions"], found["share"]) == (6, 0.5)
    # Cohen: ann always -1, bob half of the time, so 0.5 is expected. Fleiss: 9 of 12 are -1.
    assert found["cohen"] == [{"first": "ann", "second": "bob", "decisions": 6, "kappa": 0.0}]
    assert found["fleiss"] == pytest.approx((0.5 - (0.75**2 + 0.25**2)) / (1 - (0.75**2 + 0.25**2)))
    # The order in which answers were listed does not matter.
    turned = [rows[0], rows[1] | {"answers": ["c", "a", "b"], "ranks": [3, 1, 2]}]
    assert agreement(turned)["share"] == 1.0
    assert agreement([]) == {"decisions": 0, "share": None, "fleiss": None, "cohen": []}
