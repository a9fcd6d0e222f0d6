"""Imports between packages go in one direction; the imports are read from the source with `ast`.

Imports under `if TYPE_CHECKING:` only name types and run nothing; the lists of what a package may import do not apply to them.
"""

import ast
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "firth"

BELOW = {
    "firth": ("openmp", "types"),
    "openmp": (),
    "types": (),
    "io": ("types",),
    "kernel_choice": ("types", "io"),
    "fields": ("types",),
    "tokenizer": ("types", "io"),
    "corpora": ("types", "io", "tokenizer"),
    "data": ("types", "io", "fields", "tokenizer", "corpora"),
    "model": ("types", "io", "kernel_choice", "fields"),
    "pretrained": ("types", "io", "tokenizer", "model"),
    "peft": ("types", "io", "model", "pretrained"),
    "objectives": ("types", "io", "kernel_choice", "fields", "tokenizer", "data", "model", "pretrained"),
    "training": ("types", "io", "kernel_choice", "fields", "data", "model", "peft", "objectives.objective"),
    "generate": ("types", "io", "kernel_choice", "fields", "tokenizer", "data", "model", "pretrained", "peft"),
    "align": ("types", "io", "fields", "tokenizer", "data", "model", "objectives", "generate"),
    "evaluate": (
        "types",
        "io",
        "tokenizer",
        "corpora",
        "data",
        "model",
        "pretrained",
        "peft",
        "objectives",
        "generate",
    ),
    "report": ("types", "io"),
    "doctor": ("types", "openmp", "kernel_choice", "model", "objectives.word2vec", "training", "generate"),
}
"""Package -> what it may import besides itself. The others are in ABOVE."""

ABOVE = {
    "runs": ("pipelines", "recipes", "compare", "scaling", "sweep", "serve", "demo", "cli", "api"),
    "pipelines": ("recipes", "compare", "scaling", "sweep", "serve", "demo", "cli", "api"),
    "recipes": ("compare", "scaling", "sweep", "serve", "demo", "cli", "api"),
    "compare": ("scaling", "sweep", "serve", "demo", "cli", "api"),
    "scaling": ("sweep", "serve", "demo", "cli", "api"),
    "sweep": ("serve", "demo", "cli", "api"),
    "serve": ("demo", "cli", "api"),
    "demo": ("cli", "api"),
    "cli": ("api",),
    "api": ("recipes", "compare", "scaling", "sweep", "serve", "demo", "cli"),
}
"""Packages that may import everything -> the packages that they may not."""

LEARNERS = ("torch", "safetensors")
TORCH_FREE = ("types", "tokenizer", "corpora", "cli", "report")
ORACLES = {
    "transformers", "peft", "trl", "sklearn", "lm_eval", "openai", "accelerate", "datasets", "sentencepiece",
    "gensim", "pytest",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """An imported name: `firth.model.model.LM`.

    Args:
        name: The name.
        typing: Whether it is under TYPE_CHECKING.
        top: Whether it is imported with the module.
        line: Its line.
    """

    name: str
    typing: bool
    top: bool
    line: int


def imports(source: str) -> list[Import]:
    """Return all imports of a module, at any level. `from a import b` is `a.b`."""
    found: list[Import] = []

    def walk(node: ast.AST, typing: bool, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, typing, top, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"line {child.lineno}: a relative import hides where it leads"
                found.extend(Import(f"{child.module}.{a.name}", typing, top, child.lineno) for a in child.names)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                for part in child.body:
                    walk(ast.Module([part], []), True, top)
                for part in child.orelse:
                    walk(ast.Module([part], []), typing, top)
            else:
                walk(child, typing, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(ast.parse(source), False, True)
    return found


def package_of(module: str) -> str:
    """Return the package of a module: `firth.model.model.LM` -> model; firth's own names -> firth; `__main__` -> cli."""
    parts = module.replace(".__main__", ".cli").split(".")
    packages = {*BELOW, *ABOVE}
    return parts[1] if len(parts) > 1 and parts[1] in packages else "firth"


def faults(module: str, source: str) -> list[str]:
    """Return the forbidden imports of a module."""
    out = []
    package = package_of(module)
    for one in imports(source):
        outer = one.name.split(".")[0]
        where = f"{module}, line {one.line}: imports {one.name}"
        if outer in ORACLES:
            out.append(f"{where}, an oracle: tests and benchmarks only")
        if outer == "firth" and not (module == "firth" and one.typing):  # the API's names, for type checkers
            target = package_of(one.name)
            if (target in ABOVE and package not in ABOVE) or (package in ABOVE and target in ABOVE[package]):
                out.append(f"{where}: {target} is above {package}")
            elif package in BELOW and not one.typing and target not in (package, "firth"):
                inside = one.name.removeprefix("firth.")
                if not any(inside == known or inside.startswith(f"{known}.") for known in BELOW[package]):
                    out.append(f"{where}: {package} may import {', '.join(BELOW[package]) or 'nothing'}")
        if outer in LEARNERS and not one.typing:
            if package in TORCH_FREE and (package != "cli" or one.top):
                out.append(f"{where}: {package} must start without it")
            if package == "data" and module != "firth.data.collate":
                out.append(f"{where}: in data only collate.py makes tensors")
    return out


def modules() -> dict[str, Path]:
    """Return dotted name -> path of every module."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Return module -> modules that it imports when it is imported, or names types of."""
    return {
        module: {
            name
            for one in imports(source)
            if one.top
            for name in [one.name if one.name in sources else one.name.rpartition(".")[0]]
            if name in sources and name != module
        }
        for module, source in sources.items()
    }


def circle(sources: Mapping[str, str]) -> list[str]:
    """Return modules that import one another in a circle; [] if there are none."""
    try:
        TopologicalSorter(graph(sources)).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


@pytest.mark.slow
@pytest.mark.parametrize("module", modules())
def test_imports_go_down_only(module):
    assert faults(module, modules()[module].read_text(encoding="utf-8")) == []


def test_no_circle_of_imports_or_of_types():
    assert circle({module: path.read_text(encoding="utf-8") for module, path in modules().items()}) == []


def test_a_circle_is_found():
    a, types = "from firth.b import B", "if TYPE_CHECKING:\n    from firth import a"
    assert set(circle({"firth.a": a, "firth.b": types})) == {"firth.a", "firth.b"}
    assert circle({"firth.a": a, "firth.b": "def f():\n    from firth import a"}) == []
    assert circle({"firth.a": a, "firth.b": "import torch"}) == []


def test_every_package_has_its_place():
    present = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert present - {"__init__", "__main__"} <= {*BELOW, *ABOVE}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("firth.model.model", "from firth.objectives.objective import Objective"),
        ("firth.model.model", "import firth.training.step"),
        ("firth.training.trainer", "from firth.objectives.masked_lm import MLM"),
        ("firth.training.trainer", "from firth.objectives import mlm"),
        ("firth.tokenizer.vocab", "def f():\n    from firth.data import attention_fields"),
        ("firth.tokenizer.tokenizer", "def f():\n    import torch"),
        ("firth.tokenizer.tokenizer", "from torch import Tensor"),
        ("firth.data.source", "import torch.nn as nn"),
        ("firth.cli", "import torch"),
        ("firth.types", "import torch"),
        ("firth.evaluate.task", "from firth.runs.recipe import load"),
        ("firth.training.trainer", "if TYPE_CHECKING:\n    from firth.runs.recipe import Recipe"),
        ("firth.runs.run", "from firth.demo.demo import run_demo"),
        ("firth.pretrained.load_save", "def f():\n    import transformers"),
        ("firth.evaluate.metrics", "if TYPE_CHECKING:\n    from sklearn.metrics import f1_score"),
        ("firth.evaluate.task", "from firth.training.trainer import train"),
        (
            "firth.objectives.masked_lm",
            "if TYPE_CHECKING:\n    pass\nelse:\n    from firth.generate.engine import Engine",
        ),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("firth.types", "if TYPE_CHECKING:\n    import torch"),
        ("firth.data.source", "if TYPE_CHECKING:\n    from firth.model.model import LM"),
        ("firth.data.collate", "import torch"),
        ("firth.training.step", "from firth.objectives.objective import Objective"),
        ("firth.cli", "def train():\n    import torch\n    from firth.runs.run import run"),
        ("firth.demo.demo", "from firth.runs.recipe import load"),
        ("firth.report.run_report", "from firth.types import VERSION"),
    ],
)
def test_allowed_imports_are_accepted(module, source):
    assert faults(module, source) == []


def test_relative_imports_are_rejected():
    with pytest.raises(AssertionError, match="line 1"):
        imports("from . import lm")


def loads(statement: str) -> set[str]:
    """Return the top-level modules in a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [m for m in modules() if package_of(m) in TORCH_FREE or (package_of(m) == "data" and m != "firth.data.collate")],
)
def test_starts_without_torch(module):
    assert not loads(f"import {module}") & {"torch", *ORACLES}


@pytest.mark.slow
def test_loads_would_see_torch():
    assert "torch" in loads("import firth.data.collate")
