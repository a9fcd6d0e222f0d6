"""The thread that owns all models: every computation of the server runs in it.

Answers are decoded step by step (`firth.generate.scheduler`): all answers of a model advance together, and between two steps
one other job runs (a score, an embedding, a prediction), so that neither waits for the end of the other.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from firth.generate.engine import Engine
from firth.generate.scheduler import GenerationRequest, Scheduler, Update
from firth.types import LOGGER, UserError

T = TypeVar("T")
Event = tuple[int, Update] | BaseException


class EngineThread:
    """One thread that decodes answers and runs jobs.

    A model is used by this thread alone, so that no two computations share a model's state or the CPU's cores.

    Args:
        max_rows: Most answers of a model that are decoded together.
    """

    def __init__(self, max_rows: int = 16) -> None:
        self.max_rows = max_rows
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()  # start and cancel answers, before the next step
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._schedulers: dict[Engine, Scheduler] = {}
        self._answers: dict[tuple[Engine, int], tuple[_Answers, int]] = {}
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="firth-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step or job; what waits is cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for future, _ in self._jobs:
            future.cancel()
        self._jobs.clear()

    @property
    def running(self) -> int:
        """The number of answers that are decoded or wait for it."""
        return len(self._answers)

    async def run(self, job: Callable[[], T]) -> T:
        """Run a function in the thread and return its result; what it raises is raised here."""
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
            UserError: In the iteration, where a prompt is empty or longer than the context.
        """
        answers = _Answers(engine, requests, asyncio.get_running_loop())
        self._put(self._commands, lambda: self._begin(answers))
        try:
            yield answers.events()
        finally:
            if answers.unfinished:
                self._put(self._commands, lambda: self._cancel(answers))

    def _put(self, queue: deque[Any], item: Any) -> None:
        with self._wake:
            queue.append(item)
            self._wake.notify()

    def _begin(self, answers: _Answers) -> None:
        """Hand the requests of a call to the scheduler of their model."""
        engine = answers.engine
        if engine not in self._schedulers:
            self._schedulers[engine] = Scheduler(engine, max_rows=self.max_rows)
        try:
            for i, request in enumerate(answers.requests):
                id = self._schedulers[engine].submit(request)
                answers.ids.append(id)
                self._answers[engine, id] = answers, i
        except Exception as error:  # the caller raises it
            if not isinstance(error, UserError):
                LOGGER.warning(f"a request failed: {type(error).__name__}: {error}", exc_info=error)
            self._cancel(answers)
            answers.send([error])

    def _cancel(self, answers: _Answers) -> None:
        for id in answers.ids:
            if self._answers.pop((answers.engine, id), None) is not None:
                self._schedulers[answers.engine].cancel(id)

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._jobs or self._stopping or self._busy):
                    self._wake.wait()
                if self._stopping:
                    break
                commands = list(self._commands)
                self._commands.clear()
                job = self._jobs.popleft() if self._jobs else None
            for command in commands:
                command()
            if job is not None:
                self._run_job(*job)
            for engine, scheduler in list(self._schedulers.items()):
                if scheduler.busy:
                    self._step(engine, scheduler)
        self._fail_all(RuntimeError("the server is stopping"))

    @property
    def _busy(self) -> bool:
        return any(scheduler.busy for scheduler in self._schedulers.values())

    def _run_job(self, future: Future[Any], job: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise

    def _step(self, engine: Engine, scheduler: Scheduler) -> None:
        """Take one step of a model and send every call what became of its answers."""
        try:
            updates = scheduler.step()
        except Exception as error:
            LOGGER.warning(f"decoding failed: {type(error).__name__}: {error}", exc_info=error)
            del self._schedulers[engine]
            self._fail_all(error, engine)
            return
        events: dict[_Answers, list[Event]] = {}
        for update in updates:
            found = self._answers.get((engine, update.id))
            if found is None:
                continue
            answers, i = found
            events.setdefault(answers, []).append((i, update))
            if update.completion is not None:
                del self._answers[engine, update.id]
        for answers, some in events.items():
            answers.send(some)

    def _fail_all(self, error: BaseException, engine: Engine | None = None) -> None:
        """Raise an error in all calls, or in those of one model."""
        failed = {answers for (its, _), (answers, _) in self._answers.items() if engine in (None, its)}
        self._answers = {key: found for key, found in self._answers.items() if found[0] not in failed}
        for answers in failed:
            answers.send([error])


class _Answers:
    """The answers of one call, and the queue by which the event loop hears of them."""

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest], loop: asyncio.AbstractEventLoop) -> None:
        self.engine, self.requests, self.loop = engine, requests, loop
        self.ids: list[int] = []  # of the scheduler; only the thread uses them
        self.queue: asyncio.Queue[list[Event]] = asyncio.Queue()
        self.unfinished = len(requests)

    def send(self, events: list[Event]) -> None:
        """Send events from the thread to the event loop."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, events)

    async def events(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield what the steps did until all answers are finished."""
        while self.unfinished:
            for event in await self.queue.get():
                if isinstance(event, BaseException):
                    self.unfinished = 0
                    raise event
                self.unfinished -= event[1].completion is not None
                yield event
