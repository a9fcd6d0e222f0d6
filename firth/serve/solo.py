"""A scheduler that decodes every request in a batch of its own, with the interface of `firth.generate.scheduler`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from firth.generate.decoding_batch import DecodingBatch, inference_mode
from firth.generate.engine import Completion, Engine, StreamingOutput
from firth.generate.sampling import Sampling
from firth.types import UserError


@dataclass(frozen=True, eq=False)
class _GenerationRequest:
    prompt: np.ndarray
    sampling: Sampling
    seed: int = 0
    top_logprobs: int = 0
    constraint: Any = None


@dataclass(frozen=True)
class _Update:
    id: int
    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    text: str
    completion: Completion | None


class _Scheduler:
    def __init__(self, engine: Engine, max_rows: int = 16) -> None:
        self.engine, self.max_rows, self.next = engine, max_rows, 0
        self.waiting: deque[tuple[int, _GenerationRequest]] = deque()
        self.running: dict[int, tuple[DecodingBatch, StreamingOutput, int]] = {}

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: _GenerationRequest) -> int:
        if not len(request.prompt) or not self.engine.room(request.prompt):
            raise UserError("the prompt is empty or too long")
        self.next += 1
        self.waiting.append((self.next, request))
        return self.next

    def cancel(self, id: int) -> None:
        self.running.pop(id, None)
        self.waiting = deque(one for one in self.waiting if one[0] != id)

    def step(self) -> list[_Update]:
        engine, updates = self.engine, []
        with inference_mode(engine.model):
            while self.waiting and len(self.running) < self.max_rows:
                id, request = self.waiting.popleft()
                shown = request.prompt if engine.start is None else request.prompt[:0]
                answer = StreamingOutput(
                    engine.tokenizer, shown, request.sampling, engine.stops, engine.room(request.prompt)
                )
                batch = DecodingBatch(engine.model, [request.prompt], engine.start, request.sampling, [request.seed])
                self.running[id] = batch, answer, request.top_logprobs
            for id, (batch, answer, top) in list(self.running.items()):
                before = len(answer.final_text) if answer.tokens else 0
                [token], [logprob] = batch.step()
                answer.append(token, logprob)
                done = answer.done() if answer.finish else None
                updates.append(
                    _Update(id, token, logprob, ((token, logprob),) * bool(top), answer.final_text[before:], done)
                )
                if done:
                    del self.running[id]
        return updates
