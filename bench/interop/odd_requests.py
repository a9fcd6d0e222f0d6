"""Generated headers, and generated requests to the board and to the page for annotators, which have no OpenAPI document."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from typing import Any
from urllib.parse import quote

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

NAMES = (
    "host", "origin", "authorization", "content-type", "content-length", "content-encoding", "transfer-encoding", "accept",
    "accept-encoding", "connection", "expect", "sec-fetch-site", "sec-fetch-mode", "x-forwarded-for", "range", "upgrade", "cookie",
)  # fmt: skip
VALUES = (
    "", "localhost", "127.0.0.1:80", "evil.example", "a@b", "[::1", "null", "http://localhost", "Bearer x", "Basic !!", "Basic Og==",
    "application/json", "text/plain", "application/json; charset=utf-16", "gzip", "identity", "chunked", "100-continue", "close",
    "keep-alive, Upgrade", "cross-site", "navigate", "bytes=0-", "-1", "0", "99999999999999999999", "\u00e9", "x" * 9000,
)  # fmt: skip
FRAMING = ("content-length", "transfer-encoding", "expect", "connection", "upgrade")
"""Headers that say where a request ends: a client library would contradict them, or wait for what never comes."""


def odd_headers() -> st.SearchStrategy[dict[str, str]]:
    """Return a strategy of headers that a client library sends as they are."""
    names = st.sampled_from([name for name in NAMES if name not in FRAMING])
    values = st.sampled_from([value for value in VALUES if value.isascii()]) | st.text(
        st.characters(min_codepoint=33, max_codepoint=126), max_size=40
    )
    return st.dictionaries(names, values, max_size=3)


TEXTS = st.sampled_from(["", "ann", "bob", "x" * 61, "\u0000", "é\U0001f600", "../..", "%2e"]) | st.text(max_size=20)
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 10**30, 0.5, None, True]) | st.integers()
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "annotator": TEXTS, "item": TEXTS, "token": TEXTS, "event": NUMBERS, "place": NUMBERS, "seconds": NUMBERS, "comment": TEXTS,
    "text": TEXTS, "ranks": st.lists(NUMBERS, max_size=5), "other": NUMBERS,
}  # fmt: skip
POSTS = ("next", "judge", "skip", "correct", "undo", "statistics", "other")
PATHS = (
    "/", "/health", "/views", "/runs", "/runs/one/metrics", "/runs/../metrics", "/runs/%00/metrics", "/static/app.js", "/static/../app.py",
    "/static/%2e%2e/app.py", "/annotation/statistics", "/annotation/next", "/openapi.json", "/v1/models", "/nothing",
)  # fmt: skip


def fuzz_others(host: str, count: int, number: int) -> Counter[int]:
    """Send generated requests to a board or a page for annotators; return the number of each status. None may be a 500.

    Most bodies have the item and the token that are shown, so that some requests judge, skip, correct and undo.

    Args:
        host: Host and port.
        count: Requests.
        number: Seed.
    """
    statuses: Counter[int] = Counter()

    def send(method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        status, answer = request(host, method, path, body, headers)
        if status:
            statuses[status] += 1
        assert status < 500 and b"Traceback" not in answer, (method, path, body[:300], headers, status, answer[:300])
        return answer

    own = st.dictionaries(st.sampled_from([*FIELDS]), st.none(), max_size=6)
    raw = st.binary(max_size=60) | st.sampled_from(
        [b"[" * 20_000, b'{"annotator": "\xff"}', b'{"annotator": "\\ud800"}', b"{}"]
    )
    queries = st.dictionaries(st.sampled_from(["from", "version", "x"]), NUMBERS | TEXTS, max_size=2)

    @seed(number)
    @given(data=st.data())
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(["read", "bytes", "fields", *["valid"] * 4]))
        headers = {}
        if kind in ("read", "bytes"):
            headers = data.draw(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES), max_size=2))
        if kind == "read":
            query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in data.draw(queries).items())
            path = data.draw(st.sampled_from(PATHS) | TEXTS.map(lambda text: f"/runs/{quote(text, safe='')}/metrics"))
            send(data.draw(st.sampled_from(["GET", "HEAD", "PUT", "OPTIONS"])), f"{path}?{query}", b"", headers)
            return
        path = f"/annotation/{data.draw(st.sampled_from(POSTS))}"
        json_type = {"content-type": "application/json"}
        if kind == "bytes":
            send("POST", path, data.draw(raw), json_type | headers)
            return
        odd = {name: data.draw(FIELDS[name]) for name in data.draw(own)}
        if kind == "fields":
            send("POST", path, json.dumps(odd).encode(), json_type)
            return
        task = json.loads(send("POST", "/annotation/next", b'{"annotator": "ann"}', json_type))
        shown = {"annotator": "ann", **{name: task[name] for name in ("item", "token") if task.get(name)}}
        valid = {
            "judge": shown | {"ranks": [1, 2, 2]}, "skip": shown, "correct": shown | {"place": 0, "text": "it"},
            "undo": {"annotator": "ann", "event": task.get("event")},
        }.get(path.removeprefix("/annotation/"), shown)  # fmt: skip
        changed = {name: odd[name] for name in [*odd][:1]} if data.draw(st.integers(0, 3)) == 0 else {}
        send("POST", path, json.dumps(valid | changed).encode(), json_type)

    run()
    return statuses


def request(host: str, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """Send a request with headers as they are; return its status and body, 0 if the server closed the connection or waits for more."""
    connection = http.client.HTTPConnection(host, timeout=0.2 if {*FRAMING} & headers.keys() else 60)
    try:
        connection.putrequest(method, path, skip_host="host" in headers, skip_accept_encoding=True)
        if body and not {"content-length", "transfer-encoding"} & headers.keys():
            connection.putheader("content-length", str(len(body)))
        for name, value in headers.items():
            connection.putheader(name, value.encode("utf-8"))
        connection.endheaders(body or None)
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (TimeoutError, http.client.HTTPException, OSError):
        return 0, b""
    finally:
        connection.close()
