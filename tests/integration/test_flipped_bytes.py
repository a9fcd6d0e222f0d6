"""Bytes flipped at random in every file that a run keeps: each command ends in one sentence, or nothing has changed.

The suite flips a few bytes of each file, the same ones each time; FIRTH_FUZZ=1000 flips as many as one likes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from firth.evaluate.task import load_evaluated_model
from firth.io.integrity import write_record
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.pretrained.load_save import save_model
from firth.report.run_report import run_report
from firth.runs.import_export import export_model
from firth.runs.inference import evaluate_run
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError
from tests.support.runs import quiet

FLIPS = int(os.environ.get("FIRTH_FUZZ", "0"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished DPO run that trains an adapter, and so has files of every kind."""
    place = tmp_path_factory.mktemp("flipped")
    tokenizer = train(["the otter paints a red boat " * 9], "byte-bpe", 300)
    config = ModelConfig(vocab_size=tokenizer.vocab.size, hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
    save_model(LM(config, {"lm": LMHead(config)}), tokenizer, place / "base")
    pairs = [{"prompt": f"the {i}", "chosen": "otter", "rejected": f"boat {i}"} for i in range(24)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = [f"init_from={place / 'base'}", f"data.path={place / 'pairs.jsonl'}", "max_steps=2", "batch.size=8",
                "peft=lora", "checkpoint.every=1", "sample_prompts=[the otter]", "precision=fp32"]  # fmt: skip
    run(load("dpo", settings), place / "run", quiet)
    row = {"class": "a", "examples": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    table = {"classes": ["a", "b"], "confusion": [[1, 1], [0, 2]], "per_class": [row, row | {"class": "b"}]}
    write_record(place / "run" / "held_out.json", table)
    return place / "run"


def continue_run(there: Path) -> None:
    run(load(str(there)), there, quiet)


def resume(there: Path) -> None:
    """Resume from the last checkpoint."""
    (there / "done.json").unlink(missing_ok=True)
    continue_run(there)


def export(there: Path) -> None:
    export_model(there, there.parent / "out", form="hf", dtype="", shard="", log=quiet)
    shutil.rmtree(there.parent / "out")


def evaluate(there: Path) -> None:
    evaluate_run(there, [], task=None, limit=None, as_json=False)


Actions = tuple[tuple[Callable[[Path], Any], ...], int]
"""The files that each command reads, and the number of flips in the suite."""
FILES: dict[str, Actions] = {
    "done.json": ((continue_run, run_report, evaluate, export), 12),
    "metrics.jsonl": ((run_report, evaluate, resume), 9),
    "samples.jsonl": ((run_report, resume), 6),
    "held_out_texts.jsonl": ((run_report, resume), 8),
    "held_out.json": ((run_report,), 30),
    "recipe.yaml": ((continue_run, run_report, evaluate, export, load_evaluated_model), 10),
    "inputs.json": ((continue_run,), 12),
    "tokenizer/tokenizer.json": ((continue_run,), 10),
    "tokenizer/tokenizer_config.json": ((continue_run,), 10),
    "tokenizer/made_from.json": ((continue_run,), 20),
    "model/firth.json": ((load_evaluated_model, continue_run, run_report, export), 20),
    "model/config.json": ((load_evaluated_model, run_report, export), 20),
    "model/tokenizer.json": ((load_evaluated_model, export), 20),
    "model/tokenizer_config.json": ((load_evaluated_model, export), 20),
    "adapter/adapter_config.json": ((lambda there: load_evaluated_model(there / "adapter"),), 20),
    "adapter/firth.json": ((lambda there: load_evaluated_model(there / "adapter"),), 20),
    "checkpoints/step-000002/manifest.json": ((resume,), 3),
    "checkpoints/step-000002/state.json": ((resume,), 2),
    "reference/*/*/done.json": ((resume,), 5),
}


FORGIVING: dict[str, tuple[Any, ...]] = {
    "recipe.yaml": (evaluate, load_evaluated_model),
    "model/tokenizer_config.json": (load_evaluated_model, export),
    "checkpoints/step-000002/manifest.json": (resume,),
    "checkpoints/step-000002/state.json": (resume,),
}
"""Commands that do not read the file, allow users to edit it, or fall back on an earlier checkpoint. No other may succeed."""


def parsed_content(file: Path) -> str | None:
    """Return the content of a file without whitespace, or the ids of a tokenizer; None if it cannot be read."""
    try:
        if file.name == "tokenizer.json":
            return Tokenizer.load(file).digest
        text = file.read_text("utf-8")
        if file.suffix == ".yaml":
            return repr(yaml.safe_load(text))
        parts = text.split("\n") if file.suffix == ".jsonl" else [text]
        return repr([json.loads(part) for part in parts if part.strip()])
    except (ValueError, yaml.YAMLError, UserError):
        return None


def flipped(raw: bytes, draw: random.Random) -> bytes:
    """Return the bytes with one to three bytes replaced or one bit flipped, sometimes truncated."""
    found = bytearray(raw)
    for _ in range(draw.choice((1, 1, 3))):
        at = draw.randrange(len(found))
        found[at] = draw.choice((found[at] ^ 1 << draw.randrange(8), draw.randrange(256), *b'09-"[{,}e '))
    return bytes(found[: draw.randrange(len(found))] if draw.random() < 0.1 else found)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bytes_fail_with_one_sentence(name: str, whole: Path, tmp_path: Path) -> None:
    there, draw = tmp_path / "run", random.Random(name)
    shutil.copytree(whole, there)
    relative = next(whole.glob(name)).relative_to(whole)
    raw = (whole / relative).read_bytes()
    held = parsed_content(whole / relative)
    actions, count = FILES[name]
    refused = 0
    for number in range(FLIPS or count):
        damaged = flipped(raw, draw)
        if number % (4 if not FLIPS else 20) == 0:
            shutil.rmtree(there)
            shutil.copytree(whole, there)
        for action in actions if FLIPS else (actions[number % len(actions)],):
            (there / relative).parent.mkdir(exist_ok=True)
            (there / relative).write_bytes(damaged)
            try:
                action(there)
                if action not in FORGIVING.get(name, ()) and parsed_content(there / relative) != held:
                    at = next(i for i, (a, b) in enumerate(zip(raw, damaged + b"\0", strict=False)) if a != b)
                    pytest.fail(f"{action} goes on with {damaged[max(0, at - 40) : at + 40]!r}")
            except UserError as error:
                refused += 1
                if "\n" in str(error):
                    pytest.fail(f"more than one line: {error}")
            except Exception as error:
                raise AssertionError(f"{action} of {damaged!r}: {error!r}") from error
    assert refused or name.startswith("checkpoints/")  # there an earlier one takes its place
