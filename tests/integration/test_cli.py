"""The command line as a user meets it: fast help, one-sentence errors, a run from a folder of text to its samples."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from firth import cli

FIRTH = [sys.executable, "-m", "firth"]
SMALL = ["tokenizer.vocab_size=500", "model.hidden_size=32", "model.num_layers=1", "model.num_heads=1", "model.max_positions=64",
         "examples.max_length=32", "batch.size=4", "max_steps=3", "evaluation.every=2", "evaluation.max_examples=8"]  # fmt: skip


def firth(*arguments: str, code: int = 0, stdin: str | None = None) -> str:
    done = subprocess.run([*FIRTH, *arguments], capture_output=True, text=True, input=stdin, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return the same without a process of its own: most commands take less time than the import of torch."""

    def call(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["firth", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = "".join(capsys.readouterr())
        assert (ended.value.code or 0) == code, output
        return output

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"Letter {i}. " + "The quick brown fox jumps over the lazy dog again. " * 40)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    out = folder.parent / "run-gpt"
    message = firth("train", "gpt", "data.corpus=", f"data.path={folder}", *SMALL, "--out", str(out))
    assert "held out" in message and "parameters" in message
    return out


def test_help_imports_no_heavy_library() -> None:
    """Help takes 0.2 s because of what it does not import; a timed assertion would fail on a busy machine."""
    heavy = ("torch", "tokenizers", "numpy", "pyarrow", "jinja2")
    code = f"import sys, firth.cli; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "evaluate" in firth("--help")


def test_a_run_directory_holds_what_the_contract_says(run: Path) -> None:
    names = {p.name for p in run.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints", "tokenizer", "model", "report.html"} <= names
    model = {p.name for p in (run / "model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja"} <= model  # fmt: skip


def test_a_finished_run_is_kept_and_another_recipe_refused(
    run: Path, folder: Path, in_process: Callable[..., str]
) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    arguments = ["train", "gpt", "data.corpus=", f"data.path={folder}", *SMALL, "--out", str(run)]
    firth(*arguments)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert "another recipe" in in_process(*arguments, "seed=5", code=2)


def test_its_own_recipe_repeats_the_run_bit_for_bit(run: Path, tmp_path: Path) -> None:
    firth("train", str(run / "recipe.yaml"), "--out", str(tmp_path / "again"))
    ours, again = ((d / "model" / "model.safetensors").read_bytes() for d in (run, tmp_path / "again"))
    assert ours == again


def test_generate_is_seeded_and_evaluate_measures(run: Path, folder: Path, in_process: Callable[..., str]) -> None:
    first = firth("generate", str(run), "The quick", "-n", "8", "--seed", "3")
    assert first == firth("generate", str(run), "The quick", "-n", "8", "--seed", "3")
    assert "bits_per_byte" in in_process("evaluate", str(run))
    found = json.loads(in_process("evaluate", str(run), str(folder / "3.txt"), "--json"))
    assert found["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nosuch"], "no recipe 'nosuch'"),
        (["train", "gpt", "batch.siz=3"], "did you mean 'size'"),
        (["train", "gpt", "data.corpus=", "--out", "NEW"], "data.path"),
        (["train", "gpt", "data.corpus=", "data.path=/no/such/place", "--out", "NEW"], "/no/such/place"),
        (["generate", "/no/such/run", "x"], "no model"),
        (["tokenizer", "show", "/no/such/run"], "no tokenizer"),
        (["fetch", "nosuch"], "nosuch"),
        (["demo", "--size", "huge", "--out", "NEW"], "no size 'huge'"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], message: str, in_process: Callable[..., str], tmp_path: Path
) -> None:
    output = in_process(*(str(tmp_path / "new") if a == "NEW" else a for a in arguments), code=2)
    assert message in output
    assert output.count("\n") == 1, output


@pytest.mark.parametrize(("number", "hint"), [(errno.ENOSPC, "free some room"), (errno.EACCES, "another place")])
def test_what_the_machine_refuses_is_one_sentence(
    number: int, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(cli, "app", refused)
    with pytest.raises(SystemExit) as left:
        cli.main()
    message = capsys.readouterr().err
    assert left.value.code == 2
    assert "/some/file" in message and hint in message and message.count("\n") == 1


@pytest.mark.parametrize("message", ["", "stopped at step 7 and saved; run the same command again to go on"])
def test_ctrl_c_ends_in_one_sentence(
    message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typer made an exit of it, and the sentence was lost."""

    def interrupted(_: str) -> None:
        raise KeyboardInterrupt(*[message] * bool(message))

    monkeypatch.setattr("firth.corpora.catalog.fetch", interrupted)
    monkeypatch.setattr(sys, "argv", ["firth", "fetch", "pydoc"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"firth: {message or 'interrupted'}\n"


def test_another_error_of_the_machine_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError(errno.EIO, "a bad disk")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(OSError, match="a bad disk"):
        cli.main()


def test_the_tokenizer_commands(folder: Path, in_process: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "tok"
    message = in_process(
        "tokenizer", "train", str(folder), "--out", str(out), "--algorithm", "bpe", "--vocab-size", "300"
    )
    assert "12 files" in message and f"firth tokenizer show {out}" in message
    page = in_process("tokenizer", "show", str(out), "laern", "--first", "3")
    assert "->" in page and "laern" in page


def test_an_empty_folder_and_an_empty_file(in_process: Callable[..., str], tmp_path: Path) -> None:
    folder, out = tmp_path / "empty", str(tmp_path / "run")
    folder.mkdir()
    train = ["train", "gpt", "data.corpus=", f"data.path={folder}", "--out", out]
    assert "no text" in firth(*train, code=2)
    (folder / "a.txt").write_text("")
    assert "empty" in in_process(*train, code=2)
