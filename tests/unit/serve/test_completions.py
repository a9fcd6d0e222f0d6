"""Requests for text, with OpenAI's own client and by hand: answers, streams, usage, seeds, stops, log-probabilities."""

import json
import math
import threading

import httpx
import numpy as np
import openai
import pytest
from pydantic import ValidationError

from firth.generate.sampling import Sampling
from firth.serve.registry import TokenTexts
from firth.serve.schemas import ChatRequest, CompletionRequest, EmbeddingRequest, PredictRequest

PROMPT = "Who paints the boat"


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def gpt(server):
    return server.models.models["gpt"]


def greedy(served, text, count):
    """Return the engine's own greedy answer."""
    prompt = served.local.framed(served.model.tokenizer.encode(text))
    return served.model.engine.generate([prompt], Sampling(temperature=0, max_new_tokens=count))[0]


def test_models_are_listed(client):
    assert [one.id for one in client.models.list()] == ["gpt", "bert"]
    found = client.models.retrieve("gpt")
    assert found.max_model_len == 128 and {"chat", "completions"} <= {*found.capabilities}
    with pytest.raises(openai.NotFoundError, match="there is no model 'gtp': this server has gpt, bert"):
        client.models.retrieve("gtp")


def test_an_answer_equals_the_engine(client, gpt):
    found = client.completions.create(model="gpt", prompt=PROMPT, max_tokens=12, temperature=0)
    wanted = greedy(gpt, PROMPT, 12)
    assert found.choices[0].text == wanted.text
    assert found.choices[0].finish_reason == ("stop" if wanted.finish == "stop" else "length")
    assert found.usage.completion_tokens == len(wanted.tokens)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_seed_gives_one_text_in_any_company(client):
    def texts(**more):
        return [
            one.text for one in client.completions.create(model="gpt", prompt=PROMPT, max_tokens=16, **more).choices
        ]

    first, second = texts(seed=5), texts(seed=6)
    assert first != second and texts(seed=5) == first
    assert texts(seed=5, n=2) == first + second  # the second choice has the next seed
    assert len({*texts(n=8)}) > 1 and texts(seed=-3) == texts(seed=-3)


def test_several_prompts_have_their_choices_in_order(client, gpt):
    found = client.completions.create(model="gpt", prompt=[PROMPT, "The otter"], max_tokens=6, temperature=0, n=2)
    assert [one.index for one in found.choices] == [0, 1, 2, 3]
    wanted = [greedy(gpt, text, 6).text for text in (PROMPT, "The otter")]
    assert [one.text for one in found.choices] == [wanted[0], wanted[0], wanted[1], wanted[1]]


def test_token_ids_are_used_as_they_are(client, gpt):
    ids = gpt.local.framed(gpt.model.tokenizer.encode(PROMPT)).tolist()
    text = client.completions.create(model="gpt", prompt=PROMPT, max_tokens=6, temperature=0).choices[0].text
    assert client.completions.create(model="gpt", prompt=ids, max_tokens=6, temperature=0).choices[0].text == text
    with pytest.raises(openai.BadRequestError, match="token ids 0 to"):
        client.completions.create(model="gpt", prompt=[10**6], max_tokens=6)


def test_a_stream_joins_to_the_answer(client):
    body = {"model": "gpt", "prompt": PROMPT, "max_tokens": 20, "seed": 3, "n": 2}
    whole = client.completions.create(**body)
    texts, finish, usage = ["", ""], [None, None], None
    for event in client.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        for choice in event.choices:
            texts[choice.index] += choice.text
            finish[choice.index] = choice.finish_reason or finish[choice.index]
        usage = event.usage or usage
    assert texts == [one.text for one in whole.choices] and finish == [one.finish_reason for one in whole.choices]
    assert usage == whole.usage


def test_a_chat_streams_and_answers_alike(client):
    body = {"model": "gpt", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 20, "seed": 3}
    whole = client.chat.completions.create(**body, logprobs=True, top_logprobs=2)
    parts, tokens, roles = [], [], []
    for event in client.chat.completions.create(**body, stream=True, logprobs=True, top_logprobs=2):
        choice = event.choices[0]
        roles.append(choice.delta.role)
        parts.append(choice.delta.content or "")
        tokens += choice.logprobs.content if choice.logprobs else []
    assert "".join(parts) == whole.choices[0].message.content and roles[0] == "assistant"
    wanted = whole.choices[0].logprobs.content
    assert [one.token for one in tokens] == [one.token for one in wanted] and len(tokens) > 5
    np.testing.assert_allclose([one.logprob for one in tokens], [one.logprob for one in wanted], atol=1e-4)
    assert all(len(one.top_logprobs) == 2 for one in tokens)
    in_parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    parts = client.chat.completions.create(**body | {"messages": in_parts})
    assert parts.choices[0].message.content == whole.choices[0].message.content


def test_user_text_is_no_control_token(client, gpt):
    plain = client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "a"}], max_tokens=1)
    tricky = client.chat.completions.create(
        model="gpt", messages=[{"role": "user", "content": "a<|im_end|>"}], max_tokens=1
    )
    assert tricky.usage.prompt_tokens > plain.usage.prompt_tokens + 1


def test_stop_strings_end_an_answer(client):
    whole = client.completions.create(model="gpt", prompt=PROMPT, max_tokens=40, seed=1).choices[0].text
    stop = whole[10:13]
    found = client.completions.create(model="gpt", prompt=PROMPT, max_tokens=40, seed=1, stop=["@@@@", stop])
    assert found.choices[0].text == whole[: whole.index(stop)] and found.choices[0].finish_reason == "stop"
    streamed = client.completions.create(model="gpt", prompt=PROMPT, max_tokens=40, seed=1, stop=stop, stream=True)
    assert "".join(one.choices[0].text for one in streamed) == found.choices[0].text


def test_max_tokens_is_lowered_to_the_context(client, gpt):
    ids = (gpt.model.tokenizer.encode(PROMPT).tolist() * 40)[:120]
    found = client.completions.create(model="gpt", prompt=ids, max_tokens=10_000, temperature=0)
    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 9  # one more than 128 - 120
    assert client.completions.create(model="gpt", prompt="The", max_tokens=10_000, seed=0).usage.completion_tokens <= 64
    with pytest.raises(openai.BadRequestError, match="reads at most 128"):
        client.completions.create(model="gpt", prompt=ids * 2, max_tokens=1)


def test_echo_has_the_scores_of_the_engine(client, gpt):
    text = "The otter paints the boat"
    found = client.completions.create(model="gpt", prompt=text, max_tokens=0, echo=True, logprobs=3).choices[0]
    logprobs, ids = found.logprobs, gpt.model.tokenizer.encode(text)
    assert found.text == text and len(logprobs.tokens) == len(ids)
    ends = [*logprobs.text_offset[1:], len(text)]
    assert [text[a:b] for a, b in zip(logprobs.text_offset, ends, strict=True)] == logprobs.tokens
    framed = gpt.local.framed(ids)
    known = len(framed) > len(ids)
    wanted = gpt.model.engine.score([framed[:1]], [framed[1:]])[0]
    assert sum(value for value in logprobs.token_logprobs if value is not None) == pytest.approx(wanted, abs=1e-4)
    assert (logprobs.token_logprobs[0] is not None) == known
    best = [max(top.values()) for top in logprobs.top_logprobs if top]
    assert all(value <= top + 1e-6 for value, top in zip(logprobs.token_logprobs[-len(best) :], best, strict=True))
    both = client.completions.create(
        model="gpt", prompt=text, max_tokens=4, echo=True, logprobs=0, temperature=0
    ).choices[0]
    assert both.text == text + greedy(gpt, text, 4).text and both.logprobs.top_logprobs is None
    assert both.logprobs.text_offset[: len(ids)] == logprobs.text_offset and both.logprobs.text_offset[len(ids)] == len(
        text
    )


def test_echo_of_token_ids_scores_all_but_the_first(client, gpt):
    ids = gpt.model.tokenizer.encode("The otter paints")
    found = client.completions.create(
        model="gpt", prompt=[ids.tolist()], max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    values = found.choices[0].logprobs.token_logprobs
    assert values[0] is None and len(values) == len(ids) + 1
    assert sum(values[1:-1]) == pytest.approx(gpt.model.engine.score([ids[:1]], [ids[1:]])[0], abs=1e-4)


def test_unsupported_and_unknown_fields_are_named(server):
    def refusal(**more):
        reply = server.post("/v1/completions", {"model": "gpt", "prompt": "a", **more})
        assert reply.status_code == 400
        return reply.json()["error"]

    assert refusal(temprature=1) == {
        "message": "there is no field 'temprature' in this request", "type": "invalid_request_error", "param": "temprature",
        "code": "unknown_field",
    }  # fmt: skip
    assert refusal(temperature=-1)["param"] == "temperature"
    assert "greater than or equal to 0" in refusal(temperature=-1)["message"]
    assert refusal(presence_penalty=0.5)["param"] == "presence_penalty"
    assert refusal(prompt=[["a"]])["param"].startswith("prompt")
    assert refusal(max_tokens=0)["message"] == "max_tokens: 0 needs echo"
    assert (
        server.post("/v1/completions", {"model": "bert", "prompt": "a"}).json()["error"]["code"]
        == "unsupported_by_model"
    )


def test_limits_are_refused_by_name(server):
    for more, param in [
        ({"n": 9}, "n"), ({"logprobs": 9}, "logprobs"), ({"stop": ["a"] * 17}, "stop"), ({"stop": "a" * 257}, "stop"),
        ({"prompt": ["a"] * 9}, "prompt"), ({"prompt": "boat " * 200}, "prompt"), ({"prompt": []}, "prompt"),
    ]:  # fmt: skip
        reply = server.post("/v1/completions", {"model": "gpt", "prompt": "a"} | more)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), more
    messages = [{"role": "user", "content": "a"}] * 17
    assert server.post("/v1/chat/completions", {"messages": messages}).json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'{"prompt": "\xff\xfe"}', b'{"prompt": "\\ud800"}', b"[" * 10_000 + b"]" * 10_000,
        b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", b'{"prompt": "a", "n": true}',
        b'{"prompt": "a", "n": 1.5}', b'{"prompt": "a", "stop": [""]}', b"\x00", b'{"a": 1}{',
        b'{"prompt":"a","response_format":{"type":"json_schema","json_schema":{"name":"a","schema":' + b'{"a":' * 10_000,
    ],
)  # fmt: skip
def test_malformed_bodies_are_400(server, body):
    reply = server.post("/v1/completions", body)
    assert reply.status_code == 400 and reply.json()["error"]["message"] and "Traceback" not in reply.text


def test_odd_sampling_parameters_are_stable(client):
    for more in (
        {"temperature": 1e-30},
        {"temperature": 100},
        {"top_p": 1e-9},
        {"extra_body": {"min_p": 1.0, "top_k": 1}},
    ):
        found = client.completions.create(model="gpt", prompt=PROMPT, max_tokens=8, seed=1, **more)
        assert found.usage.completion_tokens > 0


def test_eight_clients_do_not_cross_talk(server, gpt):
    """Each of 8 clients asks for its own prompts and seeds at once, and gets what it gets alone."""
    requests = [
        {"prompt": f"The otter holds the map {i}", "max_tokens": 24, "seed": i, "logprobs": 1} for i in range(24)
    ]
    alone = [server.post("/v1/completions", body).json()["choices"][0] for body in requests]
    together = [None] * len(requests)

    def work(start):
        for i in range(start, len(requests), 8):
            together[i] = server.post("/v1/completions", requests[i]).json()["choices"][0]

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one["text"] for one in together] == [one["text"] for one in alone]
    assert len({one["text"] for one in alone}) == len(alone)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"], atol=1e-4)


def test_events_follow_the_format(server):
    body = {"model": "gpt", "prompt": PROMPT, "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream") and "content-length" not in reply.headers
        text = reply.read().decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: {") for event in events[:-2])
    assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"]


def test_token_texts_join_to_the_text(gpt):
    tokenizer = gpt.model.tokenizer
    texts, text = TokenTexts(tokenizer), "The otter – paints 🙂 boats"
    ids = tokenizer.encode(text).tolist()
    assert b"".join(map(texts.bytes_of, ids)).decode() == text
    offsets = texts.offsets(ids)
    assert offsets[0] == 0 and all(0 <= at <= len(text) for at in offsets) and not math.isnan(sum(offsets))
    assert texts.text(tokenizer.vocab.eos) == tokenizer.token(tokenizer.vocab.eos)


def test_null_and_neutral_values_are_accepted(server):
    """OpenAI's clients and tools of others send them; the answer is that without the field."""
    base = {"model": "gpt", "max_tokens": 4, "seed": 1}
    both = {
        "temperature": None, "top_p": None, "n": None, "stream": None, "stop": None, "user": "a", "store": False,
        "metadata": {}, "tools": [], "tool_choice": "none", "frequency_penalty": 0.0, "presence_penalty": None,
        "logit_bias": {}, "logprobs": False,
    }  # fmt: skip
    for path, own, more in [
        ("/v1/completions", {"prompt": "a"}, both | {"echo": None, "suffix": None, "best_of": None}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, both | {"top_logprobs": None}),
    ]:
        wanted = server.post(path, base | own).json()["choices"]
        for name, value in more.items():
            reply = server.post(path, base | own | {name: value})
            assert reply.status_code == 200 and reply.json()["choices"] == wanted, (name, reply.text)
    reply = server.post("/v1/completions", base | {"prompt": "a", "tools": [{"type": "function"}]})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "tools"
    assert (
        server.post("/v1/completions", base | {"prompt": "a", "top_p": 0}).json()["choices"]
        == (server.post("/v1/completions", base | {"prompt": "a", "temperature": 0}).json()["choices"])
    )


def test_echo_of_special_tokens_has_places_in_its_text(server, gpt):
    ids = [gpt.model.tokenizer.vocab.eos, *gpt.model.tokenizer.encode("The otter").tolist(), 0, 1]
    body = {"prompt": ids, "max_tokens": 3, "echo": True, "logprobs": 1, "temperature": 0}
    found = server.post("/v1/completions", body).json()["choices"][0]
    text, tokens, offsets = found["text"], found["logprobs"]["tokens"], found["logprobs"]["text_offset"]
    assert len(tokens) >= len(ids) and gpt.model.tokenizer.token(ids[0]) in text
    given = [*zip(offsets, tokens, strict=True)][: len(ids)]
    assert [text[a : a + len(token)] for a, token in given] == tokens[: len(ids)]
    assert offsets[len(ids)] == len("".join(tokens[: len(ids)]))


def test_a_stream_reads_each_token_once(server, monkeypatch):
    """The work for log-probabilities grows with the tokens, not with their square."""
    bytes_of, calls = TokenTexts.bytes_of, []
    monkeypatch.setattr(TokenTexts, "bytes_of", lambda self, id: calls.append(id) or bytes_of(self, id))
    body = {"prompt": PROMPT, "max_tokens": 64, "stream": True, "logprobs": 0, "seed": 4}
    events = server.post("/v1/completions", body).text.split("\n\n")[:-2]
    tokens = sum(len(json.loads(event[6:])["choices"][0]["logprobs"]["tokens"]) for event in events)
    assert tokens > 30 and len(calls) <= 3 * tokens


LISTS = {
    "null": 80_000, "[-1]": 60_000, '""': 90_000, "[]": 90_000, "{}": 90_000, "1": 100_000,
}  # fmt: skip


@pytest.mark.parametrize("item", LISTS)
@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, EmbeddingRequest, PredictRequest])
def test_a_list_is_refused_at_its_first_fault(item, kind):
    """A body of 1 MB of wrong items once took 7 s and 900 MB, all on the event loop."""
    fields = {"CompletionRequest": ["prompt", "stop"], "ChatRequest": ["messages"], "EmbeddingRequest": ["input"]}
    for name in fields.get(kind.__name__, ["records"]):
        more = '"prompt": "a", ' if name == "stop" else ""
        items = ",".join([item] * LISTS[item])
        with pytest.raises(ValidationError) as raised:
            kind.model_validate_json(f'{{{more}"{name}": [{items}, true]}}')
        assert raised.value.error_count() < 10


def test_a_long_text_is_refused_before_it_is_tokenized(server, gpt, monkeypatch):
    def encode(*_):
        raise AssertionError("tokenized")

    for name in ("encode", "encode_batch", "spans"):
        monkeypatch.setattr(type(gpt.model.tokenizer), name, encode)
    long = "x " * 45_000
    for path, body in [
        ("/v1/completions", {"prompt": long}), ("/v1/embeddings", {"input": long}), ("/score", {"text": long}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}), ("/attention", {"text": long}),
        ("/fill", {"model": "bert", "text": long}),
    ]:  # fmt: skip
        reply = server.post(path, body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded"), path


def test_a_long_text_is_tokenized_beside_the_event_loop(server, gpt, monkeypatch):
    kind, names = type(gpt.model.tokenizer), []
    spans = kind.spans
    monkeypatch.setattr(
        kind, "spans", lambda self, text: names.append(threading.current_thread().name) or spans(self, text)
    )
    for text in ("boat", "boat " * 10_000):
        assert server.post("/tokenize", {"text": text}).status_code == 200
    assert not names[0].startswith("asyncio_") and names[1].startswith("asyncio_")
