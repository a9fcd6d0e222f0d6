"""Structured output: what a random model writes under a schema or a regular expression always fits it."""

import json
import re
import sys

import pytest

from firth.serve import structured

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Who paints the boat?"}]


@pytest.mark.parametrize("seed", range(6))
def test_json_fits_its_schema(server, seed):
    body = {
        "model": "gpt",
        "messages": MESSAGES,
        "max_tokens": 64,
        "seed": seed,
        "temperature": 2.0,
        "stream": bool(seed % 2),
    }
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
    reply = server.post("/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    if body["stream"]:
        events = [json.loads(one.removeprefix("data: ")) for one in reply.text.split("\n\n")[:-2]]
        text = "".join(one["choices"][0]["delta"].get("content", "") for one in events)
        finish = events[-1]["choices"][0]["finish_reason"]
    else:
        text, finish = (reply.json()["choices"][0][name] for name in ("message", "finish_reason"))
        text = text["content"]
    assert finish == "stop"
    found = json.loads(text)
    assert found.keys() == {"name", "count"} and 0 <= found["count"] <= 99 and len(found["name"]) <= 8


def test_each_choice_fits_a_regular_expression(server):
    body = {
        "model": "gpt",
        "prompt": "The code is ",
        "n": 8,
        "seed": 1,
        "max_tokens": 20,
        "temperature": 3.0,
        "logprobs": 1,
    }
    body["response_format"] = {"type": "regex", "pattern": "[a-c]{2}-[0-9]{3}"}
    choices = server.post("/v1/completions", body).json()["choices"]
    assert all(re.fullmatch("[a-c]{2}-[0-9]{3}", one["text"]) for one in choices)
    assert len({one["text"] for one in choices}) > 4 and {one["finish_reason"] for one in choices} == {"stop"}
    assert "".join(choices[0]["logprobs"]["tokens"]) == choices[0]["text"]


def test_a_constraint_ends_with_max_tokens(server):
    body = {"model": "gpt", "prompt": "a", "max_tokens": 5, "response_format": {"type": "json_object"}}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"].startswith("{") and choice["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"type": "regex", "pattern": "("}, "cannot be used"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no such type"}}}, "cannot be used"),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "http://example.com/x"}}},
            "cannot be used",
        ),
        ({"type": "regex", "pattern": "(a{1000}){1000}"}, "too many expressions"),
        ({"type": "regex", "pattern": "a" * 70_000}, "of at most 65,536"),
        ({"type": "xml"}, "response_format"),
    ],
)
def test_invalid_formats_are_refused(server, wanted, message):
    reply = server.post("/v1/completions", {"model": "gpt", "prompt": "a", "response_format": wanted})
    assert reply.status_code == 400 and message in reply.json()["error"]["message"], reply.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_expression_that_becomes_too_large_ends_its_answer(server, monkeypatch, stream):
    """The error appears after some tokens; llguidance's own mask is empty then, which would look like a stop."""
    monkeypatch.setattr(structured, "LEXER_LIMITS", {"step_lexer_fuel": 4000, "max_lexer_states": 5000})
    server.models.models["gpt"].__dict__.pop("grammars", None)
    body = {"model": "gpt", "prompt": "a", "max_tokens": 60, "stream": stream, "seed": 1}
    reply = server.post(
        "/v1/completions", body | {"response_format": {"type": "regex", "pattern": "([a-z]{2,50}){2,50}x"}}
    )
    server.models.models["gpt"].__dict__.pop("grammars", None)
    if stream:
        *events, last, _ = reply.text.split("\n\n")
        assert reply.status_code == 200 and events and 'finish_reason":"' not in reply.text
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert reply.status_code == 400
        error = reply.json()["error"]
    assert error["param"] == "response_format" and "too many expressions" in error["message"]
    assert not server.models.thread.running


def test_a_missing_library_is_named(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    server.models.models["gpt"].__dict__.pop("grammars", None)
    body = {"model": "gpt", "prompt": "a", "response_format": {"type": "json_object"}}
    reply = server.post("/v1/completions", body)
    assert reply.status_code == 501 and 'pip install "firth[serve]"' in reply.json()["error"]["message"]
    assert (
        server.post("/v1/completions", {"model": "gpt", "prompt": "a", "response_format": {"type": "text"}}).status_code
        == 200
    )
