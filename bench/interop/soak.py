"""A long run of `firth serve`: generated requests, then clients for minutes; memory, latency, and that every answer is right.

    python -m bench.interop.soak RUN                                # 10,000 generated requests, 32 clients for 10 minutes
    python -m bench.interop.soak RUN --requests 500 --minutes 1

RUN is a decoder; without it, a random tiny model is served. The generated requests come from the published OpenAPI document
(schemathesis), half of them invalid on purpose; none may have a status of 500 or one that the document lacks. Then each client
sends completions, some streamed, some given up half-way, with one of NUM_PROMPTS prompts and a fixed seed. An answer that differs from what
its prompt got alone is cross-talk. Resident memory is taken each SAMPLE_SECONDS; the change is from the first third of the
minutes to the last.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUM_PROMPTS, NEW_TOKENS, SAMPLE_SECONDS = 24, 24, 5.0
BODY = {"max_tokens": NEW_TOKENS, "temperature": 1.0}


@dataclass(frozen=True)
class Served:
    """The server: host and port, process id, and the name of its model."""

    host: str
    process: int
    model: str

    def memory_mb(self) -> float:
        """Return its resident memory, in MB (10^6 bytes)."""
        pages = int(Path(f"/proc/{self.process}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def server(run: str) -> Iterator[Served]:
    """Run `firth serve`; its warnings go to standard error."""
    command = [sys.executable, "-m", "firth", "serve", f"soak={run}", "--port", "0", "--weights", "fp32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if "serving at http://" in line)
        yield Served(line.split("http://")[1].split()[0], process.pid, "soak")
    finally:
        process.terminate()
        assert process.wait() == 0, "the server did not end by itself"


def tiny_model(directory: Path) -> str:
    """Write a random model and return its directory."""
    from firth.model.heads import LMHead
    from firth.model.model import LM
    from firth.model.presets import llama
    from firth.pretrained.load_save import save_model
    from firth.tokenizer.train import train

    tokenizer = train([Path(__file__).read_text("utf-8") * 2], "byte-bpe", 700)
    config = llama(tokenizer.vocab.size, 64, 2, 4, 128, max_positions=256)
    save_model(LM(config, {"lm": LMHead(config)}), tokenizer, directory)
    return str(directory)


# ------------------------------------------------------------------------------- generated requests


def fuzz(served: Served, count: int) -> Counter[int]:
    """Send generated requests and return the number of each status."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import CHECKS

    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    schema = schemathesis.openapi.from_url(f"http://{served.host}/openapi.json")
    checks, statuses = CHECKS.get_by_names(names), Counter[int]()
    operations = [result.ok() for result in schema.get_all_operations()]
    rounds = [(one, schemathesis.GenerationMode.POSITIVE) for one in operations]
    rounds += [(one, schemathesis.GenerationMode.NEGATIVE) for one in operations if one.body]

    for operation, mode in rounds:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=-(-count // len(rounds)), deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def run(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = served.model  # a random name is only a 404
            response = case.call(timeout=120)
            statuses[response.status_code] += 1
            assert "Traceback" not in response.text
            if "text/event-stream" not in response.headers.get("content-type", [""])[0]:
                case.validate_response(response, checks=checks)

        run()
        print(f"{operation.label}, {mode.name.lower()}: {statuses.total():,} requests", file=sys.stderr, flush=True)
    return statuses


# ------------------------------------------------------------------------------- clients


@dataclass
class Load:
    """What the clients saw.

    Args:
        alone: The text of each prompt, sent alone.
        seconds: Seconds of each whole answer.
        first: Seconds to the first event of each stream.
        wrong: Answers that differ from `alone`.
        refused: Answers with a status other than 200, by status.
        left: Streams that a client gave up.
    """

    alone: list[str]
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    wrong: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    left: int = 0


def ask(served: Served, number: int, stream: bool, leave: bool = False) -> tuple[int, str, float]:
    """Send a prompt; return the status, the text and the seconds to the first part. `leave` closes it after that."""
    body = BODY | {"prompt": f"{number}: for each prompt in the", "seed": number, "stream": stream}
    connection = http.client.HTTPConnection(served.host, timeout=600)
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    text, first = "", 0.0
    if reply.status != 200 or not stream:
        found = json.loads(reply.read())
        text = found["choices"][0]["text"] if reply.status == 200 else ""
    else:
        for line in reply:
            first = first or time.perf_counter() - started
            if leave and text:
                break
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    connection.close()
    return reply.status, text, first


def client(served: Served, load: Load, seed: int, until: float) -> None:
    """Send requests until a time."""
    rng = random.Random(seed)
    while time.monotonic() < until:
        number, stream, leave = rng.randrange(NUM_PROMPTS), rng.random() < 0.5, rng.random() < 0.1
        started = time.perf_counter()
        status, text, first = ask(served, number, stream, stream and leave)
        if status != 200:
            load.refused[status] += 1
        elif stream and leave:
            load.left += 1
        else:
            load.seconds.append(time.perf_counter() - started)
            load.first += [first] * stream
            load.wrong += text != load.alone[number]


def soak(served: Served, clients: int, minutes: float) -> tuple[Load, list[float]]:
    """Run clients for minutes; return what they saw and the memory of the server over time, in MB."""
    load = Load([ask(served, number, False)[1] for number in range(NUM_PROMPTS)])
    until = time.monotonic() + 60 * minutes
    threads = [threading.Thread(target=client, args=(served, load, seed, until)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < until:
        memory.append(served.memory_mb())
        time.sleep(SAMPLE_SECONDS)
    for thread in threads:
        thread.join()
    return load, memory


def percentile(values: list[float], share: float) -> float:
    """Return a percentile in milliseconds."""
    return 1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="", help="a decoder; a random tiny model by default")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, server(arguments.run or tiny_model(Path(folder))) as served:
        load, memory = soak(served, arguments.clients, arguments.minutes)
        third = max(1, len(memory) // 3)
        start, end = statistics.median(memory[:third]), statistics.median(memory[-third:])
        print(
            f"{arguments.clients} clients, {arguments.minutes:g} minutes: {len(load.seconds):,} whole answers, {load.left:,} given up"
        )
        print(f"answers that differ from those alone: {load.wrong}; refused: {dict(load.refused) or 'none'}")
        for name, values in (("whole answer", load.seconds), ("first event", load.first)):
            print(f"{name}: p50 {percentile(values, 0.5):,.0f} ms, p99 {percentile(values, 0.99):,.0f} ms")
        print(f"memory: {start:,.0f} MB, then {end:,.0f} MB ({end / start - 1:+.1%})", flush=True)
        before = served.memory_mb()
        statuses = fuzz(served, arguments.requests)
        print(f"{statuses.total():,} generated requests: {dict(sorted(statuses.items()))}")
        print(f"memory: {before:,.0f} MB, then {served.memory_mb():,.0f} MB")


if __name__ == "__main__":
    main()
