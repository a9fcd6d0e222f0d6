"""Routes of firth's own (gaps, predictions, scores, rewards, attention), and embeddings: each calls what the command of its name calls."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from firth.data.conversations import messages_of
from firth.evaluate.prompting.requests import ScoreRequest
from firth.evaluate.tasks.preferences import dialogue_rewards
from firth.generate import embeddings
from firth.generate.attention_maps import AttentionMap
from firth.generate.scoring import ScoredPair, TokenScores
from firth.generate.slices import Slices
from firth.runs.loaded_model import trained_length
from firth.serve.completions import at_least, check_limit
from firth.serve.operations import SLICE_TOKENS, Context, Handler, batches, tokenizing
from firth.serve.registry import ServedModel
from firth.serve.responses import ApiError
from firth.serve.schemas import (
    Alternative,
    AttentionRequest,
    AttentionResponse,
    AttentionWeights,
    EmbeddingEntry,
    EmbeddingRequest,
    EmbeddingResponse,
    EmbeddingUsage,
    FillCandidate,
    FillRequest,
    FillResponse,
    PredictRequest,
    PredictResponse,
    RewardRequest,
    RewardResponse,
    RewardRow,
    ScoredToken,
    ScoreRequestBody,
    ScoreResponse,
    TokenEntry,
    TokenizeRequest,
    TokenizeResponse,
)
from firth.types import UserError

T = TypeVar("T")
SLICE_CHARACTERS = 2048
"""Most characters of the records that are read and tokenized together, unless one is longer."""


async def embed(context: Context, body: EmbeddingRequest) -> BaseModel:
    """Return the mean of the hidden states of each text, at length 1, as `firth embed` does."""
    served = context.models.get(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts:
        raise ApiError(400, "input: give at least one text", param="input", code="invalid_value")
    check_limit("input", len(texts), context.limits.max_prompts, "texts")
    evaluated = served.model.evaluated
    model, tokenizer, longest = evaluated.model, evaluated.tokenizer, trained_length(evaluated)

    def too_long(i: int) -> ApiError:
        return ApiError(
            400, f"input.{i}: this text is longer than the {longest:,} tokens that the model reads", param="input",
            code="context_length_exceeded",
        )  # fmt: skip

    for i, text in enumerate(texts):
        if served.exceeds(text, longest):
            raise too_long(i)
    encoded = await tokenizing(sum(map(len, texts)), lambda: tokenizer.encode_batch(texts))
    counts = [len(ids) for ids in encoded]
    context.check_pass(served, max(counts), "input", in_chunks=True)
    job = embeddings.embed_slices(model, tokenizer, texts, length=longest, max_tokens=SLICE_TOKENS)
    vectors, truncated = await context.models.thread.run_slices(job)
    if truncated:
        raise too_long(truncated[0])
    data = [
        EmbeddingEntry(
            index=i,
            embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if body.encoding_format == "base64"
            else vector.tolist(),
        )
        for i, vector in enumerate(vectors)
    ]
    usage = EmbeddingUsage(prompt_tokens=sum(counts), total_tokens=sum(counts))
    return EmbeddingResponse(model=served.name, data=data, usage=usage)


async def fill(context: Context, body: FillRequest) -> BaseModel:
    """Return candidates for the gaps of a text, as `firth fill` does."""
    served = context.models.get(body.model)
    served.require("fill")
    await check_length(context, served, body.text)
    model = served.model.with_lm_head()
    found = await context.models.thread.run_slices(model.candidate_slices(body.text, body.top))
    if isinstance(found, str):
        return FillResponse(model=served.name, gaps=[], text=found)
    gaps = [
        [
            FillCandidate(
                text=served.texts.text(one.token) if model.fills_tokens else one.piece, probability=one.probability
            )
            for one in gap
        ]
        for gap in found
    ]
    return FillResponse(model=served.name, gaps=gaps)


async def check_length(context: Context, served: ServedModel, text: str, in_chunks: bool = False) -> None:
    """Raise an ApiError if a text has more tokens than its model reads, or reads in one pass.

    Args:
        context: The limits.
        served: The model.
        text: The text.
        in_chunks: Whether a decoder reads it in chunks.
    """
    longest = served.model.evaluated.model.context
    served.check_characters(text, longest, "text")
    count = len(await tokenizing(len(text), lambda: served.model.tokenizer.encode(text)))
    if count > longest:
        raise ApiError(
            400, f"the text has {count:,} tokens, and {served.name} reads at most {longest:,}", param="text",
            code="context_length_exceeded",
        )  # fmt: skip
    context.check_pass(served, count, "text", in_chunks)


def predict_with(capability: str) -> Handler:
    """Return the handler of a route that predicts with the task head of a model, as `firth predict` does."""

    async def handler(context: Context, body: PredictRequest) -> BaseModel:
        served = context.models.get(body.model)
        served.require(capability)
        check_limit("records", len(body.records), context.limits.max_records, "records")
        rows = await run_records(
            context, body.records, lambda records: served.model.predict_slices(records, SLICE_TOKENS)
        )
        return PredictResponse(model=served.name, rows=rows)

    return handler


async def run_records(context: Context, records: Sequence[Any], job: Callable[[Any], Slices[list[T]]]) -> list[T]:
    """Run a job in slices on records, some at a time; its errors name the record of the request and no file."""

    def slices() -> Slices[list[T]]:
        rows: list[T] = []
        for some in batches(records, [len(str(record)) for record in records], SLICE_CHARACTERS):
            try:
                rows += yield from job(some)
            except UserError as error:
                raise ApiError(
                    400, _of_records(str(error), len(rows)), param="records", code="invalid_value"
                ) from error
            yield
        return rows

    return await context.models.thread.run_slices(slices())


def _of_records(message: str, before: int) -> str:
    """Return an error about a batch with the numbers of the records in the request.

    >>> _of_records("standard input:2: the field is missing", 8)
    'record 10: the field is missing'
    """
    message = re.sub(r"standard input:(\d+)", lambda found: f"record {int(found[1]) + before}", message)
    message = re.sub(r"^dialogue (\d+)", lambda found: f"record {int(found[1]) + before + 1}", message)
    return message.replace("standard input", "records")


async def score(context: Context, body: ScoreRequestBody) -> BaseModel:
    """Return the log-probability of each token of a text, as `firth evaluate` scores it."""
    served = context.models.get(body.model)
    served.require("score")
    check_limit("top", body.top, context.limits.max_logprobs, "alternatives per token")
    await check_length(context, served, body.prompt + body.text, in_chunks=True)
    local, texts = served.local, served.texts
    wanted = ScoreRequest(body.prompt, body.text)
    if not len(served.model.tokenizer.encode(body.text)):
        raise ApiError(400, "text: it has no token", param="text", code="invalid_value")
    top = min(body.top, len(served.model.tokenizer.vocab.ordinary))

    def job() -> Slices[tuple[ScoredPair, TokenScores]]:
        local.check([wanted])
        found = []
        for some in local.score_slices([wanted], top, SLICE_TOKENS):
            found += some
            yield
        [(_, pair, scores)] = found
        return pair, scores

    pair, scores = await context.models.thread.run_slices(job())
    tokens = []
    missing = served.model.tokenizer.encode(body.prompt + body.text).size - pair.prompt.size - pair.continuation.size
    if local.mode == "causal" and not body.prompt and missing == 0 and pair.prompt.size:
        first = int(pair.prompt[0])  # this decoder reads no token before a text
        tokens.append(ScoredToken(text=texts.text(first), id=first, logprob=None, top=[]))
    for k, id in enumerate(pair.continuation.tolist()):
        best = zip(scores.top_ids[k].tolist(), scores.top_logprobs[k].tolist(), strict=True)
        alternatives = [Alternative(text=texts.text(other), logprob=at_least(value)) for other, value in best]
        tokens.append(ScoredToken(text=texts.text(id), id=id, logprob=at_least(scores.logprobs[k]), top=alternatives))
    return ScoreResponse(model=served.name, logprob=at_least(scores.total), mode=local.mode, tokens=tokens)


async def tokenize(context: Context, body: TokenizeRequest) -> BaseModel:
    """Return the tokens of a text, without those that the model's family adds."""
    served = context.models.get(body.model)

    def split() -> TokenizeResponse:
        ids, spans = served.model.tokenizer.spans(body.text)
        tokens = [
            TokenEntry(id=id, token=served.texts.text(id), start=start, end=end)
            for id, (start, end) in zip(ids.tolist(), spans.tolist(), strict=True)
        ]
        return TokenizeResponse(model=served.name, tokens=tokens)

    return await tokenizing(len(body.text), split)


async def reward(context: Context, body: RewardRequest) -> BaseModel:
    """Return the reward of the last answer of each dialogue."""
    served = context.models.get(body.model)
    served.require("reward")
    check_limit("records", len(body.records), context.limits.max_records, "records")

    def job(records: Sequence[dict[str, Any]]) -> Slices[list[float]]:
        dialogues = [messages_of(record) for record in records]
        return (yield from dialogue_rewards(served.model.evaluated, dialogues, SLICE_TOKENS))

    rewards = await run_records(context, body.records, job)
    rows = [RewardRow(row=i, reward=value) for i, value in enumerate(rewards, 1)]
    return RewardResponse(model=served.name, rows=rows)


async def attention(context: Context, body: AttentionRequest) -> BaseModel:
    """Return the attention weights of a text (`firth.generate.attention_maps`)."""
    served = context.models.get(body.model)
    encoded = body.encoding_format == "base64"

    def response(found: Sequence[AttentionMap]) -> AttentionResponse:
        maps = [
            AttentionWeights(
                kind=one.kind, queries=list(one.queries), keys=list(one.keys), shape=list(one.weights.shape),
                weights=base64.b64encode(one.weights.tobytes()).decode() if encoded else one.weights.tolist(),
            )
            for one in found
        ]  # fmt: skip
        return AttentionResponse(model=served.name, maps=maps)

    for text in (body.text, body.answer or ""):
        await check_length(context, served, text)
    found = await context.models.thread.run_slices(served.model.attention_slices(body.text, body.answer))
    return await asyncio.to_thread(response, found)
