"""Items whose words are in training text: the definition of GPT-3's appendix C against a search written out."""

import json
import random
from pathlib import Path

import pytest

from firth.corpora.readers import Document
from firth.data.token_store import TokenStore
from firth.evaluate.prompting import contamination
from firth.evaluate.prompting.contamination import Contamination, TrainingText, find_contaminated, words
from firth.evaluate.prompting.prompt_task import ItemResult, PromptConfig
from firth.evaluate.prompting.prompts import Item
from firth.evaluate.prompting.results import contamination_lines, to_json
from firth.evaluate.prompting.runner import TaskResult, metric_value, with_contamination
from firth.evaluate.prompting.task_files import load_tasks
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from tests.support.tiny_corpus import TEXTS, tokenizer


def training(folder: Path, texts: list[str], coder: Tokenizer) -> TrainingText:
    documents = [Document(f"doc {i}", text) for i, text in enumerate(texts)]
    return TrainingText("run", [TokenStore.build(documents, coder, folder / "store")], coder)


def expected(item: dict[str, object], texts: list[str]) -> bool | None:
    """Search each document for each n-gram, by the definition."""
    fields = [words(text) for text in item.values() if isinstance(text, str)]
    grams = [field[i : i + 13] for field in fields for i in range(len(field) - 12)]
    longest = max(fields, key=len)
    if not grams:
        if len(longest) < 8:
            return None
        grams = [longest]
    documents = [f" {' '.join(words(text))} " for text in texts]
    return any(f" {' '.join(gram)} " in document for gram in grams for document in documents)


@pytest.mark.parametrize("algorithm", ["byte-bpe", "wordpiece", "unigram"])
def test_items_are_found_as_by_a_direct_search(tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies in other case and punctuation, changed by one word, of all lengths, across two documents, and in pieces."""
    monkeypatch.setattr(contamination, "PIECE_TOKENS", 300)
    monkeypatch.setattr(contamination, "BATCH_TOKENS", 1000)
    coder = tokenizer() if algorithm == "byte-bpe" else train(TEXTS, algorithm, vocab_size=600, seed=0)
    texts = [" ".join(f"w{(7 * i + k * k) % 89}" for k in range(5 + 60 * i)) for i in range(12)]
    rng = random.Random(0)
    items = []
    for length in (7, 8, 12, 13, 14, 40):
        for _ in range(12):
            document = words(rng.choice(texts[3:]))
            start = rng.randrange(len(document) - length)
            copied = document[start : start + length]
            if rng.random() < 0.5:
                copied[rng.randrange(length)] = "other"
            items.append(Item({"text": ", ".join(copied).upper() + "!", "short": "Yes.", "n": 3}, "q.jsonl:1"))
    ends = words(texts[5])[-7:] + words(texts[6])[:7]
    items.append(Item({"text": " ".join(ends)}, "q.jsonl:2"))
    [found] = find_contaminated([items], [training(tmp_path, texts, coder)])
    assert list(found.items) == [expected(dict(item.fields), texts) for item in items]
    assert {True, False, None} == set(found.items) and found.items[-1] is False


def test_lists_in_a_record_are_looked_up(tmp_path: Path) -> None:
    """Choices are texts of their own; an item that one of two runs has is found."""
    text = " ".join(f"word{i}" for i in range(30))
    runs = [training(tmp_path / name, [one], tokenizer()) for name, one in (("a", "nothing of it"), ("b", text))]
    tasks = [
        [Item({"choices": ["no", " ".join(text.split()[3:16])]}, "a:1"), Item({"q": "x " * 13}, "a:2")],
        [Item({"q": "short"}, "b:1")],
    ]
    first, second = find_contaminated(tasks, runs)
    assert first.items == (True, False) and second.items == (None,)
    assert (first.checked, first.found, first.share, second.share) == (2, 1, 0.5, 0.0)


def test_only_the_texts_of_an_item_alone_are_looked_up(tmp_path: Path) -> None:
    """A question of BIG-bench without its prefix and listed choices; instances without the definition of their task."""
    text = " ".join(f"word{i}" for i in range(60)).split()
    question, choice, definition = (" ".join(text[i : i + 14]) for i in (0, 20, 40))
    example = {"input": question + "?", "target_scores": {"yes": 1, "no": 0}}
    other = {"input": "x", "target_scores": {"z " * 14: 1, choice: 0}}
    short = {"input": " ".join(text[:9]), "target_scores": {"yes": 1, "no": 0}}
    clean = {"input": "y " * 14, "target_scores": {"yes": 1, "no": 0}}
    task = {"name": "t", "metrics": ["multiple_choice_grade"], "examples": [example, other, short, clean]}
    (tmp_path / "task.json").write_text(json.dumps(task))
    [bigbench] = load_tasks(str(tmp_path))
    rows = [{"input": f"{one} " * 14, "output": ["done"]} for one in ("a", question)]
    natural = {"Definition": [definition], "Positive Examples": rows[:1], "Instances": rows}
    (tmp_path / "natural.json").write_text(json.dumps(natural))
    [instructions] = load_tasks("natural_instructions", [str(tmp_path / "natural.json")])
    documents = [" ".join(text[:14]), " ".join(text[20:60])]
    first, second = find_contaminated(
        [bigbench.items, instructions.items], [training(tmp_path / "run", documents, tokenizer())]
    )
    assert first.items == (True, True, True, False) and second.items == (False, True)


def test_the_clean_items_have_metrics_of_their_own() -> None:
    """The share and the score on the clean items are printed and in the JSON."""
    items = [ItemResult(f"q:{i}", "", "p", 0, "y", {}, {"acc": float(i < 3)}, []) for i in range(5)]
    plain = TaskResult("task", "model", 0, 0, {"acc": metric_value("acc", items)}, {}, items)
    result = with_contamination(plain, Contamination(("runs/mine",), (True, False, True, False, None)))
    assert result.metrics["acc"].value == 0.6 and result.clean["acc"].value == 0.5
    first, second = contamination_lines([result])
    assert first.startswith("task: 2 of 4 items (50.0%) have 13 consecutive words") and first.endswith(
        "; too short to tell: 1"
    )
    assert second == "task: model on the other 2: acc 0.5000 ± 0.5000"
    found = to_json([result], PromptConfig())["contamination"]["task"]
    assert found["share"] == 0.5 and found["clean"]["acc,none"] == 0.5
    assert to_json([plain], PromptConfig())["contamination"] == {}
