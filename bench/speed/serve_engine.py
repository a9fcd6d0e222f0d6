"""Speed of concurrent requests: 16 streams that arrive at random, against one batch of 16 prompts.

    python -m bench.speed.serve_engine --weights fp32 bf16 int8
    python -m bench.speed.serve_engine --check            # every stream's answer equals that of its prompt alone; no timing

Both sides run the decoder of 29 M parameters of `bench.speed.generate` with the same weights; prompts have 32 tokens and
answers 128. "batch" is `Engine.generate` with 16 prompts. "streams" is a `Scheduler` with 16 clients: each sends its first
request at a random step and the next one, with a new prompt, as soon as its answer is complete. So prompts are read one by
one, the rows have different lengths, and each token comes with its text. Units are the tokens written. Ratios are of the
streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from bench.harness import EndSample, arguments, command
from bench.speed.generate import NEW, PROMPT, VOCAB_SIZE, IdTokenizer, Workload, firth_write, own_decoder
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.generate.scheduler import GenerationRequest, Scheduler, Update

STREAMS = 16
WEIGHTS = ("fp32", "bf16", "int8")
GREEDY = Sampling(temperature=0, max_new_tokens=NEW)


def open_engine(weights: str) -> Engine:
    return Engine(own_decoder(), IdTokenizer(), stops=(), weights=weights)  # type: ignore[arg-type]


def streams(scheduler: Scheduler, seed: int = 0) -> Iterator[list[Update]]:
    """Yield the updates of each step, without end; request i has the prompt `prompt(i)`."""
    first = sorted(np.random.default_rng(seed).integers(0, NEW, STREAMS).tolist())
    sent = step = 0
    while True:
        while sent < STREAMS and first[sent] <= step:
            scheduler.submit(GenerationRequest(prompt(sent), GREEDY))
            sent += 1
        updates = scheduler.step()
        yield updates
        for update in updates:
            if update.completion is not None:
                scheduler.submit(GenerationRequest(prompt(sent), GREEDY))
                sent += 1
        step += 1


def prompt(number: int) -> np.ndarray:
    """Return the prompt (PROMPT,) of a request."""
    return np.random.default_rng([1, number]).integers(200, VOCAB_SIZE, PROMPT)


def write_batches(end_sample: EndSample, weights: str) -> None:
    engine, work = open_engine(weights), Workload(STREAMS)
    while True:
        firth_write(engine, work)
        end_sample(work.units)


def write_streams(end_sample: EndSample, weights: str) -> None:
    written = 0
    for step, updates in enumerate(streams(Scheduler(open_engine(weights), max_rows=STREAMS))):
        written += len(updates)
        if step < NEW:  # until all streams run
            written = 0
        elif written >= STREAMS * NEW:
            end_sample(written)
            written = 0


def candidates(weights: str) -> dict[str, Callable[[EndSample], None]]:
    return {
        f"firth, batch of {STREAMS}, {weights}": partial(write_batches, weights=weights),
        f"firth, {STREAMS} streams, {weights}": partial(write_streams, weights=weights),
    }


def check() -> None:
    """Assert that the answers of the streams are those of their prompts alone."""
    engine, found = open_engine("fp32"), {}
    for updates in streams(Scheduler(engine, max_rows=STREAMS)):
        found.update({update.id: update.completion for update in updates if update.completion is not None})
        if len(found) >= 2 * STREAMS:
            break
    for i, answer in found.items():
        [alone] = engine.generate([prompt(i)], GREEDY)
        assert answer.tokens.tolist() == alone.tokens.tolist(), f"request {i}"
    print(f"{len(found)} answers of {NEW} tokens equal those of their prompts alone")


def main() -> None:
    every = [name for weights in WEIGHTS for name in candidates(weights)]
    parser = arguments(__doc__, every)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    args = parser.parse_args()
    if args.check:
        check()
        return
    for weights in args.weights:
        command(args, candidates(weights))


if __name__ == "__main__":
    main()
