"""`firth annotate`: a person at the page, and training on the files that it writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from firth.cli import app
from firth.model.config import decoder_config
from firth.pretrained.load_save import save_model
from firth.serve.annotation import AnnotationConfig, Collection, annotation_routes
from firth.serve.app import create_app
from firth.serve.config import ServeConfig
from firth.tokenizer.train import train
from tests.support.browser import WIDTHS, checked_page, chromium
from tests.support.models import random_model
from tests.support.serving import TEXT, running_app

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
SHORT = ["max_steps=2", "batch.size=4", "evaluation.max_examples=4", "init_from=model"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory with a tiny model and prompts that have answers."""
    rng = np.random.default_rng(0)
    words = TEXT.split()
    texts = [" ".join(rng.choice(words, 6)) for _ in range(96)]
    tokenizer = train(iter(texts), "byte-bpe", 340)
    torch.manual_seed(0)
    save_model(
        random_model(decoder_config(tokenizer.vocab.size, 32, 1, 2, max_positions=128), std=0.1),
        tokenizer,
        tmp_path / "model",
    )
    rows = [{"prompt": texts[i], "samples": [texts[24 + i], texts[48 + i], texts[72 + i]]} for i in range(24)]
    rows[0]["samples"][0] = MARKUP
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def firth(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    return result.output


def open_collection(workdir: Path, twice: float = 0.0) -> Collection:
    return Collection(AnnotationConfig((), ("answers.jsonl",), twice=twice), workdir / "preferences.jsonl")


def finish(collection: Collection) -> None:
    """Sample the rest, and judge and correct everything that is left."""
    collection.start()
    for thread in threading.enumerate():
        if thread.name == "firth-annotate":
            thread.join()
    preferences = collection.preferences
    while (item := preferences.next("Ann")) is not None:
        token = preferences.shown(item, "Ann").token
        preferences.correct("Ann", item.id, token, 0, "the otter paints")
        preferences.judge("Ann", item.id, token, [1, 2, 3])


def test_training_reads_the_files(workdir: Path) -> None:
    """A reward model from preferences and from rankings, DPO, and finetuning on the corrections."""
    collection = open_collection(workdir)
    finish(collection)
    collection.preferences.close()
    assert len((workdir / "preferences.jsonl").read_text().splitlines()) == 24
    for recipe, data in (
        ("reward_model", "preferences.jsonl"), ("dpo", "preferences.jsonl"), ("ranking", "preferences.jsonl"),
        ("sft", "preferences.corrections.jsonl"),
    ):  # fmt: skip
        firth("train", recipe, f"data.path={data}", *SHORT, "--out", recipe)
        rows = [json.loads(line) for line in (workdir / recipe / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2]
    rankings = firth("ratings", "preferences.jsonl", "--rankings", "rankings.jsonl")
    assert "24 rankings" in rankings


@pytest.mark.browser
def test_a_second_window_gets_the_next_prompt(browser: Any, workdir: Path) -> None:
    """Two windows show one prompt. What the second one sends is not recorded, and it says so. Keys that repeat do nothing."""
    collection = open_collection(workdir)
    config = ServeConfig(port=0)
    context = browser.new_context()
    with running_app(None, config, create_app(None, config, annotation_routes(collection))) as server:
        first, second = context.new_page(), context.new_page()
        first.goto(server.url)
        first.get_by_label("Your name").fill("Ann")
        first.get_by_role("button", name="Begin").click()
        first.locator(".pick").nth(2).wait_for()
        prompt = first.locator(".prompt .text").text_content()
        second.goto(server.url)
        second.locator(".prompt .text", has_text=prompt).wait_for()
        for key in ("1", "2", "3"):
            first.keyboard.press(key)
        first.keyboard.press("Enter")
        first.get_by_text("Next prompt, 1 judged so far.").wait_for(state="attached")
        for key in ("3", "2", "1"):
            second.keyboard.press(key)
        second.keyboard.press("Enter")
        second.get_by_role("alert").get_by_text("nothing was recorded").wait_for()
        second.get_by_text("Next prompt, 1 judged so far.").wait_for(state="attached")
        second.keyboard.down("1")
        second.keyboard.down("1")  # as a key that is held
        assert second.locator(".rank").all_text_contents() == ["1", "–", "–"]
    assert [event["shown_ranks"] for event in collection.preferences.judgments()] == [[1, 2, 3]]
    context.close()
    collection.preferences.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_a_person_ranks_answers(browser: Any, workdir: Path, width: int) -> None:
    """By keys and clicks: rank, tie, comment, correct, skip, undo; markup in an answer is text."""
    collection = open_collection(workdir)
    preferences = collection.preferences
    config = ServeConfig(port=0)
    with (
        running_app(None, config, create_app(None, config, annotation_routes(collection))) as server,
        checked_page(browser, server.url, width, "dark") as page,
    ):
        page.get_by_label("Your name").fill("Ann")
        page.get_by_role("button", name="Begin").click()
        picks = page.locator(".pick")
        picks.nth(2).wait_for()
        assert MARKUP in page.locator(".answer .text").all_text_contents()
        assert page.locator("main img, main script").count() == 0
        save = page.get_by_role("button", name="Save", exact=False).last
        assert save.is_disabled()
        shown = page.locator(".answer .text").all_text_contents()
        page.keyboard.press("2")
        page.keyboard.press("t")
        page.keyboard.press("1")
        picks.nth(2).click()
        assert page.locator(".rank").all_text_contents() == ["1", "1", "2"]
        picks.nth(2).click()  # a second click takes the rank away
        assert page.locator(".rank").all_text_contents() == ["1", "1", "–"]
        page.keyboard.press("3")
        page.get_by_label("Comment").fill("ties 1 and 2")
        save.click()
        page.get_by_text("Next prompt, 1 judged so far.").wait_for(state="attached")
        [event] = preferences.judgments()
        ranks = dict(zip(event["answers"], event["ranks"], strict=True))
        assert (
            [ranks[text] for text in shown] == [1, 1, 2] and event["comment"] == "ties 1 and 2" and event["seconds"] > 0
        )
        second = page.locator(".prompt .text").text_content()
        page.get_by_role("button", name="Correct").first.click()
        page.get_by_label("How it should read").fill("a better answer")
        page.get_by_role("button", name="Save the correction").click()
        page.get_by_text("The correction is saved.").wait_for()
        assert json.loads((workdir / "preferences.corrections.jsonl").read_text())["completion"] == "a better answer"
        page.get_by_role("button", name="Skip").click()
        page.locator(".prompt .text", has_text=second).wait_for(state="detached")
        page.get_by_role("button", name="Undo").click()
        page.locator(".prompt .text", has_text=second).wait_for()
        page.get_by_role("button", name="All equal").click()
        page.keyboard.press("Enter")
        page.get_by_text("Next prompt, 2 judged so far.").wait_for(state="attached")
        assert len((workdir / "preferences.jsonl").read_text().splitlines()) == 1  # the tie is an event only
        page.get_by_text("Progress, agreement and scores").click()
        page.get_by_role("row", name="By Ann 2").wait_for()
        page.reload()
        page.locator(".prompt .text").wait_for()  # the name is kept
        finish(collection)
        page.reload()
        page.get_by_role("heading", name="Done").wait_for()
    preferences.close()


def test_the_command_prints_the_address(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command collects until the server stops, and then prints what it has."""
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: [one.close() for one in sockets])
    shown = firth("annotate", "answers.jsonl", "--port", "0", "--out", "out/preferences.jsonl")
    assert "serving at http://127.0.0.1:" in shown and "out/preferences.jsonl: 0 judgments" in shown
    failed = CliRunner().invoke(app, ["annotate", "no-such-run", "answers.jsonl", "--out", "x.jsonl"])
    assert failed.exit_code != 0 and "no-such-run" in str(failed.exception)
    failed = CliRunner().invoke(app, ["annotate", "answers.jsonl", "--host", "0.0.0.0", "--out", "x.jsonl"])
    assert "needs --api-key" in str(failed.exception)
