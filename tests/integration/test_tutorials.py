"""The tutorials on chat models and on PPO and DPO, run in order at tiny size on made-up plays."""

from __future__ import annotations

import json
import random
import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from firth.cli import app
from tests.support.commands import ROOT, fenced

TINY = ["max_steps=2", "evaluation.every=2", "evaluation.max_examples=8"]
SETTINGS = {
    "gpt": ["data.path=text.txt", "data.split_by=line", "tokenizer.vocab_size=300", "model.hidden_size=32", "model.num_heads=2",
            "model.num_layers=1"],
    "ppo": ["batch.size=8", "examples.rollout_size=8", "examples.max_new_tokens=8", "max_steps=2"],
}  # fmt: skip
WORDS = [
    "so",
    "shaken",
    "as",
    "we",
    "are",
    "wan",
    "with",
    "care",
    "find",
    "a",
    "time",
    "for",
    "frighted",
    "peace",
    "to",
    "pant",
    "and",
    "breathe",
    "short",
    "accents",
]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with a text and the speeches of two plays."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=6)) + rng.choice(".?") for _ in range(400)]
    plays = ["the-tempest" if i < 12 else "hamlet" for i in range(len(lines))]
    rows = [{"play": play, "speaker": "A", "text": line} for play, line in zip(plays, lines, strict=True)]
    (tmp_path / "speeches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return tmp_path


def follow(page: str) -> str:
    """Run the commands and scripts of a tutorial in the working directory, and return what the commands print."""
    text = (ROOT / "docs" / "tutorials" / page).read_text("utf-8")
    printed = ""
    for before, language, block in fenced(text):
        names = re.findall(r"[Ss]ave this as `(\w+\.py)`", before.rpartition("\n## ")[2])
        if language == "python" and names:
            Path(names[-1]).write_text(block.replace("1500", "200"), "utf-8")
        elif language == "python":
            exec(compile(block, page, "exec"), {})
        for line in block.splitlines() if language == "" else ():
            words = shlex.split(line)
            if words[0] == "python":
                runpy.run_path(words[1])
            elif words[0] == "firth" and words[1] not in ("fetch", "chat"):
                name = words[2].partition(":")[0]
                tiny = [*TINY, *SETTINGS.get(name, [])] if words[1] == "train" else []
                done = CliRunner().invoke(app, [*words[1:], *tiny], input="Good morrow\n\n")
                assert done.exit_code == 0, f"{line}\n{done.output}{done.exception or ''}"
                printed += done.output
    return printed


def test_the_tutorials_run_in_order(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = follow("chat-model.md")
    assert "runs/chat/model" in printed
    assert len((directory / "test.jsonl").read_text("utf-8").splitlines()) == 11
    capsys.readouterr()
    printed = follow("ppo-and-dpo.md")
    assert {"dpo", "ppo", "reward"} <= {path.name for path in (directory / "runs").iterdir()}
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if " answers ask" in line] == [
        "chat",
        "dpo",
        "ppo",
    ]
