"""The fields that a sweep varies, and the values that each may take.

    optimizer.lr=log(1e-4,1e-2)      evenly in the logarithm
    model.dropout=uniform(0,0.2)     evenly
    batch.size=choice(8,16)          one of these

A field that holds a whole number gets whole numbers. Every end of a range and every choice is put into the recipe, whose own
validation accepts or rejects it, before anything is trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from firth.runs import config_io
from firth.runs.recipe import Recipe, expand_assignment, load
from firth.types import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

FORM = re.compile(r"(log|uniform|choice)\((.*)\)", re.S)
OTHER_FORM = re.compile(r"(int|float|randint|range|grid|normal|lognormal|loguniform|categorical|logit)\(.*\)", re.S)
"""Names that other programs use."""
DIGITS = 4
"""Significant digits of a sampled number, so that the command of the best trial can be read."""

Value = float | int | str


@dataclass(frozen=True)
class Parameter:
    """A field that a sweep varies.

    Args:
        field: The full name of the field.
        form: How its values are drawn.
        low: Least value of a range.
        high: Greatest value of a range.
        integer: Whether a range is of whole numbers.
        choices: The texts of the choices.
    """

    field: str
    form: Literal["log", "uniform", "choice"]
    low: float = 0.0
    high: float = 0.0
    integer: bool = False
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        inner = self.choices if self.form == "choice" else (f"{self.low:g}", f"{self.high:g}")
        return f"{self.form}({','.join(inner)})"

    def setting(self, value: Value) -> str:
        """Return the assignment of a value, `optimizer.lr=0.001234`."""
        if self.form != "choice" and not self.integer:
            value = min(self.high, max(self.low, float(f"{value:.{DIGITS}g}")))
        return f"{self.field}={value}"

    def suggest(self, trial: Trial) -> Value:
        """Return the value of a trial, which is sampled if it has none."""
        if self.form == "choice":
            return str(trial.suggest_categorical(self.field, self.choices))
        if self.integer:
            return trial.suggest_int(self.field, int(self.low), int(self.high), log=self.form == "log")
        return trial.suggest_float(self.field, self.low, self.high, log=self.form == "log")

    def own_value(self, recipe: Recipe) -> Value | None:
        """Return the value that a recipe has; None if the sweep cannot draw it."""
        value = _value_at(recipe, self.field)
        if self.form == "choice":
            return next((text for text in self.choices if _parsed(text) == value), None)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return (value if self.integer else float(value)) if is_number and self.low <= value <= self.high else None


def parse(settings: Sequence[str]) -> tuple[list[str], list[Parameter]]:
    """Return the fixed settings and the varied fields.

    >>> parse(["max_steps=5", "batch.size=choice(8,16)"])[1][0].choices
    ('8', '16')

    Raises:
        UserError: A form has other arguments, a range is empty, or a field is given twice.
    """
    fixed, parameters = [], []
    for setting in settings:
        name, equals, text = setting.partition("=")
        found = FORM.fullmatch(text.strip()) if equals else None
        if found is None and OTHER_FORM.fullmatch(text.strip()):
            raise UserError(f"{setting}: values are drawn by log(LOW,HIGH), uniform(LOW,HIGH) or choice(A,B,...)")
        if found is None:
            fixed.append(setting)
        else:
            field = expand_assignment(f"{name}=0").partition("=")[0]
            parameters.append(_parameter(setting, field, found[1], _arguments(found[2])))
    names = [one.field for one in parameters]
    names += [expand_assignment(one).partition("=")[0] for one in fixed]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{twice[0]} is set twice: give it one range, one choice or one value")
    if not parameters:
        raise UserError(
            "no field is varied: give at least one a range or choices, for example optimizer.lr=log(1e-4,1e-2) or batch.size=choice(8,16)"
        )
    return fixed, parameters


def _arguments(text: str) -> list[str]:
    """Split at commas that are not within brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _parameter(setting: str, field: str, form: str, arguments: list[str]) -> Parameter:
    if form == "choice":
        if len(set(arguments)) < 2 or len(set(arguments)) < len(arguments) or not all(arguments):
            raise UserError(f"{setting}: choice needs at least two different values, as in choice(8,16)")
        return Parameter(field, "choice", choices=tuple(arguments))
    try:
        low, high = (float(one) for one in arguments)
    except ValueError:
        raise UserError(
            f"{setting}: {form} needs two numbers, the lowest and the highest, as in {form}(0.1,0.5)"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{setting}: the first number must be below the second, and both finite")
    if form == "log" and low <= 0:
        raise UserError(
            f"{setting}: log needs numbers above 0, and {low:g} has no logarithm; use uniform, or a low end above 0"
        )
    return Parameter(field, "log" if form == "log" else "uniform", low, high)


def validated(name: str, fixed: Sequence[str], parameters: Sequence[Parameter]) -> list[Parameter]:
    """Check all ends and choices with the recipe's validation; return the parameters with `integer` set.

    Raises:
        UserError: A field does not exist or rejects a value.
    """
    load(name, fixed)
    return [_validated(name, fixed, one) for one in parameters]


def _validated(name: str, fixed: Sequence[str], one: Parameter) -> Parameter:
    if one.field == "model.vocab_size":
        raise UserError(f"{one.field}={one}: the tokenizer decides this number: vary tokenizer.vocab_size")

    def accepts(value: Value) -> Recipe:
        try:
            return load(name, [*fixed, one.setting(value)])
        except UserError as error:
            raise UserError(f"{one.field}={one}: {error}") from None

    if one.form == "choice":
        for text in one.choices:
            accepts(text)
        return one
    whole = replace(one, integer=True)
    try:
        held = _value_at(accepts(one.low + (one.high - one.low) * 0.381966), one.field)
        ends: tuple[float, ...] = (one.low, one.high)
    except UserError:  # perhaps of a whole number; the error of its ends is clearer
        if not (one.low.is_integer() and one.high.is_integer()):
            raise
        one, held, ends = whole, None, (int(one.low), int(one.high))
    if isinstance(held, str | bool):
        raise UserError(f"{one.field}={one}: this field holds no number: use choice(A,B,...)")
    for end in ends:
        accepts(end)
    return one


def _value_at(recipe: Recipe, field: str) -> Any:
    """Return the value of a field as plain data; None if it is within a list."""
    value = config_io.to_dict(recipe)
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _parsed(text: str) -> Any:
    return config_io.override({}, [f"x={text}"])["x"]
