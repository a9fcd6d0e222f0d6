"""Answers to held-out prompts before and after training, as SFT, reward models, DPO and PPO record them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from firth.objectives.preferences import DPO
from firth.report.run_report import run_report
from firth.runs.recipe import load
from firth.runs.run import RunResult, run
from tests.support.runs import quiet

SMALL = ["batch.size=4", "max_steps=2", "evaluation.every=0", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, dialogues, preferences, and a decoder trained for two steps."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["otter", "baker", "uncle", "pilot", "heron", "tailor", "cook", "farmer", "clerk", "fox"]
    things = ["boat", "lamp", "bread", "door", "coins"]
    rows = [
        {"prompt": f"Who has the {t} {w}?", "chosen": f"The {w}.", "rejected": "No idea."}
        for w in words
        for t in things
    ]
    (folder / "text.txt").write_text("\n\n".join(f"The {w} has the {t}. " * 8 for w in words for t in things))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chat.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) + "\n" for row in rows)
    )
    small = [
        "tokenizer.vocab_size=450",
        "model.hidden_size=32",
        "model.num_layers=1",
        "model.num_heads=1",
        "model.max_positions=64",
        "examples.max_length=32",
    ]
    base = ["data.corpus=", f"data.path={folder / 'text.txt'}", "data.split_by=blank", *small, *SMALL]
    run(load("gpt", base), folder / "gpt", log=quiet)
    return folder


def trained(folder: Path, name: str, records: str, *assignments: str) -> tuple[RunResult, list[dict[str, Any]]]:
    """Train a recipe from the decoder; return the run and its rows of held-out texts."""
    recipe = load(
        name,
        [
            f"init_from={folder / 'gpt'}",
            f"data.path={folder / records}",
            "data.validation_fraction=0.3",
            *SMALL,
            *assignments,
        ],
    )
    done = run(recipe, folder / name, log=quiet)
    rows = [json.loads(line) for line in (done.directory / "held_out_texts.jsonl").read_text("utf-8").splitlines()]
    assert {row["step"] for row in rows} == {0, done.steps}
    assert len(rows) == 16
    assert all(row["held_out"] and "Who has the" in row["prompt"] for row in rows)
    titles = [section.title for section in run_report(done.directory).sections]
    assert titles[1] == "Answers before and after training"
    return done, rows


def test_sft_records_answers_and_references(folder: Path) -> None:
    _, rows = trained(folder, "sft", "chat.jsonl")
    for row in rows:
        assert [answer["name"] for answer in row["answers"]] == ["model", "reference"]
        assert row["answers"][1]["text"].startswith("The ")


def test_a_reward_model_records_the_scores_of_both_answers(folder: Path) -> None:
    _, rows = trained(folder, "reward_model", "pairs.jsonl", "optimizer.lr=0.01")
    before, after = rows[:8], rows[8:]
    for row in rows:
        assert [answer["name"] for answer in row["answers"]] == ["preferred", "rejected"]
        assert row["score"] == "reward" and row["answers"][1]["text"] == "No idea."
    scores = [[[answer["score"] for answer in row["answers"]] for row in some] for some in (before, after)]
    assert scores[0] != scores[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dpo_records_log_ratios_that_begin_at_zero(folder: Path, precision: str) -> None:
    if (folder / "dpo").exists():
        (folder / "dpo").rename(folder / "dpo-before")
    _, rows = trained(folder, "dpo", "pairs.jsonl", "optimizer.lr=0.01", f"precision={precision}")
    for row in rows:
        assert [answer["name"] for answer in row["answers"]] == ["model", "preferred", "rejected"]
        assert row["score"] == "nats above the reference" and row["answers"][0]["score"] is None
        for answer in row["answers"][1:]:
            assert abs(answer["score"]) < (0.05 if precision == "bf16" else 1e-4) or row["step"]
    assert any(abs(answer["score"]) > 0.1 for row in rows[8:] for answer in row["answers"][1:])


def test_ppo_records_answers_to_held_out_prompts_with_rewards(folder: Path) -> None:
    settings = [
        "examples.reward_function=builtins:len",
        "examples.rollout_size=8",
        "examples.num_epochs=1",
        "examples.max_new_tokens=8",
    ]
    done, rows = trained(folder, "ppo", "chat.jsonl", *settings)
    for row in rows:
        [answer] = row["answers"]
        assert answer["score"] == len(answer["text"])
    assert run_report(done.directory).numbers[0].label == "reward"


def test_dpo_says_when_both_answers_become_less_likely() -> None:
    remark = DPO().metrics["chosen"].remark
    assert remark is not None
    sentence = remark({"chosen": 1.0, "valid/chosen": -2.0, "valid/rejected": -5.0})
    assert sentence.startswith("Both answers became less likely than under the reference on held-out comparisons")
    assert "the preferred by 2 nats, the rejected by 5" in sentence
    assert remark({"valid/chosen": 0.5, "valid/rejected": -5.0}) == ""
