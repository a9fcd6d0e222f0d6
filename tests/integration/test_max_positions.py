"""Rows are limited to the learned positions of a model, less those of a prefix or a prompt, before a run starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from firth.align.rollouts import RolloutsConfig
from firth.model.config import ModelConfig
from firth.model.config_groups import EmbeddingConfig, EncoderConfig, PositionConfig
from firth.model.model import LM
from firth.objectives import find as objective
from firth.pretrained.load_save import save_model
from firth.runs.compatibility import limit_lengths
from firth.runs.peft_options import FullFinetuning, PrefixTuning
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.train import train
from firth.types import UserError
from tests.support.runs import quiet

TEXT = ("the otter paints a red boat near the old stone bridge and sings all day long " * 30 + "\n\n") * 6
BODY = {"vocab_size": 300, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 64}
SHAPES = {
    "gpt2": ModelConfig(**BODY),
    "rotary": ModelConfig(**BODY, position=PositionConfig("rotary")),
    "roberta": ModelConfig(**BODY, causal=False, embedding=EmbeddingConfig(type_vocab_size=2)),
    "bart": ModelConfig(**BODY, encoder=EncoderConfig(num_layers=1, decoder_start_token="eos")),
}
PARTS = {"gpt2": "causal_lm", "rotary": "causal_lm", "roberta": "mlm", "bart": "denoising"}
"""Model config -> the objective of its heads."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "text.txt").write_text(TEXT)
    rows = [{"text": TEXT[i : i + 500], "label": "ab"[i % 2], "prompt": TEXT[i : i + 300], "answer": TEXT[i : i + 300]}
            for i in range(40)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(place: Path) -> Callable[[str], Path]:
    """Return the directory of a model with random weights."""

    @cache
    def make(name: str) -> Path:
        tokenizer = train([TEXT], "byte-bpe", 300)
        torch.manual_seed(0)
        config = SHAPES[name]
        save_model(LM(config, objective(PARTS[name])().heads(config)), tokenizer, place / name)
        return place / name

    return make


CASES = [
    ("gpt2", "gpt2", "peft=prefix", {"max_length": 48}),
    ("gpt2", "gpt2", "peft=prompt", {"max_length": 48}),
    ("gpt2", "gpt2", "peft=full", {"max_length": 64}),
    ("roberta", "roberta", "peft=prompt", {"max_length": 48}),
    ("roberta", "classification", "peft=prefix", {"max_length": 48}),
    ("bart", "bart", "peft=prefix", {"max_length": 47}),
    ("bart", "bart", "peft=full", {"max_length": 63}),
    ("bart", "text_to_text", "peft=prefix", {"max_length": 64, "max_target_length": 48}),
    ("bart", "text_to_text", "peft=prompt", {"max_length": 48, "max_target_length": 64}),
]


@pytest.mark.parametrize(("name", "recipe", "adapt", "fits"), CASES)
def test_long_rows_are_lowered_or_rejected(
    name: str, recipe: str, adapt: str, fits: dict[str, int], place: Path, base: Callable[[str], Path], tmp_path: Path
) -> None:
    data = place / ("rows.jsonl" if recipe in ("classification", "text_to_text") else "text.txt")
    common = [
        f"data.path={data}",
        f"init_from={base(name)}",
        adapt,
        "max_steps=1",
        "batch.size=8",
        "precision=fp32",
        "evaluation.max_examples=8",
        "sample_prompts=[]",
        *["model=null"] * (recipe not in ("classification", "text_to_text")),
    ]
    common += ["examples.prompt_template={prompt}", "examples.completion_template={answer}"] * (
        recipe == "text_to_text"
    )
    tight = [f"examples.{field}={value}" for field, value in fits.items()]
    assert run(load(recipe, [*common, *tight]), tmp_path / "tight", quiet).steps == 1
    lines: list[str] = []
    short = run(
        load(recipe, [*common, *["examples.max_target_length=64"] * ("max_target_length" in fits)]),
        tmp_path / "open",
        lines.append,
    )
    kept = load(str(short.directory)).examples
    assert {field: getattr(kept, field) for field in fits} == fits
    assert run(load(str(short.directory)), short.directory, quiet).steps == 1
    for field, value in fits.items():
        message = rf"^examples\.{field}={value + 1}: .* positions .*: set examples\.{field}={value}$"
        with pytest.raises(UserError, match=message):
            run(load(recipe, [*common, *tight, f"examples.{field}={value + 1}"]), tmp_path / "no", quiet)
    assert not (tmp_path / "no" / "inputs.json").exists()


def test_prompts_leave_room_for_prefix_and_answer() -> None:
    model, lines = LM(SHAPES["gpt2"], {}), list[str]()
    found = limit_lengths(
        RolloutsConfig(max_new_tokens=20), RolloutsConfig(), PrefixTuning(), model, model.config, 0, lines.append
    )
    assert found == RolloutsConfig(max_new_tokens=20, max_prompt_length=28) and len(lines) == 1
    assert (
        limit_lengths(RolloutsConfig(), RolloutsConfig(), FullFinetuning(), model, model.config, 0, lines.append)
        == RolloutsConfig()
    )
    with pytest.raises(UserError, match=r"lower peft\.num_virtual_tokens$"):
        limit_lengths(RolloutsConfig(), RolloutsConfig(), PrefixTuning(), model, model.config, 0, quiet)


@pytest.mark.parametrize("adapt", ["peft=prefix", "peft=prompt"])
def test_rotary_positions_do_not_limit_rows(
    adapt: str, place: Path, base: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = [f"data.path={place / 'text.txt'}", f"init_from={base('rotary')}", adapt, "max_steps=1", "batch.size=8",
                "precision=fp32", "evaluation.max_examples=8", "sample_prompts=[]", "model=null", "examples.max_length=80"]  # fmt: skip
    done = run(load("gpt2", settings), tmp_path, quiet)
    assert load(str(done.directory)).examples.max_length == 80  # type: ignore[attr-defined]


def test_existing_prefix_takes_positions(place: Path, base: Callable[[str], Path], tmp_path: Path) -> None:
    """A run that continues an adapter counts its positions, and so does a LoRA on its model."""
    common = [f"data.path={place / 'text.txt'}", "max_steps=1", "batch.size=8", "precision=fp32", "sample_prompts=[]",
              "evaluation.max_examples=8", "model=null"]  # fmt: skip
    first = [f"init_from={base('gpt2')}", "peft.kind=prefix", "peft.num_virtual_tokens=10"]
    one = run(load("gpt2", [*common, *first]), tmp_path / "one", quiet).directory
    onward = (
        ["peft.kind=prefix", f"peft.init_from={one}", f"init_from={base('gpt2')}"],
        ["peft=lora", f"init_from={one}"],
    )
    for more in onward:
        with pytest.raises(UserError, match=r"^examples\.max_length=55: .* set examples\.max_length=54$"):
            run(load("gpt2", [*common, *more, "examples.max_length=55"]), tmp_path / "no", quiet)
        done = run(load("gpt2", [*common, *more]), tmp_path / more[0], quiet)
        assert load(str(done.directory)).examples.max_length == 54  # type: ignore[attr-defined]
