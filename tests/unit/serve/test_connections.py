"""Clients that leave, read slowly or send half of a request; limits of requests; faults of the engine."""

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time

import httpx
import pytest

from firth.generate import embeddings
from firth.serve import app, inference, operations
from firth.serve.config import ServeLimits
from firth.serve.registry import ServedModel
from firth.serve.responses import EventStream
from firth.serve.schemas import HealthResponse
from tests.support.serving import serving

LONG = {"model": "gpt", "prompt": "The otter", "max_tokens": 64, "n": 8, "stream": True}
"""Takes about a second with `slow`."""


@pytest.fixture
def slow(server, monkeypatch):
    """Make each step of the decoder take 30 ms."""
    from firth.generate.scheduler import Scheduler

    step = Scheduler.step

    def slower(self):
        time.sleep(0.03)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slower)


@pytest.fixture
def raw(server):
    """Return a function that opens a connection and sends bytes."""
    opened = []

    def connect(data=b""):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        opened.append(connection)
        connection.sendall(data)
        return connection

    yield connect
    for connection in opened:
        connection.close()


def request_bytes(path, body, length=None):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length or len(data)}\r\n\r\n"
    return head.encode() + data


def answers(server):
    """Return whether the server answers a short request within a second."""
    start = time.monotonic()
    reply = server.post("/v1/completions", {"model": "gpt", "prompt": "a", "max_tokens": 1})
    return reply.status_code == 200 and time.monotonic() - start < 1


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_is_gone(server, raw, slow, stream):
    connection = raw(request_bytes("/v1/completions", LONG | {"stream": stream}))
    while not server.models.thread.running:
        time.sleep(0.005)
    connection.close()
    assert server.settle() < 1


def test_a_waiting_answer_ends_when_its_client_is_gone(server, raw, slow):
    connections = [raw(request_bytes("/v1/completions", LONG)) for _ in range(4)]  # 32 answers, 16 rows
    deadline = time.monotonic() + 5
    while server.models.thread.running < 32 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert server.models.thread.running == 32
    for connection in connections:
        connection.close()
    assert server.settle() < 1


def test_slow_and_silent_clients_block_no_one(server, raw):
    connections = [raw() for _ in range(20)]
    connections += [raw(b"POST /v1/completions HTTP/1.1\r\nHost: loc") for _ in range(20)]
    connections += [raw(request_bytes("/v1/completions", LONG, length=5000)) for _ in range(20)]
    connections += [raw(request_bytes("/v1/completions", LONG)) for _ in range(2)]  # answers that nobody reads
    assert answers(server)
    for connection in connections[:60]:
        connection.settimeout(5)
        received = b""
        while part := connection.recv(4096):
            received += part
        assert received == b"" or b"408" in received.split(b"\r\n")[0]
    assert connections[0].recv(1) == b""


def test_half_a_second_request_is_ended(server, raw):
    connection = raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    received = b""
    while b'{"status":"ok"}' not in received:
        received += connection.recv(4096)
    connection.sendall(b"GET /health HTT")
    time.sleep(1)
    connection.sendall(b"P/1.1\r\n")
    start = time.monotonic()
    connection.settimeout(5)
    assert connection.recv(4096) == b"" and time.monotonic() - start < 2.5


@pytest.mark.parametrize(
    "data",
    [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 200_000, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
     b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n"],
)  # fmt: skip
def test_broken_requests_are_400(server, raw, data):
    connection = raw(data)
    assert connection.recv(4096).startswith(b"HTTP/1.1 400")


def test_a_long_body_is_answered_before_it_is_sent(raw):
    connection = raw(request_bytes("/v1/completions", {}, length=10**9))
    assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_one_request_too_many_gets_429(model_paths, slow):
    with serving([model_paths["gpt"]], max_requests=2) as server:
        replies = []
        threads = [
            threading.Thread(target=lambda: replies.append(server.post("/v1/completions", LONG | {"stream": False})))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        while server.models.thread.running < 16:
            time.sleep(0.005)
        refused = server.post("/tokenize", {"text": "a"})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        for thread in threads:
            thread.join()
        assert [reply.status_code for reply in replies] == [200, 200]
        assert server.post("/tokenize", {"text": "a"}).status_code == 200


def test_an_answer_that_takes_too_long_ends(model_paths, slow):
    with serving([model_paths["gpt"]], request_seconds=0.3) as server:
        reply = server.post("/v1/completions", LONG | {"stream": False})
        assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
        events = server.post("/v1/completions", LONG).text.split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert server.settle() < 1


def test_a_client_that_reads_nothing_is_given_up():
    """The stream ends, closes its events and gives its place back, although no part of it is taken."""
    closed, ended = [], []

    async def events():
        try:
            while True:
                yield HealthResponse(status="ok")
        finally:
            closed.append(True)

    async def receive():
        await asyncio.sleep(3600)

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    stream = EventStream(events(), ServeLimits(send_seconds=0.1))
    stream.on_end = lambda: ended.append(True)
    start = time.monotonic()
    asyncio.run(stream({"type": "http"}, receive, send))
    assert closed == ended == [True] and time.monotonic() - start < 2


def test_a_fault_of_the_engine_ends_its_answers_alone(server, monkeypatch, caplog):
    from firth.generate.scheduler import Scheduler

    def broken(self):
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(Scheduler, "step", broken)
    reply = server.post("/v1/completions", LONG | {"stream": False})
    assert reply.status_code == 500 and "secret" not in reply.text and reply.json()["error"]["type"] == "server_error"
    events = server.post("/v1/completions", LONG).text
    assert '"internal_error"' in events and "secret" not in events
    monkeypatch.undo()
    assert answers(server)


def test_a_stream_is_one_response_at_a_time(server):
    """A connection is used again after a stream."""
    with httpx.Client(base_url=server.url) as client:
        for _ in range(3):
            reply = client.post("/v1/completions", json=LONG | {"max_tokens": 3})
            assert reply.text.endswith("data: [DONE]\n\n")


def test_a_long_computation_does_not_stop_the_end(model_paths, monkeypatch):
    """The server ends `drain_seconds` after the signal, although one step of a job takes longer."""
    monkeypatch.setattr(app, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(ServedModel, "exceeds", lambda *_: False)

    def slow(*_, **__):
        time.sleep(6)
        yield

    monkeypatch.setattr(embeddings, "embed_slices", slow)
    replies = []

    def ask(server):
        with contextlib.suppress(httpx.HTTPError):
            replies.append(server.post("/v1/embeddings", {"input": "a"}).status_code)

    with serving([model_paths["gpt"]], drain_seconds=1.0) as server:
        client = threading.Thread(target=ask, args=(server,))
        client.start()
        time.sleep(0.3)
        start = time.monotonic()
    assert time.monotonic() - start < 4
    client.join(5)
    assert not client.is_alive() and 200 not in replies


def test_places_are_counted_before_a_body_is_parsed(model_paths, slow, monkeypatch):
    with serving([model_paths["gpt"]], max_requests=1) as server:
        client = threading.Thread(target=lambda: server.post("/v1/completions", LONG | {"stream": False}))
        client.start()
        while not server.models.thread.running:
            time.sleep(0.005)
        monkeypatch.setattr(operations, "parse", lambda *_: pytest.fail("parsed"))
        assert server.post("/v1/completions", b'{"prompt": [nul').status_code == 429
        monkeypatch.undo()
        client.join()
        assert server.post("/v1/completions", b'{"prompt": [nul').status_code == 400
        assert server.post("/tokenize", {"text": "a"}).status_code == 200  # the refused one gave its place back


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/score", {"model": "bert", "text": "The otter paints the boat. " * 6}),
        ("/score", {"model": "gpt", "text": "The otter paints the boat. " * 6}),
        ("/v1/embeddings", {"model": "gpt", "input": "The otter paints the boat. " * 6}),
        ("/fill", {"model": "bert", "text": "The <mask> paints the boat."}),
    ],
    ids=["pseudo-likelihood", "score", "embedding", "gap"],
)
def test_a_stream_goes_on_beside_one_long_text(server, slow, monkeypatch, path, body):
    """A pass of at most 16 tokens, or one row of an encoder, comes between two steps; no two passes follow each other."""
    from firth.generate.scheduler import Scheduler
    from firth.model.model import LM

    done, step, forward, inside = [], Scheduler.step, LM.forward, threading.local()

    def stepping(self):
        done.append("step")
        inside.step = True
        try:
            return step(self)
        finally:
            inside.step = False

    def passing(self, batch, *context):
        if not getattr(inside, "step", False):
            done.append(batch["tokens"].numel())
        return forward(self, batch, *context)

    monkeypatch.setattr(inference, "SLICE_TOKENS", 16)
    monkeypatch.setattr(Scheduler, "step", stepping)
    monkeypatch.setattr(LM, "forward", passing)
    replies = []
    job = threading.Thread(target=lambda: replies.append(server.post(path, body)))
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"n": 1}, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        job.start()
        assert [*lines][-2:] == ["data: [DONE]", ""]
    job.join()
    assert replies[0].status_code == 200, replies[0].text
    slices = [one for one in done if one != "step"]
    row = len(server.models.models["bert"].model.tokenizer.encode(body.get("text", ""))) + 2
    assert len(slices) >= (1 if path == "/fill" else 2) and max(slices) <= (row if body["model"] == "bert" else 16)
    during = done[: len(done) - done[::-1].index("step")]
    assert all("step" in pair for pair in itertools.pairwise(during[during.index("step") :])), during


def test_a_stream_goes_on_beside_a_job(server, slow, monkeypatch):
    """Embeddings of 8 texts are computed one at a time, each between two steps of the stream."""
    from firth.generate.scheduler import Scheduler

    done, states, step = [], embeddings._mean_states, Scheduler.step
    monkeypatch.setattr(inference, "SLICE_TOKENS", 1)
    monkeypatch.setattr(embeddings, "_mean_states", lambda *args: done.append("slice") or states(*args))
    monkeypatch.setattr(Scheduler, "step", lambda self: done.append("step") or step(self))
    replies = []
    body = {"input": ["The otter paints the boat."] * 8}
    job = threading.Thread(target=lambda: replies.append(server.post("/v1/embeddings", body)))
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"n": 1}, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        job.start()
        assert [*lines][-2:] == ["data: [DONE]", ""]
    job.join()
    order = "".join(one[1] for one in done).strip("l")  # t: a step, l: a slice
    assert replies[0].status_code == 200 and done.count("slice") == 8
    assert order.count("l") >= 2 and "ll" not in order
