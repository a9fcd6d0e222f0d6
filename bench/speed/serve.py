"""Serving SmolLM2-135M to 1, 4 and 16 clients: tokens per second and time to the first token, against llama.cpp's server.

    pip install --no-deps --target LLAMA xllamacpp gguf
    python -m bench.speed.serve --site LLAMA --check --kind F32 --weights fp32     # both write the same text; no timing
    python -m bench.speed.serve --site LLAMA
    python -m bench.speed.serve --server llama-server     # a llama.cpp that was compiled for this CPU (-DGGML_NATIVE=ON)

Both servers hold 8-bit weights (Q8_0 in llama.cpp, int8 in firth) of `firth fetch smollm2`, on THREADS threads and with 16
rows. Each client sends three prompts one after another to `/v1/completions` and reads the stream; no two prompts are equal.
The servers take turns, so that a ratio is within a round. Tokens are those that the servers report. In 8 bits the servers round in
different places, and greedy texts of so small a model soon differ.

llama.cpp runs with the fastest of SETTINGS for 16 clients, which are tried first. It has a KV cache of its own for each row (no
unified one, over which every row would attend), continuous batching, batches of 2,048 tokens in parts of 512, its prompt cache, and a
greedy sampler alone (top_k 1) in place of its chain of eight. The wheel of xllamacpp is compiled for AVX2; llama.cpp that is compiled
for the CPU may be faster.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench.harness import busy_seconds, describe, machine
from bench.speed.smollm2 import PROMPTS, add_site, model_directory

CLIENTS, REQUESTS, NEW_TOKENS, THREADS, ROWS = (1, 4, 16), 3, 64, 2, 16
SETTINGS = {
    "": {}, "sleeping threads": {"poll": 0}, "no flash attention": {"flash": 0},
    "sleeping threads, no flash attention": {"poll": 0, "flash": 0},
}  # fmt: skip
"""What is tried: whether waiting threads spin (`poll`, 0 to 100), and flash attention (-1 for llama.cpp's choice)."""
CONTEXT = 512
"""Tokens of context of a row in llama.cpp, which divides its memory by the rows; firth takes what a row needs."""


@dataclass(frozen=True)
class Measurement:
    """Result of one round of one server.

    Args:
        tokens: Tokens of all answers.
        seconds: Wall time.
        first: Seconds to the first token of each answer.
        others: Share of the machine that other processes used.
    """

    tokens: int
    seconds: float
    first: list[float]
    others: float


@dataclass(frozen=True)
class Address:
    """A server.

    Args:
        name: Its name in the table.
        host: Host and port.
        process: Its process id.
        fields: Further fields of its requests.
    """

    name: str
    host: str
    process: int
    fields: Mapping[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------- servers


@contextmanager
def firth_server(weights: str) -> Iterator[Address]:
    """Run `firth serve`."""
    command = [
        sys.executable,
        "-m",
        "firth",
        "serve",
        f"smollm2={model_directory()}",
        "--port",
        "0",
        "--weights",
        weights,
    ]
    command += ["--limit", f"max_rows={ROWS}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "serving at http://" in line:
                yield Address(f"firth, {weights}", line.split("http://")[1].split()[0], process.pid)
                return
        raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def llama_server(kind: str, site: str, binary: str, settings: Mapping[str, int]) -> Iterator[Address]:
    """Run llama.cpp's server in a process of its own, on a file that firth writes.

    Args:
        kind: Format of the weights.
        site: Directory of xllamacpp.
        binary: The program llama-server, in place of xllamacpp; "" for none.
        settings: A value of SETTINGS.
    """
    command = [sys.executable, "-m", "bench.speed.serve", "--site", site, "--llama", str(gguf_file(kind))]
    command += ["--settings", json.dumps(settings)]
    if binary:
        command = [binary, *binary_options(str(gguf_file(kind)), settings)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    greedy = {"samplers": ["top_k"], "top_k": 1}
    try:
        for line in process.stdout:
            if found := re.search(r"http://(127\.0\.0\.1:\d+)", line):
                threading.Thread(target=process.stdout.read, daemon=True).start()  # so that its log does not block it
                wait_for(found[1])
                yield Address(f"llama.cpp, {kind}", found[1], process.pid, greedy)
                return
        raise RuntimeError("llama.cpp's server did not start")
    finally:
        process.terminate()
        process.wait()


FOLDER = tempfile.TemporaryDirectory()
"""Where the file of llama.cpp is, until the program ends."""


@cache
def gguf_file(kind: str) -> Path:
    """Write the model with weights of a kind, and return the file."""
    from firth.pretrained import gguf
    from firth.pretrained.load_save import load_model
    from firth.tokenizer.tokenizer import Tokenizer

    file = Path(FOLDER.name) / f"{kind}.gguf"
    gguf.write(load_model(model_directory()), Tokenizer.load(model_directory()), file, kind)
    return file


def fastest(peer: Callable[[Mapping[str, int]], Any]) -> str:
    """Measure llama.cpp alone with each of SETTINGS; return the name of the fastest."""
    rates = {}
    for name, settings in SETTINGS.items():
        with peer(settings) as theirs:
            measure(theirs, 2, 99, 1)
            found = measure(theirs, CLIENTS[-1], 1, 1)
        rates[name] = found.tokens / found.seconds
        print(
            f"{theirs.name}, {name or 'defaults'}: {rates[name]:,.0f} tokens/s, others {found.others:.0%}", flush=True
        )
    return max(rates, key=lambda name: rates[name])


def wait_for(host: str) -> None:
    """Wait until a server has loaded its model."""
    for _ in range(600):
        connection = http.client.HTTPConnection(host, timeout=10)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise RuntimeError("llama.cpp's server did not load the model")


def binary_options(file: str, settings: Mapping[str, int]) -> list[str]:
    """Return the options of the program llama-server, which are those of `run_llama`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flash = {-1: "auto", 0: "off", 1: "on"}[settings.get("flash", -1)]
    options = {
        "-m": file, "--port": port, "-c": CONTEXT * ROWS, "-np": ROWS, "-b": 2048, "-ub": 512, "-t": THREADS, "-tb": THREADS,
        "-fa": flash, "--poll": settings.get("poll", 50),
    }  # fmt: skip
    return [*(str(one) for pair in options.items() for one in pair), "--no-kv-unified"]


def run_llama(file: str, settings: Mapping[str, int]) -> None:
    """Serve a file with llama.cpp until the process is ended; print the address."""
    import xllamacpp as library  # type: ignore[import-not-found]

    params = library.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.n_batch = CONTEXT * ROWS, ROWS, 2048
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.cpuparams.poll = params.cpuparams_batch.poll = settings.get("poll", 50)
    params.flash_attn_type, params.kv_unified = settings.get("flash", -1), False
    params.warmup, params.verbosity = True, 0
    server = library.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


# ------------------------------------------------------------------------------- clients


def ask(address: Address, prompt: str) -> tuple[str, int, float]:
    """Stream an answer; return its text, its tokens and the seconds to its first one."""
    body = {
        "model": "smollm2", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, **address.fields,
    }  # fmt: skip
    started, first, text, tokens = time.perf_counter(), 0.0, "", 0
    connection = http.client.HTTPConnection(address.host, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 200, reply.read()
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        event: dict[str, Any] = json.loads(line[6:])
        if event["choices"] and event["choices"][0]["text"]:
            first = first or time.perf_counter() - started
            text += event["choices"][0]["text"]
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    connection.close()
    return text, tokens, first


def measure(address: Address, clients: int, salt: int, requests: int = REQUESTS) -> Measurement:
    """Let clients ask a server and return what it took; `salt` makes the prompts of a round new."""
    results: list[tuple[str, int, float]] = []

    def client(number: int) -> None:
        for k in range(requests):
            which = salt * 1000 + number * requests + k
            results.append(ask(address, f"{which}. {PROMPTS[which % len(PROMPTS)]}"))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    before, own, started = busy_seconds() or 0.0, cpu_seconds(address.process), time.perf_counter()
    mine = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    used = cpu_seconds(address.process) - own + time.process_time() - mine
    others = max(0.0, (busy_seconds() or 0.0) - before - used) / seconds / (os.cpu_count() or 1)
    return Measurement(sum(tokens for _, tokens, _ in results), seconds, [first for *_, first in results], others)


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------- table


def table(found: dict[tuple[int, str], list[Measurement]], names: list[str]) -> str:
    """Return a Markdown table: medians over rounds, and the ratio of firth to llama.cpp within a round."""
    lines = [
        "| clients | " + " | ".join(f"{name}: tokens/s | first token, ms" for name in names) + " | ratio (range) |"
    ]
    lines.append("|---|" + "---|" * (2 * len(names) + 1))
    for clients in sorted({key[0] for key in found}):
        cells, rates = [], []
        for name in names:
            rounds = found[clients, name]
            rates.append([one.tokens / one.seconds for one in rounds])
            first = statistics.median(value for one in rounds for value in one.first)
            cells += [f"{statistics.median(rates[-1]):,.0f}", f"{1000 * first:,.0f}"]
        ratios = [b / a for a, b in zip(*rates, strict=True)] if len(rates) == 2 else [1.0]
        ratio = f"**{statistics.median(ratios):.2f}x** ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {clients} | {' | '.join(cells)} | {ratio} |")
    others = [one.others for rounds in found.values() for one in rounds]
    share = f"{statistics.median(others):.0%} (up to {max(others):.0%})"
    return "\n".join([*lines, "", f"Other processes used {share} of the machine. {describe(machine())}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", default="", help="directory in which xllamacpp was installed with --target")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="requests of each client")
    parser.add_argument("--weights", default="int8", help="firth's weights: int8, bf16 or fp32")
    parser.add_argument("--kind", default="Q8_0", help="llama.cpp's weights: Q8_0, F16 or F32")
    parser.add_argument("--check", action="store_true", help="compare the texts of both servers; no timing")
    parser.add_argument("--server", default="", help="the program llama-server, in place of xllamacpp")
    parser.add_argument("--peer", help="one of SETTINGS; by default the fastest of them")
    parser.add_argument("--llama", default="", help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="{}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    add_site(arguments.site)
    if arguments.llama:
        run_llama(arguments.llama, json.loads(arguments.settings))
        return
    peer = partial(llama_server, arguments.kind, arguments.site, arguments.server)
    best = arguments.peer if arguments.peer in SETTINGS else "" if arguments.check else fastest(peer)
    with peer(SETTINGS[best]) as theirs, firth_server(arguments.weights) as ours:
        if arguments.check:
            equal = [ask(theirs, prompt)[0][:40] == ask(ours, prompt)[0][:40] for prompt in PROMPTS]
            print(f"the first 40 characters of {sum(equal)} of {len(equal)} answers are equal")
            assert sum(equal) > len(equal) / 2
            return
        measured: dict[tuple[int, str], list[Measurement]] = {}
        for server in (theirs, ours):
            measure(server, 2, 99, 1)  # warm up
        for round in range(arguments.rounds):
            for clients in CLIENTS:
                for server in (theirs, ours) if round % 2 else (ours, theirs):
                    result = measure(server, clients, round * 10 + clients % 7, arguments.requests)
                    measured.setdefault((clients, server.name), []).append(result)
                    rate = f"{result.tokens / result.seconds:,.0f} tokens/s, others {result.others:.0%}"
                    print(f"round {round}, {clients} clients, {server.name}: {rate}", file=sys.stderr, flush=True)
        print(f"llama.cpp with: {best or 'defaults'}")
        print(table(measured, [theirs.name, ours.name]))


if __name__ == "__main__":
    main()
