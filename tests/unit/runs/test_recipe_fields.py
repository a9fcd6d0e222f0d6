"""`firth show` lists every field of a recipe."""

import pytest
from typer.testing import CliRunner

from firth.cli import app
from firth.runs.recipe import load
from firth.runs.recipe_fields import fields_of
from firth.runs.recipe_names import RECIPES
from tests.support.commands import recipe_fields


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_has_a_type_and_a_meaning(name: str) -> None:
    fields = fields_of(load(name))
    assert len({field.name for field in fields}) == len(fields)
    assert [field.name for field in fields if not (field.kind and field.meaning)] == []


def test_the_shown_fields_can_be_set() -> None:
    """They are the names that the command line takes."""
    known = set(recipe_fields())
    names = {field.name for field in fields_of(load("gpt"))}
    assert {name for name in names if not name.startswith(("objective", "examples", "peft"))} <= known
    assert {"batch.size", "model.norm.eps", "budget.max_steps", "optimizer.lr", "evaluation.every"} <= names


def test_the_shown_fields_of_a_sum_can_be_set() -> None:
    plain = load("albert")
    shown = [field for field in fields_of(plain) if field.name.startswith("objective[")]
    assert {"objective[0].swapped", "objective[1].noise"} <= {field.name for field in shown}
    for field in shown:
        assert load("albert", [f"{field.name}={field.value}"]) == plain
    changed = load("albert", ["objective[1].noise=iid"])
    assert [field.value for field in fields_of(changed) if field.name == "objective[1].noise"] == ["iid"]


def test_show_prints_value_default_and_meaning() -> None:
    done = CliRunner().invoke(app, ["show", "gpt", "batch.size=3"])
    lines = done.output.splitlines()
    at = lines.index("batch.size = 3")
    assert lines[at + 1].startswith("    integer, at least 1; default 16. Examples per optimizer step")
    wrong = CliRunner().invoke(app, ["show", "gpt", "batch.sizes=3"])
    assert wrong.exit_code and "sizes" in str(wrong.exception)
