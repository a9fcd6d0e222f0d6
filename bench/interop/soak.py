"""A long run of `firth serve`: generated requests, then clients for minutes; memory, latency, and that every answer is right.

    python -m bench.interop.soak RUN                                # 10,000 generated requests, 32 clients for 10 minutes
    python -m bench.interop.soak RUN --requests 500 --minutes 1
    python -m bench.interop.soak --minutes 0 --seconds 100 --state FILE    # some of the 10,000; repeat it until all are sent

RUN is a decoder; without it, a random tiny model is served. The generated requests come from the published OpenAPI document
(schemathesis), half of them invalid on purpose; none may have a status of 500 or one that the document lacks. Some have
generated headers too, and the routes of the board and of the page for annotators get theirs (`odd_requests`). Each client
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.interop.odd_requests import fuzz_others, odd_headers

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
    """Run `firth serve`."""
    with running("serve", f"soak={run}", "--weights", "fp32") as (host, process):
        yield Served(host, process, "soak")


@contextmanager
def board_server(directory: Path) -> Iterator[str]:
    """Run `firth watch` on a run of a few steps; yield its address."""
    run = directory / "runs" / "one"
    run.mkdir(parents=True)
    rows = [{"step": step, "split": "train", "loss": 1 / (1 + step)} for step in range(50)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with running("watch", str(directory / "runs")) as (host, _):
        yield host


@contextmanager
def annotation_server(directory: Path) -> Iterator[str]:
    """Run `firth annotate` on prompts with samples; yield its address."""
    prompts = directory / "prompts.jsonl"
    rows = [{"prompt": f"question {i}", "samples": [f"{i} yes", f"{i} no", f"{i} perhaps"]} for i in range(200)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with running("annotate", str(prompts), "--out", str(directory / "preferences.jsonl")) as (host, _):
        yield host


@contextmanager
def running(*arguments: str) -> Iterator[tuple[str, int]]:
    """Run a command that serves; yield its address and its process. Its warnings go to standard error."""
    command = [sys.executable, "-m", "firth", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if "serving at http://" in line)
        yield line.split("http://")[1].split()[0], process.pid
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


@dataclass
class Sent:
    """The generated requests that were sent, over several runs of the program if they have a file in common.

    Args:
        file: The file; None for none.
        statuses: Requests by status.
        route: The route from which the next run goes on.
    """

    file: Path | None
    statuses: Counter[int] = field(default_factory=Counter)
    route: int = 0

    @staticmethod
    def load(file: Path | None) -> Sent:
        """Return what earlier runs have sent."""
        if file is None or not file.exists():
            return Sent(file)
        found = json.loads(file.read_text("utf-8"))
        return Sent(file, Counter({int(status): count for status, count in found["statuses"].items()}), found["route"])

    def save(self) -> None:
        """Write the file."""
        if self.file is not None:
            self.file.write_text(json.dumps({"statuses": self.statuses, "route": self.route}), "utf-8")


EXAMPLES = 40
"""Requests that are generated at a time for a route."""


def fuzz(served: Served, others: Sequence[str], sent: Sent, count: int, seconds: float) -> None:
    """Send generated requests until `count` were sent or the seconds are over.

    Args:
        served: The server of models.
        others: Addresses of a board and of a page for annotators.
        sent: What was sent, which is added to.
        count: Requests in total.
        seconds: Most seconds.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st
    from schemathesis.checks import CHECKS

    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    schema = schemathesis.openapi.from_url(f"http://{served.host}/openapi.json")
    checks = CHECKS.get_by_names(names)
    operations = [result.ok() for result in schema.get_all_operations()]
    rounds: list[Any] = [(one, schemathesis.GenerationMode.POSITIVE) for one in operations]
    rounds += [(one, schemathesis.GenerationMode.NEGATIVE) for one in operations if one.body]
    rounds += [(host, None) for host in others]
    end = time.monotonic() + seconds

    def generated(operation: Any, mode: Any) -> None:
        @seed(random.randrange(1 << 32))
        @given(case=operation.as_strategy(generation_mode=mode), headers=st.none() | odd_headers())
        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def run(case: Any, headers: dict[str, str] | None) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = served.model  # a random name is only a 404
            response = case.call(timeout=120, headers=headers)
            sent.statuses[response.status_code] += 1
            assert "Traceback" not in response.text
            if headers is None and "text/event-stream" not in response.headers.get("content-type", [""])[0]:
                case.validate_response(response, checks=checks)
            assert response.status_code < 500, response.text

        run()

    while sent.statuses.total() < count and time.monotonic() < end:
        operation, mode = rounds[sent.route % len(rounds)]
        if mode is None:
            sent.statuses += fuzz_others(operation, EXAMPLES, random.randrange(1 << 32))
        else:
            generated(operation, mode)
        sent.route += 1
        sent.save()
        name = operation if mode is None else f"{operation.label}, {mode.name.lower()}"
        print(f"{name}: {sent.statuses.total():,} requests", file=sys.stderr, flush=True)


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


def report(load: Load, memory: list[float], arguments: argparse.Namespace) -> None:
    """Print what the clients saw."""
    third = max(1, len(memory) // 3)
    start, end = statistics.median(memory[:third]), statistics.median(memory[-third:])
    print(
        f"{arguments.clients} clients, {arguments.minutes:g} minutes: {len(load.seconds):,} whole answers, {load.left:,} given up"
    )
    print(f"answers that differ from those alone: {load.wrong}; refused: {dict(load.refused) or 'none'}")
    for name, values in (("whole answer", load.seconds), ("first event", load.first)):
        print(f"{name}: p50 {percentile(values, 0.5):,.0f} ms, p99 {percentile(values, 0.99):,.0f} ms")
    print(f"memory: {start:,.0f} MB, then {end:,.0f} MB ({end / start - 1:+.1%})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="", help="a decoder; a random tiny model by default")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=1e9, help="most seconds for generated requests")
    parser.add_argument("--state", type=Path, help="a file by which several runs share the generated requests")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, server(arguments.run or tiny_model(Path(folder))) as served:
        if arguments.minutes:
            report(*soak(served, arguments.clients, arguments.minutes), arguments)
        if arguments.requests:
            before, sent = served.memory_mb(), Sent.load(arguments.state)
            with board_server(Path(folder)) as board, annotation_server(Path(folder)) as annotation:
                fuzz(served, (board, annotation), sent, arguments.requests, arguments.seconds)
            print(f"{sent.statuses.total():,} generated requests: {dict(sorted(sent.statuses.items()))}")
            print(f"memory: {before:,.0f} MB, then {served.memory_mb():,.0f} MB")


if __name__ == "__main__":
    main()
