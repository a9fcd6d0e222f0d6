"""Every number of a recipe has a range, which is checked in a recipe and in Python."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path

import pytest

from firth import objectives
from firth.compare.compare import ComparisonConfig
from firth.generate.sampling import Sampling
from firth.ranges import MAX_INT, PositiveInt, Range, Ranged, is_numeric, range_of, ranges
from firth.runs import config_io
from firth.runs.compatibility import EXAMPLES
from firth.runs.peft_options import PEFT_METHODS
from firth.runs.recipe import BatchConfig, Recipe, load
from firth.types import UserError


def recipe_classes() -> list[type]:
    """Every dataclass that a recipe can contain, and those that the command line fills."""
    found: dict[type, None] = {}

    def walk(kind: type) -> None:
        if kind in found:
            return
        found[kind] = None
        for hint in typing.get_type_hints(kind).values():
            for inner in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                    walk(inner)

    chosen = [*EXAMPLES.values(), *map(objectives.find, objectives.OBJECTIVES), *PEFT_METHODS.values()]
    for kind in (Recipe, Sampling, ComparisonConfig, *chosen):
        walk(kind)
    return list(found)


def numeric_fields(kind: type) -> dict[str, typing.Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if is_numeric(hints[f.name])}


NUMBERS = [(kind, name) for kind in recipe_classes() for name in numeric_fields(kind)]


def test_all_recipe_classes_and_numbers_are_found() -> None:
    names = {kind.__name__ for kind in recipe_classes()}
    assert {
        "Recipe",
        "BatchConfig",
        "EvalConfig",
        "CheckpointConfig",
        "Budget",
        "Schedule",
        "OptimizerConfig",
        "DataConfig",
        "TokenizerConfig",
        "ModelConfig",
    } <= names
    assert {
        "WindowsConfig",
        "RolloutsConfig",
        "MLM",
        "PPO",
        "LoRA",
        "PrefixTuning",
        "Sampling",
        "ComparisonConfig",
    } <= names
    assert len(NUMBERS) >= 130


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda one: getattr(one, "__name__", one))
def test_every_numeric_field_has_a_range(kind: type, name: str) -> None:
    allowed = range_of(numeric_fields(kind)[name])
    assert allowed is not None
    assert issubclass(kind, Ranged)
    outside = [math.nan, math.inf, -math.inf] if allowed == Range() else [math.nan, -math.inf, math.inf, -(10**9)]
    for value in outside:
        bad = kind.__new__(kind)
        for field in dataclasses.fields(kind):  # the defaults, and nothing where a field has none
            object.__setattr__(bad, field.name, None)
        object.__setattr__(bad, name, value)
        with pytest.raises(UserError, match=rf"{name}={value} must be "):
            Ranged.__post_init__(bad)  # type: ignore[arg-type]


def test_a_class_without_a_range_would_be_found() -> None:
    @dataclasses.dataclass(frozen=True)
    class Loose(Ranged):
        count: int = 0
        share: tuple[float, ...] | None = None
        on: bool = False
        kind: typing.Literal[1, "auto"] = 1

    assert list(numeric_fields(Loose)) == ["count", "share"]
    assert not ranges(Loose)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.validation_fraction=-1", "data.validation_fraction=-1.0 must be at least 0 and below 1"),
        ("tokenizer.sample_bytes=-1", "tokenizer.sample_bytes=-1 must be at least 1"),
        ("max_flops=nan", "budget.max_flops=nan must be finite, at least 0"),
        ("max_seconds=.inf", "budget.max_seconds=inf must be finite, at least 0"),
        ("optimizer.lr=0", "optimizer.lr=0.0 must be above 0"),
        ("examples.max_length=0", "examples.max_length=0 must be at least 1 and at most 1073741823"),
        ("batch.gradient_accumulation_steps=0", "batch.gradient_accumulation_steps=0 must be at least 1"),
        ("batch.pack_to_length=-1", "batch.pack_to_length=-1 must be at least 0 and at most 1073741823"),
        ("data.weights=[1, -1]", "data.weights=[1.0, -1.0] must be above 0"),
        ("model.num_layers=-1", "model.num_layers=-1 must be at least 0 and at most 10000"),
        ("seed=-1", "seed=-1 must be at least 0"),
        (f"max_steps={MAX_INT + 1}", f"budget.max_steps={MAX_INT + 1} must be at least 0 and at most {MAX_INT}"),
        ("batch.size=true", "batch.size: True does not fit: it should be a number, at least 1"),
        ("data.path=[]", "data.path=[] names no file: name files or directories, or set data.corpus=NAME"),
        ("data.path=", "data.path=[''] has an empty name, which would be the working directory"),
    ],
)
def test_a_setting_out_of_range_is_one_sentence(setting: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load("gpt", [setting])
    assert str(caught.value) == message


def test_a_file_out_of_range_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: x\nobjective:\n  - nsp\n  - kind: mlm\n    mlm_probability: 1.5\nexamples: segment_pairs\nbatch: {size: 4}\n"
    )
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert str(caught.value) == f"{path}:5: objective.1.mlm_probability=1.5 must be above 0 and below 1"
    with pytest.raises(UserError) as caught:
        load(str(path), ["objective.mlm_probability=2"])
    assert str(caught.value) == "objective.1.mlm_probability=2.0 must be above 0 and below 1"
    with pytest.raises(UserError) as caught:
        load(str(path), ["objective.mlm_probability=0.2", "batch.size=0"])
    assert str(caught.value) == "batch.size=0 must be at least 1"
    path.write_text("name: x\nobjective: mlm\nexamples: chunks\nbatch: {pack_to_length: 4, group_by_length: 4}\n")
    with pytest.raises(UserError) as caught:  # fields that do not fit each other have a line, too
        load(str(path))
    assert str(caught.value).startswith(f"{path}:4: batch.pack_to_length and batch.group_by_length")


def test_a_number_out_of_range_is_refused_in_python() -> None:
    with pytest.raises(UserError, match=r"^batch.size=0 must be at least 1$"):
        BatchConfig(size=0)
    with pytest.raises(UserError, match=r"^batch.group_by_length=-1 must be at least 0$"):
        dataclasses.replace(BatchConfig(), group_by_length=-1)
    with pytest.raises(UserError, match=r"^sampling.top_p=0 must be above 0 and at most 1$"):
        Sampling(top_p=0)
    assert range_of(PositiveInt | None) == Range(ge=1)
    assert config_io.from_dict(tuple[PositiveInt, ...], "3") == (3,)


def test_an_incomplete_model_config_names_the_fix() -> None:
    """One error for all missing fields; completing them one by one would end in a causal model."""
    with pytest.raises(UserError) as caught:
        load("classification", ["model.hidden_size=64"])
    message = str(caught.value)
    assert message.startswith(
        "the model config lacks num_layers, num_heads, and the recipe 'classification' has none of its own"
    )
    assert "init_from=RUN" in message and "causal: false" in message
    assert (
        load(
            "classification", ["model={vocab_size: 100, hidden_size: 32, num_layers: 1, num_heads: 2, causal: false}"]
        ).model
        is not None
    )
