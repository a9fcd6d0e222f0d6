"""What the page can show of each model, and the route of attention weights."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from torch import nn

from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config, recurrent_config
from firth.model.config_groups import EncoderConfig
from firth.objectives.classification import classification_head
from firth.objectives.reward_model import reward_head
from firth.runs.loaded_model import Model
from firth.serve.app import create_app
from firth.serve.board import Board
from firth.serve.config import ServeConfig
from firth.serve.pages import describe, site
from firth.serve.registry import ModelRegistry, ServedModel
from tests.support.models import random_model
from tests.support.serving import Running
from tests.support.tiny_corpus import tokenizer

WORDS = tokenizer()
SIZE = WORDS.vocab.size
DECODER = decoder_config(SIZE, 32, 2, num_heads=2)


def served(config: ModelConfig, recipe: dict[str, Any] | None = None, **heads: nn.Module) -> ServedModel:
    """Return a model of random weights, with a recipe of its run."""
    model = Model.of(random_model(config, **heads), WORDS)
    evaluated = replace(model.evaluated)
    evaluated.__dict__["recipe"] = recipe or {}
    return ServedModel("m", Model(evaluated), 0)


def shown(config: ModelConfig, recipe: dict[str, Any] | None = None, **heads: nn.Module) -> set[str]:
    """Return the views that are shown; the others must give a reason of one sentence."""
    views = describe(served(config, recipe, **heads))["views"]
    assert all(reason == "" or reason.endswith(".") for reason in views.values())
    return {name for name, reason in views.items() if not reason}


def test_views_of_each_family() -> None:
    always = {"tokens", "attention", "similarity"}
    chat = {"objective": {"kind": "sft"}}
    assert shown(DECODER) == always | {"complete"}
    assert shown(DECODER, chat) == always | {"complete", "chat"}
    assert shown(encoder_config(SIZE, 32, 2, num_heads=2)) == always | {"fill"}
    assert shown(encoder_decoder_config(SIZE, 32, 2, num_heads=2)) == always | {"complete", "fill"}
    assert shown(recurrent_config(SIZE, 32, 1)) == {"complete", "tokens", "similarity"}
    vae = DECODER.with_fields({"encoder": EncoderConfig(num_layers=1, latent_size=4)})
    assert shown(vae) == {"attention", "similarity"}
    assert shown(DECODER, None, reward=reward_head(32)) == {"attention", "similarity", "predict"}


@pytest.mark.parametrize(
    ("head", "examples", "fields"),
    [
        ("classes", {"text_field": "review"}, {"review": "text"}),
        ("classes", {"text_field": "a", "text_pair_field": "b"}, {"a": "text", "b": "text"}),
        ("score", {}, {"text": "text"}),
        ("tags", {"words_field": "words"}, {"words": "words"}),
        ("choice", {"text_field": "q"}, {"q": "text", "options": "lines"}),
        ("choice", {"option_fields": ["x", "y"]}, {"text": "text", "x": "text", "y": "text"}),
        ("span", {"context_field": "passage"}, {"passage": "passage", "question": "text"}),
        ("reward", {}, {"prompt": "text", "completion": "text"}),
    ],
)
def test_fields_of_predictions(head: str, examples: dict[str, Any], fields: dict[str, str]) -> None:
    made = {head: classification_head(32, 2)}
    found = describe(served(encoder_config(SIZE, 32, 1, num_heads=2), {"examples": examples}, **made))
    assert {one["field"]: one["kind"] for one in found["predict"]["inputs"]} == fields
    routes = {"tags": "tag", "span": "answer", "reward": "reward"}
    assert found["predict"]["route"] == routes.get(head, "classify") and not found["views"]["predict"]


def test_the_site_of_a_server() -> None:
    one, other = served(DECODER), served(encoder_config(SIZE, 32, 1, num_heads=2))
    found = site(ModelRegistry({"a": one, "b": other}), runs=False)
    assert (found["compare"], found["runs"], len(found["models"])) == (False, False, 2)
    assert site(ModelRegistry({"a": one, "b": one}), runs=True)["compare"]
    assert site(None, runs=True) == {"models": [], "compare": False, "runs": True}
    json.dumps(found)


def test_views_are_served(server: Running, tmp_path: Path) -> None:
    running = TestClient(server.app, base_url="http://localhost")  # without `with`: its lifespan has begun already
    assert [one["name"] for one in running.get("/views").json()["models"]] == ["gpt", "bert"]
    app = create_app(None, ServeConfig(), board=Board([tmp_path]))
    with TestClient(app, base_url="http://localhost") as http:
        assert http.get("/views").json() == {"models": [], "compare": False, "runs": True}
        assert http.get("/runs").json() == {"runs": []}
        for name in ("app.js", "style.css", "annotate.js"):
            assert http.get(f"/static/{name}").status_code == 200


def test_attention_is_that_of_the_model(server: Running) -> None:
    body = {"model": "bert", "text": "The otter paints"}
    [wanted] = server.models.models["bert"].model.attention("The otter paints")
    numbers = server.post("/attention", body).json()["maps"][0]
    encoded = server.post("/attention", body | {"encoding_format": "base64"}).json()["maps"][0]
    np.testing.assert_allclose(np.array(numbers["weights"]), wanted.weights, atol=1e-6)
    raw = np.frombuffer(base64.b64decode(encoded["weights"]), "<f4").reshape(encoded["shape"])
    np.testing.assert_array_equal(raw, wanted.weights)
    assert encoded["queries"] == list(wanted.queries) and encoded["shape"] == [2, 2, *raw.shape[2:]]
    refused = server.post("/attention", {"model": "gpt", "text": "the otter " * 200})
    assert refused.status_code == 400 and "shorten it" in refused.json()["error"]["message"]
    assert "/attention" in json.dumps(TestClient(server.app, base_url="http://localhost").get("/openapi.json").json())


def test_a_model_without_an_lm_head_has_attention() -> None:
    model = random_model(encoder_config(SIZE, 32, 1, num_heads=2, max_positions=40), classes=classification_head(32, 2))
    [found] = Model.of(model, WORDS).attention("the class")
    assert found.weights.shape[:2] == (1, 2)
