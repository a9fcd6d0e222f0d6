"""Collecting preferences over HTTP: sampled answers, hidden runs, the statistics."""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from firth.data.dialogues import ranking
from firth.evaluate.prompting.requests import GenerateReply
from firth.pipelines.stage import Asker, read_prompts
from firth.serve.annotation import AnnotationConfig, Collection, annotation_routes, sampled_items
from firth.serve.app import create_app
from firth.serve.config import ServeConfig, ServeLimits
from firth.types import UserError
from tests.support.serving import running_app


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def samples(tmp_path: Path) -> str:
    rows = [{"prompt": f"question {i}", "samples": [f"{i} yes", f"{i} no", f"{i} yes"]} for i in range(20)]
    return write(tmp_path / "samples.jsonl", rows)


def open_page(collection: Collection) -> TestClient:
    return TestClient(create_app(None, ServeConfig(), annotation_routes(collection)), base_url="http://localhost")


def wait(collection: Collection) -> None:
    deadline = time.monotonic() + 30
    while collection.sampling:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_person_judges_by_the_page(samples: str, tmp_path: Path) -> None:
    out = tmp_path / "out" / "preferences.jsonl"
    collection = Collection(AnnotationConfig((), (samples,), twice=0.0), out)
    collection.start()
    wait(collection)
    with open_page(collection) as http:
        assert "annotate.js" in http.get("/").text
        task = http.post("/annotation/next", json={"annotator": "ann"}).json()
        assert task["prompt"] == "question 0" and sorted(task["answers"]) == ["0 no", "0 yes"] and task["judged"] == 0
        assert "runs" not in json.dumps(task)
        ranks = [1 if text == "0 yes" else 2 for text in task["answers"]]
        body = {"annotator": "ann", "item": task["item"], "token": task["token"]}
        task = http.post("/annotation/judge", json=body | {"ranks": ranks, "comment": " good "}).json()
        assert (task["prompt"], task["judged"]) == ("question 1", 1)
        undo = {"annotator": "ann", "event": task["event"]}
        task = http.post("/annotation/undo", json=undo).json()
        assert (
            task["prompt"] == "question 0" and http.post("/annotation/undo", json=undo).json()["item"] == task["item"]
        )
        refused = http.post("/annotation/skip", json=body)
        assert refused.status_code == 409 and refused.json()["error"]["code"] == "stale"
        task = http.post("/annotation/skip", json=body | {"token": task["token"]}).json()
        place = task["answers"].index("1 no")
        correction = {
            "annotator": "ann",
            "item": task["item"],
            "token": task["token"],
            "place": place,
            "text": "perhaps",
        }
        assert http.post("/annotation/correct", json=correction).json() == {"recorded": True, "event": 3}
        body = {"annotator": "ann", "item": task["item"], "token": task["token"], "ranks": [1, 1]}
        http.post("/annotation/judge", json=body)
        numbers = http.get("/annotation/statistics").json()
    assert (numbers["prompts"], numbers["judgments"], numbers["skipped"], numbers["corrections"]) == (20, 1, 1, 1)
    assert numbers["annotators"] == {"ann": 1} and numbers["runs"] == []
    [correction] = [
        json.loads(line) for line in (out.parent / "preferences.corrections.jsonl").read_text().splitlines()
    ]
    assert (correction["completion"], correction["original"]) == ("perhaps", "1 no")


def test_wrong_requests_are_refused(samples: str, tmp_path: Path) -> None:
    collection = Collection(AnnotationConfig((), (samples,)), tmp_path / "preferences.jsonl")
    with open_page(collection) as http:
        task = http.post("/annotation/next", json={"annotator": "ann"}).json()
        good = {"annotator": "ann", "item": task["item"], "token": task["token"], "ranks": [1, 2]}
        for change in ({"ranks": [1]}, {"ranks": [1, 3]}, {"ranks": [1, "2"]}, {"item": "x"}, {"annotator": ""}, {"other": 1},
                       {"seconds": -1}, {"ranks": [1, 10**30]}):  # fmt: skip
            answer = http.post("/annotation/judge", json=good | change)
            assert answer.status_code == 400 and answer.json()["error"]["message"], change
        assert (
            http.post("/annotation/judge", content=b"{", headers={"content-type": "application/json"}).status_code
            == 400
        )
    assert collection.preferences.judgments() == []


def test_answers_are_sampled_from_all_runs_in_turn(
    model_paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers of two runs: each run writes half of all answers. The same command samples the same ones."""
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other").symlink_to(model_paths["gpt"])
    runs = (str(model_paths["gpt"]), str(tmp_path / "other"))
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Who holds {i}?"} for i in range(10)])
    config = AnnotationConfig(runs, (prompts,), answers=3, max_new_tokens=8, chat=False)
    found = [item for items in sampled_items(config, read_prompts((prompts,))) for item in items]
    assert [item.prompt for item in found] == [f"Who holds {i}?" for i in range(10)]
    counts = [sum(run in answer.runs for item in found for answer in item.answers) for run in runs]
    assert counts == [15, 15] and all(len(item.answers) == 3 for item in found)
    assert [item for items in sampled_items(config, read_prompts((prompts,))) for item in items] == found


def test_scores_of_hidden_runs(model_paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other").symlink_to(model_paths["gpt"])
    runs = (str(model_paths["gpt"]), str(tmp_path / "other"))
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Who holds {i}?"} for i in range(6)])
    config = AnnotationConfig(runs, (prompts,), answers=2, max_new_tokens=8, chat=False, twice=1.0)
    collection = Collection(config, tmp_path / "preferences.jsonl")
    with open_page(collection) as http:
        for name in ("ann", "bob"):
            while (task := http.post("/annotation/next", json={"annotator": name}).json())["item"]:
                assert "other" not in json.dumps(task)
                written = {a.text: a.runs for a in collection.preferences.items[task["item"]].answers}
                ranks = [1 if runs[1] in written[text] else 2 for text in task["answers"]]
                http.post(
                    "/annotation/judge",
                    json={"annotator": name, "item": task["item"], "token": task["token"], "ranks": ranks},
                )
        numbers = http.get("/annotation/statistics").json()
    assert [(row["name"], row["votes"], row["win_rate"]) for row in numbers["runs"]] == [
        (runs[1], 12, 1.0),
        (runs[0], 12, 0.0),
    ]
    assert numbers["agreement"]["share"] == 1.0 and numbers["done"] == numbers["wanted"] == 12
    rows = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(row["runs"][0] == [runs[1]] and ranking(row)[2] == [0, 1] for row in rows)


def test_what_cannot_be_judged_is_named(
    model_paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "cache"))
    plain = write(tmp_path / "plain.jsonl", [{"prompt": "Who?"}])
    with pytest.raises(UserError, match=r"plain\.jsonl:1: there is no list of answers in `samples`"):
        Collection(AnnotationConfig((), (plain,)), tmp_path / "a.jsonl")
    long = write(tmp_path / "long.jsonl", [{"prompt": "Who?"}, {"prompt": "the otter " * 200}])
    config = AnnotationConfig((str(model_paths["gpt"]),), (long,), chat=False, max_new_tokens=4)
    with pytest.raises(UserError, match=r"long\.jsonl:2: the prompt has"):
        Collection(config, tmp_path / "b.jsonl")
    rows = [{"prompt": f"Who holds {i}?"} for i in range(9)] + [{"prompt": "the otter " * 200}]
    later = AnnotationConfig(
        (str(model_paths["gpt"]),), (write(tmp_path / "later.jsonl", rows),), chat=False, max_new_tokens=4
    )
    collection = Collection(later, tmp_path / "c.jsonl")
    collection.start()
    wait(collection)
    with open_page(collection) as http:
        task = http.post("/annotation/next", json={"annotator": "ann"}).json()
    assert task["prompt"] == "Who holds 0?" and "later.jsonl:10" in task["error"]


def test_a_restart_takes_what_was_judged_from_the_journal(
    model_paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the cache of replies too: only prompts that nobody judged are sampled; other settings sample all again."""
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "cache"))
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Who holds {i}?"} for i in range(4)])
    config = AnnotationConfig(
        (str(model_paths["gpt"]),), (prompts,), answers=3, max_new_tokens=8, chat=False, twice=0.0
    )
    first = Collection(config, tmp_path / "preferences.jsonl")
    items = list(first.preferences.items.values())
    for item in (items[0], items[2]):
        first.preferences.skip("ann", item.id, first.preferences.shown(item, "ann").token)
    first.preferences.close()
    requested: list[str] = []

    def write_one(self: Asker, requests: Any, locations: Any) -> list[GenerateReply]:
        requested.extend(request.prompt for request in requests)
        return [GenerateReply(f"sample {i}", "stop") for i in range(len(requests))]

    monkeypatch.setattr(Asker, "write", write_one)
    again = Collection(config, tmp_path / "preferences.jsonl")
    assert set(requested) == {items[1].prompt, items[3].prompt}
    found = list(again.preferences.items.values())
    assert (found[0], found[2]) == (items[0], items[2]) and [one.prompt for one in found] == [
        one.prompt for one in items
    ]
    again.preferences.close()
    requested.clear()
    Collection(replace(config, temperature=0.5), tmp_path / "preferences.jsonl").preferences.close()
    assert len(set(requested)) == 4


def test_undo_of_a_prompt_that_is_gone_says_so(samples: str, tmp_path: Path) -> None:
    first = Collection(AnnotationConfig((), (samples,), twice=0.0), tmp_path / "preferences.jsonl")
    item = first.preferences.next("ann")
    assert item is not None
    first.preferences.skip("ann", item.id, first.preferences.shown(item, "ann").token)
    first.preferences.close()
    other = write(tmp_path / "other.jsonl", [{"prompt": "another", "samples": ["yes", "no"]}])
    collection = Collection(AnnotationConfig((), (other,), twice=0.0), tmp_path / "preferences.jsonl")
    with open_page(collection) as http:
        task = http.post("/annotation/next", json={"annotator": "ann"}).json()
        task = http.post("/annotation/undo", json={"annotator": "ann", "event": task["event"]}).json()
    assert task["prompt"] == "another" and task["event"] is None
    assert task["notice"] == "The skip is undone. Its prompt is not among those that are loaded: question 0"


def test_requests_have_places(samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request more than the limit gets 429, and a place is free again when its request is answered."""
    collection = Collection(AnnotationConfig((), (samples,)), tmp_path / "preferences.jsonl")
    entered, leave = threading.Event(), threading.Event()
    real = collection.preferences.next

    def slow(annotator: str) -> Any:
        entered.set()
        assert leave.wait(30)
        return real(annotator)

    monkeypatch.setattr(collection.preferences, "next", slow)
    config = ServeConfig(port=0, limits=ServeLimits(max_requests=1))
    app = create_app(None, config, annotation_routes(collection, config.limits))
    with running_app(None, config, app) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.post, "/annotation/next", {"annotator": "ann"})
        assert entered.wait(30)
        assert server.post("/annotation/next", {"annotator": "bob"}).status_code == 429
        assert httpx.get(server.url + "/annotation/statistics").status_code == 429
        leave.set()
        assert waiting.result().status_code == 200
        assert server.post("/annotation/next", {"annotator": "bob"}).status_code == 200


def test_half_a_character_is_refused_with_its_line(tmp_path: Path) -> None:
    """Such a text could be neither sent to the page nor written to a file."""
    for name, row in (("a", {"prompt": "bad \ud800"}), ("b", {"prompt": "ok", "samples": ["fine", "bad \udc00"]})):
        path = write(tmp_path / f"{name}.jsonl", [{"prompt": "ok", "samples": ["\U0001f600", "b"], "x": math.nan}, row])
        with pytest.raises(UserError, match=rf"{name}\.jsonl:2: a text has half a character"):
            read_prompts((path,))
