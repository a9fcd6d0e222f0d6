"""Models that reply to requests: on this machine, and behind an OpenAI-compatible endpoint."""

import copy
import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firth.evaluate.prompting import responders
from firth.evaluate.prompting.prompt_task import MetricConfig, PromptConfig, PromptTask
from firth.evaluate.prompting.requests import GenerateReply, GenerateRequest, ReplyCache, ScoreReply, ScoreRequest
from firth.evaluate.prompting.responders import Endpoint, LocalModel
from firth.evaluate.prompting.runner import run_tasks
from firth.evaluate.task import EvaluatedModel
from firth.generate.decoding_batch import rectangle
from firth.generate.scoring import ScoredPair, _fp32_logits, score_gaps
from firth.model.config import decoder_config, encoder_config, encoder_decoder_config
from firth.runs.evaluate_prompts import evaluate_prompts
from firth.types import UserError
from tests.support.fake_responder import items
from tests.support.models import random_model
from tests.support.tiny_corpus import tokenizer


def local(tmp_path: Path, encoder: bool = False, within_word: bool = False) -> LocalModel:
    """Return a tiny model with random weights."""
    coder = tokenizer()
    config = (encoder_config if encoder else decoder_config)(coder.vocab.size, 32, 2, num_heads=2)
    return LocalModel(EvaluatedModel(random_model(config), coder, tmp_path, tmp_path), within_word=within_word)


def test_scores_are_those_of_the_tokens(tmp_path: Path) -> None:
    """The prompt and its continuation are tokenized together."""
    model = local(tmp_path)
    [(_, reply)] = model.reply([ScoreRequest("the cat", " sat here")])
    assert isinstance(reply, ScoreReply)
    whole = model.tokenizer.encode("the cat sat here")
    row = np.concatenate(([model.bos], whole)) if model.bos is not None else whole
    with torch.inference_mode():
        logits = model.model.heads["lm"](model.model(rectangle([row[:-1]], torch.device("cpu")))[0]).log_softmax(-1)
    count = len(whole) - len(model.tokenizer.encode("the cat"))
    expected = [float(logits[i - 1, row[i]]) for i in range(len(row) - count, len(row))]
    np.testing.assert_allclose(reply.logprobs, expected, atol=1e-4)


def test_samples_depend_on_their_own_seed_only(tmp_path: Path) -> None:
    """A sample is the same alone and among others, which share its prefill."""
    model = local(tmp_path)
    requests = [GenerateRequest("the", (), 8, 1.0, seed=seed) for seed in (3, 1, 2)] + [
        GenerateRequest("a cat", (), 8, 1.0, seed=1)
    ]
    together = dict(model.reply(requests))
    for i, request in enumerate(requests):
        assert dict(model.reply([request]))[0] == together[i]
    assert len({reply.text for reply in together.values() if isinstance(reply, GenerateReply)}) > 1


@pytest.mark.parametrize("chat", [False, True])
def test_a_long_rationale_fits_the_context(tmp_path: Path, chat: bool) -> None:
    """An untrained model writes until its context is full; the answer is then requested after a part of it."""
    coder = tokenizer()
    config = decoder_config(coder.vocab.size, 32, 1, num_heads=2, max_positions=96)
    model = LocalModel(EvaluatedModel(random_model(config), coder, tmp_path, tmp_path))
    questions = items({"q": "the cat sat on the mat", "a": "a cat"})
    metric = (MetricConfig("exact_match"),)
    task = PromptTask("ask", questions, "generate_until", "q", "a", stop=(), metrics=metric)
    [result] = run_tasks([task], model, PromptConfig(cot="zero-shot", chat=chat))
    rationale, _ = result.items[0].replies
    assert len(coder.encode(rationale)) > 20
    choice = replace(task, output_type="multiple_choice", choices=("a cat", "the mat"), metrics=(MetricConfig("acc"),))
    [result] = run_tasks([choice], model, PromptConfig(cot="zero-shot", chat=chat))
    assert len(result.items[0].replies) == 3


def test_a_masked_model_scores_and_does_not_write(tmp_path: Path) -> None:
    """Without a prompt, as for minimal pairs; masking whole words changes the score of words of several tokens."""
    text = "unbelievable extraordinary cats"
    [(_, each)] = local(tmp_path, encoder=True).reply([ScoreRequest("", text)])
    [(_, words)] = local(tmp_path, encoder=True, within_word=True).reply([ScoreRequest("", text)])
    assert isinstance(each, ScoreReply) and isinstance(words, ScoreReply)
    assert len(each.logprobs) == len(words.logprobs) and each.logprobs != words.logprobs
    with pytest.raises(UserError, match="bidirectional"):
        local(tmp_path, encoder=True).check([GenerateRequest("the")])


class Handler(BaseHTTPRequestHandler):
    """A server that scores each character -1 and answers with the last word of the prompt, five times followed by a stop."""

    failures = 0
    echo = True
    dies_after: int | None = None
    posts = 0
    clock = itertools.count()

    def _send(self, body: dict[str, Any], code: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        stamp = next(Handler.clock)  # vLLM: the time, and a random id
        tiny = {"id": "tiny", "max_model_len": 64, "created": stamp, "permission": [{"id": f"modelperm-{stamp}"}]}
        self._send({"data": [tiny, {"id": "other", "created": stamp}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.posts += 1
        if Handler.dies_after is not None and Handler.posts > Handler.dies_after:
            self.connection.close()
            return
        if Handler.failures:
            Handler.failures -= 1
            self._send({"error": "busy"}, 503)
        elif self.path.endswith("/chat/completions"):
            text = " ".join(message["content"] for message in body["messages"])
            self._send({"choices": [{"message": {"content": f"chat {text}"}, "finish_reason": "stop"}]})
        elif body.get("echo") and Handler.echo:
            text = body["prompt"]
            logprobs = [None] + [-1.0] * len(text)
            tops = [None] + [{"x": -1.0}] * (len(text) - 1) + [{"x": -0.5}]
            offsets = list(range(len(text) + 1))
            found = {"text_offset": offsets, "token_logprobs": logprobs, "top_logprobs": tops}
            self._send({"choices": [{"text": f"{text}!", "logprobs": found}]})
        else:
            self._send({"choices": [{"text": f" {body['prompt'].split()[-1]}\nmore", "finish_reason": "length"}]})


@pytest.fixture
def address() -> Iterator[str]:
    Handler.failures, Handler.echo, Handler.dies_after, Handler.posts = 0, True, None, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"openai:http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_scores_and_generates(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop strings are applied to what the server returns, and a busy server gets the request again."""
    monkeypatch.setattr(responders.time, "sleep", lambda _: None)
    model = Endpoint(address)
    assert (model.model, model.context) == ("tiny", 64)
    Handler.failures = 2
    replies = dict(model.reply([
        ScoreRequest("ab ", "cde"), GenerateRequest("one two", ("\n",)), GenerateRequest("hi", chat=True, begun="so"),
    ]))  # fmt: skip
    assert replies[0] == ScoreReply((-1.0,) * 4, greedy=True)
    assert replies[1] == GenerateReply(" two", "length")
    assert replies[2] == GenerateReply("chat hi so", "stop")


def test_an_endpoint_that_cannot_serve_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No log-probabilities, no such model, no server, and a host that is not this machine."""
    monkeypatch.setattr(responders.time, "sleep", lambda _: None)
    Handler.echo = False
    with pytest.raises(UserError, match="returns no log-probabilities of the prompt"):
        Endpoint(address).check([GenerateRequest("ab"), ScoreRequest("ab", "c")])
    Endpoint(address).check([GenerateRequest("ab")])
    with pytest.raises(UserError, match="the server has tiny, other, and not big"):
        Endpoint(f"{address}#big")
    with pytest.raises(UserError, match="does not answer /models"):
        Endpoint("openai:http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="is not this machine"):
        Endpoint("openai:http://example.com/v1")
    Handler.failures = 3
    with pytest.raises(UserError, match="refuses /completions with 503"):
        list(Endpoint(address).reply([GenerateRequest("one")]))


def test_an_evaluation_resumes_after_an_endpoint_died(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The server fails for good after two answers; when it is back, only the others are requested."""
    monkeypatch.setattr(responders.time, "sleep", lambda _: None)
    questions = items(*({"q": f"word{i}", "a": f"word{i}"} for i in range(5)))
    task = PromptTask(
        "echo", questions, "generate_until", "q", "a", stop=("\n",), metrics=(MetricConfig("exact_match"),)
    )
    first, sent = Endpoint(address), []
    post = Handler.do_POST

    def dying(self: Handler) -> None:
        sent.append(self.path)
        Handler.failures = 1 if len(sent) > 2 else 0
        post(self)

    monkeypatch.setattr(Handler, "do_POST", dying)
    cache = ReplyCache(tmp_path, first.digest)
    with pytest.raises(UserError, match="refuses /completions with 503"):
        run_tasks([task], first, PromptConfig(), cache)
    cache.close()
    monkeypatch.setattr(Handler, "do_POST", lambda self: (sent.append(self.path), post(self)))
    Handler.failures = 0
    sent.clear()
    second = Endpoint(address)
    cache = ReplyCache(tmp_path, second.digest)
    [result] = run_tasks([task], second, PromptConfig(), cache)
    cache.close()
    assert len(sent) == 3 and len(result.items) == 5


def test_servers_may_stamp_their_list_of_models(address: str) -> None:
    """The same model has the same cache of replies at another time; another one has not."""
    assert Endpoint(address).digest == Endpoint(address).digest != Endpoint(f"{address}#other").digest


def adapted(directory: Path, with_tokenizer: bool) -> LocalModel:
    """Return a model as it is loaded from the adapter in `directory/adapter`, whose base is `directory/base`."""
    coder, adapter, base = tokenizer(), directory / "adapter", directory / "base"
    for place, weights in ((base, "model"), (adapter, "adapter_model")):
        place.mkdir(exist_ok=True)
        if not (place / f"{weights}.safetensors").exists():
            (place / f"{weights}.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    model = random_model(decoder_config(coder.vocab.size, 32, 1, num_heads=2))
    return LocalModel(EvaluatedModel(model, coder, adapter, adapter if with_tokenizer else base))


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_the_replies_of_an_adapter_are_its_own(tmp_path: Path, with_tokenizer: bool) -> None:
    """Neither those of its base, nor those before its weights or the weights of its base were changed."""
    adapter = adapted(tmp_path, with_tokenizer)
    base = LocalModel(replace(adapter.evaluated, directory=tmp_path / "base", model_directory=tmp_path / "base"))
    digests = [base.digest, adapter.digest]
    assert adapted(tmp_path, with_tokenizer).digest == adapter.digest
    for file in ("adapter/adapter_model.safetensors", "base/model.safetensors"):
        (tmp_path / file).write_bytes(b"other")
        digests.append(adapted(tmp_path, with_tokenizer).digest)
    assert len(set(digests)) == 4


def test_replies_depend_on_the_chat_template_and_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template is in a file of its own, chat_template.jinja, and no part of the tokenizer's digest."""
    model = local(tmp_path).evaluated
    other = replace(model, tokenizer=copy.copy(model.tokenizer))
    other.tokenizer.template = "{{ messages[0]['content'] }}"
    digests = [LocalModel(model).digest, LocalModel(other).digest]
    monkeypatch.setattr(responders, "SCORING_VERSION", responders.SCORING_VERSION + 1)
    digests.append(LocalModel(model).digest)
    assert len(set(digests)) == 3


def test_a_text_of_gaps_that_is_too_long_is_found_before_scoring(tmp_path: Path) -> None:
    """The longest source has a sentinel for one token, and eos."""
    coder = tokenizer()
    config = encoder_decoder_config(coder.vocab.size, 32, 1, num_heads=2)
    text = "cat " * 12
    tokens = len(coder.encode(text))
    for context, fits in ((tokens + 1, True), (tokens, False)):
        lm = random_model(config.with_fields({"position.type": "learned", "max_positions": context}))
        model = LocalModel(EvaluatedModel(lm, coder, tmp_path, tmp_path))
        request = ScoreRequest("", text)
        assert model.model.context == context and model._in_gaps(request)
        if fits:
            model.check([request])
            assert len(dict(model.reply([request]))) == 1
        else:
            with pytest.raises(UserError, match=f"has {tokens + 1} tokens and this model reads at most {tokens}"):
                model.check([request])


def test_a_text_is_filled_word_by_word_by_span_corruption(tmp_path: Path) -> None:
    """T5 has seen no text without its source: a text alone is scored in gaps, unless the run trained something else."""
    coder, text = tokenizer(), "unbelievable extraordinary cats"
    config = encoder_decoder_config(coder.vocab.size, 32, 2, num_heads=2)
    model = LocalModel(EvaluatedModel(random_model(config), coder, tmp_path, tmp_path), within_word=True)
    requests = [ScoreRequest("", text), ScoreRequest("two", " cats")]
    replies = dict(model.reply(requests))
    starts = [offset == 0 or text[offset - 1] == " " or text[offset] == " " for offset, _ in coder.spans(text)[1]]
    pair = ScoredPair(np.zeros(0, np.int32), coder.encode(text), np.array(starts))
    [(_, scores)] = score_gaps(model.model, model.evaluated.vocab, [pair])
    assert replies[0] == ScoreReply(tuple(scores.logprobs.tolist()), scores.greedy) and sum(starts) == 3
    (tmp_path / "recipe.yaml").write_text("objective: {kind: seq2seq}\n", "utf-8")
    other = LocalModel(EvaluatedModel(random_model(config), coder, tmp_path, tmp_path), within_word=True)
    forced = dict(other.reply(requests))
    first, second = forced[1], replies[1]
    assert isinstance(first, ScoreReply) and isinstance(second, ScoreReply)
    assert first.logprobs == pytest.approx(second.logprobs, abs=1e-4)
    assert forced[0] != replies[0] and model.digest != other.digest


def questions(folder: Path) -> tuple[str, str]:
    """Return a task that generates, and one that scores."""
    (folder / "q.jsonl").write_text("".join(json.dumps({"q": f"item {i}", "a": str(i)}) + "\n" for i in range(6)))
    common = "data: q.jsonl\ndoc_to_text: q\ndoc_to_target: a\n"
    (folder / "writes.yaml").write_text(f'{common}output_type: generate_until\ngeneration_kwargs: {{until: ["\\n"]}}\n')
    (folder / "scores.yaml").write_text(f"{common}output_type: loglikelihood\n")
    return str(folder / "writes.yaml"), str(folder / "scores.yaml")


def test_an_endpoint_that_dies_is_resumed(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replies before it died are kept: the same call sends the others only."""
    monkeypatch.setattr(responders.time, "sleep", lambda _: None)
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "cache"))
    writes, _ = questions(tmp_path)
    Handler.dies_after = 4
    with pytest.raises(UserError, match="the same command continues once it runs again"):
        evaluate_prompts([address], [writes], PromptConfig())
    Handler.dies_after, Handler.posts = None, 0
    [[result]] = evaluate_prompts([address], [writes], PromptConfig())
    assert Handler.posts == 2
    assert [item.answers["none"].strip() for item in result.items] == list("012345")


def test_an_endpoint_without_log_probabilities_is_refused_first(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any model runs, also one that is named before it; tasks that generate need none."""
    monkeypatch.setattr(responders.time, "sleep", lambda _: None)
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "cache"))
    writes, scores = questions(tmp_path)
    Handler.echo = False
    with pytest.raises(UserError, match="returns no log-probabilities of the prompt"):
        evaluate_prompts([str(tmp_path / "no-such-run"), address], [writes, scores], PromptConfig())
    assert Handler.posts == 1 and not (tmp_path / "cache").exists()
    [[result]] = evaluate_prompts([address], [writes], PromptConfig())
    assert len(result.items) == 6


def test_an_endpoint_without_log_probabilities_writes_rationales(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --cot few-shot multiple choice is read from a text; without it the choices are scored."""
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "q.jsonl").write_text('{"q": "one yes", "a": "yes"}\n{"q": "two no", "a": "no"}\n')
    (tmp_path / "choice.yaml").write_text(
        "data: q.jsonl\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: a\ndoc_to_choice: [yes!, no!]\n"
        "doc_to_rationale: a\nmetric_list: [{metric: acc}]\nfewshot_delimiter: \"\\n\"\n"
        "filter_list: [{name: none, filter: [{function: remove_whitespace}]}]\n".replace("yes!", '"yes"').replace("no!", '"no"')
    )  # fmt: skip
    Handler.echo = False
    config = PromptConfig(shots=1, cot="few-shot")
    [[result]] = evaluate_prompts([address], [str(tmp_path / "choice.yaml")], config)
    assert result.metrics["acc"].value == 1, "the server repeats the last word of the question"
    with pytest.raises(UserError, match="returns no log-probabilities"):
        evaluate_prompts([address], [str(tmp_path / "choice.yaml")], PromptConfig())


def test_a_head_in_bf16_is_multiplied_in_fp32(tmp_path: Path) -> None:
    """Logits of 16 to 32 have steps of 1/8 in bf16, so that choices would often have equal log-probabilities."""
    whole = local(tmp_path).evaluated
    model = LocalModel(whole, "bf16").model
    head = model.heads["lm"]
    states = (3 * torch.randn(6, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    products = states.double() @ head.weight.double().T  # type: ignore[operator, union-attr]
    exact = head.softcap * torch.tanh(products / head.softcap)  # type: ignore[operator, union-attr]
    with torch.inference_mode():
        found, rounded = _fp32_logits(head, states), head(states)  # type: ignore[arg-type]
    known = found > -1e4  # ids that the tokenizer does not have
    assert found.dtype == torch.float32 and known.float().mean() > 0.9
    assert (found.double() - exact)[known].abs().max() < 1e-4
    assert (rounded.double() - exact)[known].abs().max() > 1e-2


def test_half_characters_of_an_endpoint_are_replaced(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may cut an answer within a character; no file could be written with it."""
    model = Endpoint(address)
    monkeypatch.setattr(model, "_send", lambda *_: {"choices": [{"text": "x\ud83d"}]})
    [(_, reply)] = model.reply([GenerateRequest("a")])
    assert reply == GenerateReply("x\ufffd", "stop")
