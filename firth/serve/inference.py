"""Routes of firth's own, and embeddings: each calls what the command of its name calls."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import BaseModel

from firth.data.conversations import messages_of
from firth.evaluate.prompting.requests import ScoreRequest
from firth.evaluate.tasks.preferences import dialogue_rewards
from firth.generate import embeddings
from firth.runs.loaded_model import trained_length
from firth.serve.completions import at_least, check_limit
from firth.serve.errors import ApiError
from firth.serve.operations import Context, Handler
from firth.serve.registry import ServedModel
from firth.serve.schemas import (
    Alternative,
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


async def embed(context: Context, body: EmbeddingRequest) -> BaseModel:
    """Return the mean of the hidden states of each text, at length 1, as `firth embed` does."""
    served = context.models.get(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts:
        raise ApiError(400, "input: give at least one text", param="input", code="invalid_value")
    check_limit("input", len(texts), context.limits.max_prompts, "texts")
    evaluated = served.model.evaluated

    def job() -> tuple[np.ndarray, list[int], int]:
        count = sum(len(ids) for ids in evaluated.tokenizer.encode_batch(texts))
        longest = trained_length(evaluated)
        return *embeddings.embed(evaluated.model, evaluated.tokenizer, texts, length=longest), count

    vectors, truncated, count = await context.models.thread.run(job)
    if truncated:
        raise ApiError(
            400, f"input.{truncated[0]}: this text is longer than the {trained_length(evaluated):,} tokens that the model reads",
            param="input", code="context_length_exceeded",
        )  # fmt: skip
    data = [
        EmbeddingEntry(
            index=i,
            embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if body.encoding_format == "base64"
            else vector.tolist(),
        )
        for i, vector in enumerate(vectors)
    ]
    usage = EmbeddingUsage(prompt_tokens=count, total_tokens=count)
    return EmbeddingResponse(model=served.name, data=data, usage=usage)


async def fill(context: Context, body: FillRequest) -> BaseModel:
    """Return candidates for the gaps of a text, as `firth fill` does."""
    served = context.models.get(body.model)
    served.require("fill")
    check_length(served, body.text)
    model = served.model.with_lm_head()
    found = await context.models.thread.run(lambda: model.candidates(body.text, body.top))
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


def check_length(served: ServedModel, text: str) -> None:
    """Raise an ApiError if a text has more tokens than the context of its model."""
    count, context = len(served.model.tokenizer.encode(text)), served.model.evaluated.model.context
    if count > context:
        raise ApiError(
            400, f"the text has {count:,} tokens, and {served.name} reads at most {context:,}", param="text",
            code="context_length_exceeded",
        )  # fmt: skip


def predict_with(capability: str) -> Handler:
    """Return the handler of a route that predicts with the task head of a model, as `firth predict` does."""

    async def handler(context: Context, body: PredictRequest) -> BaseModel:
        served = context.models.get(body.model)
        served.require(capability)
        check_limit("records", len(body.records), context.limits.max_records, "records")
        records: Any = body.records
        rows = await run_records(context, lambda: served.model.predict(records))
        return PredictResponse(model=served.name, rows=rows)

    return handler


async def run_records(context: Context, job: Callable[[], Any]) -> Any:
    """Run a job on records; its errors name the record of the request and no file."""
    try:
        return await context.models.thread.run(job)
    except UserError as error:
        message = re.sub(r"standard input:(\d+)", r"record \1", str(error)).replace("standard input", "records")
        raise ApiError(400, message, param="records", code="invalid_value") from error


async def score(context: Context, body: ScoreRequestBody) -> BaseModel:
    """Return the log-probability of each token of a text, as `firth evaluate` scores it."""
    served = context.models.get(body.model)
    served.require("score")
    check_limit("top", body.top, context.limits.max_logprobs, "alternatives per token")
    check_length(served, body.prompt + body.text)
    local, texts = served.local, served.texts
    wanted = ScoreRequest(body.prompt, body.text)
    if not len(served.model.tokenizer.encode(body.text)):
        raise ApiError(400, "text: it has no token", param="text", code="invalid_value")
    top = min(body.top, len(served.model.tokenizer.vocab.ordinary))

    def job() -> Any:
        local.check([wanted])
        [(_, pair, scores)] = local.score([wanted], top)
        return pair, scores

    pair, scores = await context.models.thread.run(job)
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
    ids, spans = served.model.tokenizer.spans(body.text)
    tokens = [
        TokenEntry(id=id, token=served.texts.text(id), start=start, end=end)
        for id, (start, end) in zip(ids.tolist(), spans.tolist(), strict=True)
    ]
    return TokenizeResponse(model=served.name, tokens=tokens)


async def reward(context: Context, body: RewardRequest) -> BaseModel:
    """Return the reward of the last answer of each dialogue."""
    served = context.models.get(body.model)
    served.require("reward")
    check_limit("records", len(body.records), context.limits.max_records, "records")

    def job() -> list[float]:
        return dialogue_rewards(served.model.evaluated, [messages_of(record) for record in body.records])

    rewards = await run_records(context, job)
    rows = [RewardRow(row=i, reward=value) for i, value in enumerate(rewards, 1)]
    return RewardResponse(model=served.name, rows=rows)
