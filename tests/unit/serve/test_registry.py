"""Several models on one server: names, adapters that share the weights of their base, GGUF files."""

import os
import signal
import subprocess
import sys
import time

import httpx
import pytest
import torch
from typer.testing import CliRunner

from firth.cli import app
from firth.evaluate.prompting.requests import GenerateRequest, ScoreRequest
from firth.evaluate.prompting.responders import Endpoint
from firth.evaluate.task import load_evaluated_model
from firth.peft import adapter_files, lora
from firth.peft.lora import LoraConfig
from firth.pretrained import gguf
from firth.pretrained.load_save import load_model
from firth.runs import loaded_model
from firth.serve.app import create_app
from firth.serve.config import ServeConfig
from firth.serve.registry import load_models
from firth.serve.server import serve
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError


@pytest.fixture(scope="module")
def adapters(model_paths, tmp_path_factory):
    """Return two LoRA adapters of `gpt`, one of which also has the whole LM head."""
    found = []
    for seed, heads in ((1, []), (2, ["lm"])):
        torch.manual_seed(seed)
        model = load_model(model_paths["gpt"])
        for name in lora.chosen(model, ["q", "v"]):
            layer = lora.add_to_module(model, name, LoraConfig(rank=2))
            torch.nn.init.normal_(layer.B, std=0.3)
        if heads:
            with torch.no_grad():
                for parameter in model.heads["lm"].parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        directory = tmp_path_factory.mktemp("adapters") / f"adapter{seed}"
        adapter_files.write(model, directory, model_paths["gpt"], heads)
        found.append(directory)
    return found


def storage(model):
    return {tensor.data_ptr(): tensor.numel() for tensor in (*model.parameters(), *model.buffers())}


def test_adapters_share_the_weights_of_their_base(adapters, model_paths):
    """The base is in memory once, is not changed, and each adapter computes what it does when it is merged."""
    registry = load_models([str(model_paths["gpt"]), *map(str, adapters)])
    models = {name: served.model.model for name, served in registry.models.items()}
    tokens = torch.arange(10, 30)[None]
    batch = {"tokens": tokens, "query_time": torch.arange(20)[None], "key_time": torch.arange(20)[None]}

    def logits(model):
        with torch.no_grad():
            return model.heads["lm"](model(batch))

    base = storage(models["gpt"])
    for directory in adapters:
        merged = adapter_files.load(directory)
        merged.restrict_vocab(registry.models["gpt"].model.tokenizer.vocab)
        torch.testing.assert_close(logits(models[directory.name]), logits(merged), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(logits(models[directory.name]), logits(models["gpt"]), atol=1e-2)
    fresh = load_model(model_paths["gpt"])
    fresh.restrict_vocab(registry.models["gpt"].model.tokenizer.vocab)
    torch.testing.assert_close(logits(models["gpt"]), logits(fresh), atol=0, rtol=0)
    own = {name: sum(n for at, n in storage(model).items() if at not in base) for name, model in models.items()}
    assert own["adapter1"] < 0.05 * sum(base.values()), own
    assert own["adapter1"] < own["adapter2"] < 0.5 * sum(base.values()), own


def test_names_are_unique_and_can_be_given(model_paths):
    registry = load_models([str(model_paths["gpt"]), f"again={model_paths['gpt']}"])
    assert [*registry.models] == ["gpt", "again"]
    assert registry.models["gpt"].model.evaluated is registry.models["again"].model.evaluated
    with pytest.raises(UserError, match="two models are named 'gpt'"):
        load_models([str(model_paths["gpt"]), str(model_paths["gpt"])])


def test_a_gguf_file_is_served_in_int8(model_paths, tmp_path):
    directory = model_paths["gpt"]
    gguf.write(load_model(directory), Tokenizer.load(directory), tmp_path / "small.gguf", "F32")
    served = load_models([str(tmp_path / "small.gguf")], "int8").get("small")
    assert {"completions", "embeddings", "score"} <= {*served.capabilities}
    assert served.model.generate(["The otter"], max_new_tokens=4, seed=1)
    assert served.model.embed(["The otter"]).shape == (1, 32)


def test_the_endpoint_client_gets_the_scores_of_the_directory(server):
    """firth's own client of OpenAI's routes scores and writes what `firth evaluate` does on the directory."""
    endpoint, local = Endpoint(f"openai:{server.url}/v1#gpt"), server.models.models["gpt"].local
    assert endpoint.context == 128
    requests = [ScoreRequest("The otter paints", " the boat"), ScoreRequest("Who holds", " the map by the mill?")]
    requests.append(GenerateRequest("Who paints", max_new_tokens=12, temperature=0.0))
    endpoint.check(requests)
    theirs, ours = dict(endpoint.reply(requests)), dict(local.reply(requests))
    for i in (0, 1):
        assert theirs[i].logprobs == pytest.approx(ours[i].logprobs, abs=1e-4) and theirs[i].greedy == ours[i].greedy
    assert theirs[2].text == ours[2].text


def test_the_command_serves_and_drains(model_paths):
    """SIGTERM: no new connections, the running stream ends with its last event, and the process with status 0."""
    command = [sys.executable, "-m", "firth", "serve", str(model_paths["gpt"]), "--port", "0", "--limit", "max_rows=1"]
    environment = {**os.environ, "FIRTH_API_KEY": "k" * 20}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "serving at" in line:
            break
    assert lines and "serving at" in lines[-1], lines
    url = lines[-1].split()[2]
    assert httpx.get(f"{url}/health").status_code == 200 and httpx.get(f"{url}/v1/models").status_code == 401
    body = {
        "prompt": "The otter",
        "max_tokens": 100,
        "n": 4,
        "stream": True,
        "response_format": {"type": "regex", "pattern": "[a-z ]{50}"},
    }
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {'k' * 20}"}
    ) as reply:
        events = reply.iter_lines()
        assert next(events).startswith("data: {")
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        rest = [line for line in events if line]
    assert rest[-1] == "data: [DONE]" and sum('"finish_reason":"stop"' in line for line in rest) == 4
    assert process.wait(10) == 0


def test_a_signal_before_the_first_request_ends_the_server(monkeypatch):
    """SIGTERM as soon as the address is printed, when uvicorn does not handle it yet, is neither lost nor the end of the process."""
    before, stopping = signal.getsignal(signal.SIGTERM), []

    def run(self, sockets):
        signal.raise_signal(signal.SIGTERM)
        stopping.append(self.should_exit)
        sockets[0].close()

    monkeypatch.setattr("uvicorn.Server.run", run)
    try:
        serve(create_app(None, ServeConfig()), ServeConfig(port=0))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopping == [True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "needs --api-key"),
        (["--limit", "max_rowz=1"], "the limits are max_body_bytes"),
        (["--limit", "max_rows=x"], "is not a number"),
        (["--limit", "max_rows=0"], "greater than or equal to 1"),
        (["--host", "256.1.1.1", "--api-key", "k" * 20], "cannot listen"),
    ],
)
def test_wrong_options_are_one_sentence(model_paths, options, message):
    done = CliRunner().invoke(app, ["serve", str(model_paths["gpt"]), *options])
    assert type(done.exception) is UserError and message in str(done.exception)


def test_bf16_is_announced_once(model_paths, monkeypatch, caplog):
    loaded_model._warn_of_bf16.cache_clear()
    monkeypatch.setattr(loaded_model, "choose_precision", lambda *_: "bf16")
    load_models([str(model_paths["gpt"]), f"other={model_paths['gpt']}", f"third={model_paths['gpt']}"], "auto")
    model = load_evaluated_model(model_paths["gpt"]).model
    assert [loaded_model.fast_weights(model) for _ in range(2)] == ["bf16"] * 2
    warnings = [record.getMessage() for record in caplog.records if "bf16" in record.getMessage()]
    assert warnings == ["weights are held in bf16, which is faster here: use --weights fp32 for full precision"]
