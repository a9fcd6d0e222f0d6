"""Hundreds of requests that are generated from the published OpenAPI document: every response fits the document, none is a 500.

Further ones have generated headers, or go to the board and to the page for annotators, which have no such document.
"""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS

from bench.interop.odd_requests import fuzz_others, odd_headers
from firth.serve.annotation import AnnotationConfig, Collection, annotation_routes
from firth.serve.app import create_app
from firth.serve.board import Board
from firth.serve.config import ServeConfig
from firth.serve.preferences import Preferences
from firth.training.device import flush_denormals
from tests.support.serving import running_app

REQUESTS_PER_ROUTE = 30


@pytest.mark.slow
def test_generated_requests_have_documented_responses(server):
    flush_denormals(
        False
    )  # Hypothesis needs subnormal floats, which training in an earlier test of this process has flushed
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 14
    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    checks, statuses = CHECKS.get_by_names(names), Counter()

    def check(operation, mode):
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=REQUESTS_PER_ROUTE // 2, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def run(case):
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):  # a random name is only a 404
                case.body["model"] = ("gpt", "bert")[statuses.total() % 2]
            response = case.call(timeout=60)
            statuses[response.status_code] += 1
            assert "Traceback" not in response.text
            if "text/event-stream" not in response.headers.get("content-type", [""])[0]:
                case.validate_response(response, checks=checks)

        run()

    for operation in operations:
        check(operation, schemathesis.GenerationMode.POSITIVE)
        if operation.body:
            check(operation, schemathesis.GenerationMode.NEGATIVE)
    assert statuses.total() >= 300 and {200, 400} <= {*statuses}
    assert not server.models.thread.running


def test_generated_headers_are_answered(server):
    """A client may send any header; what the server answers is a status of 2xx or 4xx, in its own words."""
    flush_denormals(False)
    statuses = Counter()

    @given(
        headers=odd_headers(),
        path=st.sampled_from(["/", "/health", "/views", "/v1/models", "/openapi.json", "/static/app.js"]),
    )
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def run(headers, path):
        reply = server.client.get(path, headers=headers)
        statuses[reply.status_code] += 1
        assert reply.status_code < 500 and "Traceback" not in reply.text, (headers, reply.text)

    run()
    assert {200, 400, 403} <= {*statuses}, statuses


def test_generated_requests_to_the_board_and_to_annotators(tmp_path):
    flush_denormals(False)
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.0}\n{"step": 2')
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(f'{{"prompt": "question {i}", "samples": ["{i} a", "{i} b", "{i} c"]}}\n' for i in range(60))
    )
    collection = Collection(AnnotationConfig((), (str(prompts),)), tmp_path / "preferences.jsonl")
    collection.start()
    config = ServeConfig(port=0)
    app = create_app(None, config, annotation_routes(collection), board=Board([tmp_path / "runs"]))
    with running_app(None, config, app) as found:
        statuses = fuzz_others(found.url.removeprefix("http://"), 200, 7)
    collection.preferences.close()
    assert statuses.total() >= 150 and {200, 400, 403, 404, 405} <= {*statuses}, statuses
    kinds = Counter(event["event"] for event in collection.preferences.journal.events)
    assert kinds.keys() >= {"judgment", "skip", "correction", "undo"}, kinds
    again = Preferences(tmp_path / "preferences.jsonl")
    assert again.judgments() == collection.preferences.judgments()
    again.close()
