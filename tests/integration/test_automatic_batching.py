"""Automatic batching of task records: packed where possible, otherwise grouped by length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from firth.runs.config_io import read_yaml
from firth.runs.recipe import GROUPED_STEPS, BatchConfig, ResolvedBatchConfig, load
from firth.runs.run import run
from firth.types import UserError

TINY = [
    "data.validation_fraction=0.2",
    "max_steps=3",
    "batch.size=4",
    "tokenizer.vocab_size=400",
    "examples.max_length=24",
    "checkpoint.every=0",
]
ENCODER = "model={hidden_size: 32, num_layers: 1, num_heads: 2, causal: false, max_positions: 64}"


def resolved_batch(folder: Path, name: str, *settings: str) -> dict[str, object]:
    """Return the batch config of the recipe that a run has written."""
    done = run(load(name, [*TINY, *settings]), folder, lambda _: None)
    batch = read_yaml(done.directory / "recipe.yaml")[0]["batch"]
    assert isinstance(batch, dict)
    return batch


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"text": "a fine day " * (i % 6 + 1), "label": "good" if i % 2 else "bad"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "questions.jsonl"
    rows = [{"text": "which " * (i % 6 + 1), "options": ["this one", "that"], "label": i % 2} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "settings", "pack", "sort"),
    [
        ("classification", [ENCODER], 24, 0),
        ("classification", [ENCODER, "batch.pack_to_length=0"], 0, 0),
        ("classification", [ENCODER, "batch.group_by_length=7"], 0, 7),
        ("classification", [ENCODER[:-1] + ", attention: {linformer: {k: 8}}}"], 0, GROUPED_STEPS),
        ("multiple_choice", [ENCODER], 0, GROUPED_STEPS),
    ],
)  # fmt: skip
def test_auto_packing_is_resolved(
    name: str, settings: list[str], pack: int, sort: int, classes: Path, options: Path, tmp_path: Path
) -> None:
    source = options if name == "multiple_choice" else classes
    batch = resolved_batch(tmp_path / "run", name, f"data={source}", *settings)
    assert (batch["pack_to_length"], batch["group_by_length"]) == (pack, sort)


def test_prompt_tuning_groups_by_length_and_resumes(classes: Path, tmp_path: Path) -> None:
    resolved_batch(tmp_path / "base", "classification", f"data={classes}", ENCODER)
    start = f"init_from={tmp_path / 'base' / 'model'}"
    batch = resolved_batch(
        tmp_path / "prompt", "classification", f"data={classes}", start, "peft=prompt", "peft.num_virtual_tokens=2"
    )
    assert (batch["pack_to_length"], batch["group_by_length"]) == (0, GROUPED_STEPS)
    again = run(load(str(tmp_path / "prompt")), tmp_path / "prompt", lambda _: None)
    assert again.steps == 3


def test_packing_and_grouping_together_are_rejected() -> None:
    with pytest.raises(UserError, match="both spare padding"):
        load("classification", ["batch.pack_to_length=64", "batch.group_by_length=5"])
    assert BatchConfig(pack_to_length="auto").resolve(0, packs=True) == ResolvedBatchConfig()
    assert BatchConfig(pack_to_length="auto").packed_length == 0


@pytest.mark.parametrize("recipe", ["semi_supervised", "weak_supervision"])
def test_wrapped_examples_have_the_length_of_their_base(recipe: str, tmp_path: Path) -> None:
    rows = [{"text": f"word {'again ' * (i % 9)}", "label": "ab"[i % 2]} for i in range(160)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = "model={hidden_size: 32, num_layers: 1, num_heads: 1, causal: false, max_positions: 64}"
    settings = [
        f"data={file}",
        "tokenizer.vocab_size=400",
        shape,
        "max_steps=2",
        "batch.size=8",
        "checkpoint.every=0",
        "examples.base.max_length=32",
    ]
    other = {
        "semi_supervised": ["examples=partially_labeled", "examples.num_labeled=40", "objective=consistency"],
        "weak_supervision": ["examples=simulated_annotators"],
    }
    run(load(recipe, [*other[recipe], *settings]), tmp_path / "run", lambda _: None)
    batch = load(str(tmp_path / "run")).batch
    assert batch.pack_to_length == 32 or batch.group_by_length  # nothing is padded to the longest of all


def test_rejected_recipe_keeps_recipe_yaml(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"word {i}", "label": "ab"[i % 2]}) + "\n" for i in range(40)))
    shape = "model={hidden_size: 32, num_layers: 1, num_heads: 1, causal: false, max_positions: 64}"
    settings = [f"data={file}", "tokenizer.vocab_size=400", shape, "max_steps=4", "batch.size=8", "checkpoint.every=2"]
    directory = tmp_path / "run"
    run(load("classification", settings), directory, lambda _: None)
    (directory / "done.json").unlink()  # as if it had been killed
    began = (directory / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match="another recipe"):
        run(load("classification", [*settings, "seed=5"]), directory, lambda _: None)
    assert (directory / "recipe.yaml").read_bytes() == began
    run(load("classification", settings), directory, lambda _: None)
