"""`/attention`: the weights of a text by layer and head."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

from pydantic import BaseModel

from firth.generate.attention_maps import AttentionMap
from firth.serve.inference import check_length
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
        await check_length(context, served, text)
    found = await context.models.thread.run_slices(served.model.attention_slices(body.text, body.answer))
    return await asyncio.to_thread(response, found)
