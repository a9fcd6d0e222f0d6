"""Every recipe in fp32 and bf16: two small steps, stopped and resumed bit by bit, reloaded, exported."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from firth.pretrained.load_save import load_model
from firth.runs.import_export import export_model
from firth.runs.prepare import train_tokenizer
from firth.runs.recipe import Recipe, load, published
from firth.runs.recipe_names import RECIPES
from firth.runs.run import RunResult, run
from firth.training import trainer
from firth.training.run_lock import Interrupted

TEXT = "the king and queen of all that land did walk by night with many a fool who sang. But no one heard it, my lord!"
WORDS = TEXT.split()

FEW = (
    "max_steps=2", "batch.size=4", "evaluation.every=0", "checkpoint.every=1", "evaluation.max_examples=4", "evaluation.best_metric=",
)  # fmt: skip

SMALL = {
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.head_dim": 0,
    "model.num_kv_heads": 0,
    "model.intermediate_size": 48,
}

TUNED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "classification": ("bert", "labeled.jsonl", ()),
    "regression": ("bert", "scored.jsonl", ()),
    "multiple_choice": ("bert", "choices.jsonl", ()),
    "token_classification": ("bert", "tagged.jsonl", ()),
    "token_features": ("elmo", "tagged.jsonl", ()),
    "question_answering": (
        "bert",
        "questions.jsonl",
        ("examples.max_length=64", "examples.doc_stride=16", "examples.max_question_length=16"),
    ),
    "text_to_text": ("t5", "dialogues.jsonl", ()),
    "glue": ("bert", "sentences.tsv", ()),
    "semi_supervised": ("bert", "labeled.jsonl", ("examples.num_labeled=8", "examples.teacher={classification}")),
    "weak_supervision": ("bert", "votes.jsonl", ()),
    "closed_book_questions": ("closed_book", "dialogues.jsonl", ()),
    "sft": ("gpt", "dialogues.jsonl", ()),
    "reward_model": ("gpt", "preferences.jsonl", ()),
    "ranking": ("gpt", "rankings.jsonl", ()),
    "dpo": ("gpt", "preferences.jsonl", ()),
    "simpo": ("gpt", "preferences.jsonl", ()),
    "orpo": ("gpt", "preferences.jsonl", ()),
    "kto": ("gpt", "labeled_answers.jsonl", ()),
    "reinforce": (
        "gpt",
        "dialogues.jsonl",
        ("examples.reward_function=builtins:len", "examples.rollout_size=8", "examples.max_new_tokens=6"),
    ),
    **dict.fromkeys(
        ("rloo", "grpo"),
        (
            "gpt",
            "dialogues.jsonl",
            ("examples.reward_function=builtins:len", "examples.rollout_size=8", "examples.max_new_tokens=6"),
        ),
    ),
    "ppo": (
        "gpt",
        "dialogues.jsonl",
        ("examples.reward_model={reward_model}", "examples.rollout_size=8", "examples.max_new_tokens=6"),
    ),
}
"""Recipe -> the recipe of the run that it starts from, its records, and its settings."""

Make = Callable[[str, str], RunResult]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen documents, a tokenizer of them, and records of every kind."""
    place = tmp_path_factory.mktemp("precision")
    (place / "text").mkdir()
    for number in range(24):
        turned = [WORDS[(i * (number % 7 + 1) + number) % len(WORDS)] for i in range(300)]
        lines = [" ".join(turned[i : i + 9]).capitalize() for i in range(0, 300, 9)]
        (place / "text" / f"{number}.txt").write_text(". ".join(lines))
    train_tokenizer(
        [str(place / "text")],
        place / "tok",
        algorithm="byte-bpe",
        vocab_size=400,
        num_sentinels=100,
        log=lambda _: None,
    )

    def write(name: str, record: Callable[[int, list[str]], object]) -> None:
        spoken = [[WORDS[(i * 3 + k) % len(WORDS)] for k in range(5)] + [f"number {i}"] for i in range(40)]
        rows = [json.dumps(record(i, words)) + "\n" for i, words in enumerate(spoken)]
        (place / f"{name}.jsonl").write_text("".join(rows))

    write("labeled", lambda i, words: {"text": " ".join(words), "label": "ab"[i % 2]})
    write("scored", lambda i, words: {"text": " ".join(words), "label": i / 4})
    write("choices", lambda i, words: {"text": " ".join(words), "options": ["king", "queen"], "label": i % 2})
    write("tagged", lambda i, words: {"tokens": words, "tags": ["x" if len(word) > 4 else "y" for word in words]})
    write("votes", lambda i, words: {"text": " ".join(words), "labels": ["a", "b", "ab"[i % 2]]})
    write("dialogues", lambda i, words: {"prompt": " ".join(words), "completion": words[0]})
    write("preferences", lambda i, words: {"prompt": " ".join(words), "chosen": words[0], "rejected": "fool fool"})
    write("labeled_answers", lambda i, words: {
        "prompt": " ".join(words), "completion": words[0] if i % 3 else "fool", "label": i % 3 > 0,
    })  # fmt: skip
    write("rankings", lambda i, words: {"prompt": " ".join(words), "answers": [words[0], words[1], "fool fool"]})
    write("questions", lambda i, words: {
        "id": str(i), "question": "who?", "context": " ".join(words), "title": str(i),
        "answers": {"text": [words[0]], "answer_start": [0]},
    })  # fmt: skip
    rows = [f"{' '.join(WORDS[i % 9 : i % 9 + 5])} {i}\t{i % 2}\n" for i in range(40)]
    (place / "sentences.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    return place


@pytest.fixture(scope="module")
def make(folder: Path) -> Make:
    """Return the run of a recipe in a precision, stopped after the first step and resumed."""
    made: dict[tuple[str, str], RunResult] = {}

    def one(name: str, precision: str) -> RunResult:
        if (name, precision) not in made:
            plan, directory = small(name, precision, folder, one), folder / f"{name}-{precision}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(trainer, "interrupt_handler", lambda _: InterruptOnce())
                with pytest.raises(Interrupted):
                    run(plan, directory, log=lambda _: None)
            made[name, precision] = run(plan, directory, log=lambda _: None)
        return made[name, precision]

    return one


class InterruptOnce:
    """Ctrl-C in the middle of the first step."""

    requested = True

    def __enter__(self) -> InterruptOnce:
        return self

    def __exit__(self, *_: object) -> None: ...


def small(name: str, precision: str, folder: Path, make: Make) -> Recipe:
    """Return the recipe with smaller sizes."""
    if name in TUNED:
        start, records, more = TUNED[name]
        runs = {
            key: make(key, precision).directory
            for key in ("classification", "reward_model")
            if f"{{{key}}}" in "".join(more)
        }
        settings = [f"init_from={make(start, precision).directory}", f"data.path={folder / records}"]
        settings += [setting.format(**runs) for setting in more]
    else:
        config = published(name).model
        assert config is not None
        sizes = (
            SMALL
            | ({"model.encoder.num_layers": 2} if config.encoder.num_layers else {})
            | ({} if config.num_layers else {"model.num_layers": 0})
        )
        settings = [f"{field}={value}" for field, value in sizes.items()]
        settings += [f"data.path={folder / 'text'}"]
        own = published(name).tokenizer.algorithm == "word"
        settings += ["tokenizer.vocab_size=400"] if own else [f"tokenizer.path={folder / 'tok'}"]
    return load(name, [*FEW, *settings, f"precision={precision}", "sample_prompts=[]"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RECIPES)
def test_run_resumes_bit_identical_and_reloads(
    name: str, precision: str, folder: Path, make: Make, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    whole = run(small(name, precision, folder, make), tmp_path / "whole", log=lambda _: None)
    resumed = make(name, precision)
    assert whole.steps == 2 and whole.metrics == resumed.metrics
    first, second = (load_model(x.model).state_dict() for x in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.isfinite(x).all() for x in first.values())
    facts = json.loads((resumed.model / "firth.json").read_text("utf-8"))["facts"]
    assert facts["steps"] == 2
    with warnings.catch_warnings(action="ignore"):
        export_model(resumed.directory, tmp_path / "export", form="hf", dtype="", shard="", log=lambda _: None)
    exported = load_model(tmp_path / "export").state_dict()
    assert all(torch.equal(exported[k], second[k]) for k in second)
