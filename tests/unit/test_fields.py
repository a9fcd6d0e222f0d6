"""Fields of a recipe have types and ranges, which are checked in a recipe and in Python."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path

import numpy as np
import pytest

from firth import objectives
from firth.compare.compare import ComparisonConfig
from firth.data.examples import DataConfig
from firth.fields import MAX_INT, Validated, check_fields
from firth.generate.sampling import Sampling
from firth.objectives.classification import Classification
from firth.objectives.objective import Objective
from firth.runs.config_io import from_dict
from firth.runs.examples import EXAMPLES
from firth.runs.peft_options import PEFT_METHODS
from firth.runs.recipe import BatchConfig, Recipe, TokenizerConfig, load
from firth.training.optimizer import OptimizerConfig
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


def is_numeric(hint: typing.Any) -> bool:
    """Whether an annotation admits an int or a float."""
    if typing.get_origin(hint) is typing.Literal:
        return False
    return hint in (int, float) or any(is_numeric(inner) for inner in typing.get_args(hint))


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
    assert issubclass(kind, Validated)
    unbounded = numeric_fields(kind)[name] == float | None
    for value in (math.nan, math.inf, -math.inf, True, "1", *(() if unbounded else (-(10**9), -1e9))):
        values, errors = check_fields(kind, {name: value})
        assert not values
        assert [(name, f"={value!r} should be ") for name, _ in errors] == [
            (name, errors[0][1][: len(f"={value!r} should be ")])
        ]


def test_a_field_without_a_range_would_be_found() -> None:
    @dataclasses.dataclass(frozen=True)
    class Loose(Validated):
        count: int = 0
        share: tuple[float, ...] | None = None
        on: bool = False
        kind: typing.Literal[1, "auto"] = 1

    assert list(numeric_fields(Loose)) == ["count", "share"]
    assert check_fields(Loose, {"count": -(10**9)}) == ({"count": -(10**9)}, [])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.validation_fraction=1", "data.validation_fraction=1 should be less than 1"),
        ("data.validation_fraction=-1", "data.validation_fraction=-1 should be greater than or equal to 0"),
        ("tokenizer.sample_bytes=-1", "tokenizer.sample_bytes=-1 should be greater than or equal to 1"),
        ("max_flops=.nan", "budget.max_flops=nan should be a finite number"),
        ("max_seconds=.inf", "budget.max_seconds=inf should be a finite number"),
        ("optimizer.lr=0", "optimizer.lr=0 should be greater than 0"),
        ("examples.max_length=0", "examples.max_length=0 should be greater than or equal to 1"),
        (
            "batch.gradient_accumulation_steps=0",
            "batch.gradient_accumulation_steps=0 should be greater than or equal to 1",
        ),
        ("batch.pack_to_length=-1", "batch.pack_to_length=-1 should be greater than or equal to 0 or 'auto'"),
        ("data.weights=[1, -1]", "data.weights=[1, -1] should be greater than 0"),
        ("model.num_layers=-1", "model.num_layers=-1 should be greater than or equal to 0"),
        ("seed=-1", "seed=-1 should be greater than or equal to 0"),
        (f"max_steps={MAX_INT + 1}", f"budget.max_steps={MAX_INT + 1} should be less than or equal to {MAX_INT}"),
        ("batch.size=true", "batch.size=True should be a valid integer"),
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
    assert str(caught.value) == f"{path}:5: objective.1.mlm_probability=1.5 should be less than 1"
    with pytest.raises(UserError) as caught:
        load(str(path), ["objective.mlm_probability=2"])
    assert str(caught.value) == "objective.1.mlm_probability=2 should be less than 1"
    with pytest.raises(UserError) as caught:
        load(str(path), ["objective.mlm_probability=0.2", "batch.size=0"])
    assert str(caught.value) == "batch.size=0 should be greater than or equal to 1"
    path.write_text("name: x\nobjective: mlm\nexamples: chunks\nbatch: {pack_to_length: 4, group_by_length: 4}\n")
    with pytest.raises(UserError) as caught:  # fields that do not fit each other have a line, too
        load(str(path))
    assert str(caught.value).startswith(f"{path}:4: batch.pack_to_length and batch.group_by_length")


def test_a_number_out_of_range_is_refused_in_python() -> None:
    with pytest.raises(UserError, match=r"^batch.size=0 should be greater than or equal to 1$"):
        BatchConfig(size=0)
    with pytest.raises(UserError, match=r"^batch.group_by_length=-1 should be greater than or equal to 0$"):
        dataclasses.replace(BatchConfig(), group_by_length=-1)
    with pytest.raises(UserError, match=r"^sampling.top_p=0 should be greater than 0$"):
        Sampling(top_p=0)


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


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (OptimizerConfig, {"lr": "x"}, "optimizer.lr='x' should be a valid number"),
        (OptimizerConfig, {"lr": "0.1"}, "optimizer.lr='0.1' should be a valid number"),
        (BatchConfig, {"size": 2.0}, "batch.size=2.0 should be a valid integer"),
        (BatchConfig, {"pack_to_length": "aut"}, "batch.pack_to_length='aut' should be a valid integer or 'auto'"),
        (DataConfig, {"path": [3]}, "data.path=[3] should be a valid string"),
        (Classification, {"class_weights": "balancd"}, "objective.class_weights='balancd' should be a list or 'balanced'"),
        (TokenizerConfig, {"byte_fallback": 1, "path": 3}, "tokenizer.path=3 should be a valid string; "
         "tokenizer.byte_fallback=1 should be a valid boolean"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_in_python(kind: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        kind(**fields)
    assert str(caught.value) == message


def test_a_section_of_another_class_is_refused_in_python() -> None:
    with pytest.raises(UserError, match=r"^batch=\{'size': 3\} should be an instance of BatchConfig$"):
        dataclasses.replace(load("gpt"), batch={"size": 3})  # type: ignore[arg-type]


def test_lists_and_integers_are_accepted_in_python() -> None:
    data = DataConfig(path=["a", "b"], weights=[1, 2])  # type: ignore[arg-type]
    assert (data.path, data.weights) == (("a", "b"), (1.0, 2.0))
    assert DataConfig(path="a").path == ("a",)  # type: ignore[arg-type]
    assert isinstance(OptimizerConfig(lr=1).lr, float)


def test_all_errors_of_a_file_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: 3\nobjective:\n  - nsp\n  - {kind: mlm, mlm_probability: x}\nexamples: chunks\nbatch:\n  siz: 3\n  size: 0\n"
    )
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert str(caught.value).splitlines() == [
        f"{path}:4: objective.1.mlm_probability='x' should be a valid number",
        f"{path}:7: batch.siz: there is no field 'siz' in BatchConfig; did you mean 'size'?",
        f"{path}:8: batch.size=0 should be greater than or equal to 1",
        f"{path}:1: name=3 should be a valid string",
    ]


@dataclasses.dataclass(frozen=True)
class Scale:
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class OwnObjective(Objective):
    """A user's class that knows nothing of pydantic, with a field of a type that pydantic does not know."""

    distance: int = 2
    table: np.ndarray | None = None
    scale: Scale = Scale()


def test_a_class_unaware_of_pydantic_is_checked() -> None:
    assert OwnObjective(3, np.zeros(2), Scale(2.0)).distance == 3
    with pytest.raises(
        UserError, match=r"^objective.distance=None should be a valid integer; objective.table=3 should be an instance"
    ):
        OwnObjective(None, 3)  # type: ignore[arg-type]
    assert from_dict(OwnObjective, {"distance": 4, "scale": {"factor": 2}}) == OwnObjective(4, None, Scale(2.0))
    with pytest.raises(UserError, match=r"^scale.factor='x' should be a valid number$"):
        from_dict(OwnObjective, {"scale": {"factor": "x"}})
