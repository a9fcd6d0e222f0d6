"""Requests and responses as pydantic models: they validate, and the OpenAPI document is generated from them.

The fields of `/v1` are OpenAI's. A field that is not listed is refused by name. A listed field that is not supported takes
its neutral value alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from firth.fields import MAX_INT

MAX_TOKEN_ID = (1 << 31) - 1
MAX_NAME_CHARACTERS = 512

MAX_ITEMS = 1 << 16
"""Most items of any list, as a bound on the work before the limits of the server apply."""

T = TypeVar("T")
Items = Annotated[list[T], Field(max_length=MAX_ITEMS, fail_fast=True)]
"""A list that is refused at its first wrong item."""
Count = Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(max_length=1 << 20, fail_fast=True)]
ModelName = Annotated[
    str | None,
    Field(max_length=MAX_NAME_CHARACTERS, description="The name of a model of this server; the first one by default."),
]
Top = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID, description="Most likely tokens that are returned for each token.")]


class Strict(BaseModel):
    """Base class of requests and their parts: nothing is converted, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Request(Strict):
    """Base class of requests."""

    model: ModelName = None


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = Field(False, description="Whether the last event has the numbers of tokens.")
    include_obfuscation: Literal[False] | None = Field(None, description="Not supported.")


class TextFormat(Strict):
    """Text without constraints."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A JSON schema with a name."""

    name: str = Field(max_length=MAX_NAME_CHARACTERS)
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Strict):
    """Text that a regular expression matches as a whole."""

    type: Literal["regex"]
    pattern: str = Field(min_length=1)


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type")]


def _nullable(schema: dict[str, Any]) -> None:
    schema["type"] = [schema["type"], "null"]


class SamplingRequest(Request):
    """What requests for text have in common. As in OpenAI's API, null means the default."""

    temperature: float = Field(
        1.0, ge=0, le=100, description="0 takes the most likely token.", json_schema_extra=_nullable
    )
    top_p: float = Field(
        1.0, ge=0, le=1, description="Sample from the most likely tokens that together have this probability.",
        json_schema_extra=_nullable,
    )  # fmt: skip
    top_k: int = Field(0, ge=0, le=MAX_TOKEN_ID, description="Sample from the K most likely tokens; 0: all.")
    repetition_penalty: float = Field(
        1.0, ge=0.1, le=10, description="Above 1, tokens already in the text become less likely."
    )
    min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens below this share of the highest probability.")
    n: Count = Field(1, description="Answers to each prompt.", json_schema_extra=_nullable)
    stop: Annotated[str, Field(min_length=1)] | Items[Annotated[str, Field(min_length=1)]] | None = Field(
        None, description="Texts that end the answer and are not part of it."
    )
    seed: int | None = Field(
        None, ge=-MAX_INT, le=MAX_INT, description="The same seed gives the same answer, whatever else is decoded."
    )
    stream: bool = Field(
        False, description="Whether the answer comes in parts, as server-sent events.", json_schema_extra=_nullable
    )
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(
        None, description="`text`, `json_object`, `json_schema`, or `regex` with a `pattern`."
    )
    user: str | None = Field(None, description="Ignored.")
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="Ignored.")
    parallel_tool_calls: bool | None = Field(None, description="Ignored.")
    store: Literal[False] | None = Field(None, description="Not supported.")
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Not supported.")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="Not supported.")
    frequency_penalty: Literal[0] | None = Field(None, description="Not supported.")
    presence_penalty: Literal[0] | None = Field(None, description="Not supported.")
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = Field(None, description="Not supported.")

    @field_validator("temperature", "top_p", "n", "stream", "echo", mode="before", check_fields=False)
    @classmethod
    def _default(cls, value: Any, info: ValidationInfo) -> Any:
        return cls.model_fields[str(info.field_name)].default if value is None else value


class CompletionRequest(SamplingRequest):
    """A request to continue texts."""

    prompt: str | TokenIds | Items[str] | Items[TokenIds] = Field(
        description="A text, several, token ids, or several lists of them. Token ids are used as they are."
    )
    max_tokens: int | None = Field(16, ge=0, le=MAX_TOKEN_ID, description="Lowered to what fits into the context.")
    logprobs: Top | None = None
    echo: bool = Field(
        False, description="Whether the prompt is repeated, with the log-probability of each token.",
        json_schema_extra=_nullable,
    )  # fmt: skip
    best_of: Literal[1] | None = Field(None, description="Not supported.")
    suffix: Literal[""] | None = Field(None, description="Not supported.")

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none_for_false(cls, value: Any) -> Any:
        return None if value is False else value


class ContentPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[ContentPart]
    name: str | None = Field(None, max_length=MAX_NAME_CHARACTERS, description="Ignored.")

    @property
    def as_message(self) -> dict[str, str]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(SamplingRequest):
    """A request for the next message of a chat."""

    messages: Items[ChatMessage] = Field(min_length=1, description="`role` and `content`, a text or parts of text.")
    max_tokens: Count | None = Field(None, description="Lowered to what fits into the context.")
    max_completion_tokens: Count | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Whether each token has its log-probability.")
    top_logprobs: Top | None = None


class EmbeddingRequest(Request):
    """A request for vectors."""

    input: str | Items[str] = Field(description="A text or several.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = Field(None, description="Not supported.")
    user: str | None = Field(None, description="Ignored.")


class FillRequest(Request):
    """A request to fill the gaps of a text."""

    text: str = Field(description="A text with <mask> where a token, or for T5 a span, is missing.")
    top: Annotated[int, Field(ge=1, le=1000)] = Field(5, description="Candidates for each gap.")


class PredictRequest(Request):
    """Records with the fields of the training data, or texts."""

    records: Items[dict[str, Any]] | Items[str] = Field(
        min_length=1, description="Records with the fields of the training data, or texts."
    )


class ScoreRequestBody(Request):
    """A text to score."""

    text: str = Field(description="The text whose tokens are scored.")
    prompt: str = Field("", description="Comes before the text and is not scored.")
    top: Top = 0


class TokenizeRequest(Request):
    """A text to split into tokens."""

    text: str = Field(description="The text.")


class AttentionRequest(Request):
    """A text whose attention weights are returned."""

    text: str = Field(description="The text; of an encoder-decoder that of the encoder.")
    answer: str | None = Field(
        None, description="What the decoder of an encoder-decoder reads; by default what it writes."
    )
    encoding_format: Literal["float", "base64"] = "float"


class RewardRequest(Request):
    """Dialogues whose last answer is rated: `messages`, or `prompt` and `completion`, as in training."""

    records: Items[dict[str, Any]] = Field(min_length=1, description="`messages`, or `prompt` and `completion`.")


# ------------------------------------------------------------------------------- responses


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error."""

    error: ErrorDetail


class HealthResponse(BaseModel):
    """The state of the server."""

    status: Literal["ok"]


class ModelEntry(BaseModel):
    """A model of the server."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["firth"] = "firth"
    max_model_len: int = Field(description="Most tokens of its context.")
    capabilities: list[str] = Field(description="What it can do: completions, chat, embeddings, fill, ...")


class ModelList(BaseModel):
    """The models of the server."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities of tokens: four lists of one item per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class CompletionChoice(BaseModel):
    """An answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class CompletionResponse(BaseModel):
    """The answers of `/v1/completions`, or an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of an answer with its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob]


class ChatAnswer(BaseModel):
    """The message of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatResponse(BaseModel):
    """The answers of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """A part of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, str]:
        return {name: value for name, value in handler(self).items() if value is not None}


class ChatChunkChoice(BaseModel):
    """A part of an answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """An event of the stream of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class EmbeddingUsage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingEntry(BaseModel):
    """A vector of length 1: numbers, or their float32 bytes in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """One vector for each text."""

    object: Literal["list"] = "list"
    model: str
    data: list[EmbeddingEntry]
    usage: EmbeddingUsage


class FillCandidate(BaseModel):
    """A text for a gap."""

    text: str
    probability: float


class FillResponse(BaseModel):
    """Candidates for each gap, most likely first; or the whole text from a model that writes it anew (BART)."""

    model: str
    gaps: list[list[FillCandidate]]
    text: str | None = None


class PredictResponse(BaseModel):
    """One row for each record, as `firth predict` writes it."""

    model: str
    rows: list[dict[str, Any]]


class Alternative(BaseModel):
    """A token in the place of another."""

    text: str
    logprob: float


class ScoredToken(BaseModel):
    """A token with its log-probability and the most likely tokens in its place.

    The first token of a decoder that reads no token before a text has no log-probability.
    """

    text: str
    id: int
    logprob: float | None
    top: list[Alternative]


class ScoreResponse(BaseModel):
    """The log-probability of each token of a text, and their sum in nats."""

    model: str
    logprob: float
    mode: Literal["causal", "masked", "halves"]
    tokens: list[ScoredToken]


class TokenEntry(BaseModel):
    """A token and its place in the text."""

    id: int
    token: str
    start: int
    end: int


class TokenizeResponse(BaseModel):
    """The tokens of a text."""

    model: str
    tokens: list[TokenEntry]


class RewardRow(BaseModel):
    """The reward of a dialogue."""

    row: int
    reward: float


class RewardResponse(BaseModel):
    """One row for each dialogue."""

    model: str
    rows: list[RewardRow]


class AttentionWeights(BaseModel):
    """The weights of one kind of attention; those of a query add up to 1."""

    kind: Literal["self", "encoder", "decoder", "cross"]
    queries: list[str]
    keys: list[str]
    shape: list[int] = Field(description="Layers, heads, queries, keys.")
    weights: list[list[list[list[float]]]] | str = Field(description="Numbers, or their float32 bytes in base64.")


class AttentionResponse(BaseModel):
    """Attention weights: of an encoder-decoder three kinds, of other models one."""

    model: str
    maps: list[AttentionWeights]
