"""Code rules that a machine can check. Each rule is a function of a text, and each is shown to find a violation."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "firth").rglob("*.py"))
TEXTS = [
    path
    for top in ("firth", "tests", "bench", "docs", ".ci")
    for path in sorted((ROOT / top).rglob("*"))
    if path.is_file()
    and path.suffix in (".py", ".j2", ".md", ".yaml", ".toml", ".sh", "")
    and "__pycache__" not in path.parts
] + [path for name in ("README.md", "Makefile", "pyproject.toml", "constraints.txt") if (path := ROOT / name).exists()]

MAX_LINES = 600


def too_long(source: str) -> list[str]:
    """A file has at most MAX_LINES lines."""
    lines = source.count("\n")
    return [f"{lines} lines, of at most {MAX_LINES}"] if lines > MAX_LINES else []


def broad_excepts(source: str) -> list[str]:
    """`except:`, and `except Exception` that neither raises again nor logs a warning: errors must not be swallowed."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            again = any(
                isinstance(inner, ast.Raise)
                or (isinstance(inner, ast.Call) and ast.unparse(inner.func) == "LOGGER.warning")
                for inner in ast.walk(node)
            )
            if not caught or (re.search(r"\b(Base)?Exception\b", caught) and not again):
                out.append(f"line {node.lineno}: except {caught or 'anything'}")
    return out


def dispatch(source: str) -> list[str]:
    """`hasattr` hides the type of an object, and `strict=False` on weights hides mismatches."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "hasattr":
                out.append(f"line {node.lineno}: hasattr")
            if name.endswith("load_state_dict"):
                out += [
                    f"line {node.lineno}: {ast.unparse(k)}" for k in node.keywords if ast.unparse(k) == "strict=False"
                ]
    return out


def reads_pickles(source: str) -> list[str]:
    """Pickles are never read: they run code (torch.load, numpy's allow_pickle, pickle itself)."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None)]
            out += [f"line {node.lineno}: {n}" for n in names if n in ("pickle", "dill", "joblib", "shelve", "marshal")]
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) == "torch.load":
                out.append(f"line {node.lineno}: torch.load")
            out += [f"line {node.lineno}: allow_pickle" for k in node.keywords if ast.unparse(k) == "allow_pickle=True"]
    return out


def no_docstring(source: str) -> list[str]:
    """Every module has a docstring."""
    tree = ast.parse(source)
    return [] if not tree.body or ast.get_docstring(tree) else ["no module docstring"]


def imports_a_test(source: str) -> list[str]:
    """Test modules share code through tests/support and conftest.py; none imports another."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            parts = [name for alias in node.names for name in alias.name.split(".")]
            parts += (getattr(node, "module", None) or "").split(".")
            out += [f"line {node.lineno}: {part}" for part in parts if part.startswith("test_")]
    return out


DIALECT = re.compile(r"\b(told|said|asked|apart|stands|beside|learnt|mend|mended|laid|whoever|behold)\b", re.I)
"""Words that this project once used for many things, and the field for none."""


def dialect(source: str) -> list[str]:
    """Return the words of the old dialect in docstrings, messages, comments and names of functions."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            found += [f"line {token.start[0]}: {word}" for word in DIALECT.findall(token.string)]
        elif token.type == tokenize.NAME:
            found += [
                f"line {token.start[0]}: {token.string}" for part in token.string.split("_") if DIALECT.fullmatch(part)
            ]
    return found


def machine_paths(text: str) -> list[str]:
    """Paths that exist on one machine only."""
    return re.findall(r"(?<![\w.])(?:/home/\w+|/root/|/work/|/Users/\w+|/tmp/\w+|[A-Z]:\\\\Users)[\w/.-]*", text)


def violations(rule, paths):
    """Every violation of a rule, with its file."""
    return [f"{p.relative_to(ROOT)}: {what}" for p in paths for what in rule(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("rule", [too_long, broad_excepts, dispatch, reads_pickles, no_docstring])
def test_sources_keep_the_rules(rule):
    assert len(SOURCES) > 20
    assert violations(rule, SOURCES) == []


def test_no_test_imports_another():
    paths = [path for path in TEXTS if path.suffix == ".py" and path.is_relative_to(ROOT / "tests")]
    assert len(paths) > 100
    assert violations(imports_a_test, paths) == []


def test_the_package_speaks_plainly():
    assert violations(dialect, SOURCES) == []


def test_the_documents_speak_plainly():
    documents = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
    assert [
        f"{path.relative_to(ROOT)}: {word}" for path in documents for word in DIALECT.findall(path.read_text("utf-8"))
    ] == []


def test_no_machine_paths():
    assert violations(machine_paths, [path for path in TEXTS if path != Path(__file__)]) == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (too_long, "x = 1\n" * (MAX_LINES + 1)),
        (broad_excepts, "try:\n    f()\nexcept:\n    raise"),
        (broad_excepts, "try:\n    f()\nexcept Exception:\n    pass"),
        (broad_excepts, "try:\n    f()\nexcept (OSError, BaseException) as e:\n    print(e)"),
        (dispatch, "hasattr(model, 'lm')"),
        (dispatch, "model.load_state_dict(state, strict=False)"),
        (reads_pickles, "import pickle"),
        (reads_pickles, "from pickle import load"),
        (reads_pickles, "import torch\nx = torch.load('a')"),
        (reads_pickles, "np.load('a', allow_pickle=True)"),
        (no_docstring, "x = 1"),
        (imports_a_test, "from tests.unit.test_house import ROOT"),
        (imports_a_test, "import tests.unit.test_house"),
        (imports_a_test, "def f():\n    from tests.unit import test_house"),
        (machine_paths, "see /home/ann/firth and nothing else"),
        (machine_paths, 'open("/root/x")'),
    ],
)
def test_a_violation_is_found(rule, source):
    assert len(rule(source)) == 1


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (broad_excepts, "try:\n    f()\nexcept BaseException:\n    clean()\n    raise"),
        (broad_excepts, "try:\n    f()\nexcept OSError:\n    pass"),
        (broad_excepts, "try:\n    f()\nexcept Exception as error:\n    LOGGER.warning(str(error))"),
        (machine_paths, "https://example.com/home/ann ./work/ and runs/tmp/x"),
        (no_docstring, ""),
        (imports_a_test, "from tests.support.models import random_model"),
    ],
)
def test_allowed_code_is_no_violation(rule, source):
    assert rule(source) == []


def test_every_benchmark_is_in_the_bench_readme():
    readme = (ROOT / "bench" / "README.md").read_text("utf-8")
    programs = [path for path in (ROOT / "bench").rglob("*.py") if "__main__" in path.read_text("utf-8")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in programs]
    assert len(names) > 20
    assert [name for name in names if f"python -m {name}" not in readme] == []


def test_the_readme_begins_with_make_demo_and_make_test():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme, re.M | re.S)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    commands = [line.split("#")[0].strip() for line in lines if line and not line.startswith(("git clone", "cd ", "#"))]
    assert commands[:2] == ["make demo", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {"demo", "test"} <= set(targets)


def test_no_two_public_classes_share_a_name():
    names = [
        node.name
        for path in SOURCES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert len(names) > 100
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_test_names_are_short():
    names = [
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
    ]
    assert len(names) > 500
    assert [name for name in names if len(name) > 60] == []
