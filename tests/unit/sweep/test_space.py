"""Varied fields of a sweep: what is parsed, which ends and choices the recipe rejects, whole numbers."""

import pytest

from firth.runs.recipe import load
from firth.sweep.space import Parameter, parse, validated
from firth.types import UserError


def checked(*settings: str, recipe: str = "gpt") -> list[Parameter]:
    fixed, parameters = parse(settings)
    return validated(recipe, fixed, parameters)


def test_forms_and_fixed_settings_are_parsed() -> None:
    fixed, (lr, batch, dropout) = parse(
        ["optimizer.lr=log(1e-4,1e-2)", "max_steps=5", "batch.size=choice(8, 16)", "model.dropout=uniform(0,0.2)"]
    )
    assert fixed == ["max_steps=5"]
    assert (lr.field, lr.form, lr.low, lr.high) == ("optimizer.lr", "log", 1e-4, 1e-2)
    assert (batch.choices, dropout.form) == (("8", "16"), "uniform")
    assert [str(one) for one in (lr, batch, dropout)] == ["log(0.0001,0.01)", "choice(8,16)", "uniform(0,0.2)"]


def test_choices_may_hold_lists_and_short_names() -> None:
    _, (objective,) = parse(["objective=choice([nsp, mlm],mlm)"])
    assert objective.choices == ("[nsp, mlm]", "mlm")
    _, (steps,) = parse(["max_steps=choice(5,10)"])
    assert steps.field == "budget.max_steps"
    _, (norm,) = parse(["model.norm=choice(rms,layer)"])
    assert norm.field == "model.norm.type"


@pytest.mark.parametrize(("setting", "message"), [
    ("optimizer.lr=log(0,1)", r"log needs numbers above 0, and 0 has no logarithm"),
    ("optimizer.lr=log(-1,1)", r"log needs numbers above 0, and -1"),
    ("optimizer.lr=log(1e-2,1e-4)", r"the first number must be below the second"),
    ("optimizer.lr=log(1e-4,1e-4)", r"the first number must be below the second"),
    ("optimizer.lr=uniform(0,inf)", r"both finite"),
    ("optimizer.lr=uniform(0,nan)", r"both finite"),
    ("optimizer.lr=log(1e-4)", r"log needs two numbers, the lowest and the highest, as in log\(0.1,0.5\)"),
    ("optimizer.lr=log(1,2,3)", r"log needs two numbers"),
    ("optimizer.lr=uniform(a,b)", r"uniform needs two numbers"),
    ("batch.size=choice(8)", r"choice needs at least two different values"),
    ("batch.size=choice(8,8)", r"choice needs at least two different values"),
    ("batch.size=choice(8,)", r"choice needs at least two different values"),
    ("batch.size=int(8,16)", r"values are drawn by log\(LOW,HIGH\), uniform\(LOW,HIGH\) or choice\(A,B,...\)"),
])  # fmt: skip
def test_forms_with_wrong_arguments_are_errors(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        parse([setting])
    assert str(raised.value).startswith(setting)


def test_a_field_has_one_setting_and_one_is_varied() -> None:
    with pytest.raises(UserError, match=r"budget.max_steps is set twice"):
        parse(["max_steps=choice(5,10)", "budget.max_steps=5"])
    with pytest.raises(UserError, match=r"no field is varied: give at least one a range or choices"):
        parse(["max_steps=5"])


@pytest.mark.parametrize(("setting", "message"), [
    ("optimizer.lrr=log(1e-4,1e-2)", r"there is no field 'lrr' in OptimizerConfig; did you mean 'lr'"),
    ("model.dropout=uniform(0,1.5)", r"model.dropout=uniform\(0,1.5\): .*model.dropout"),
    ("batch.size=choice(8,x)", r"batch.size=choice\(8,x\): .*batch.size"),
    ("batch.size=uniform(1.5,3.5)", r"batch.size"),
    ("batch.size=uniform(0,4)", r"batch.size=uniform\(0,4\): .*batch.size"),
    ("name=uniform(1,2)", r"name=uniform\(1,2\): this field holds no number: use choice"),
    ("compile=uniform(0,1)", r"compile"),
    ("model.vocab_size=choice(300,400)", r"model.vocab_size=choice\(300,400\): the tokenizer decides this number"),
    ("schedule.kind=choice(cosine,cosin)", r"schedule.kind=choice\(cosine,cosin\): .*schedule.kind"),
])  # fmt: skip
def test_values_that_the_recipe_rejects_are_errors(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked(setting)


def test_fields_of_whole_numbers_get_whole_numbers() -> None:
    size, lr = checked("batch.size=log(2,64)", "optimizer.lr=uniform(1,2)")
    assert (size.integer, lr.integer) == (True, False)
    assert (size.setting(8), lr.setting(1.23456789)) == ("batch.size=8", "optimizer.lr=1.235")


def test_sampled_numbers_stay_within_their_range() -> None:
    (lr,) = checked("optimizer.lr=log(0.00012345,0.00056789)")
    ends = [float(lr.setting(end).partition("=")[2]) for end in (lr.low, lr.high)]
    assert ends == [lr.low, lr.high]  # rounding alone would give 0.0001234


def test_the_recipes_own_values_are_found() -> None:
    recipe = load("gpt", ["batch.size=16", "model.dropout=0.1"])
    found = checked("batch.size=choice(8,16)", "model.dropout=uniform(0,0.2)", "optimizer.lr=log(10,20)")
    assert [one.own_value(recipe) for one in found] == ["16", 0.1, None]
