"""Every command line in the docstrings of firth/recipes is a command: its recipe can be built, its options exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from firth.cli import app
from firth.objectives.objective import Sum
from firth.runs.recipe import load
from firth.types import UserError
from tests.support.commands import check_command

ROOM = Path(__file__).parents[3] / "firth"
FILES = [*sorted((ROOM / "recipes").glob("*.py")), ROOM / "evaluate" / "evaluate.py"]


def docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def commands(text: str) -> list[str]:
    """A line that begins with `firth`, up to the two blanks before its description; and commands in backticks.

    >>> commands("    firth train bert  tiny\\n  and `firth list`, see `firth.data`")
    ['firth train bert', 'firth list']
    """
    whole = [re.split(r"(?<! ) {2,}", re.sub(r"^(firth train \w+) +(?=\w+=)", r"\1 ", line.strip()))[0]
             for line in text.splitlines() if line.strip().startswith("firth ")]  # fmt: skip
    return whole + re.findall(r"`(firth [^`]*)`", text)


FOUND = sorted(
    {(path.name, line) for path in FILES for text in docstrings(path.read_text()) for line in commands(text)}
)


def test_docstrings_contain_commands() -> None:
    assert len(FOUND) > 60


@pytest.mark.parametrize(("name", "line"), FOUND)
def test_documented_command_is_valid(name: str, line: str) -> None:
    check_command(line)


def test_settings_of_tasks_are_valid() -> None:
    text = docstrings((ROOM / "recipes" / "finetuning.py").read_text())[0]
    lines = [re.split(" {2,}", line.strip())[0] for line in text.splitlines() if re.match(r" +\w+\.\w+=", line)]
    assert len(lines) == 2
    for line in lines:
        load("classification", shlex.split(line))


def test_text_field_holds_the_typed_text() -> None:
    line = next(line for name, line in FOUND if "text_to_text" in line and name == "finetuning.py")
    examples = check_command(line).examples  # type: ignore[union-attr]
    assert (examples.prompt_template, examples.completion_template) == ("in French: {en}", "{fr}")  # type: ignore[attr-defined]
    for text in ("{a}: {b}", "# {en}", "yes", "3", "a # b", "[{en}]", "{en}"):
        typed = load(
            "text_to_text", [f"examples.prompt_template={text}", "examples.completion_template='x: y'"]
        ).examples
        assert (typed.prompt_template, typed.completion_template) == (text, "x: y")  # type: ignore[attr-defined]
    assert not isinstance(
        check_command("firth train lstm init_embeddings_from=runs/word2vec model.hidden_size=128").objective, Sum
    )  # type: ignore[union-attr]


def test_invalid_command_is_detected() -> None:
    for line in (
        "firth train brt",
        "firth train bert batch.siz=3",
        "firth evaluate runs/x --tusk glue",
        "firth trian bert",
    ):
        with pytest.raises((Exception, SystemExit)):
            check_command(line)


def test_negative_length_and_predict_input_help() -> None:
    error = CliRunner().invoke(app, ["embed", "runs/x", "a.txt", "--max-length", "-3"]).exception
    assert isinstance(error, UserError) and "--max-length=-3 should be greater than or equal to 0" in str(error)
    output = CliRunner().invoke(app, ["predict", "--help"]).output
    assert "CoNLL" in output and "SQuAD" in output
