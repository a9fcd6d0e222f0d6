"""`/attention`: the weights of a text by layer and head."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

from pydantic import BaseModel

from firth.generate.attention_maps import AttentionMap
from firth.serve.operations import Context
from firth.serve.schemas import AttentionRequest, AttentionResponse, AttentionWeights


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
        served.check_characters(text, served.model.evaluated.model.context, "text")
    found = await context.models.thread.run(lambda: served.model.attention(body.text, body.answer))
    return await asyncio.to_thread(response, found)
