"""The OpenAPI document, and the requests of the how-to page: each is valid."""

import re
import shlex
from pathlib import Path

import pytest

from firth.serve.app import OPERATIONS, STATIC, document
from firth.serve.config import ServeConfig
from firth.serve.operations import parse
from firth.serve.responses import ApiError
from tests.support.commands import fenced

PAGE = (Path(__file__).parents[3] / "docs" / "how-to" / "serve-a-model.md").read_text("utf-8")
COMMANDS = [
    shlex.split(command)
    for _, language, block in fenced(PAGE)
    if language == "sh"
    for command in re.split(r"\n(?=curl|export|firth)", block.replace("\\\n", " "))
    if command.startswith("curl")
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[1].removeprefix("http://127.0.0.1:8000"))
def test_requests_of_the_page_are_valid(words):
    path = words[1].removeprefix("http://127.0.0.1:8000")
    if "-d" not in words:
        assert path == "/v1/models"
        return
    [operation] = [one for one in OPERATIONS if one.path == path]
    parse(operation.request, words[words.index("-d") + 1].encode())


def test_the_page_shows_most_routes():
    assert len(COMMANDS) >= 8
    with pytest.raises(ApiError, match="there is no field 'promt'"):
        parse(OPERATIONS[0].request, b'{"promt": "a"}')


def test_the_document_describes_each_route():
    found = document(OPERATIONS, has_key=True)
    assert {*found["paths"]} == {one.path for one in OPERATIONS} | {"/health", "/v1/models", "/v1/models/{model}"}
    assert found["security"] == [{"key": []}] and found["paths"]["/health"]["get"]["security"] == []
    assert "security" not in document(OPERATIONS, has_key=False)
    references = set(re.findall(r"#/components/schemas/([\w-]+)", str(found)))
    assert references <= {*found["components"]["schemas"]}


def test_limits_and_pages_are_there():
    assert (STATIC / "page.html").is_file()
    assert ServeConfig().limits.max_requests == 64
