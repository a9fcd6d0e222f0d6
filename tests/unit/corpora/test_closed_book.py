"""The closed book: the patterns, the split by name, and the evaluation of a model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from firth.corpora import catalog
from firth.corpora.closed_book import Fact, facts, held_out, write_closed_book
from firth.evaluate.evaluate import evaluate
from firth.model.config import decoder_config, encoder_decoder_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.pretrained.load_save import save_model
from firth.tokenizer.train import train
from firth.types import UserError


@pytest.mark.parametrize(
    ("gloss", "wanted"),
    [
        ("Beaumont: a city of southeastern Texas near Houston", ["Texas"]),
        ("Batna: a town in north central Algeria", ["Algeria"]),
        ("Shiraz: a city in central southwestern Iran; ruins are nearby", ["Iran"]),
        ("Panama City, Bay City: a port city on the Gulf of Mexico", ["Gulf of Mexico"]),
        ("Aachen, Aix-la-Chapelle: a city in the far western part of the Netherlands", ["Netherlands"]),
        ("Tokyo, Edo, capital of Japan: the capital and largest city of Japan; a center", ["Tokyo"]),
        ("Kinshasa: the capital of the Democratic Republic of the Congo on the Congo river", ["Kinshasa"]),
        ("Twain, Mark Twain: United States writer and humorist (1835-1910)", ["United States", "1835", "1910"]),
        ("Conrad: English novelist (born in Poland) noted for sea stories (1857-1924)", []),
        ("Conrad: English novelist noted for sea stories (born in Poland) (1857-1924)", []),
        ("Conrad: English novelist noted for sea stories (born in Poland; 1857-1924)", ["English", "1857", "1924"]),
        ("Catherine Howard: Queen of England as the fifth wife of Henry VIII (1520-1542)", []),
        ("South Australia: a province in Australia", []),
        ("city: a large and densely populated urban area", []),
        ("Boston: a city of many hills", []),
        ("Isle Royal: a national park on an island in Michigan", []),
    ],
)
def test_patterns_extract_facts(gloss: str, wanted: list[str]) -> None:
    assert [fact.answer for fact in facts(gloss)] == wanted


def test_a_question_does_not_contain_its_answer() -> None:
    for gloss in ("Tunis: a city in Tunisia", "Mexico City: capital and largest city of Mexico"):
        assert facts(gloss) == []


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_glosses_and_their_questions(tmp_path: Path) -> None:
    senses = [f"Town{i}: a town in northern Land{i % 7}" for i in range(200)]
    senses += ["Portland: a city in Oregon", "Portland: a city in Maine", "run: move fast"]
    data = "".join(
        f"{i:08d} 15 n 01 {sense.split(':')[0]} 0 000 | {sense.split(': ')[1]}\n" for i, sense in enumerate(senses)
    )
    summary = write_closed_book([("data.noun", io.BytesIO(data.encode()))], tmp_path, about="places")
    text, trained, examined = (rows(tmp_path / f"{name}.jsonl") for name in ("text", "train", "test"))
    assert "200 glosses" in summary and len(text) == 200  # Portland has two glosses with different answers
    assert len(trained) + len(examined) == 200 and 30 < len(examined) < 70
    assert all(held_out(Fact("where", row["prompt"].split(" is ")[0], "", "")) for row in examined)
    assert not {row["prompt"] for row in trained} & {row["prompt"] for row in examined}
    answer = {row["text"].split(":")[0]: row["text"].split()[-1] for row in text}
    assert all(answer[row["prompt"].split(" is ")[0]] == row["completion"] for row in trained + examined)


def test_a_file_of_a_corpus_is_named_after_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path))
    [file] = catalog.paths("pydoc/assert.txt", lambda _: None)
    assert "assert" in Path(file).read_text("utf-8")
    with pytest.raises(UserError, match="no file 'nosuch"):
        catalog.paths("pydoc/nosuch.txt", lambda _: None)


@pytest.mark.slow
def test_answers_are_scored_by_exact_match(tmp_path: Path) -> None:
    questions = [{"prompt": f"Where is Town{i}?", "completion": "Texas"} for i in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    tokenizer = train(["Where is Texas? Town 0 1 2 3"] * 20, "unigram", vocab_size=330, num_sentinels=4)
    config = encoder_decoder_config(tokenizer.vocab.size, 32, 1, num_heads=2, max_positions=64)
    torch.manual_seed(0)
    model = LM(config, {"lm": LMHead(config)})
    save_model(model, tokenizer, tmp_path / "model")
    found = evaluate(tmp_path / "model", [str(tmp_path / "test.jsonl")], task="generation")
    assert (found["items"], found["exact_match"], found["majority_label"], found["majority_accuracy"]) == (
        4,
        0.0,
        "Texas",
        1.0,
    )
    # Train the model to answer: each position predicts one piece of the answer.
    wanted = [*tokenizer.encode("Texas").tolist(), tokenizer.vocab.eos]
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    source = torch.as_tensor([[*tokenizer.encode(row["prompt"]).tolist(), tokenizer.vocab.eos] for row in questions])
    for _ in range(60):
        adam.zero_grad()
        reach = torch.arange(len(wanted)).expand(4, -1)
        tokens = torch.tensor([[tokenizer.vocab.pad, *wanted[:-1]]] * 4)
        hidden = model({"source_tokens": source, "tokens": tokens, "query_time": reach, "key_time": reach})
        logits = model.heads["lm"](hidden)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(wanted * 4)).backward()
        adam.step()
    save_model(model, tokenizer, tmp_path / "model")
    assert evaluate(tmp_path / "model", [str(tmp_path / "test.jsonl")], task="generation")["exact_match"] == 1.0
    causal = LM(
        decoder_config(tokenizer.vocab.size, 32, 1), {"lm": LMHead(decoder_config(tokenizer.vocab.size, 32, 1))}
    )
    save_model(causal, tokenizer, tmp_path / "causal")
    found = evaluate(tmp_path / "causal", [str(tmp_path / "test.jsonl")], task="generation")
    assert (found["items"], found["exact_match"]) == (4, 0.0)
