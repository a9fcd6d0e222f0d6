"""The demo at a tiny size, on a user's own folder; a killed demo resumes and ends with the same bits."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from firth.align.rewards import PreferencePairs, read_preference_pairs
from firth.data.dialogues import PreferencesConfig
from firth.data.records import Records
from firth.demo import data
from firth.demo.data import DatasetInfo, read_rows, sample_balanced
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

STAGES = (
    "encoder",
    "encoder-decoder",
    "decoder",
    "classification-pretrained",
    "classification-scratch",
    "sft",
    "reward_model",
    "ppo",
    "dpo",
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve files of real text that every Python installation contains: its help topics."""
    directory = tmp_path_factory.mktemp("texts")
    topics = sorted(pydoc_data.topics.topics.items())
    for i in range(12):
        (directory / f"part-{i}.txt").write_text("\n\n".join(text for _, text in topics[i::12]), "utf-8")
    return directory


def demo_command(texts: Path, out: Path) -> list[str]:
    """Return the command of a tiny demo on a folder."""
    return [sys.executable, "-m", "firth", "demo", "--size", "tiny", "--text", str(texts), "--out", str(out)]


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a demo that ran without interruption."""
    out = tmp_path_factory.mktemp("demo") / "finished"
    process = subprocess.run(demo_command(texts, out), capture_output=True, text=True, timeout=500)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "taaaaasty" in process.stdout and "true reward" in process.stdout and "[7/7]" in process.stdout
    return out


def test_every_stage_writes_a_run_and_the_report(finished: Path) -> None:
    for stage in STAGES:
        assert (finished / stage / "done.json").exists(), stage
        assert (finished / stage / "model" / "model.safetensors").exists(), stage
    page = (finished / "report.html").read_text("utf-8")
    for words in ("Subwords", "PPO and DPO", "reward model", "firth chat", "bits per byte", "taaaaasty"):
        assert words in page, words
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page.split("<body", 1)[0]


@pytest.mark.oracle
def test_transformers_loads_the_models(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

    for name, auto_class in (
        ("encoder", AutoModelForMaskedLM),
        ("encoder-decoder", AutoModelForSeq2SeqLM),
        ("decoder", AutoModelForCausalLM),
        ("ppo", AutoModelForCausalLM),
    ):
        directory = finished / name / "model"
        model, loading_info = auto_class.from_pretrained(directory, output_loading_info=True)
        assert not loading_info["missing_keys"], (name, loading_info)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokens = tokenizer("print the value", return_tensors="pt", add_special_tokens=False)
        assert tokens["input_ids"].shape[1] > 1
        assert model.config.vocab_size >= len(tokenizer)


def test_preferences_hold_texts_and_sampled_tokens(finished: Path, tmp_path: Path) -> None:
    """The preference files hold texts, as any preference data does, and the sampled tokens; a reward model trains on them."""
    file, start = finished / "material" / "preferences-train.jsonl", finished / "sft"
    rows = read_rows(file)
    assert all(isinstance(row[name], str) for row in rows for name in ("prompt", "chosen", "rejected"))
    tokenizer = Tokenizer.load(start)
    records, sampled = (
        Records(PreferencesConfig(max_length=256), [str(file)], tokenizer),
        PreferencePairs(read_preference_pairs(file)),
    )
    prompts = {row["prompt"] for row in read_rows(finished / "material" / "dialogues-train.jsonl")}
    assert {row["prompt"] for row in rows} <= prompts
    for i, record in enumerate(records.record_ids.tolist()):
        for side in ("chosen", "rejected"):
            ids = tokenizer.encode(rows[record][side])
            from_sampling, from_text = sampled[record][f"{side}_tokens"], records[i][f"{side}_tokens"]
            prompt_length = len(rows[record]["tokens"]["prompt"])
            assert from_text[:prompt_length].tolist() == from_sampling[:prompt_length].tolist()
            # The sampled tokens may be another split of the text than the tokenizer's; if they are not, both rows are equal.
            if rows[record]["finished"][side] and ids.tolist() == from_sampling[prompt_length:-1].tolist():
                assert from_text[: len(from_sampling)].tolist() == from_sampling.tolist()
    settings = [f"init_from={start}", f"data.path={file}", "max_steps=1", "batch.size=4", "evaluation.every=0"]
    run(load("reward_model", settings), tmp_path / "reward_model", log=lambda _: None)
    assert (tmp_path / "reward_model" / "model" / "model.safetensors").exists()


def test_a_finished_demo_trains_nothing_again(finished: Path, texts: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    subprocess.run(demo_command(texts, finished), check=True, capture_output=True, timeout=300)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before


def test_a_killed_demo_ends_with_the_same_bits(finished: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    rng = random.Random(0)
    for stage in ("encoder", "sft", "reward_model"):
        process = subprocess.Popen(demo_command(texts, out), stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 240
        while not (out / stage / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "ppo" / "done.json").exists()
    resumed = subprocess.run(demo_command(texts, out), capture_output=True, text=True, timeout=500)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    for stage in STAGES:
        metrics = [json.loads((d / stage / "done.json").read_text())["metrics"] for d in (out, finished)]
        assert metrics[0] == metrics[1], stage
        weights = [(d / stage / "model" / "model.safetensors").read_bytes() for d in (out, finished)]
        assert weights[0] == weights[1], stage


def test_another_text_in_the_same_directory_is_rejected(finished: Path, tmp_path: Path) -> None:
    process = subprocess.run(demo_command(tmp_path, finished), capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and "holds a demo of other text" in process.stderr


def test_too_little_text_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Too little. " * 9)
    with pytest.raises(UserError, match="too little for the demo"):
        data.make_folder_data([str(tmp_path)], tmp_path / "out")


def test_one_large_file_is_enough(tmp_path: Path) -> None:
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    (tmp_path / "book.txt").write_text(text, "utf-8")
    info = data.make_folder_data([str(tmp_path / "book.txt")], tmp_path / "out")
    assert info.labels == ("beginning", "middle", "end")
    passages = [
        row["text"] for split in ("train", "valid") for row in read_rows(tmp_path / "out" / f"labeled-{split}.jsonl")
    ]
    assert len(set(passages)) > 100
    held_out = {row["text"] for row in read_rows(tmp_path / "out" / "valid.jsonl")}
    assert held_out and not held_out & {row["text"] for row in read_rows(tmp_path / "out" / "train.jsonl")}
    assert DatasetInfo.load(tmp_path / "out") == info


def test_questions_statements_and_balance() -> None:
    labeled = data.sentences("What is it\nyou would see, my lord? It is a ghost that walks at night. Nay! Ay.")
    assert [row["label"] for row in labeled] == ["question", "statement"]
    assert labeled[0]["text"] == "What is it you would see, my lord"
    rows = [{"text": str(i), "label": "a" if i % 4 else "b"} for i in range(40)]
    sampled = sample_balanced(rows, 100, random.Random(0))
    assert sum(row["label"] == "a" for row in sampled) == sum(row["label"] == "b" for row in sampled) == 10


def test_true_rewards_prefer_what_they_describe() -> None:
    assert data.brief("I will come to you.") > data.brief("I will come to you")
    assert data.brief("word " * 60 + ".") < 0.1
    assert data.thou("Thou art my friend.") > data.thou("You are my friend.")
    many = data.thou("thou thee thy thine hast dost art wilt.")
    assert many <= data.thou("thou shalt hear thy brother speak tonight.")
