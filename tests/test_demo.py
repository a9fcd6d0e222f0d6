"""The demo at a tiny size, on a user's own folder: killed half-way it goes on and ends with the same bits."""

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
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from firth.align.rewards import PreferencePairs, read_preference_pairs
from firth.data.records import PreferenceRecords
from firth.demo import folder, plays, scorers
from firth.demo.data import DemoText, balanced, read_rows
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

STAGES = ("encoder", "encoder-decoder", "decoder", "classification-pretrained", "classification-scratch", "sft", "reward_model",
          "ppo", "dpo")  # fmt: skip


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve files of real text that every Python carries: its help topics."""
    place = tmp_path_factory.mktemp("mine")
    topics = sorted(pydoc_data.topics.topics.items())
    for i in range(12):
        (place / f"part-{i}.txt").write_text("\n\n".join(text for _, text in topics[i::12]), "utf-8")
    return place


def walk(mine: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "firth.cli", "demo", "--size", "tiny", "--text", str(mine), "--out", str(out)]


@pytest.fixture(scope="module")
def whole(mine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "whole"
    done = subprocess.run(walk(mine, out), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "taaaaasty" in done.stdout and "true reward" in done.stdout and "[7/7]" in done.stdout
    return out


def test_every_stage_leaves_a_run_and_the_report_says_what_happened(whole: Path) -> None:
    for stage in STAGES:
        assert (whole / stage / "done.json").exists(), stage
        assert (whole / stage / "model" / "model.safetensors").exists(), stage
    page = (whole / "report.html").read_text("utf-8")
    for said in ("Subwords", "PPO and DPO", "reward model", "firth chat", "bits per byte", "taaaaasty"):
        assert said in page, said
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page.split("<body", 1)[0]


def test_transformers_loads_what_it_made(whole: Path) -> None:
    for name, kind in (("encoder", AutoModelForMaskedLM), ("encoder-decoder", AutoModelForSeq2SeqLM),
                       ("decoder", AutoModelForCausalLM), ("ppo", AutoModelForCausalLM)):  # fmt: skip
        place = whole / name / "model"
        model, told = kind.from_pretrained(place, output_loading_info=True)
        assert not told["missing_keys"], (name, told)
        tokens = AutoTokenizer.from_pretrained(place)("print the value", return_tensors="pt", add_special_tokens=False)
        assert tokens["input_ids"].shape[1] > 1
        assert model.config.vocab_size >= len(AutoTokenizer.from_pretrained(place))


def test_its_files_are_read_by_the_next_command(whole: Path, tmp_path: Path) -> None:
    """Its preferences hold texts as every preference does, and the tokens that were sampled beside them."""
    file, start = whole / "material" / "preferences-train.jsonl", whole / "sft"
    rows = read_rows(file)
    assert all(isinstance(row[name], str) for row in rows for name in ("prompt", "chosen", "rejected"))
    tokenizer = Tokenizer.load(start)
    texts, sampled = PreferenceRecords([str(file)], tokenizer, 256), PreferencePairs(read_preference_pairs(file))
    requests = {row["prompt"] for row in read_rows(whole / "material" / "dialogues-train.jsonl")}
    assert {row["prompt"] for row in rows} <= requests
    for i, owner in enumerate(texts.record_ids.tolist()):
        for side in ("chosen", "rejected"):
            ids = tokenizer.encode(rows[owner][side])
            ours, theirs = sampled[owner][f"{side}_tokens"], texts[i][f"{side}_tokens"]
            asked = len(rows[owner]["tokens"]["prompt"])
            assert theirs[:asked].tolist() == ours[:asked].tolist()
            # What was sampled may be cut into other pieces than its text is; where it is not, it is the same row.
            if rows[owner]["finished"][side] and ids.tolist() == ours[asked:-1].tolist():
                assert theirs[: len(ours)].tolist() == ours.tolist()
    settings = [f"init_from={start}", f"data.path={file}", "max_steps=1", "batch.size=4", "evaluation.every=0"]
    run(load("reward_model", settings), tmp_path / "reward_model", log=lambda _: None)
    assert (tmp_path / "reward_model" / "model" / "model.safetensors").exists()


def test_again_it_does_nothing(whole: Path, mine: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*.safetensors")}
    subprocess.run(walk(mine, whole), check=True, capture_output=True, timeout=300)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*.safetensors")} == before


def test_killed_half_way_it_ends_with_the_same_bits(whole: Path, mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    rng = random.Random(0)
    for stage in ("encoder", "sft", "reward_model"):
        process = subprocess.Popen(walk(mine, out), stdout=subprocess.DEVNULL, start_new_session=True)
        until = time.monotonic() + 240
        while not (out / stage / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(rng.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "ppo" / "done.json").exists()
    done = subprocess.run(walk(mine, out), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in STAGES:
        ours, theirs = (json.loads((d / stage / "done.json").read_text())["metrics"] for d in (out, whole))
        assert ours == theirs, stage
        weights = [(d / stage / "model" / "model.safetensors").read_bytes() for d in (out, whole)]
        assert weights[0] == weights[1], stage


def test_another_text_in_the_same_place_is_refused(whole: Path, tmp_path: Path) -> None:
    done = subprocess.run(walk(tmp_path, whole), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "another" in done.stderr.replace("other text", "another text")


def test_too_little_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Too little. " * 9)
    with pytest.raises(UserError, match="too little for the demo"):
        folder.make([str(tmp_path)], tmp_path / "out")


def test_one_large_file_is_enough(tmp_path: Path) -> None:
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    (tmp_path / "book.txt").write_text(text, "utf-8")
    material = folder.make([str(tmp_path / "book.txt")], tmp_path / "out")
    assert material.labels == ("beginning", "middle", "end")
    labelled = [
        row["text"] for part in ("train", "valid") for row in read_rows(tmp_path / "out" / f"labeled-{part}.jsonl")
    ]
    assert len(set(labelled)) > 100
    held = {row["text"] for row in read_rows(tmp_path / "out" / "valid.jsonl")}
    assert held and not held & {row["text"] for row in read_rows(tmp_path / "out" / "train.jsonl")}
    assert DemoText.load(tmp_path / "out") == material


def test_questions_statements_and_balance() -> None:
    found = plays.sentences("What is it\nyou would see, my lord? It is a ghost that walks at night. Nay! Ay.")
    assert [row["label"] for row in found] == ["question", "statement"]
    assert found[0]["text"] == "What is it you would see, my lord"
    rows = [{"text": str(i), "label": "a" if i % 4 else "b"} for i in range(40)]
    kept = balanced(rows, 100, random.Random(0))
    assert sum(r["label"] == "a" for r in kept) == sum(r["label"] == "b" for r in kept) == 10


def test_the_true_scorers_want_what_they_say() -> None:
    assert scorers.brief("I will come to you.") > scorers.brief("I will come to you")
    assert scorers.brief("word " * 60 + ".") < 0.1
    assert scorers.thou("Thou art my friend.") > scorers.thou("You are my friend.")
    heap = scorers.thou("thou thee thy thine hast dost art wilt.")
    assert heap <= scorers.thou("thou shalt hear thy brother speak tonight.")
