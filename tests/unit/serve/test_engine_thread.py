"""The engine thread: no request is lost however they interleave, and stopping it ends what waits."""

import asyncio
import sys
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest

from firth.generate.sampling import Sampling
from firth.generate.scheduler import GenerationRequest, Scheduler
from firth.serve.engine_thread import EngineThread
from firth.serve.responses import ApiError
from firth.types import UserError
from tests.support.serving import serving


@pytest.fixture
def thread():
    found = EngineThread(max_rows=4)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def engine(server):
    return server.models.models["gpt"].model.engine


@pytest.fixture
def slow(monkeypatch):
    """Make each step take 5 ms, so that an answer of 100 tokens is decoded while a test does something else."""
    step = Scheduler.step

    def slower(self):
        time.sleep(0.005)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slower)


def request(length=3, count=2):
    return GenerationRequest(np.arange(10, 10 + length), Sampling(temperature=0, max_new_tokens=count))


async def tokens(thread, engine, requests):
    async with thread.generate(engine, requests) as events:
        return sum([1 async for _ in events])


def test_no_request_is_lost(thread, engine):
    """1,000 requests from one event loop while the thread takes others up, with the smallest time slice of the interpreter."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    async def caller():
        return [await asyncio.wait_for(tokens(thread, engine, [request(count=1)]), 30) for _ in range(100)]

    async def jobs():
        return [await asyncio.wait_for(thread.run(lambda i=i: i), 30) for i in range(200)]

    async def everything():
        return await asyncio.gather(*(caller() for _ in range(8)), jobs())

    try:
        *found, ran = asyncio.run(everything())
    finally:
        sys.setswitchinterval(interval)
    assert found == [[1] * 100] * 8 and ran == [*range(200)]


def test_jobs_run_between_steps(thread, engine, slow):
    """A job does not wait for the end of an answer."""

    async def both():
        answer = asyncio.create_task(tokens(thread, engine, [request(count=100)]))
        await asyncio.sleep(0.02)
        assert await thread.run(lambda: 5) == 5
        done = answer.done()
        return done, await answer

    done, count = asyncio.run(both())
    assert not done and count > 20


def test_errors_reach_their_caller_alone(thread, engine):
    async def three():
        good = asyncio.create_task(tokens(thread, engine, [request()]))
        with pytest.raises(UserError, match="reads at most"):
            await tokens(thread, engine, [request(), request(length=500)])
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 / 0)
        return await good

    assert asyncio.run(three()) == 2 and thread.running == 0


def test_leaving_an_answer_frees_its_row(thread, engine):
    async def leave():
        async with thread.generate(engine, [request(count=100) for _ in range(8)]) as events:
            async for _ in events:
                break
        return await tokens(thread, engine, [request()])

    assert asyncio.run(leave()) == 2 and thread.running == 0


def test_stopping_ends_what_waits(thread, engine, slow):
    async def stopped():
        answer = asyncio.create_task(tokens(thread, engine, [request(count=100)]))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(thread.stop)
        with pytest.raises(ApiError, match="stopping"):
            await answer

    asyncio.run(stopped())


def test_the_thread_starts_once(thread):
    with pytest.raises(RuntimeError, match="runs already"):
        thread.start()
    thread.stop()
    thread.start()
    assert asyncio.run(thread.run(lambda: 5)) == 5


def test_nothing_waits_for_a_thread_that_has_stopped(thread, engine):
    thread.stop()

    async def late():
        with pytest.raises(ApiError, match="computes no more"):
            await asyncio.wait_for(thread.run(lambda: 5), 5)
        with pytest.raises(ApiError, match="computes no more"):
            await asyncio.wait_for(tokens(thread, engine, [request()]), 5)

    asyncio.run(late())


def test_stopping_waits_for_no_slice_and_answers_what_waits(thread, engine):
    """A slice of a second runs; behind it wait a job and an answer that the thread has not taken up."""

    async def stopped():
        jobs = [asyncio.create_task(thread.run(lambda: time.sleep(1))) for _ in range(2)]
        await asyncio.sleep(0.1)
        answer = asyncio.create_task(tokens(thread, engine, [request()]))
        await asyncio.sleep(0.05)
        start = time.monotonic()
        await asyncio.to_thread(thread.stop, 0.1)
        found = await asyncio.wait_for(asyncio.gather(*jobs, answer, return_exceptions=True), 5)
        return time.monotonic() - start, found

    seconds, found = asyncio.run(stopped())
    assert seconds < 0.5 and [error.status for error in found] == [503] * 3
    thread.stop()
    assert not thread.alive


def sleeping(done, name, count, seconds=0.01):
    for _ in range(count):
        time.sleep(seconds)
        done.append(name)
        yield
    return name


def test_a_step_comes_between_two_slices(thread, engine):
    done = []

    async def both():
        job = asyncio.create_task(thread.run_slices(sleeping(done, "a", 200)))
        await asyncio.sleep(0.05)
        count = await tokens(thread, engine, [request(count=20)])
        return count, len(done), await job

    count, slices, result = asyncio.run(both())
    assert count == 20 and slices < 60 and result == "a" and len(done) == 200


def test_jobs_take_turns(thread):
    done = []

    async def both():
        return await asyncio.gather(*(thread.run_slices(sleeping(done, name, 10)) for name in "ab"))

    assert asyncio.run(both()) == ["a", "b"] and done[:8] == [*"abababab"]


def test_a_job_ends_when_its_caller_leaves(thread):
    done = []

    async def leave():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(thread.run_slices(sleeping(done, "a", 1000)), 0.1)
        return await asyncio.wait_for(thread.run(lambda: 5), 1)

    assert asyncio.run(leave()) == 5 and len(done) < 50


class Panic(BaseException):
    """As a library in Rust raises it."""


class Broken:
    """A constraint that fails after `good` tokens."""

    def __init__(self, error, good):
        self.error, self.good = error, good

    def mask(self, tokens):
        if len(tokens) >= self.good:
            raise self.error
        return np.ones(40, bool)

    def accept(self, token):
        if self.good == 0.5:
            raise self.error


@pytest.mark.parametrize(
    ("error", "good"), [(ValueError("it"), 0), (ValueError("it"), 3), (Panic("it"), 2), (ValueError("it"), 0.5)]
)
def test_a_constraint_that_fails_ends_its_call_alone(thread, engine, error, good):
    async def three():
        other = asyncio.create_task(tokens(thread, engine, [request(count=60)]))
        seen = []

        async def read():
            async with thread.generate(engine, [replace(request(count=60), constraint=Broken(error, good))]) as events:
                async for event in events:
                    seen.append(event)

        with pytest.raises((ValueError, RuntimeError), match="it"):
            await read()
        return len(seen), await other

    seen, other = asyncio.run(three())
    assert seen == int(good) and other == asyncio.run(tokens(thread, engine, [request(count=60)]))
    assert thread.running == 0


def test_the_thread_survives_a_panic(thread, engine, monkeypatch):
    def panic(*_):
        raise Panic("it")

    async def failed():
        with pytest.raises(RuntimeError, match="Panic: it"):
            await asyncio.wait_for(thread.run(lambda: panic()), 5)
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "step", panic)
            with pytest.raises(RuntimeError, match="Panic: it"):
                await asyncio.wait_for(tokens(thread, engine, [request()]), 5)
        return await tokens(thread, engine, [request()])

    assert asyncio.run(failed()) == 2 and thread.alive


def test_health_shows_a_thread_that_has_ended(model_paths, monkeypatch):
    def panic(*_):
        raise Panic("it")

    with serving([model_paths["gpt"]]) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        monkeypatch.setattr(EngineThread, "_begin", panic)
        body = {"prompt": "a", "max_tokens": 1}
        replies = [server.post("/v1/completions", body) for _ in range(2)]
        replies.append(httpx.get(f"{server.url}/health"))
        assert [reply.status_code for reply in replies] == [503] * 3
        assert replies[2].json()["error"]["code"] == "engine_failed"
