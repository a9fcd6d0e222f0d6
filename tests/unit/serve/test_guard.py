"""What the server refuses before a route sees it: hosts, origins, keys, bodies."""

import asyncio
import base64
import json

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from firth.serve.app import create_app
from firth.serve.config import ServeConfig, ServeLimits
from firth.types import UserError

KEY = "k" * 24


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"bytes": len(await request.body())})


async def broken(request: Request) -> JSONResponse:
    raise ValueError("a secret detail")


def call(config, path="/echo", method="POST", body=b"{}", chunks=None, **headers):
    """Send one request to an application; return (status, headers, body)."""
    app = create_app(None, config, [Route("/echo", echo, methods=["GET", "POST"]), Route("/broken", broken)])
    given = {"host": "localhost:8000", "content-type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(k.encode(), v.encode("latin-1")) for k, v in given.items() if v is not None]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": raw,
             "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 8000), "root_path": ""}  # fmt: skip
    parts = list(chunks if chunks is not None else [body])
    sent = []

    async def receive():
        if not parts:
            await asyncio.sleep(3600)
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts) or chunks is not None}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:])


def test_a_page_has_the_security_headers():
    status, headers, body = call(ServeConfig(), "/", "GET")
    assert status == 200 and b"<!doctype html>" in body
    assert "script-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_names_of_this_machine_are_accepted(host):
    assert call(ServeConfig(), host=host)[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 403), ("evil.example:8000", 403), ("10.0.0.1", 403), ("", 400), ("a@localhost", 400), (None, 400),
     ("localhost:x", 400), ("localhost.evil.example", 403)],
)  # fmt: skip
def test_other_hosts_are_refused(host, status):
    assert call(ServeConfig(), host=host)[0] == status


def test_a_server_for_others_accepts_addresses_and_allowed_names():
    config = ServeConfig(host="0.0.0.0", api_key=KEY, allowed_hosts=("box.lan",))
    auth = {"authorization": f"Bearer {KEY}"}
    assert [call(config, host=host, **auth)[0] for host in ("10.0.0.1:8000", "box.lan", "evil.example")] == [
        200,
        200,
        403,
    ]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://localhost:8000"}, 200),
        ({"origin": "http://localhost:9000"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "file://localhost:8000"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ({"sec_fetch_site": "same-origin", "sec_fetch_mode": "cors"}, 200),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(headers, status):
    assert call(ServeConfig(), **headers)[0] == status


def test_the_key_guards_every_route_but_health():
    config = ServeConfig(api_key=KEY)
    basic = "Basic " + base64.b64encode(f"any:{KEY}".encode()).decode()
    for authorization, status in [
        (None, 401), ("Bearer wrong", 401), (f"Bearer {KEY}x", 401), (KEY, 401), (f"Bearer {KEY}", 200), (basic, 200),
        ("Basic !!", 401), ("Bearer \xff", 401),
    ]:  # fmt: skip
        assert call(config, authorization=authorization)[0] == status, authorization
    assert [call(config, path, "GET")[0] for path in ("/", "/static/app.js", "/nothing")] == [401] * 3
    assert call(config, "/health", "GET")[0] == 200
    status, headers, body = call(config)
    assert headers["www-authenticate"].startswith("Bearer")
    assert json.loads(body)["error"]["code"] == "invalid_api_key"


def test_a_long_body_is_refused_before_it_is_read():
    config = ServeConfig(limits=ServeLimits(max_body_bytes=10))
    assert call(config, body=b"1234567890")[0] == 200
    status, headers, body = call(config, content_length="11", chunks=[])
    assert status == 413 and headers["connection"] == "close" and "10 bytes" in json.loads(body)["error"]["message"]
    assert call(config, chunks=[b"123456", b"789012"])[0] == 413  # no Content-Length


def test_a_slow_body_is_refused():
    status, headers, _ = call(ServeConfig(limits=ServeLimits(body_seconds=0.05)), chunks=[b"{"])
    assert status == 408 and headers["connection"] == "close"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_type": "text/plain"}, 415),
        ({"content_type": None}, 415),
        ({"content_type": "application/json; charset=utf-8"}, 200),
        ({"content_encoding": "gzip"}, 415),
    ],
)
def test_only_plain_json_is_read(headers, status):
    assert call(ServeConfig(), **headers)[0] == status


def test_errors_have_one_shape_and_no_details():
    status, _, body = call(ServeConfig(), "/broken", "GET")
    assert status == 500 and b"secret" not in body
    assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
    status, _, body = call(ServeConfig(), "/nothing", "GET")
    assert status == 404 and json.loads(body)["error"]["message"] == "there is no /nothing"
    status, headers, body = call(ServeConfig(), "/health")
    assert status == 405 and "allow" in headers and "POST" in json.loads(body)["error"]["message"]
    assert call(ServeConfig(), "/static/../config.py", "GET")[0] == 404


def test_an_open_address_needs_a_key():
    with pytest.raises(UserError, match="needs --api-key"):
        ServeConfig(host="0.0.0.0")
    with pytest.raises(UserError, match="16 or more"):
        ServeConfig(api_key="short")
    assert ServeConfig(host="127.1.2.3").api_key == ""


@pytest.mark.parametrize(
    "origin", ["http:foo", "https:", "http://[", "http://a]b", "http://[::1", "null", "ftp://localhost:8000", ""]
)
def test_odd_origins_are_refused(origin):
    status, _, body = call(ServeConfig(), origin=origin)
    assert (status, json.loads(body)["error"]["code"]) == (403, "invalid_origin")
    assert call(ServeConfig(), origin="http://localhost:8000")[0] == 200
