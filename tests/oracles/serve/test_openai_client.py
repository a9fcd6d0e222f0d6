"""OpenAI's own client against the server, with transformers as the oracle of what is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.serving import Running, serving, write_models

PROMPT = "Who paints the boat"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(paths: dict[str, Path]) -> Iterator[Running]:
    with serving([*paths.values()]) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def reference(paths: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(paths["gpt"], dtype=torch.float32).eval()


def prompt_ids(server: Running) -> torch.Tensor:
    served = server.models.models["gpt"]
    return torch.from_numpy(served.local.framed(served.model.tokenizer.encode(PROMPT))).long()[None]


def test_models(client: openai.OpenAI) -> None:
    found = client.models.list()
    assert found.object == "list" and [one.id for one in found] == ["gpt", "bert"]
    assert client.models.retrieve("bert").object == "model"


def test_a_completion_is_that_of_transformers(client: openai.OpenAI, server: Running, reference: Any) -> None:
    ids = prompt_ids(server)
    written = reference.generate(ids, max_new_tokens=16, do_sample=False, use_cache=True)[0, ids.shape[1] :].tolist()
    served = server.models.models["gpt"]
    found = client.completions.create(model="gpt", prompt=PROMPT, max_tokens=16, temperature=0, logprobs=1)
    assert found.object == "text_completion" and found.usage is not None
    assert found.choices[0].text == served.model.tokenizer.decode(written)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (ids.shape[1], len(written))
    with torch.no_grad():
        logits = reference(torch.cat([ids, torch.tensor([written])], 1)).logits[0, ids.shape[1] - 1 : -1]
    wanted = logits.log_softmax(-1).gather(-1, torch.tensor(written)[:, None])[:, 0].tolist()
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert logprobs.token_logprobs == pytest.approx(wanted[: len(logprobs.token_logprobs)], abs=1e-4)
    assert len(logprobs.token_logprobs) >= len(written) - 1


def test_a_chat_and_its_stream(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    whole = client.chat.completions.create(model="gpt", messages=messages, max_tokens=20, seed=7, temperature=0.8)
    assert whole.choices[0].message.role == "assistant" and whole.usage is not None
    parts, usage, finish = [], None, None
    for event in client.chat.completions.create(
        model="gpt", messages=messages, max_tokens=20, seed=7, temperature=0.8, stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        usage = event.usage or usage
        for choice in event.choices:
            parts.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert "".join(parts) == whole.choices[0].message.content and len(parts) > 3
    assert usage == whole.usage and finish == whole.choices[0].finish_reason


def test_seeds_and_stops(client: openai.OpenAI) -> None:
    def text(seed: int, **more: Any) -> str:
        found = client.completions.create(model="gpt", prompt=PROMPT, max_tokens=40, seed=seed, **more)
        return str(found.choices[0].text)

    assert text(1) == text(1) != text(2)
    stop = text(1)[8:11]
    assert text(1, stop=[stop]) == text(1)[: text(1).index(stop)]


def test_errors_have_the_types_of_the_client(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gtp", prompt="a")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="gpt", prompt="boat " * 5000)
    assert long.value.code == "context_length_exceeded"
    regex: Any = {"type": "regex", "pattern": "(a{1000}){1000}"}
    with pytest.raises(openai.BadRequestError, match="too many expressions"):
        client.completions.create(model="gpt", prompt="a", extra_body={"response_format": regex})
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="gpt", messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )  # fmt: skip


def test_embeddings_have_length_one(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="bert", input=["a boat", "an otter"])
    for one in found.data:
        assert math.isclose(sum(value * value for value in one.embedding), 1, abs_tol=1e-5)
