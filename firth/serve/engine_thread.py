"""The thread that owns all models: every computation of the server runs in it.

Answers are decoded step by step (`firth.generate.scheduler`): all answers of a model advance together, and between two steps
one slice of another job runs (a batch of a score, an embedding, a prediction), so that neither waits for the end of the other.
Jobs take turns slice by slice, and one whose caller has left ends after its slice.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from firth.generate.engine import Engine
from firth.generate.scheduler import GenerationRequest, Scheduler, TokenConstraint, Update
from firth.generate.slices import Slices
from firth.serve.responses import ApiError
from firth.types import LOGGER, UserError

T = TypeVar("T")
Event = tuple[int, Update] | Exception


class EngineThread:
    """One thread that decodes answers and runs jobs.

    A model is used by this thread alone, so that no two computations share a model's state or the CPU's cores.

    Args:
        max_rows: Most answers of a model that are decoded together.
    """

    def __init__(self, max_rows: int = 16) -> None:
        self.max_rows = max_rows
        self._wake = threading.Condition()
        self._begun: deque[_Answers] = deque()  # calls to take up before the next step
        self._left: deque[_Answers] = deque()  # calls to cancel before the next step
        self._jobs: deque[tuple[Future[Any], Slices[Any]]] = deque()  # the first one has the turn
        self._schedulers: dict[Engine, Scheduler] = {}
        self._answers: dict[tuple[Engine, int], tuple[_Answers, int]] = {}
        self._stopping = self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: It runs already.
        """
        with self._wake:
            if self.alive:
                raise RuntimeError("the engine thread runs already")
            self._stopping = self._closed = False
            self._thread = threading.Thread(target=self._main, name="firth-engine", daemon=True)
            self._thread.start()

    def stop(self, seconds: float | None = None) -> None:
        """End the thread after its current step or slice; calls that run or wait get an error.

        Args:
            seconds: Most seconds to wait for the step or slice; None for as long as it takes.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                LOGGER.warning(f"a computation did not end within {seconds:g} seconds: it is given up")
        self._close(ApiError(503, "the server is stopping", code="stopping"))

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def running(self) -> int:
        """The number of answers that are decoded or wait for it."""
        return len(self._answers)

    async def run(self, job: Callable[[], T]) -> T:
        """Run a function in the thread, as one slice, and return its result; what it raises is raised here."""
        return await self.run_slices(_whole(job))

    async def run_slices(self, job: Slices[T]) -> T:
        """Run a job in slices and return its result; what it raises is raised here.

        If the caller is cancelled, the job ends after its slice.

        Raises:
            ApiError: The thread has stopped.
        """
        future: Future[T] = Future()
        self._put(self._jobs, (future, job))
        return await asyncio.wrap_future(future)

    @asynccontextmanager
    async def generate(
        self, engine: Engine, requests: Sequence[GenerationRequest]
    ) -> AsyncIterator[AsyncIterator[tuple[int, Update]]]:
        """Decode answers; inside the context, iterate over (index of the request, what a step did to it).

        Leaving the context cancels the answers that are not finished.

        Raises:
            ApiError: The thread has stopped.
            Exception: In the iteration, what a constraint of these requests raised.
            UserError: In the iteration, where a prompt is empty or longer than the context.
        """
        answers = _Answers(engine, requests, asyncio.get_running_loop())
        self._put(self._begun, answers)
        try:
            yield answers.events()
        finally:
            if answers.unfinished:
                with contextlib.suppress(ApiError):
                    self._put(self._left, answers)

    def _put(self, queue: deque[Any], item: Any) -> None:
        with self._wake:
            if self._closed:
                raise ApiError(503, "the server computes no more", code="stopping")
            queue.append(item)
            self._wake.notify_all()

    def _main(self) -> None:
        error = ApiError(503, "the server is stopping", code="stopping")
        try:
            with torch.inference_mode():  # jobs take turns: none may leave the mode that another one needs
                self._loop()
        except BaseException as fault:
            LOGGER.warning(f"the engine thread has ended: {type(fault).__name__}: {fault}", exc_info=fault)
            error = ApiError(503, "the engine has failed: start the server again", code="engine_failed")
        finally:
            self._close(error)

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._begun or self._left or self._jobs or self._stopping or self._busy):
                    self._wake.wait()
                if self._stopping:
                    return
                begun, left = [*self._begun], [*self._left]
                job = self._jobs[0] if self._jobs else None
            for answers in begun:
                self._begin(answers)
                self._done_with(self._begun)
            for answers in left:
                self._cancel(answers)
                self._done_with(self._left)
            if job is not None:
                more = _slice(*job)
                with self._wake:
                    if self._jobs and self._jobs[0] is job:
                        self._jobs.rotate(-1) if more else self._jobs.popleft()
            for engine, scheduler in list(self._schedulers.items()):
                if scheduler.busy:
                    self._step(engine, scheduler)

    def _done_with(self, queue: deque[_Answers]) -> None:
        """Drop the first call of a queue, which keeps it until then so that no call is lost if the thread ends."""
        with self._wake:
            if not self._closed:
                queue.popleft()

    @property
    def _busy(self) -> bool:
        return any(scheduler.busy for scheduler in self._schedulers.values())

    def _close(self, error: Exception) -> None:
        """Take nothing more, and raise an error in every call that runs or waits."""
        with self._wake:
            self._closed = True
            waiting, jobs = {*self._begun, *(answers for answers, _ in self._answers.values())}, [*self._jobs]
            self._begun.clear()
            self._left.clear()
            self._jobs.clear()
            self._answers, self._schedulers = {}, {}
        for answers in waiting:
            answers.send([error])
        for future, _ in jobs:
            _resolve(future, error=error)

    def _begin(self, answers: _Answers) -> None:
        """Hand the requests of a call to the scheduler of their model."""
        engine = answers.engine
        try:
            if engine not in self._schedulers:
                self._schedulers[engine] = Scheduler(engine, max_rows=self.max_rows)
            for i, request in enumerate(answers.requests):
                id = self._schedulers[engine].submit(request)
                answers.ids.append(id)
                self._answers[engine, id] = answers, i
        except BaseException as error:  # the caller raises it
            if not isinstance(error, UserError):
                LOGGER.warning(f"a request failed: {type(error).__name__}: {error}", exc_info=error)
            self._fail(answers, _ordinary(error))

    def _fail(self, answers: _Answers, error: Exception) -> None:
        """End the answers of a call with an error."""
        self._cancel(answers)
        answers.send([error])

    def _cancel(self, answers: _Answers) -> None:
        for id in answers.ids:
            if self._answers.pop((answers.engine, id), None) is not None:
                self._schedulers[answers.engine].cancel(id)

    def _step(self, engine: Engine, scheduler: Scheduler) -> None:
        """Take one step of a model and send every call what became of its answers."""
        try:
            updates = scheduler.step()
        except BaseException as error:
            LOGGER.warning(f"decoding failed: {type(error).__name__}: {error}", exc_info=error)
            self._schedulers.pop(engine, None)
            failed = {answers for (its, _), (answers, _) in self._answers.items() if its is engine}
            self._answers = {key: found for key, found in self._answers.items() if found[0] not in failed}
            for answers in failed:
                answers.send([_ordinary(error)])
            return
        events: dict[_Answers, list[Event]] = {}
        for update in updates:
            found = self._answers.get((engine, update.id))
            if found is None:
                continue
            answers, i = found
            constraint = answers.requests[i].constraint
            if isinstance(constraint, _Guarded) and constraint.error is not None:
                self._fail(answers, constraint.error)
                events.pop(answers, None)
                continue
            events.setdefault(answers, []).append((i, update))
            if update.completion is not None:
                del self._answers[engine, update.id]
        for answers, some in events.items():
            answers.send(some)


class _Guarded:
    """A constraint whose exception ends its own call alone: from then on it allows no token.

    Args:
        constraint: The constraint.
    """

    def __init__(self, constraint: TokenConstraint) -> None:
        self.constraint = constraint
        self.error: Exception | None = None

    def mask(self, tokens: Sequence[int]) -> np.ndarray:
        if self.error is None:
            try:
                return self.constraint.mask(tokens)
            except BaseException as error:
                if not isinstance(error, Exception):
                    LOGGER.warning(f"a library panicked: {error}", exc_info=error)
                self.error = _ordinary(error)
        return np.zeros(0, bool)

    def accept(self, token: int) -> None:
        if self.error is None:
            try:
                self.constraint.accept(token)
            except BaseException as error:
                if not isinstance(error, Exception):
                    LOGGER.warning(f"a library panicked: {error}", exc_info=error)
                self.error = _ordinary(error)


class _Answers:
    """The answers of one call, and the queue by which the event loop hears of them."""

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest], loop: asyncio.AbstractEventLoop) -> None:
        self.engine, self.loop = engine, loop
        self.requests = [
            one if one.constraint is None else replace(one, constraint=_Guarded(one.constraint)) for one in requests
        ]
        self.ids: list[int] = []  # of the scheduler; only the thread uses them
        self.queue: asyncio.Queue[list[Event]] = asyncio.Queue()
        self.unfinished = len(requests)

    def send(self, events: list[Event]) -> None:
        """Send events from the thread to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.queue.put_nowait, events)

    async def events(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield what the steps did until all answers are finished."""
        while self.unfinished:
            for event in await self.queue.get():
                if isinstance(event, Exception):
                    self.unfinished = 0
                    raise event
                self.unfinished -= event[1].completion is not None
                yield event


def _whole(job: Callable[[], T]) -> Slices[T]:
    """Return a job of one slice."""
    yield from ()
    return job()


def _slice(future: Future[Any], job: Slices[Any]) -> bool:
    """Run the next slice of a job; return whether there is more."""
    try:
        if future.cancelled():  # its caller has left
            job.close()
            return False
        next(job)
        return True
    except StopIteration as end:
        _resolve(future, end.value)
    except BaseException as error:
        if not isinstance(error, Exception):
            LOGGER.warning(f"a library panicked: {error}", exc_info=error)
        _resolve(future, error=_ordinary(error))
    return False


def _resolve(future: Future[Any], result: Any = None, error: Exception | None = None) -> None:
    """Give a future its result or its error, unless it has been cancelled."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _ordinary(error: BaseException) -> Exception:
    """Return an error that the event loop can raise: SystemExit and a panic of a library would end it."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
