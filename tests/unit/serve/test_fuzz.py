"""Hundreds of requests that are generated from the published OpenAPI document: every response fits the document, none is a 500."""

from __future__ import annotations

from collections import Counter

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS

from firth.training.device import flush_denormals

REQUESTS_PER_ROUTE = 30


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
    print(dict(statuses))
    assert statuses.total() >= 300 and {200, 400} <= {*statuses}
    assert not server.models.thread.running
