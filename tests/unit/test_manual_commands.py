"""Every command and every recipe field in the manual, the README and the examples exists."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from firth.runs.recipe import load
from firth.runs.recipe_names import RECIPES
from tests.support.commands import (
    ROOT,
    check_command,
    command_lines,
    fenced,
    inline_commands,
    named_fields,
    recipe_fields,
)

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "bench" / "README.md"]
BENCHMARKS = sorted((ROOT / "bench").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FIELDS = set(recipe_fields())


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Return an empty working directory whose modules can be imported, and forget them afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write_files(text: str, directory: Path) -> None:
    """Write the Python and YAML of a page under the file names that precede them: Save it as `skip_lm.py`."""
    for before, language, block in fenced(text):
        names = re.findall(r"`(\w+\.(?:py|yaml))`", before)
        if (
            language in ("python", "yaml")
            and names
            and names[-1].endswith({"python": ".py", "yaml": ".yaml"}[language])
        ):
            (directory / names[-1]).write_text(block, "utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_recipes_of_a_page_are_valid(page: Path, directory: Path) -> None:
    text = page.read_text("utf-8")
    write_files(text, directory)
    for line in (*command_lines(text), *inline_commands(text)):
        try:
            check_command(line)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{line}\n{error}") from error
    for file in directory.glob("*.yaml"):
        load(str(file))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_recipe_fields_of_a_page_exist(page: Path) -> None:
    assert sorted(set(named_fields(page.read_text("utf-8"))) - FIELDS) == []


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_commands_of_an_example_are_valid(script: Path, directory: Path) -> None:
    (directory / script.name).write_text(script.read_text("utf-8"), "utf-8")
    text = ast.get_docstring(ast.parse(script.read_text("utf-8"))) or ""
    for line in (*inline_commands(text), *re.findall(r"(?<!`)(firth train .*)$", text, re.M)):
        check_command(line)


def test_the_manual_has_commands() -> None:
    texts = [page.read_text("utf-8") for page in PAGES]
    lines = [line for text in texts for line in command_lines(text)]
    assert len(lines) > 40
    assert {line.split()[0] for line in lines} >= {"firth", "make", "torchrun", "python3"}
    assert len({name for text in texts for name in named_fields(text)}) > 10


@pytest.mark.parametrize(
    "line",
    [
        "firth trian gpt", "firth train brt", "firth train gpt batch.siz=3", "firth train gpt --outt runs/x",
        "firth train gpt:huge", "firth train gpt batch.size=0", "firth tokenizer trian a.txt", "firth export runs/x",
        "firth compare gpt lstn --max-flops 1e12", "firth compare gpt lstm batch.siz=3 --max-flops 1e12",
        "torchrun --nproc-per-node 2 -m firth train gpt batch.siz=3", "make demos", "python -m bench.nothing",
        "firth sweep gpt 'batch.siz=choice(3,4)'", "firth sweep gpt 'batch.size=log(0,4)'",
        "python docs/nothing.py", "firth generate runs/x --top-p 2",
    ],
)  # fmt: skip
def test_an_invalid_command_is_found(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check_command(line)


def test_an_unknown_field_is_found() -> None:
    assert "model.hidden_size" in FIELDS
    assert "objective.mlm_probability" in FIELDS
    assert set(named_fields("set `model.width=3` or `examples.max_length`")) - FIELDS == {"model.width"}


@pytest.mark.parametrize("program", BENCHMARKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_settings_of_a_benchmark_exist(program: Path) -> None:
    strings = [node.value for node in ast.walk(ast.parse(program.read_text("utf-8"))) if isinstance(node, ast.Constant)]
    settings = {found[1] for one in strings if (found := re.match(r"(\w+\.\w[\w.]*)=", str(one)))}
    recipes = "|".join(["probe", *RECIPES])
    names = {re.sub(rf"^({recipes})\.(?=[\w.]+$)", "", name) for name in settings}  # of one recipe of a comparison
    assert sorted(names - FIELDS - {"max_steps"}) == []
