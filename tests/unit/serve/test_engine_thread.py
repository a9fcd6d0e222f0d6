"""The engine thread: no request is lost however they interleave, and stopping it ends what waits."""

import asyncio
import sys

import numpy as np
import pytest

from firth.generate.sampling import Sampling
from firth.generate.scheduler import GenerationRequest
from firth.serve.engine_thread import EngineThread
from firth.types import UserError


@pytest.fixture
def thread():
    found = EngineThread(max_rows=4)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def engine(server):
    return server.models.models["gpt"].model.engine


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


def test_jobs_run_between_steps(thread, engine):
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


def test_stopping_ends_what_waits(thread, engine):
    async def stopped():
        answer = asyncio.create_task(tokens(thread, engine, [request(count=100)]))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(thread.stop)
        with pytest.raises(RuntimeError, match="stopping"):
            await answer

    asyncio.run(stopped())
