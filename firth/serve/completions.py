"""`/v1/completions` and `/v1/chat/completions`: OpenAI's requests for text.

A request becomes prompts of token ids, and `n` answers to each are decoded together with those of other requests. Choice i of
prompt p has index p * n + i and seed `seed + index`, so that a seed gives the same text in any company.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from firth.fields import MAX_INT
from firth.generate.sampling import Sampling
from firth.generate.scheduler import GenerationRequest, Update
from firth.generate.scoring import ScoredPair, TokenScores, score_slices
from firth.generate.slices import Slices
from firth.serve.config import ServeLimits
from firth.serve.operations import SLICE_TOKENS, Context, batches
from firth.serve.registry import Offsets, ServedModel
from firth.serve.responses import ApiError, EventStream
from firth.serve.schemas import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    FinishReason,
    SamplingRequest,
    TextFormat,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from firth.serve.structured import GrammarConstraint
from firth.tokenizer import chat

GREEDY_TEMPERATURE = 1e-4
"""Lower temperatures take the most likely token: the logits divided by them would overflow."""
MIN_TOP_P = 1e-9
"""For a `top_p` of 0: the most likely token alone."""
MIN_LOGPROB = -9999.0
"""The log-probability that JSON shows for a probability of 0, as OpenAI's server does."""


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """A prompt.

    Args:
        ids: Token ids as the model reads them, (n,).
        own: How many of them, at the end, are the request's and not a token that starts a text.
        text: Its text; None for a prompt of token ids.
    """

    ids: np.ndarray
    own: int
    text: str | None


@dataclass
class Answer:
    """An answer while it is decoded.

    Args:
        index: Its index among the choices.
        updates: Its tokens, with the end-of-text token.
        offsets: Where its next token starts in the text of the choice.
        finish: Why it ended; None while it is decoded.
    """

    index: int
    offsets: Offsets
    updates: list[Update] = field(default_factory=list)
    finish: FinishReason | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(update.text for update in self.updates)

    def add(self, update: Update) -> None:
        """Add what a step did."""
        self.updates.append(update)
        if update.completion is not None:
            self.finish = "stop" if update.completion.finish == "stop" else "length"


@dataclass(frozen=True, eq=False)
class Job:
    """A request for text, ready to be decoded.

    Args:
        served: The model.
        prompts: The prompts.
        requests: The answers to decode, `n` for each prompt.
        n: Answers to each prompt.
    """

    served: ServedModel
    prompts: Sequence[PromptTokens]
    requests: Sequence[GenerationRequest]
    n: int

    def usage(self, answers: Sequence[Answer]) -> Usage:
        """Return the numbers of tokens: a prompt counts once, however many answers it has."""
        prompt = sum(len(one.ids) for one in self.prompts)
        completion = sum(len(answer.updates) for answer in answers)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


# ------------------------------------------------------------------------------- from a request to a job


async def prepare(
    context: Context, body: SamplingRequest, served: ServedModel, prompts: Sequence[PromptTokens], max_tokens: int | None,
    top: int,
) -> Job:  # fmt: skip
    """Check a request against the limits and return its job.

    Args:
        context: The limits.
        body: The request.
        served: Its model.
        prompts: Its prompts.
        max_tokens: Most tokens of an answer, 0 for none; None for what fits.
        top: Most likely tokens per token.
    """
    limits, engine = context.limits, served.model.engine
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    check_limit("stop", len(stop), limits.max_stop_strings, "stop strings")
    check_limit("stop", max(map(len, stop), default=0), limits.max_stop_characters, "characters in a stop string")
    check_limit("n", body.n * len(prompts), limits.max_choices, "answers")
    check_limit("logprobs", top, limits.max_logprobs, "alternatives per token")
    for prompt in prompts:
        check_prompt(served, prompt, limits, room=max_tokens != 0)
        context.check_pass(served, len(prompt.ids), "prompt", in_chunks=True)
    constraint = await constraint_of(context, served, body)
    seed = secrets.randbits(31) if body.seed is None else body.seed % MAX_INT
    requests = []
    for p, prompt in enumerate(prompts if max_tokens != 0 else ()):
        longest = min(limits.max_new_tokens, engine.room(prompt.ids), max_tokens or limits.max_new_tokens)
        sampling = Sampling(
            max_new_tokens=longest, temperature=body.temperature if body.temperature >= GREEDY_TEMPERATURE else 0.0,
            top_k=body.top_k, top_p=max(body.top_p, MIN_TOP_P), min_p=body.min_p,
            repetition_penalty=body.repetition_penalty, stop_strings=stop,
        )  # fmt: skip
        for i in range(body.n):
            own = None if constraint is None else constraint.copy()
            number = (seed + p * body.n + i) % MAX_INT
            requests.append(GenerationRequest(prompt.ids, sampling, number, min(top, _vocab_size(served)), own))
    return Job(served, prompts, requests, body.n)


def check_limit(param: str, found: int, most: int, what: str) -> None:
    """Raise an ApiError if a request has more of something than the server allows."""
    if found > most:
        raise ApiError(400, f"{param}: {found:,} {what}, of at most {most:,}", param=param, code="limit_exceeded")


def check_prompt(served: ServedModel, prompt: PromptTokens, limits: ServeLimits, room: bool = True) -> None:
    """Raise an ApiError if a prompt is empty, longer than allowed, or leaves no room for an answer."""
    most = most_tokens(served, limits)
    if not len(prompt.ids):
        raise ApiError(400, "the prompt is empty: give at least one token", param="prompt", code="invalid_value")
    if len(prompt.ids) > most or (room and not served.model.engine.room(prompt.ids)):
        raise ApiError(
            400, f"the prompt has {len(prompt.ids):,} tokens, and this server reads at most {most:,} for {served.name}",
            param="prompt", code="context_length_exceeded",
        )  # fmt: skip


async def constraint_of(context: Context, served: ServedModel, body: SamplingRequest) -> GrammarConstraint | None:
    """Return the constraint of `response_format`; None for plain text."""
    wanted = body.response_format
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    return await asyncio.to_thread(lambda: served.grammars.compile(wanted, context.limits))


def _vocab_size(served: ServedModel) -> int:
    return len(served.model.tokenizer.vocab.ordinary)


def text_prompt(served: ServedModel, text: str) -> PromptTokens:
    """Return a text as a prompt, with the tokens that its family needs."""
    ids = served.model.tokenizer.encode(text)
    framed = served.local.framed(ids)
    if not len(framed):  # a model without bos cannot read an empty text
        roles = served.model.tokenizer.vocab.roles
        start = roles.get("bos", roles.get("eos"))
        framed = framed if start is None else np.array([start], np.int32)
    return PromptTokens(framed, len(ids), text)


def token_prompt(served: ServedModel, ids: Sequence[int]) -> PromptTokens:
    """Return token ids as a prompt."""
    size = served.model.tokenizer.vocab.size
    if any(id >= size for id in ids):
        raise ApiError(
            400, f"prompt: this model has the token ids 0 to {size - 1}", param="prompt", code="invalid_value"
        )
    return PromptTokens(np.array(ids, np.int32), len(ids), None)


async def completion_prompts(served: ServedModel, body: CompletionRequest, limits: ServeLimits) -> list[PromptTokens]:
    """Return the prompts of a request of `/v1/completions`."""
    given: Any = body.prompt
    several = isinstance(given, list) and (not given or not isinstance(given[0], int))
    prompts: list[str | list[int]] = given if several else [given]
    if not prompts:
        raise ApiError(400, "prompt: give at least one", param="prompt", code="invalid_value")
    check_limit("prompt", len(prompts), limits.max_prompts, "prompts")

    for one in prompts:
        if isinstance(one, str):
            served.check_characters(one, most_tokens(served, limits), "prompt")

    def encode() -> list[PromptTokens]:
        return [text_prompt(served, one) if isinstance(one, str) else token_prompt(served, one) for one in prompts]

    return await asyncio.to_thread(encode)


def most_tokens(served: ServedModel, limits: ServeLimits) -> int:
    """Return the most tokens of a prompt."""
    context = served.model.model.context
    return min(context, limits.max_prompt_tokens or context)


# ------------------------------------------------------------------------------- decoding


async def decode(context: Context, job: Job, offsets: Sequence[int]) -> AsyncGenerator[tuple[Answer, Update], None]:
    """Yield each answer and what a step did to it.

    Args:
        context: The thread.
        job: The job.
        offsets: Where the first token of each answer starts in the text of its choice.
    """
    answers = [Answer(i, Offsets(job.served.texts, offset)) for i, offset in enumerate(offsets)]
    if not answers:
        return
    async with context.models.thread.generate(job.served.model.engine, job.requests) as events:
        async for i, update in events:
            answers[i].add(update)
            yield answers[i], update


async def decode_all(context: Context, job: Job, offsets: Sequence[int]) -> list[Answer]:
    """Return the finished answers."""
    answers = {answer.index: answer async for answer, _ in decode(context, job, offsets)}
    return [answers[i] for i in range(len(job.requests))]


def shown(served: ServedModel, updates: Sequence[Update]) -> list[Update]:
    """Return the tokens that are a part of the text of an answer: without the token that ended it."""
    return [one for one in updates if one.completion is None or one.token not in served.model.engine.stops]


# ------------------------------------------------------------------------------- completions


async def complete(context: Context, body: CompletionRequest) -> CompletionResponse | EventStream:
    """Answer a request of `/v1/completions`."""
    served = context.models.get(body.model)
    served.require("completions")
    if body.echo and served.local.mode != "causal":
        raise ApiError(
            400, f"echo: {served.name} is an encoder-decoder, which gives its prompt no probability", param="echo"
        )
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens: 0 needs echo", param="max_tokens", code="invalid_value")
    prompts = await completion_prompts(served, body, context.limits)
    job = await prepare(context, body, served, prompts, body.max_tokens, body.logprobs or 0)
    echoed = await echo(context, job, body) if body.echo else [EMPTY_ECHO] * len(prompts)
    offsets = [len(echoed[i // body.n].text) for i in range(len(job.requests))]
    head: dict[str, Any] = {"id": new_id("cmpl"), "created": int(time.time()), "model": served.name}
    if body.stream:
        return EventStream(_completion_events(context, job, body, echoed, offsets, head), context.limits)
    answers = await decode_all(context, job, offsets) or [
        Answer(i, Offsets(served.texts), finish="length") for i in range(len(prompts) * body.n)
    ]
    choices = []
    for answer in answers:
        start = echoed[answer.index // body.n]
        logprobs = None
        if body.logprobs is not None:
            logprobs = join(start.logprobs, completion_logprobs(served, answer.offsets, answer.updates, body.logprobs))
        choices.append(
            CompletionChoice(
                index=answer.index, text=start.text + answer.text, logprobs=logprobs, finish_reason=answer.finish
            )
        )
    return CompletionResponse(**head, choices=choices, usage=job.usage(answers))


async def _completion_events(
    context: Context, job: Job, body: CompletionRequest, echoed: Sequence[Echo], offsets: Sequence[int], head: dict[str, Any]
) -> AsyncGenerator[CompletionResponse, None]:  # fmt: skip
    def event(
        index: int, text: str, logprobs: CompletionLogprobs | None, finish: FinishReason | None
    ) -> CompletionResponse:
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)
        return CompletionResponse(**head, choices=[choice])

    answers: dict[int, Answer] = {}
    if body.echo:
        for i in range(len(job.prompts) * body.n):
            start = echoed[i // body.n]
            yield event(i, start.text, start.logprobs, "length" if body.max_tokens == 0 else None)
    async for answer, update in decode(context, job, offsets):
        answers[answer.index] = answer
        logprobs = None
        if body.logprobs is not None:
            logprobs = completion_logprobs(job.served, answer.offsets, [update], body.logprobs)
        if update.text or answer.finish or (logprobs is not None and logprobs.tokens):
            yield event(answer.index, update.text, logprobs, answer.finish)
    if body.stream_options is not None and body.stream_options.include_usage:
        yield CompletionResponse(**head, choices=[], usage=job.usage([*answers.values()]))


@dataclass(frozen=True)
class Echo:
    """A prompt as it is repeated.

    Args:
        text: Its text.
        logprobs: Its tokens, if log-probabilities are wanted.
    """

    text: str
    logprobs: CompletionLogprobs | None


EMPTY_ECHO = Echo("", None)


async def echo(context: Context, job: Job, body: CompletionRequest) -> list[Echo]:
    """Return the text of each prompt and the log-probability of each of its tokens, as `firth evaluate` scores it.

    The first token has one only if the model reads a token before every text.
    """
    served, texts = job.served, job.served.texts
    top = min(body.logprobs or 0, _vocab_size(served))
    written = [texts.joined(prompt.ids) if prompt.text is None else prompt.text for prompt in job.prompts]
    if body.logprobs is None:
        return [Echo(text, None) for text in written]
    splits = [max(1, len(prompt.ids) - prompt.own) for prompt in job.prompts]
    pairs = {
        p: ScoredPair(prompt.ids[:at], prompt.ids[at:])
        for p, (prompt, at) in enumerate(zip(job.prompts, splits, strict=True))
        if len(prompt.ids) > at
    }
    vocab = served.model.evaluated.vocab

    def score() -> Slices[dict[int, TokenScores]]:
        found = {}
        for some in batches([*pairs], [len(job.prompts[p].ids) for p in pairs]):
            for scored in score_slices(served.model.model, vocab, [pairs[p] for p in some], top, SLICE_TOKENS):
                found.update({some[k]: scores for k, scores in scored})
                yield
        return found

    scores = await context.models.thread.run_slices(score()) if pairs else {}
    out = []
    for p, prompt in enumerate(job.prompts):
        ids = [int(id) for id in prompt.ids[len(prompt.ids) - prompt.own :]]
        mine = scores.get(p)
        scored = 0 if mine is None else len(mine.logprobs)
        values: list[float | None] = [None] * (len(ids) - scored)
        tops: list[dict[str, float] | None] = [None] * (len(ids) - scored)
        if mine is not None:
            values += [at_least(value) for value in mine.logprobs]
            best = zip(mine.top_ids.tolist(), mine.top_logprobs.tolist(), strict=True)
            tops += [top_dict(served, zip(*one, strict=True)) for one in best]
        logprobs = CompletionLogprobs(
            tokens=[texts.text(id) for id in ids], token_logprobs=values, top_logprobs=tops if body.logprobs else None,
            text_offset=texts.prompt_offsets(prompt.text, ids),
        )  # fmt: skip
        out.append(Echo(written[p], logprobs))
    return out


def completion_logprobs(
    served: ServedModel, offsets: Offsets, updates: Sequence[Update], top: int
) -> CompletionLogprobs:
    """Return the log-probabilities of the next tokens of an answer.

    Args:
        served: The model.
        offsets: Where the next token starts.
        updates: The tokens; those that are not shown are left out.
        top: Most likely tokens per token; 0 for none.
    """
    some = shown(served, updates)
    return CompletionLogprobs(
        tokens=[served.texts.text(update.token) for update in some],
        token_logprobs=[at_least(update.logprob) for update in some],
        top_logprobs=[top_dict(served, update.alternatives) for update in some] if top else None,
        text_offset=[offsets.next(update.token) for update in some],
    )


def join(first: CompletionLogprobs | None, second: CompletionLogprobs) -> CompletionLogprobs:
    """Return the log-probabilities of a prompt and of its answer in one."""
    if first is None:
        return second
    tops = None if first.top_logprobs is None else first.top_logprobs + (second.top_logprobs or [])
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens, token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=tops, text_offset=first.text_offset + second.text_offset,
    )  # fmt: skip


def top_dict(served: ServedModel, alternatives: Any) -> dict[str, float]:
    """Return text -> log-probability of alternatives; of tokens with one text, the most likely."""
    found: dict[str, float] = {}
    for id, logprob in alternatives:
        found.setdefault(served.texts.text(id), at_least(logprob))
    return found


def at_least(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return max(MIN_LOGPROB, float(logprob))


def new_id(prefix: str) -> str:
    """Return an id for a response."""
    return f"{prefix}-{secrets.token_hex(12)}"


# ------------------------------------------------------------------------------- chat


async def chat_complete(context: Context, body: ChatRequest) -> ChatResponse | EventStream:
    """Answer a request of `/v1/chat/completions`."""
    served = context.models.get(body.model)
    served.require("chat")
    check_limit("messages", len(body.messages), context.limits.max_messages, "messages")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs: it needs logprobs", param="top_logprobs", code="invalid_value")
    messages = [one.as_message for one in body.messages]
    served.check_characters(
        "".join(one["content"] for one in messages), most_tokens(served, context.limits), "messages"
    )
    ids, _ = await asyncio.to_thread(chat.encode, served.model.tokenizer, messages, True)
    prompt = PromptTokens(ids, len(ids), None)
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    job = await prepare(context, body, served, [prompt], most, body.top_logprobs or 0)
    offsets = [0] * len(job.requests)
    head: dict[str, Any] = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": served.name}
    if body.stream:
        return EventStream(_chat_events(context, job, body, offsets, head), context.limits)
    answers = await decode_all(context, job, offsets)
    choices = []
    for answer in answers:
        assert answer.finish is not None
        logprobs = chat_logprobs(served, answer.updates) if body.logprobs else None
        message = ChatAnswer(content=answer.text)
        choices.append(ChatChoice(index=answer.index, message=message, logprobs=logprobs, finish_reason=answer.finish))
    return ChatResponse(**head, choices=choices, usage=job.usage(answers))


async def _chat_events(
    context: Context, job: Job, body: ChatRequest, offsets: Sequence[int], head: dict[str, Any]
) -> AsyncGenerator[ChatChunk, None]:
    def event(
        index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, finish: FinishReason | None = None
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**head, choices=[choice])

    for i in range(body.n):
        yield event(i, ChatDelta(role="assistant", content=""))
    answers: dict[int, Answer] = {}
    async for answer, update in decode(context, job, offsets):
        answers[answer.index] = answer
        logprobs = None
        if body.logprobs:
            logprobs = chat_logprobs(job.served, [update])
        if update.text or answer.finish or (logprobs is not None and logprobs.content):
            delta = ChatDelta(content=update.text) if update.text else ChatDelta()
            yield event(answer.index, delta, logprobs, answer.finish)
    if body.stream_options is not None and body.stream_options.include_usage:
        yield ChatChunk(**head, choices=[], usage=job.usage([*answers.values()]))


def chat_logprobs(served: ServedModel, updates: Sequence[Update]) -> ChatLogprobs:
    """Return the log-probabilities of the tokens that are shown."""
    content = []
    for update in shown(served, updates):
        own = top_logprob(served, update.token, update.logprob)
        tops = [top_logprob(served, id, logprob) for id, logprob in update.alternatives]
        content.append(TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=tops))
    return ChatLogprobs(content=content)


def top_logprob(served: ServedModel, id: int, logprob: float) -> TopLogprob:
    """Return a token with its log-probability."""
    return TopLogprob(token=served.texts.text(id), logprob=at_least(logprob), bytes=list(served.texts.bytes_of(id)))
