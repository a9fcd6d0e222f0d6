"""The recurrent recipes end to end: trained, fine-tuned, loaded, rejected; whole words and tags read from records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.data.labeled import TaggedConfig
from firth.data.records import Records
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.pretrained.load_save import load_model
from firth.runs.inference import nearest_words
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import IGNORE, UserError

TEXT = "The king loved the queen . A dog barked at a cat ! The queen saw a dog , and the king saw a cat .\n"
FEW = [
    "max_steps=2",
    "evaluation.every=0",
    "evaluation.max_examples=8",
    "checkpoint.every=2",
    "batch.size=4",
    "precision=fp32",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for i in range(4):
        (folder / f"{i}.txt").write_text(TEXT * 30)
    rows = [{"text": TEXT[a : a + 20], "label": "even" if a % 2 else "odd"} for a in range(40)]
    (folder / "labeled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = TEXT.split()
    tags = ["sign" if not w.isalpha() else "long" if len(w) > 3 else "short" for w in words]
    # Each sentence begins elsewhere: those of the same words would be held out together, or not at all.
    turned = [{"tokens": words[i:] + words[:i], "tags": tags[i:] + tags[:i]} for i in range(len(words))]
    (folder / "tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    return folder


@pytest.fixture(scope="module")
def runs(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps of each recipe."""
    folder = tmp_path_factory.mktemp("runs")
    text = [f"data.path={files}/*.txt", *FEW]
    bytes_ = ["tokenizer.vocab_size=400"]
    small = {
        "word2vec": [
            "model.hidden_size=16",
            "tokenizer.vocab_size=200",
            "examples.max_length=64",
            "sample_prompts=[king]",
        ],
        "lstm": ["model.hidden_size=16", "examples.max_length=16", "sample_prompts=['The ']", *bytes_],
        "elmo": [
            "model.hidden_size=16",
            "model.embedding.characters.num_filters=64",
            "examples.max_length=16",
            *bytes_,
        ],
    }
    for name, changes in small.items():
        run(load(name, [*text, *changes]), folder / name, log=lambda _: None)
    return folder


def test_language_model_becomes_a_classifier(runs: Path, files: Path, tmp_path: Path) -> None:
    """Dai and Le 2015: `firth train classification init_from=RUN`."""
    lines: list[str] = []
    plan = load("classification", [f"init_from={runs}/lstm", f"data.path={files}/labeled.jsonl", *FEW])
    done = run(plan, tmp_path / "tuned", log=lines.append)
    assert "drops lm; adds classes" in "\n".join(lines)
    tuned = load_model(done.model)
    assert tuned.config.rnn.type == "lstm"
    assert {"accuracy"} <= {k.removeprefix("valid/") for k in done.metrics}
    with pytest.raises(UserError, match="left-to-right LSTM cannot"):
        run(
            load(
                "classification",
                [f"init_from={runs}/lstm", "objective.position=first", f"data.path={files}/labeled.jsonl"],
            ),
            tmp_path / "no",
            lines.append,
        )


def test_cached_generation_matches_uncached(runs: Path) -> None:
    model, tokenizer = load_model(runs / "lstm" / "model"), Tokenizer.load(runs / "lstm")
    engine = Engine(model, tokenizer, stops=())
    prompts = [tokenizer.encode(text) for text in ("The king", "A dog barked at")]
    answers = engine.generate(prompts, Sampling(max_new_tokens=6, temperature=0))
    for prompt, answer in zip(prompts, answers, strict=True):
        row = prompt.tolist()
        for token in answer.tokens:
            state = model({"tokens": torch.tensor([row])})[:, -1]
            assert token == int(model.heads["lm"](state).argmax())
            row.append(int(token))
    options = [tokenizer.encode(" king"), tokenizer.encode(" dog barked")]
    separately = engine.score([prompts[0]] * 2, options)
    assert engine.options(prompts[0], options) == pytest.approx(separately, abs=1e-4)


def test_word_vectors_are_shown_written_and_loaded(runs: Path, files: Path, tmp_path: Path) -> None:
    samples = [json.loads(line) for line in (runs / "word2vec" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 2]
    out = tmp_path / "vectors.txt"
    lines = nearest_words(runs / "word2vec", ["queen"], 3, out)
    assert lines[0].startswith("queen: ") and "queen" not in lines[0][7:]
    with pytest.raises(UserError, match="is not a single token"):
        nearest_words(runs / "word2vec", ["Zwieback"], 3, None)
    first, *rows = out.read_text().splitlines()
    model, tokenizer = load_model(runs / "word2vec" / "model"), Tokenizer.load(runs / "word2vec")
    assert first == f"{len(rows)} 16" == f"{len(tokenizer.vocab.ordinary)} 16"
    written = {row.split(" ")[0]: np.array(row.split(" ")[1:], float) for row in rows}
    assert written["king"] == pytest.approx(model.tokens.weight[tokenizer.id("king")].detach().numpy(), abs=1e-5)

    printed: list[str] = []
    taken = [
        f"init_embeddings_from={runs}/word2vec",
        f"data.path={files}/*.txt",
        "examples.max_length=16",
        *FEW,
        "sample_prompts=[]",
    ]
    done = run(
        load("lstm", [*taken, "model.hidden_size=16", "optimizer.lr=1e-12", "max_steps=1"]),
        tmp_path / "lstm",
        printed.append,
    )
    assert "everything else is initialized at random" in "\n".join(printed)
    new = load_model(done.model).tokens.weight.detach()
    alike = torch.nn.functional.cosine_similarity(new, model.tokens.weight, dim=-1)
    assert torch.allclose(alike, torch.ones(()), atol=1e-4)
    assert float(new.square().mean().sqrt()) == pytest.approx(0.02, rel=0.1)
    with pytest.raises(UserError, match=r"set model\.hidden_size=16"):
        run(load("lstm", [*taken, "model.hidden_size=32"]), tmp_path / "other", printed.append)
    with pytest.raises(UserError, match="builds its embeddings from characters"):
        run(
            load("lstm", [*taken[1:], f"init_embeddings_from={runs}/elmo", "model.hidden_size=16"]),
            tmp_path / "third",
            printed.append,
        )
    train(["other words " * 90], "byte-bpe", vocab_size=300, num_sentinels=0).save(tmp_path / "stranger")
    stranger = [*taken, "model.hidden_size=16", f"tokenizer.path={tmp_path / 'stranger'}"]
    with pytest.raises(UserError, match="another tokenizer"):
        run(load("lstm", stranger), tmp_path / "fourth", printed.append)


def test_tags_are_learned_from_a_frozen_model(runs: Path, files: Path, tmp_path: Path) -> None:
    plan = load("token_features", [f"init_from={runs}/elmo", f"data.path={files}/tagged.jsonl", *FEW, "max_steps=40"])
    done = run(plan, tmp_path / "tags", log=lambda _: None)
    assert done.metrics["valid/accuracy"] > 0.6
    before, after = load_model(runs / "elmo" / "model"), load_model(done.model)
    theirs = dict(before.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in after.named_parameters() if not n.startswith("heads."))
    facts = json.loads((done.model / "firth.json").read_text())["facts"]
    assert facts["classes"] == ["long", "short", "sign"]


def test_elmo_reads_the_characters_of_its_tokenizer(runs: Path) -> None:
    model, tokenizer = load_model(runs / "elmo" / "model"), Tokenizer.load(runs / "elmo")
    queen = tokenizer.encode(" queen")[-1]
    letters = [257, *(b + 1 for b in tokenizer.token(queen).encode()), 258]
    assert model.tokens.spelling[queen].tolist() == letters + [0] * (16 - len(letters))


@pytest.mark.parametrize("algorithm", ["byte-bpe", "bpe", "wordpiece", "unigram", "word"])
def test_tag_label_is_at_the_first_token_of_a_word(algorithm: str, files: Path) -> None:
    tokenizer = train([TEXT * 5], algorithm, 400 if algorithm != "word" else 140, num_sentinels=3)
    source = Records(TaggedConfig(max_length=200), [f"{files}/tagged.jsonl"], tokenizer)
    example = source[0]
    at = np.flatnonzero(example["tags"] != IGNORE)
    words = TEXT.split()
    assert len(at) == len(words)
    assert source.classes == ("long", "short", "sign")
    spelled = ["sign" if not w.isalpha() else "long" if len(w) > 3 else "short" for w in words]
    assert [source.classes[t] for t in example["tags"][at]] == spelled
    for start, stop, word in zip(at, [*at[1:], len(example["tokens"]) - 1], words, strict=True):
        text = tokenizer.decode(example["tokens"][start:stop]).strip()
        assert text.lower() == word.lower()


def test_invalid_tagged_records_are_rejected(tmp_path: Path, files: Path) -> None:
    tokenizer = train([TEXT], "word", 140, num_sentinels=3)
    for row, message in (
        ({"tokens": ["a", "b"], "tags": ["x"]}, "of the same length"),
        ({"text": "a b"}, "of the same length"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=f"bad.jsonl.*{message}"):
            Records(TaggedConfig(max_length=20), [str(tmp_path / "bad.jsonl")], tokenizer)
    with pytest.raises(UserError, match=r"the tag short is none of the classes \(long\)"):
        Records(TaggedConfig(max_length=20), [f"{files}/tagged.jsonl"], tokenizer, classes=("long",))


def test_word_tokenizer_has_the_most_frequent_words() -> None:
    tokenizer = train(["the The cat , cat zebra THE"], "word", 112, num_sentinels=100)
    assert tokenizer.pieces("The cat, a zebra") == ["the", "cat", ",", "<unk>", "zebra"]
    assert tokenizer.vocab.size == 111
    assert tokenizer.vocab.starts(tokenizer.encode("The cat, a zebra")).all()
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert (
        not tokenizer.vocab.special[tokenizer.encode("</s> <mask> <pad>")].sum()
        - (tokenizer.encode("</s> <mask> <pad>") == tokenizer.vocab.roles["unk"]).sum()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["lstm", "model.causal=false"],
            "objective causal_lm reads a text from left to right, which a bidirectional LSTM cannot",
        ),
        (["lstm", "objective=mlm"], "objective mlm reads a text from both sides, which a left-to-right LSTM cannot"),
        (["lstm", "objective=span_corruption"], "an encoder-decoder"),
        (
            ["lstm", "objective={kind: span_corruption, layout: prefix}", "model.causal=false"],
            "reads a prompt in both directions and continues it in the same row",
        ),
        (["gpt", "objective=word2vec"], "reads each token by itself, which a causal decoder cannot"),
        (["word2vec", "objective=causal_lm"], "which a table of word vectors cannot"),
        (["bert", "objective=bilm"], "reads a text with two separate models"),
        (["elmo", "objective=causal_lm"], "which a bidirectional LSTM with separate directions cannot"),
    ],
)
def test_incompatible_recipe_is_rejected_when_loaded(changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(changes[0], changes[1:])


def test_bidirectional_lstm_supports_encoder_objectives() -> None:
    assert (
        load("lstm", ["model.causal=false", "objective=mlm", "examples=chunks"]).model.description
        == "a bidirectional LSTM"
    )
    for name in ("word2vec", "lstm", "elmo"):
        assert load(f"{name}:published").data.path == ()


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("A heron counts the rain.", [], "too few words for word2vec: 5 that .* train on a longer text$"),
        (
            "A heron counts the rain. " * 3,
            [],
            "17 that .* examples.subsampling_threshold=0.001 keeps about 1.5; .* set examples.subsampling_threshold=0",
        ),
        ("heron\nrain\nboat\nmill\n" * 9, ["data.split_by=line"], "single word, so no word has a neighbor"),
    ],
)
def test_word2vec_on_too_little_text_is_rejected(text: str, changes: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    plan = ["word2vec", f"data.path={tmp_path}/a.txt", "model.hidden_size=8", "max_steps=1", "batch.size=2"]
    with pytest.raises(UserError, match=message):
        run(load(plan[0], [*plan[1:], *changes]), tmp_path / "run", log=lambda _: None)


def test_word2vec_trains_on_a_short_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A heron counts the rain. " * 3)
    changes = [
        f"data.path={tmp_path}/a.txt",
        "model.hidden_size=8",
        "max_steps=1",
        "batch.size=2",
        "examples.subsampling_threshold=0",
    ]
    finished = run(load("word2vec", changes), tmp_path / "run", log=lambda _: None)
    assert np.isfinite(list(finished.metrics.values())).all()
