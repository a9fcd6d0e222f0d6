"""Routes of firth's own, and embeddings: equal to what the model's own methods return."""

import base64
import json

import numpy as np
import openai
import pytest
import torch
import yaml

from firth.evaluate.prompting.requests import ScoreRequest
from firth.evaluate.task import load_evaluated_model
from firth.generate.decoding_batch import rectangle
from firth.model.config import decoder_config, encoder_config
from firth.objectives.classification import classification_head
from firth.objectives.reward_model import reward_head
from firth.pretrained.load_save import save_model
from firth.runs.loaded_model import Model
from firth.serve import inference
from firth.serve.config import ServeConfig, ServeLimits
from firth.serve.registry import ModelRegistry, ServedModel
from firth.tokenizer import chat
from firth.tokenizer.train import train
from tests.support.models import random_model
from tests.support.serving import running
from tests.support.tiny_corpus import tokenizer

TEXT = "The otter paints the boat"


def test_fill_has_the_candidates_of_the_model(server):
    reply = server.post("/fill", {"model": "bert", "text": "The <mask> paints the boat", "top": 3}).json()
    wanted = server.models.models["bert"].model.fill("The <mask> paints the boat", 3)
    assert [one["probability"] for one in reply["gaps"][0]] == [probability for _, probability in wanted[0]]
    assert len(reply["gaps"][0]) == 3 and reply["text"] is None and reply["model"] == "bert"
    assert "nothing to fill" in server.post("/fill", {"model": "bert", "text": TEXT}).json()["error"]["message"]
    assert server.post("/fill", {"model": "gpt", "text": "a <mask>"}).json()["error"]["code"] == "unsupported_by_model"


def test_embeddings_equal_the_model(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    wanted = server.models.models["bert"].model.embed([TEXT, "a"], normalize=True)
    for encoding in ("float", "base64"):
        found = client.embeddings.create(model="bert", input=[TEXT, "a"], encoding_format=encoding)
        vectors = [
            np.frombuffer(base64.b64decode(one.embedding), "<f4") if isinstance(one.embedding, str) else one.embedding
            for one in found.data
        ]
        np.testing.assert_allclose(vectors, wanted, atol=1e-6)
    assert np.linalg.norm(client.embeddings.create(model="gpt", input=TEXT).data[0].embedding) == pytest.approx(
        1, abs=1e-5
    )
    with pytest.raises(openai.BadRequestError, match=r"input\.1: this text is longer"):
        client.embeddings.create(model="bert", input=["a", TEXT * 60])


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_scores_equal_the_evaluation(server, name):
    local = server.models.models[name].local
    [(_, wanted)] = local.reply([ScoreRequest("The otter", " paints the boat")])
    found = server.post("/score", {"model": name, "prompt": "The otter", "text": " paints the boat", "top": 4}).json()
    assert [one["logprob"] for one in found["tokens"]] == pytest.approx(wanted.logprobs, abs=1e-5)
    assert found["logprob"] == pytest.approx(sum(wanted.logprobs), abs=1e-4)
    assert "".join(one["text"] for one in found["tokens"]) == " paints the boat"
    for one in found["tokens"]:
        values = [top["logprob"] for top in one["top"]]
        assert len(values) == 4 and values == sorted(values, reverse=True) and values[0] >= one["logprob"] - 1e-5


def test_a_score_covers_the_whole_text(server):
    found = server.post("/score", {"model": "gpt", "text": TEXT}).json()
    assert "".join(one["text"] for one in found["tokens"]) == TEXT and found["mode"] == "causal"


def test_tokens_cover_the_text(server):
    text = "The otter – 🙂"
    found = server.post("/tokenize", {"model": "gpt", "text": text}).json()["tokens"]
    assert [one["id"] for one in found] == server.models.models["gpt"].model.tokenizer.encode(text).tolist()
    assert found[0]["start"] == 0 and found[-1]["end"] == len(text)


HEADS = {
    "classifier": ("classes", 2, {"objective": {"kind": "classification", "position": "first"}, "examples": {"kind": "labeled"}}),
    "tagger": ("tags", 3, {"examples": {"kind": "tagged"}}),
    "reader": (
        "span", 2,
        {"objective": {"kind": "question_answering", "position": "first"},
         "examples": {"kind": "questions", "max_length": 48, "max_question_length": 8, "doc_stride": 16}},
    ),
}  # fmt: skip
CLASSES = {"classifier": ("bad", "good"), "tagger": ("B-LOC", "I-LOC", "O"), "reader": ()}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Return a server of a reward model and of models that classify, tag and answer, with random weights."""
    directory, vocab_tokenizer = tmp_path_factory.mktemp("heads"), tokenizer()
    size = vocab_tokenizer.vocab.size
    for name, (head, outputs, recipe) in HEADS.items():
        model = random_model(
            encoder_config(size, 32, 1, 2, max_positions=64), **{head: classification_head(32, outputs)}
        )
        save_model(model, vocab_tokenizer, directory / name / "model", {"recipe": "0", "classes": CLASSES[name]})
        (directory / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    chatty = train([TEXT * 20], "byte-bpe", 300, num_sentinels=0)
    model = random_model(decoder_config(chatty.vocab.size, 32, 1, 2, max_positions=64), reward=reward_head(32))
    save_model(model, chatty, directory / "rater")
    models = {name: Model(load_evaluated_model(directory / name)) for name in (*HEADS, "rater")}  # no whole recipe
    registry = ModelRegistry({name: ServedModel(name, model, 0) for name, model in models.items()})
    with running(registry, ServeConfig(port=0, limits=ServeLimits(max_records=4))) as found:
        yield found


@pytest.mark.parametrize(
    ("route", "name", "records"),
    [
        ("classify", "classifier", [{"text": "a fine film"}, {"text": "dull", "id": "x"}, {"text": ""}]),
        ("classify", "classifier", ["a fine film", "dull"]),
        ("tag", "tagger", [{"tokens": ["Paris", "sleeps"]}]),
        ("tag", "tagger", ["Paris sleeps"]),
        ("answer", "reader", [{"question": "Who wrote it?", "context": "The play was written by Anne Lee."}]),
    ],
)
def test_predictions_equal_the_command(heads, route, name, records):
    reply = heads.post(f"/{route}", {"model": name, "records": records})
    assert reply.status_code == 200, reply.text
    wanted = json.loads(json.dumps(heads.models.models[name].model.predict(records)))
    assert reply.json() == {"model": name, "rows": wanted} and len(wanted) == len(records)


def test_records_are_refused_by_number(heads):
    reply = heads.post("/classify", {"model": "classifier", "records": [{"text": "a"}, {"txt": "b"}]})
    assert reply.status_code == 400 and "record 2" in reply.json()["error"]["message"]
    assert "standard input" not in reply.text and "/tmp" not in reply.text
    assert (
        heads.post("/classify", {"model": "classifier", "records": ["a"] * 5}).json()["error"]["code"]
        == "limit_exceeded"
    )
    assert (
        heads.post("/tag", {"model": "classifier", "records": ["a"]}).json()["error"]["code"] == "unsupported_by_model"
    )


def test_rewards_equal_the_head(heads):
    """The reward is read at the last token of the answer, whatever follows it in the template."""
    records = [
        {"messages": [{"role": "user", "content": "who paints"}, {"role": "assistant", "content": answer}]}
        for answer in ("the otter", "the boat at dawn")
    ]
    served = heads.models.models["rater"]
    reply = heads.post("/reward", {"model": "rater", "records": records})
    assert reply.status_code == 200, reply.text
    for row, record in zip(reply.json()["rows"], records, strict=True):
        tokens, mask = chat.encode(served.model.tokenizer, record["messages"])
        batch = rectangle([tokens[: np.flatnonzero(mask)[-1] + 1]], torch.device("cpu"))
        with torch.no_grad():
            model = served.model.evaluated.model
            assert row["reward"] == pytest.approx(float(model.heads["reward"](model(batch)[0, -1])), abs=1e-5)
    unanswered = [{"messages": [{"role": "user", "content": "a"}]}]
    assert "answer of the assistant" in heads.post("/reward", {"model": "rater", "records": unanswered}).text


def test_records_in_slices_give_the_rows_of_all(heads, monkeypatch):
    monkeypatch.setattr(inference, "SLICE_CHARACTERS", 1)
    records = [{"text": "a fine film"}, {"text": "dull", "id": "x"}, {"text": "good"}]
    wanted = heads.models.models["classifier"].model.predict(records)
    found = heads.post("/classify", {"model": "classifier", "records": records}).json()["rows"]
    for one, other in zip(found, json.loads(json.dumps(wanted)), strict=True):
        assert one.keys() == other.keys() and one["label"] == other["label"]
    refused = heads.post("/classify", {"model": "classifier", "records": [*records, {"txt": "b"}]}).json()["error"]
    assert refused["message"].startswith("record 4")
    good = {"prompt": "who paints", "completion": "the otter"}
    refused = heads.post("/reward", {"model": "rater", "records": [good, good | {"completion": "boat " * 90}]})
    assert refused.json()["error"]["message"].startswith("record 2 has"), refused.text
