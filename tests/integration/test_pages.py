"""The pages of `firth serve` and `firth watch` in a browser, each view used as a person would, on a desktop and on a phone."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from firth.evaluate.task import load_evaluated_model
from firth.generate.scheduler import Scheduler, Update
from firth.model.config import decoder_config, encoder_config, encoder_decoder_config
from firth.objectives.classification import classification_head
from firth.pretrained.load_save import save_model
from firth.runs.loaded_model import Model
from firth.serve.app import create_app
from firth.serve.board import Board
from firth.serve.config import ServeConfig, ServeLimits
from firth.serve.registry import ModelRegistry, ServedModel, load_models
from firth.tokenizer.train import train
from firth.training.logging import MetricsLog
from tests.support.browser import WIDTHS, checked_page, chromium
from tests.support.models import random_model
from tests.support.serving import TEXT, Running, running_app

expect = pytest.importorskip("playwright.sync_api", reason="drives the browser; installed with the test extra").expect
pytestmark = pytest.mark.browser

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
"""What a model writes in a test; the tests fail if a dialog opens or an element appears."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a run of 60 steps."""
    directory = tmp_path_factory.mktemp("board") / "runs"
    (directory / "gpt").mkdir(parents=True)
    (directory / "gpt" / "recipe.yaml").write_text(
        "name: gpt\nobjective: {kind: causal_lm}\nbudget: {max_steps: 100}\n"
    )
    write_rows(directory / "gpt", 0, 60)
    return directory


def write_rows(run: Path, start: int, stop: int) -> None:
    log = MetricsLog(run, start)
    for step in range(start + 1, stop + 1):
        log.row("train", step, step * 0.5, step * 100, {"loss": 5 - step / 50, "norm": 1.0})
    log.row("valid", stop, stop * 0.5, stop * 100, {"loss": 5 - stop / 55})
    log.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Iterator[Running]:
    """Return a server of a chat model, two decoders, an encoder, an encoder-decoder and a classifier, and a board."""
    directory = tmp_path_factory.mktemp("models")
    words = train([TEXT], "byte-bpe", 340, num_sentinels=4)
    size = words.vocab.size
    decoder = decoder_config(size, 32, 2, 2, max_positions=256)
    both = encoder_decoder_config(size, 32, 2, 2, max_positions=128)
    for name, config, facts in (
        ("chat", decoder, {"objective": ["sft"]}),
        ("gpt", decoder, {}),
        ("bert", encoder_config(size, 32, 2, 2, max_positions=64), {}),
        ("t5", both, {"objective": ["span_corruption"]}),
    ):
        save_model(random_model(config, std=0.1), words, directory / name, facts)
    head = {"classes": classification_head(32, 2)}
    facts = {"recipe": "0", "classes": ("bad", "good")}
    classifier = random_model(encoder_config(size, 32, 1, 2, max_positions=64), **head)
    save_model(classifier, words, directory / "classifier" / "model", facts)
    recipe = {"objective": {"kind": "classification", "position": "first"}, "examples": {"kind": "labeled"}}
    (directory / "classifier" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = load_models([str(directory / name) for name in ("chat", "gpt", "bert", "t5")])
    models = {
        **found.models,
        "classifier": ServedModel("classifier", Model(load_evaluated_model(directory / "classifier")), 0),
    }
    registry = ModelRegistry(models, found.thread)
    config = ServeConfig(port=0, limits=ServeLimits(max_new_tokens=200))
    with running_app(registry, config, create_app(registry, config, board=Board([runs]))) as server:
        yield server


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, browser: Any, site: Running) -> Iterator[Any]:
    """Return the page of the server at a width, which is checked at the end."""
    with checked_page(browser, site.url, request.param) as found:
        found.locator("h1").wait_for()
        yield found


def choose(page: Any, model: str, view: str) -> None:
    page.get_by_label("Model", exact=True).select_option(model)
    page.get_by_role("link", name=view, exact=True).click()
    page.get_by_role("heading", name=view, exact=True, level=1).wait_for()


def force_output(page: Any, text: str) -> None:
    """Make the server's model write this text, by a regular expression that the request then has."""

    def change(route: Any) -> None:
        body = json.loads(route.request.post_data)
        body["response_format"] = {"type": "regex", "pattern": re.escape(text)}
        route.continue_(post_data=json.dumps(body))

    for path in ("**/v1/chat/completions", "**/v1/completions"):
        page.route(path, change)


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")
    page.get_by_role("button", name="Send", exact=True).wait_for()


def test_chat(page: Any) -> None:
    choose(page, "chat", "Chat")
    page.locator("summary", has_text="Sampling").click()
    page.get_by_label("Most new tokens").fill("12")
    say(page, "Who paints the boat?")
    mine, answer = page.get_by_role("article", name="You"), page.get_by_role("article", name="chat")
    assert mine.locator(".text").inner_text() == "Who paints the boat?"
    first = answer.locator(".text").text_content()
    answer.get_by_role("button", name="Regenerate").click()
    page.get_by_text("2 of 2").wait_for()
    answer.get_by_role("button", name="Earlier answer").click()
    assert answer.locator(".text").text_content() == first
    mine.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("Who holds the map?")
    page.get_by_role("button", name="Send again").click()
    page.get_by_text("Who holds the map?").wait_for()
    page.get_by_role("button", name="Regenerate").wait_for()
    assert page.get_by_role("article").count() == 2
    page.get_by_role("button", name="New conversation").click()
    assert page.get_by_role("article").count() == 0


def test_settings_and_system_prompt_are_sent(page: Any) -> None:
    choose(page, "chat", "Chat")
    sent: list[dict[str, Any]] = []
    page.on(
        "request", lambda request: request.url.endswith("/chat/completions") and sent.append(request.post_data_json)
    )
    page.locator("summary", has_text="System prompt").click()
    page.locator("summary", has_text="Sampling").click()
    page.get_by_label("System prompt", exact=True).fill("Be brief.")
    for label, value in (("Temperature", "0"), ("Most new tokens", "5"), ("Seed", "7"), ("Stop at", "x\ny")):
        page.get_by_label(label, exact=True).fill(value)
    say(page, "Who?")
    page.get_by_role("button", name="Regenerate").wait_for()
    [body] = sent
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert (body["temperature"], body["max_tokens"], body["seed"], body["stop"], body["stream"]) == (
        0,
        5,
        7,
        ["x", "y"],
        True,
    )
    page.get_by_label("Temperature", exact=True).fill("-1")
    say(page, "Again?")
    assert len(sent) == 1  # a wrong value is not sent


def test_stop_ends_the_answer(page: Any, site: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Scheduler.step

    def slow_step(scheduler: Scheduler) -> list[Update]:
        time.sleep(0.1)  # the answer takes 24 seconds, so that there is time to stop it
        return step(scheduler)

    monkeypatch.setattr(Scheduler, "step", slow_step)
    force_output(page, "ab " * 80)
    choose(page, "chat", "Chat")
    page.get_by_label("Message", exact=True).fill("Go on.")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator(".assistant .text")).to_contain_text("ab ab")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("Stopped.").wait_for()
    site.settle(10)
    assert len(page.locator(".assistant .text").text_content()) < 240


def test_markup_of_a_model_is_text(page: Any) -> None:
    force_output(page, MARKUP)
    choose(page, "chat", "Chat")
    say(page, MARKUP)
    page.get_by_role("button", name="Regenerate").wait_for()
    texts = page.locator(".message .text")
    assert [texts.nth(i).text_content() for i in range(2)] == [MARKUP, MARKUP]
    choose(page, "gpt", "Write")
    page.get_by_label("Text", exact=True).fill(MARKUP)
    page.get_by_role("button", name="Continue").click()
    page.get_by_text("The model ended the text.").wait_for()
    assert page.locator(".output .text").text_content() == MARKUP * 2
    assert page.locator("main img, main script").count() == 0


def test_write_and_keep(page: Any) -> None:
    choose(page, "gpt", "Write")
    page.locator("summary", has_text="Sampling").click()
    page.get_by_label("Most new tokens").fill("8")
    page.get_by_label("Text", exact=True).fill("The otter")
    page.get_by_role("button", name="Continue").click()
    page.get_by_text("The limit of new tokens is reached.").wait_for()
    written = page.locator(".written").text_content()
    page.get_by_role("button", name="Keep and go on").click()
    assert page.get_by_label("Text", exact=True).input_value() == f"The otter{written}"
    page.get_by_role("button", name="Continue").wait_for()
    choose(page, "t5", "Write")
    page.get_by_label("Text", exact=True).fill("Who paints?")
    page.get_by_role("button", name="Answer").click()
    page.locator(".output .note", has_text=re.compile("limit|ended")).wait_for()


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_fill_in(page: Any, model: str) -> None:
    choose(page, model, "Fill in")
    text = page.get_by_role("textbox", name="Text")
    text.fill("The ")
    page.get_by_role("button", name="Insert <mask>").click()
    assert text.input_value() == "The <mask>"
    text.fill("The <mask> paints the <mask> at dawn.")
    page.get_by_label("Candidates", exact=True).fill("4")
    page.get_by_role("button", name="Fill", exact=True).click()
    page.get_by_role("heading", name="Gap 2").wait_for()
    second = page.get_by_role("group", name="Candidates for gap 1").get_by_role("button")
    if model == "bert":
        assert second.count() == 4
        second.nth(0).focus()
        page.keyboard.press("ArrowDown")
        piece = second.nth(1).locator(".piece").text_content()
        assert second.nth(1).get_attribute("aria-pressed") == "true"
        assert page.locator("mark").first.text_content() == piece


@pytest.mark.parametrize("model", ["gpt", "bert", "t5"])
def test_tokens(page: Any, model: str) -> None:
    choose(page, model, "Tokens")
    page.get_by_label("Text", exact=True).fill("The otter paints\nthe boat")
    page.get_by_role("button", name="Score").click()
    strip = page.get_by_role("group", name="Tokens of the text")
    strip.wait_for()
    texts = strip.get_by_role("button").all_text_contents()
    assert "".join(texts).replace("⏎", "\n") == "The otter paints\nthe boat"
    strip.get_by_role("button").last.click()
    assert page.locator(".detail tbody tr").count() == 10
    page.keyboard.press("Home")
    assert strip.get_by_role("button").first.get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize(("model", "kinds"), [("gpt", 0), ("bert", 0), ("t5", 3)])
def test_attention(page: Any, model: str, kinds: int) -> None:
    choose(page, model, "Attention")
    page.get_by_label("Text", exact=True).fill("The otter paints the boat at dawn")
    page.get_by_role("button", name="Show attention").click()
    page.get_by_role("heading", name="All layers and heads").wait_for()
    assert (
        page.get_by_label("Kind").locator("option").count() == kinds
        if kinds
        else page.get_by_label("Kind").count() == 0
    )
    assert page.locator(".thumb").count() == 4
    page.get_by_role("button", name="Layer 1, head 2").click()
    assert (
        page.get_by_label("Layer", exact=True).input_value(),
        page.get_by_label("Head", exact=True).input_value(),
    ) == ("0", "1")
    page.get_by_role("group", name="Choose the token").get_by_role("button").nth(1).click()
    shares = [int(one) for one in re.findall(r"(\d+)%", page.get_by_text("” attends to").text_content())]
    assert shares and shares == sorted(shares, reverse=True) and sum(shares) <= 101
    painted = page.evaluate(
        "[...document.querySelector('.scroll canvas').getContext('2d').getImageData(0, 0, 400, 400).data].some(Boolean)"
    )
    assert painted


def test_similarity(page: Any) -> None:
    choose(page, "bert", "Similarity")
    page.get_by_label("Texts").fill("The otter\nThe boat\n\nThe otter")
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("heading", name="Most similar").wait_for()
    cells = page.locator(".similarity tbody td").all_text_contents()
    assert len(cells) == 9 and cells[2] == "1.00" and cells[1] == cells[3] != "1.00"
    page.get_by_label("Texts").fill("one")
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("alert").get_by_text("two texts or more").wait_for()


def test_predictions(page: Any) -> None:
    choose(page, "classifier", "Predict")
    page.get_by_label("Text", exact=True).fill("a fine boat")
    page.get_by_role("button", name="Predict").click()
    page.get_by_role("heading", name="Prediction").wait_for()
    assert sorted(page.locator(".bars tbody .piece").all_text_contents()) == ["bad", "good"]


def test_views_that_a_model_lacks_have_a_reason(page: Any, site: Running) -> None:
    page.get_by_label("Model", exact=True).select_option("bert")
    assert page.get_by_role("link", name="Chat", exact=True).count() == 0
    page.get_by_text("Not with this model").click()
    page.get_by_text("It reads in both directions, so it does not continue a text.").first.wait_for()
    page.goto(f"{site.url}/#chat")
    page.get_by_label("Model", exact=True).select_option("gpt")
    page.get_by_text("Chat: It was not trained on dialogues").wait_for()


def test_side_by_side(page: Any) -> None:
    page.get_by_role("link", name="Side by side").click()
    page.get_by_label("Text", exact=True).fill("Who holds the map?")
    page.locator("summary", has_text="Sampling").click()
    page.get_by_label("Most new tokens").fill("6")
    second = page.get_by_role("region", name="Second model")
    second.get_by_role("combobox").select_option("t5")
    page.get_by_role("button", name="Write with both").click()
    for side, how in ((page.get_by_role("region", name="First model"), "as a chat"), (second, "as an answer")):
        side.get_by_text(re.compile(rf"{how}, \d")).wait_for()


def test_the_board_grows_while_a_run_trains(page: Any, runs: Path) -> None:
    """New rows, a resumed run and a run that begins later appear without reloading."""
    name = f"late-{page.viewport_size['width']}"
    page.get_by_role("link", name="Runs", exact=True).click()
    row = page.get_by_role("row", name=re.compile("runs.gpt"))
    row.get_by_text("step 60 of 100").wait_for()
    page.locator(".plot polyline").first.wait_for()
    before = page.locator(".plot polyline").nth(1).get_attribute("points")
    write_rows(runs / "gpt", 60, 80)
    row.get_by_text("step 80 of 100").wait_for()
    expect(page.locator(".plot polyline").nth(1)).not_to_have_attribute("points", before)
    (runs / name).mkdir()
    with (runs / name / "metrics.jsonl").open("w") as file:
        file.write('{"split": "train", "step": 3, "seconds": 1, "tokens": 5, "loss": 2.5}\n{"split": "train", "st')
    late = page.get_by_role("row", name=re.compile(name))
    late.get_by_text("step 3").wait_for()
    late.get_by_role("checkbox").check()
    page.get_by_label("Horizontal axis").select_option("tokens")
    page.get_by_label("Logarithmic").check()
    page.locator(".legend").get_by_text(name).wait_for()
    write_rows(runs / "gpt", 60, 60)
    row.get_by_text("step 60 of 100").wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_watch_shows_the_board_alone(browser: Any, tmp_path: Path, theme: str) -> None:
    config = ServeConfig(port=0)
    app = create_app(None, config, board=Board([tmp_path / "runs"]))
    with running_app(None, config, app) as server, checked_page(browser, server.url, 390, theme) as page:
        page.get_by_text("There is no run yet.").wait_for()
        (tmp_path / "runs" / "a").mkdir(parents=True)
        write_rows(tmp_path / "runs" / "a", 0, 5)
        page.get_by_role("row", name=re.compile("runs.a")).wait_for()
        assert page.get_by_role("link", name="Chat").count() == 0
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 253, 248)", "dark": "rgb(23, 24, 27)"}[theme]


def test_the_keyboard_alone_is_enough(browser: Any, site: Running) -> None:
    """Tab reaches the link that skips the navigation, then the views; focus moves to the heading of a view."""
    with checked_page(browser, site.url, 1280) as page:
        page.locator("h1").wait_for()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        page.get_by_role("link", name="Write", exact=True).focus()
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Write", level=1).wait_for()
        expect(page.get_by_role("heading", name="Write", level=1)).to_be_focused()
        unnamed = page.evaluate(
            "[...document.querySelectorAll('main input, main select, main textarea, main button')].filter("
            "e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).length"
        )
        assert unnamed == 0


CUT = 'data: {"choices": [{"index": 0, "text": "The", "finish_reason": null}]}\n\n'
READ = """async () => {
  const { write } = await import("/static/api.js");
  let text = "";
  try {
    const finish = await write({ chat: false, body: { prompt: "a" }, receive: (piece) => (text += piece) });
    return [text, finish];
  } catch (error) {
    return [text, error.message];
  }
}"""


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        (CUT, "the answer broke off: the server closed the connection"), (CUT + "data: [DONE]\n\n", "stop"),
        (CUT + 'data: {"error": {"message": "it failed"}}\n\n', "it failed"),
    ],
)  # fmt: skip
def test_a_stream_that_breaks_off_is_no_answer(browser: Any, site: Running, sent: str, wanted: str) -> None:
    page = browser.new_page()
    page.goto(site.url)
    page.route("**/v1/completions", lambda route: route.fulfill(body=sent, content_type="text/event-stream"))
    assert page.evaluate(READ) == ["The", wanted]
    page.close()
