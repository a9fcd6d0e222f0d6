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

from firth.corpora import readers
from firth.corpora.readers import first_records
from firth.data.conversations import comparison, messages_of
from firth.data.dialogues import DialoguesConfig, PreferencesConfig, RankingsConfig, ranking
from firth.data.records import Records
from firth.evaluate.ratings import bradley_terry, write_rankings
from firth.serve.preference_statistics import agreement, run_scores, run_votes, statistics
from firth.serve.preferences import JudgedItem, Preferences, StaleError, make_item
from firth.types import UserError
from tests.support.tiny_corpus import tokenizer


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


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file as `train` and all other commands read them."""
    return [record for _, record in readers.records([str(path)])]


def judge(preferences: Preferences, annotator: str, best_first: bool = True) -> JudgedItem | None:
    """Rank the answers by their text, and return the item; None if there is none."""
    item = preferences.next(annotator)
    if item is not None:
        order = preferences.order(item, annotator)
        ranks = [place + 1 if best_first else len(order) - place for place in order]
        rank(preferences, annotator, item, ranks)
    return item


def rank(preferences: Preferences, annotator: str, item: JudgedItem, ranks: list[int], **values: Any) -> None:
    """Judge what an annotator sees now."""
    preferences.judge(annotator, item.id, preferences.shown(item, annotator).token, ranks, **values)


def skip(preferences: Preferences, annotator: str, item: JudgedItem) -> None:
    preferences.skip(annotator, item.id, preferences.shown(item, annotator).token)


def undo(preferences: Preferences, annotator: str) -> str | None:
    """Undo, and return the prompt of what was undone."""
    event = preferences.undo(annotator)
    return event["prompt"] if event is not None else None


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
    found = rows(tmp_path / "preferences.jsonl")
    assert len(found) == 20 and len(orders) > 3
    for i, row in enumerate(found):
        assert row["answers"] == [f"answer {k} to {i}" for k in range(3)] and row["ranks"] == [1, 2, 3]
        assert (row["chosen"], row["rejected"]) == (f"answer 0 to {i}", f"answer 2 to {i}")
        assert row["runs"] == [["run0"], ["run1"], ["run0"]] and row["annotator"] == "ann"


def test_the_file_is_read_as_preferences_and_as_rankings(tmp_path: Path) -> None:
    preferences = collection(tmp_path)
    item = preferences.next("ann")
    assert item is not None
    order = preferences.order(item, "ann")
    rank(preferences, "ann", item, [{0: 1, 1: 3, 2: 1}[i] for i in order], comment="two are fine")
    [row] = rows(tmp_path / "preferences.jsonl")
    prompt, chosen, rejected = comparison(row)
    assert prompt == [{"role": "user", "content": "question 0"}] and rejected[0]["content"] == "answer 1 to 0"
    _, answers, ranks = ranking(row)
    assert [answer[0]["content"] for answer in answers] == ["answer 0 to 0", "answer 2 to 0", "answer 1 to 0"]
    assert ranks == [0, 0, 1] and row["comment"] == "two are fine" and chosen[0]["content"] == "answer 0 to 0"


def test_a_tie_of_all_answers_is_kept_as_an_event_only(tmp_path: Path) -> None:
    preferences = collection(tmp_path)
    item = preferences.next("ann")
    assert item is not None
    rank(preferences, "ann", item, [1, 1, 1])
    assert rows(tmp_path / "preferences.jsonl") == [] and len(preferences.judgments()) == 1
    found = run_votes(preferences.judgments())
    assert found is not None and found[0].outcome.tolist() == [0.5, 0.5]


def test_undo_gives_the_prompt_back(tmp_path: Path) -> None:
    preferences = collection(tmp_path)
    first, second = judge(preferences, "ann"), judge(preferences, "ann")
    judge(preferences, "bob")
    assert first is not None and second is not None
    before = preferences.order(second, "ann")
    assert undo(preferences, "ann") == second.prompt
    assert preferences.order(second, "ann") != before  # that of the first time again
    skip(preferences, "ann", second)
    assert [undo(preferences, "ann") for _ in range(3)] == [second.prompt, first.prompt, None]
    assert [row["annotator"] for row in rows(tmp_path / "preferences.jsonl")] == ["bob"]
    assert preferences.next("ann") == first
    assert len(lines(tmp_path / "preferences.events.jsonl")) == 7  # nothing is removed


def test_a_skipped_prompt_is_given_to_others(tmp_path: Path) -> None:
    preferences = collection(tmp_path, 2)
    item = preferences.next("ann")
    assert item is not None
    skip(preferences, "ann", item)
    assert preferences.next("ann") != item and preferences.next("bob") == item


def test_two_annotators_get_different_prompts_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preferences = collection(tmp_path, 2)
    first, second = preferences.next("ann"), preferences.next("bob")
    assert first != second and preferences.next("ann") == first and preferences.next("eve") is None
    later = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert preferences.next("eve") in (first, second)  # the person who had it has left


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
    preferences.correct("ann", item.id, preferences.shown(item, "ann").token, place, "  a better answer ")
    [row] = rows(tmp_path / "preferences.corrections.jsonl")
    assert row["original"] == "answer 1 to 0"
    assert [one["content"] for one in messages_of(row)] == ["question 0", "a better answer"]
    assert undo(preferences, "ann") == item.prompt and rows(tmp_path / "preferences.corrections.jsonl") == []


def test_wrong_judgments_are_refused(tmp_path: Path) -> None:
    preferences = collection(tmp_path)
    item = preferences.next("ann")
    assert item is not None
    for ranks in ([], [1, 2], [0, 1, 2], [1, 2, 4], [1, 2, 3, 4]):
        with pytest.raises(UserError, match="give each of the 3 answers a rank"):
            rank(preferences, "ann", item, ranks)
    for place, text in ((3, "x"), (-1, "x"), (0, " ")):
        with pytest.raises(UserError, match="a correction needs"):
            preferences.correct("ann", item.id, preferences.shown(item, "ann").token, place, text)
    with pytest.raises(UserError, match="reload the page"):
        preferences.judge("ann", "0" * 16, "", [1, 2, 3])
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
        assert len(again.judgments()) == 1 and len(rows(tmp_path / "preferences.jsonl")) == 1
        judge(again, "ann")
        again.close()
        assert [row["prompt"] for row in rows(tmp_path / "preferences.jsonl")] == ["question 0", "question 1"]


KILLED = """
import sys
from pathlib import Path
from firth.serve.preferences import Preferences, make_item
preferences = Preferences(Path(sys.argv[1]), twice=0.0)
preferences.add([make_item(f"question {i}", [("a", f"{i} yes"), ("b", f"{i} no")]) for i in range(10_000)])
while (item := preferences.next("ann")) is not None:
    preferences.judge("ann", item.id, preferences.shown(item, "ann").token, [1, 2])
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
    assert [row["prompt"] for row in rows(out)] == recorded


def test_scores_of_runs_are_those_of_bradley_terry(tmp_path: Path) -> None:
    """Two answers of two runs; run0 wins 15 of 20: a log-odds of ln 3, or 191 points of Elo's scale."""
    preferences = collection(tmp_path, 20, answers=2)
    for i in range(20):
        judge(preferences, "ann", best_first=i < 15)
    judgments = preferences.judgments()
    found = run_votes(judgments)
    assert found is not None
    votes = found[0]
    assert votes.names == ("run0", "run1") and votes.outcome.sum() == 15
    score = bradley_terry(votes, penalty=0)
    assert score[0] - score[1] == pytest.approx(np.log(3), abs=1e-6)
    first, second = run_scores(judgments)
    assert (first["name"], first["votes"], first["win_rate"]) == ("run0", 20, 0.75)
    assert first["low"] < first["score"] < first["high"] and second["high"] > second["score"]
    assert first["score"] - second["score"] == pytest.approx(400 * np.log10(3), rel=0.03)  # with the penalty


def test_agreement_counts_decisions_on_two_answers(tmp_path: Path) -> None:
    """Two annotators on two prompts of three answers: on one they agree, on the other the order is reversed."""
    judged: list[dict[str, Any]] = [
        {"item": item, "annotator": name, "answers": ["a", "b", "c"], "ranks": ranks}
        for item, name, ranks in [("1", "ann", [1, 2, 3]), ("1", "bob", [1, 2, 3]), ("2", "ann", [1, 2, 3]), ("2", "bob", [3, 2, 1])]
    ]  # fmt: skip
    judged.append({"item": "3", "annotator": "ann", "answers": ["a", "b"], "ranks": [1, 1]})
    found = agreement(judged)
    assert (found["decisions"], found["share"]) == (6, 0.5)
    # Cohen: ann always -1, bob half of the time, so 0.5 is expected. Fleiss: 9 of 12 are -1.
    assert found["cohen"] == [{"first": "ann", "second": "bob", "decisions": 6, "kappa": 0.0}]
    assert found["fleiss"] == pytest.approx((0.5 - (0.75**2 + 0.25**2)) / (1 - (0.75**2 + 0.25**2)))
    # The order in which answers were listed does not matter.
    turned = [judged[0], judged[1] | {"answers": ["c", "a", "b"], "ranks": [3, 1, 2]}]
    assert agreement(turned)["share"] == 1.0
    assert agreement([]) == {"decisions": 0, "share": None, "fleiss": None, "cohen": []}


def test_a_repeated_request_is_recorded_once(tmp_path: Path) -> None:
    """Two windows show the same answers; the first that judges wins, and the ranks of the other are given to no answer."""
    preferences = collection(tmp_path, 50, answers=4)
    for _ in range(50):
        item = preferences.next("ann")
        assert item is not None
        shown = preferences.shown(item, "ann")
        for _ in range(2):  # the second time is a retry
            preferences.judge("ann", item.id, shown.token, [1, 2, 3, 4])
        assert rows(tmp_path / "preferences.jsonl")[-1]["answers"] == shown.answers
        with pytest.raises(StaleError, match="nothing was recorded"):
            preferences.judge("ann", item.id, shown.token, [4, 3, 2, 1])
        with pytest.raises(StaleError, match="nothing was recorded"):
            preferences.correct("ann", item.id, shown.token, 0, "better")
        with pytest.raises(StaleError, match="nothing was recorded"):
            preferences.skip("ann", item.id, shown.token)
    assert len(preferences.journal.events) == 50


def test_a_request_that_arrives_after_its_undo_is_refused(tmp_path: Path) -> None:
    preferences = collection(tmp_path)
    item = preferences.next("ann")
    assert item is not None
    shown = preferences.shown(item, "ann")
    preferences.correct("ann", item.id, shown.token, 2, "better")
    preferences.correct("ann", item.id, shown.token, 2, "better")
    assert [row["original"] for row in rows(tmp_path / "preferences.corrections.jsonl")] == [shown.answers[2]]
    preferences.judge("ann", item.id, shown.token, [1, 2, 3])
    last = preferences.last("ann")
    for _ in range(2):  # the second time is a retry, and does not undo the correction too
        assert preferences.undo("ann", last) == preferences.journal.events[1]
    assert len(preferences.journal.active) == 1
    with pytest.raises(StaleError):
        preferences.judge("ann", item.id, shown.token, [1, 2, 3])
    with pytest.raises(StaleError, match="nothing was undone"):
        preferences.undo("ann", 99)
    assert preferences.shown(item, "ann").answers == shown.answers
    rank(preferences, "ann", item, [3, 2, 1])
    assert [one["shown_ranks"] for one in preferences.judgments()] == [[3, 2, 1]]


def test_undo_names_an_event_and_not_a_line(tmp_path: Path) -> None:
    """A damaged line may be removed: the undo of another event still revokes that one."""
    preferences = collection(tmp_path)
    judge(preferences, "ann")
    judge(preferences, "ann")
    preferences.undo("ann")
    judge(preferences, "bob")
    before = [one["prompt"] for one in preferences.judgments()]
    preferences.close()
    events = tmp_path / "preferences.events.jsonl"
    events.write_text("".join(events.read_text().splitlines(keepends=True)[1:]))
    assert before == ["question 0", "question 2"]
    assert [one["prompt"] for one in collection(tmp_path).judgments()] == ["question 2"]


FULL = """
import resource, signal, sys
from pathlib import Path
from firth.serve.preferences import Preferences, make_item
from firth.types import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
out = Path(sys.argv[1])
preferences = Preferences(out, twice=0.0)
items = [make_item(f"question {i}", [("a", f"{i} yes"), ("b", f"{i} no")]) for i in range(4)]
preferences.add(items)
def judge(i):
    preferences.judge("ann", items[i].id, preferences.shown(items[i], "ann").token, [1, 2])
def full(path, free):
    size = (path.stat().st_size + free) if path is not None else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
judge(0)
full(preferences.journal.path, 50)
try:
    judge(1)
except UserError as error:
    print(error)
full(None, 0)
judge(2)
preferences.undo("ann")
judge(3)
preferences.journal._file.close()
"""


def test_a_full_disk_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    """The judgment that cannot be written is refused; later ones and their undo are read back as they were made."""
    out = tmp_path / "preferences.jsonl"
    output = subprocess.run([sys.executable, "-c", FULL, str(out)], capture_output=True, text=True, check=True).stdout
    assert "preferences.events.jsonl: file too large; free some room" in output
    assert [row["prompt"] for row in rows(out)] == ["question 0", "question 3"]
    assert [one["prompt"] for one in Preferences(out).judgments()] == ["question 0", "question 3"]


def test_a_file_that_could_not_be_written_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event is kept although its row could not be written; the same request writes it."""
    preferences = collection(tmp_path)
    judge(preferences, "ann")
    item = preferences.next("ann")
    assert item is not None
    token = preferences.shown(item, "ann").token
    with monkeypatch.context() as patch:
        real = os.write
        patch.setattr(os, "write", lambda fd, data: real(fd, data) if b'"event"' in data else real(fd, data[:9]) // 0)
        with pytest.raises(ZeroDivisionError):
            preferences.judge("ann", item.id, token, [1, 2, 3])
    assert len(rows(tmp_path / "preferences.jsonl")) == 1
    preferences.judge("ann", item.id, token, [1, 2, 3])
    assert len(rows(tmp_path / "preferences.jsonl")) == 2 and len(preferences.journal.events) == 2


def test_files_are_only_appended_to(tmp_path: Path) -> None:
    """A judgment, an undo and a start leave what was written before as it is; a file that is gone is written again."""
    preferences, out = collection(tmp_path, 8), tmp_path / "preferences.jsonl"
    files = [tmp_path / f"preferences{kind}.jsonl" for kind in ("", ".corrections", ".events")]
    before: dict[Path, tuple[int, bytes]] = {}

    def check() -> None:
        for file in files:
            if file.exists():
                number, content = before.get(file, (file.stat().st_ino, b""))
                assert file.stat().st_ino == number and file.read_bytes().startswith(content)
                before[file] = number, file.read_bytes()

    for _ in range(3):
        item = preferences.next("ann")
        assert item is not None
        preferences.correct("ann", item.id, preferences.shown(item, "ann").token, 0, "better")
        check()
        judge(preferences, "ann")
        check()
        preferences.undo("ann")  # the judgment
        check()
        preferences.undo("ann")  # the correction
        check()
        judge(preferences, "ann")
        check()
        preferences.close()
        preferences = collection(tmp_path, 8)
        check()
    assert [row["prompt"] for row in rows(out)] == ["question 0", "question 1", "question 2"]
    assert [one["undo"] for one in lines(out) if "undo" in one] == [1, 6, 11] and rows(files[1]) == []
    out.unlink()
    judge(preferences, "ann")
    assert [row["prompt"] for row in rows(out)] == [f"question {i}" for i in range(4)]


def test_a_row_that_a_kill_cut_is_written_again(tmp_path: Path) -> None:
    """The file of preferences is cut at each byte, and read as it is; the next start completes it."""
    preferences, out = collection(tmp_path), tmp_path / "preferences.jsonl"
    judge(preferences, "ann")
    judge(preferences, "ann")
    preferences.undo("ann")
    judge(preferences, "ann", best_first=False)
    preferences.close()
    whole, wanted = out.read_bytes(), rows(out)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for end in (*range(0, len(whole), 37), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])):
        out.write_bytes(whole[:end])
        complete = whole[:end].count(b"\n") + (whole[end : end + 1] == b"\n")
        if end and not complete:  # a file of which nothing is known
            with pytest.raises(UserError, match="this line is not JSON"):
                rows(out)
        else:
            assert [row["id"] for row in rows(out)] == [[], [0], [0, 1], [0], [0, 3]][complete]
        collection(tmp_path).close()
        assert out.read_bytes() == whole and rows(out) == wanted
    out.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match="the last line is not one of `firth annotate`"):
        collection(tmp_path)


def test_every_reader_skips_what_was_undone(tmp_path: Path) -> None:
    """Reward models and DPO, rankings, ratings, and demonstrations of the file of corrections."""
    preferences, out = collection(tmp_path), tmp_path / "preferences.jsonl"
    for best_first in (True, False):
        item = judge(preferences, "ann", best_first)
        assert item is not None
        preferences.undo("ann")
        judge(preferences, "ann", not best_first)
    place = preferences.order(item, "bob").index(1)
    for text in ("wrong", "right"):
        preferences.correct("bob", item.id, preferences.shown(item, "bob").token, place, text)
        if text == "wrong":
            preferences.undo("bob")
    preferences.close()
    assert len(lines(out)) == 6
    words = tokenizer()
    for kind in (PreferencesConfig, RankingsConfig):
        found = Records(kind(max_length=200), [str(out)], words)
        assert found.num_records == 2 and not found.notes, kind
    pair = Records(PreferencesConfig(max_length=200), [str(out)], words)[0]
    assert "answer 2 to 0" in words.decode(pair["chosen_tokens"]) and "answer 0" in words.decode(
        pair["rejected_tokens"]
    )
    assert write_rankings([str(out)], tmp_path / "rankings.jsonl") == 2
    [first, second] = rows(tmp_path / "rankings.jsonl")
    best = [row["answers"][int(np.argmax(row["scores"]))][0]["content"] for row in (first, second)]
    assert best == ["answer 2 to 0", "answer 0 to 1"]
    corrections = Records(DialoguesConfig(max_length=200), [str(tmp_path / "preferences.corrections.jsonl")], words)
    assert corrections.num_records == 1 and "right" in words.decode(corrections[0]["tokens"])
    with first_records(1):
        assert [row["id"] for row in rows(out)] == [2]


def test_undo_is_a_record_of_annotators_alone(tmp_path: Path) -> None:
    """Other files may have such fields."""
    file = tmp_path / "other.jsonl"
    file.write_text('{"id": 1, "text": "a"}\n{"undo": 1, "text": "b"}\n{"id": 1, "text": "c"}\n')
    assert [row["text"] for row in rows(file)] == ["a", "b", "c"]
    file.write_text('{"id": 1, "annotator": "x", "text": "a"}\n{"id": 2, "text": "b"}\n{"te')
    assert [row["text"] for row in rows(file)] == ["a", "b"]
    file.write_text('{"id": 1, "annotator": "x", "text": "a"}\n{"te\n{"id": 2}\n')
    with pytest.raises(UserError, match=r"other\.jsonl:2: this line is not JSON"):
        rows(file)


def test_corrections_of_something_else_are_not_overwritten(tmp_path: Path) -> None:
    corrections = tmp_path / "preferences.corrections.jsonl"
    corrections.write_text('{"prompt": "mine", "completion": "precious"}\n')
    with pytest.raises(UserError, match=r"corrections\.jsonl: this file was not written by `firth annotate`"):
        Preferences(tmp_path / "preferences.jsonl")
    assert "precious" in corrections.read_text()
    corrections.unlink()
    Preferences(tmp_path / "preferences.jsonl").close()  # the refusal gave up the lock


def judgments_of(outcomes: list[bool], answers: int) -> list[dict[str, Any]]:
    """Return judgments of `answers` of either run to a prompt, where all of the run `a` are better, or all worse."""
    runs, better = [["a"]] * answers + [["b"]] * answers, [1] * answers + [2] * answers
    return [
        {"prompt": str(i), "runs": runs, "annotator": "ann", "ranks": better if won else better[::-1]}
        for i, won in enumerate(outcomes)
    ]


def test_intervals_do_not_shrink_with_the_answers_to_a_prompt() -> None:
    """40 prompts, of which `a` wins 26: the interval is that of a binomial share, however many answers each prompt has."""
    stats = pytest.importorskip("scipy.stats", reason="the oracle; installed with the extra `scale`")
    won = np.array([i % 20 < 13 for i in range(40)])
    for answers in (1, 2, 3):
        [first] = [row for row in run_scores(judgments_of(won.tolist(), answers)) if row["name"] == "a"]
        for name, share in (("low", 0.025), ("high", 0.975)):
            p = stats.binom.ppf(share, 40, 0.65) / 40
            # ln(p / (1 - p)) is the difference of two scores around 1000; one more win is 10 points.
            assert first[name] == pytest.approx(1000 + 200 * np.log10(p / (1 - p)), abs=11), (answers, name)
    assert [row["low"] for row in run_scores(judgments_of([True], 3))] == [None, None]


def test_fleiss_kappa_counts_a_person_once() -> None:
    """One person who judges twice is one rater: with another one, kappa is that of two."""

    def judgment(item: str, name: str, ranks: list[int]) -> dict[str, Any]:
        return {"item": item, "annotator": name, "answers": ["a", "b"], "ranks": ranks}

    alone = [
        judgment("1", "ann", [1, 2]),
        judgment("1", "ann", [1, 2]),
        judgment("2", "ann", [1, 2]),
        judgment("2", "ann", [2, 1]),
    ]
    found = agreement(alone)
    assert (found["fleiss"], found["decisions"], found["share"]) == (None, 2, 0.5)
    two = [judgment(item, name, ranks) for item, name, ranks in [
        ("1", "ann", [1, 2]), ("1", "bob", [1, 2]), ("2", "ann", [1, 2]), ("2", "bob", [2, 1]), ("3", "ann", [2, 1]), ("3", "bob", [2, 1]),
    ]]  # fmt: skip
    again = [judgment("1", "ann", [2, 1]), judgment("2", "bob", [1, 2])]
    assert agreement(two + again)["fleiss"] == agreement(two)["fleiss"] == pytest.approx(1 / 3)
