"""A run records its inputs: files may move but not change, and the run directory holds everything that the run depends on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from firth.cli import app
from firth.io.safetensors import read_tensors
from firth.model.config import decoder_config, encoder_config
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.classification import Classification
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.reward_model import RewardModeling
from firth.pretrained.load_save import save_model
from firth.runs.input_hashes import RunInputs
from firth.runs.recipe import load
from firth.runs.run import RunResult, run
from firth.runs.tokenizer import resolved_size, tokenizer_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError
from tests.support.runs import quiet

SMALL = [
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.head_dim=0",
    "model.intermediate_size=48",
    "model.max_positions=64",
    "examples.max_length=24",
    "batch.size=4",
    "max_steps=4",
    "checkpoint.every=2",
    "evaluation.every=0",
    "sample_prompts=[]",
    "tokenizer.vocab_size=420",
]


NOUNS = ("otter", "boat", "lamp", "river")


def words(seed: int, count: int = 60) -> str:
    return " ".join(f"{NOUNS[(i * seed) % 4]}{(i * i + seed) % 7}" for i in range(count))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with texts and a finished run on them."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "texts").mkdir()
    for i in range(6):
        (folder / "texts" / f"{i}.txt").write_text(words(i + 1))
    run(load("gpt", [*SMALL, f"data.path={folder / 'texts'}", "data.validation_fraction=0.2"]), folder / "run", quiet)
    return folder


def kill(directory: Path) -> None:
    """Leave the files of a run that was killed after its second step."""
    for name in ("done.json", "report.html"):
        (directory / name).unlink()
    for name in ("model", "checkpoints/step-000004"):
        shutil.rmtree(directory / name)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def again(folder: Path, *settings: str, lines: list[str] | None = None) -> RunResult:
    recipe = load("gpt", [*SMALL, f"data.path={folder / 'texts'}", "data.validation_fraction=0.2", *settings])
    return run(recipe, folder / "run", quiet if lines is None else lines.append)


def edit(folder: Path) -> None:
    (folder / "texts" / "3.txt").write_text(words(9))


def edit_and_set_the_time_back(folder: Path) -> None:
    file = folder / "texts" / "3.txt"
    status, text = file.stat(), file.read_text()
    file.write_text(text[::-1])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def add(folder: Path) -> None:
    (folder / "texts" / "new.txt").write_text(words(9))


@pytest.mark.parametrize("state", ["killed", "finished"])
@pytest.mark.parametrize("change", [edit, edit_and_set_the_time_back, add])
def test_changed_text_is_rejected(folder: Path, change: Callable[[Path], None], state: str) -> None:
    """The text is replaced between a kill and the resumption, or after the run is finished."""
    if state == "killed":
        kill(folder / "run")
    again_first = {p: p.read_bytes() for p in (folder / "run" / "tokenizer").iterdir()}
    change(folder)
    with pytest.raises(UserError, match=r"began with another content of data\.path: put back") as error:
        again(folder)
    assert "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in (folder / "run" / "tokenizer").iterdir()} == again_first
    with pytest.raises(UserError, match=r"began with another content of data\.path"):
        again(folder, f"data.validation_path={folder / 'texts'}")


def test_moved_text_resumes(finished: Path, folder: Path) -> None:
    whole = read_tensors(finished / "run" / "model")
    kill(folder / "run")
    shutil.copytree(folder / "texts", folder / "moved" / "texts")
    shutil.rmtree(folder / "texts")
    for file in (folder / "moved" / "texts").iterdir():
        os.utime(file, (1, 1))
    (folder / "texts").symlink_to(folder / "moved" / "texts")
    done = again(folder, f"data.path={folder / 'moved' / 'texts'}")
    assert done.steps == 4 and all(torch.equal(whole[n], t) for n, t in read_tensors(done.model).items())
    recipe = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())
    assert recipe["data"]["path"] == [str(folder / "moved" / "texts")]
    lines: list[str] = []
    assert again(folder, lines=lines) == done  # and the finished run at the first path
    assert lines[-1].endswith(f"is finished, after 4 steps; its model is {folder / 'run' / 'model'}")


def test_files_are_not_hashed_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again(folder, f"data.path={folder / 'texts'}")
    recipe = load(str(folder / "run"))
    first = RunInputs.read(recipe, folder / "run", quiet)
    first.write(folder / "run", "hash")
    monkeypatch.setattr("firth.runs.input_hashes.hashlib.file_digest", None)
    assert RunInputs.read(recipe, folder / "run", quiet).digests == first.digests


def test_run_without_a_record_of_inputs_is_rejected(folder: Path) -> None:
    (folder / "run" / "inputs.json").unlink()
    with pytest.raises(UserError, match="older version of firth, which kept no record of its inputs"):
        again(folder)


def test_other_settings_are_rejected_by_name(folder: Path) -> None:
    with pytest.raises(UserError, match=r"a run of another recipe: batch\.size is 4 there and 8 here; choose another"):
        again(folder, "batch.size=8")
    with pytest.raises(UserError, match=r"began without data\.validation_path, which this recipe sets"):
        again(folder, f"data.validation_path={folder / 'texts' / '0.txt'}")


def test_edited_recipe_of_a_run_is_rejected(folder: Path) -> None:
    file = folder / "run" / "recipe.yaml"
    text = file.read_text()
    assert text.count("weight_decay: 0.1") == 1
    file.write_text(text.replace("weight_decay: 0.1", "weight_decay: 0.2"))
    with pytest.raises(
        UserError, match=r"recipe\.yaml was changed after the run began: put it back, or train it in another"
    ):
        run(load(str(folder / "run")), folder / "run", lambda _: None)
    file.write_text(text + "\n# a comment changes nothing\n")
    again(folder)
    file.write_text(text)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with one tokenizer and config, two of each kind, and records."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train([words(i) for i in range(1, 9)], "byte-bpe", vocab_size=400)
    left, both = (
        decoder_config(tokenizer.vocab.size, 32, 1, max_positions=64),
        encoder_config(tokenizer.vocab.size, 32, 1, max_positions=64),
    )
    kinds: dict[str, tuple[Objective, bool]] = {
        "policy": (CausalLM(), True), "reward": (CausalLM() + RewardModeling(), True), "encoder": (MLM(), False),
        "teacher": (Classification(class_names=("bad", "good")), False),
    }  # fmt: skip
    for kind, (objective, causal) in kinds.items():
        for seed in (0, 1):
            torch.manual_seed(seed)
            config = left if causal else both
            facts = {"classes": ["bad", "good"]} if kind == "teacher" else {}
            save_model(LM(config, objective.heads(config)), tokenizer, folder / f"{kind}-{seed}", facts)
    rows = [{"prompt": f"otter{i}", "chosen": "boat", "rejected": "lamp"} for i in range(24)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labels = [{"text": f"otter {i}", "label": "good" if i % 2 else "bad"} for i in range(30)]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    return folder


def cases(folder: Path) -> dict[str, tuple[str, list[str], str]]:
    """Field -> recipe, settings, and the model that it names."""
    pairs, labels = f"data.path={folder / 'pairs.jsonl'}", f"data.path={folder / 'labels.jsonl'}"
    ppo = [pairs, "examples.rollout_size=4", "examples.num_epochs=1", "examples.max_new_tokens=2"]
    taught = f"examples={{kind: pseudo_labeled, teacher: {folder / 'teacher'}, num_labeled: 4}}"
    begin = [f"init_from={folder / 'encoder'}", "objective=pseudo_labels", taught]
    return {
        "init_from": ("dpo", [pairs, f"init_from={folder / 'policy'}"], "policy"),
        "examples.reward_model": (
            "ppo",
            [*ppo, f"init_from={folder / 'policy'}", f"examples.reward_model={folder / 'reward'}"],
            "reward",
        ),
        "examples.teacher": ("semi_supervised", [labels, *begin], "teacher"),
        "init_embeddings_from": (
            "classification",
            [
                labels,
                f"init_embeddings_from={folder / 'encoder'}",
                "model.hidden_size=32",
                "model.num_layers=1",
                "model.num_heads=2",
                "model.causal=false",
                "model.max_positions=64",
            ],
            "encoder",
        ),
        "tokenizer.path": (
            "classification",
            [
                labels,
                f"tokenizer.path={folder / 'encoder'}",
                "model.hidden_size=32",
                "model.num_layers=1",
                "model.num_heads=2",
                "model.causal=false",
                "model.max_positions=64",
            ],
            "encoder",
        ),
    }


@pytest.mark.parametrize(
    "field", ["init_from", "examples.reward_model", "examples.teacher", "init_embeddings_from", "tokenizer.path"]
)
def test_another_model_is_rejected(models: Path, tmp_path: Path, field: str) -> None:
    """Between two starts of a run the weights are replaced by others with the same config and tokenizer."""
    for kind in ("policy", "reward", "encoder", "teacher"):
        shutil.copytree(models / f"{kind}-0", tmp_path / kind)
    for name in ("pairs", "labels"):
        shutil.copy(models / f"{name}.jsonl", tmp_path)
    name, settings, kind = cases(tmp_path)[field]
    common = [
        "batch.size=4",
        "max_steps=2",
        "evaluation.every=0",
        "checkpoint.every=1",
        "sample_prompts=[]",
        "precision=fp32",
    ]
    recipe = load(name, [*settings, *common])
    run(recipe, tmp_path / "run", quiet)
    for file in (tmp_path / kind).iterdir():
        os.utime(file, (1, 1))
    run(recipe, tmp_path / "run", quiet)  # nothing but times has changed
    shutil.rmtree(tmp_path / kind)
    shutil.copytree(models / f"{kind}-1", tmp_path / kind)
    if field == "tokenizer.path":
        run(recipe, tmp_path / "run", quiet)  # the weights are no input here
        train([words(i) + " lantern" for i in range(1, 9)], "byte-bpe", vocab_size=390).save(tmp_path / kind)
        (tmp_path / kind / "firth.json").unlink()
    with pytest.raises(UserError, match=rf"began with another content of {field}"):
        run(recipe, tmp_path / "run", quiet)
    (tmp_path / "run" / "done.json").unlink()
    with pytest.raises(UserError, match=rf"began with another content of {field}"):
        run(recipe, tmp_path / "run", quiet)
    shutil.rmtree(tmp_path / kind)
    if field == "examples.reward_model":
        with pytest.raises(UserError, match=rf"began with a {field} that is not there any more"):
            run(recipe, tmp_path / "run", quiet)


def test_tokenizer_of_a_failed_run_is_rebuilt(finished: Path, tmp_path: Path) -> None:
    """It was trained on another text with other settings: the recipe sets unigram with 450 ids, and the file was BPE with 366."""
    (tmp_path / "text.txt").write_text(words(5, 400))
    failed = load("gpt", [*SMALL, f"data.path={tmp_path / 'text.txt'}", "examples.max_length=999"])
    with pytest.raises(UserError):
        run(failed, tmp_path / "run", quiet)
    left = Tokenizer.load(tmp_path / "run" / "tokenizer")
    settings = [*SMALL, f"data.path={finished / 'texts'}", "tokenizer.algorithm=unigram", "tokenizer.vocab_size=410"]
    lines: list[str] = []
    run(load("gpt", settings), tmp_path / "run", lines.append)
    made = Tokenizer.load(tmp_path / "run" / "tokenizer")
    assert json.loads(made.definition)["model"]["type"] == "Unigram" and made.digest != left.digest
    assert any("an earlier run made this tokenizer of another text or with other settings" in line for line in lines)
    alone = tokenizer_of(load("gpt", settings), tmp_path / "alone", quiet)
    assert alone.digest == made.digest == Tokenizer.load(tmp_path / "run" / "model").digest
    lines.clear()
    run(load("gpt", settings), tmp_path / "run", lines.append)
    assert not any("ids from" in line for line in lines)


@pytest.mark.parametrize("algorithm", ["bpe", "byte-bpe", "wordpiece", "unigram", "word"])
def test_resolved_vocab_size_repeats_the_tokenizer(algorithm: str, finished: Path, tmp_path: Path) -> None:
    """For a text with fewer than 8,192 ids the resolved size gives the same tokenizer, with every algorithm.

    Unigram with 286 requested ids finds 284 here, so its recipe keeps 8,192.
    """
    settings = [f"data.path={finished / 'texts'}", f"tokenizer.algorithm={algorithm}"]
    first = tokenizer_of(load("gpt", [*settings, "tokenizer.vocab_size=8192"]), tmp_path / "first", quiet)
    size = first.vocab.size
    resolved = resolved_size(tmp_path / "first")
    assert size < 8192 and resolved == (8192 if algorithm == "unigram" else size)
    again = tokenizer_of(load("gpt", [*settings, f"tokenizer.vocab_size={resolved}"]), tmp_path / "again", quiet)
    assert again.digest == first.digest and resolved_size(tmp_path / "again") == resolved
    lines: list[str] = []
    tokenizer_of(load("gpt", [*settings, f"tokenizer.vocab_size={resolved}"]), tmp_path / "first", lines.append)
    assert not lines


def firth(*arguments: str, code: int = 0) -> str:
    """Return the output of the command, or its error message."""
    result = CliRunner().invoke(app, arguments)
    if code:
        assert isinstance(result.exception, UserError), result.output
        return str(result.exception)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_run_directory_is_complete_and_resumes(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """recipe.yaml has no open settings, the directory resumes, and the file repeats the run bit by bit elsewhere."""
    shutil.copytree(finished / "texts", tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    settings = [
        *(s for s in SMALL if "size" not in s),
        "tokenizer.vocab_size=8192",
        "data.path=texts",
        "precision=auto",
    ]
    firth("train", "gpt", *settings, "--out", "run")
    recipe = yaml.safe_load(Path("run/recipe.yaml").read_text())
    size = Tokenizer.load("run/tokenizer").vocab.size
    assert recipe["tokenizer"]["vocab_size"] == recipe["model"]["vocab_size"] == size < 8192
    assert recipe["precision"] in ("fp32", "bf16")
    assert recipe["data"]["path"] == [str(tmp_path / "texts")] and recipe["data"]["corpus"] == ""
    whole = read_tensors(Path("run/model"))
    assert "run is finished, after 4 steps" in firth("train", "run")
    kill(Path("run"))
    monkeypatch.chdir(tmp_path / "texts")
    out = firth("train", "../run")
    assert "resuming from step-000002" in out and not (tmp_path / "texts" / "runs").exists()
    monkeypatch.chdir(tmp_path)
    assert "would change its recipe: choose another directory with --out" in firth("train", "run", "seed=5", code=2)
    firth("train", "run", "seed=4", "max_steps=1", "--out", "other")
    firth("train", "run/recipe.yaml", "--out", "again")
    assert Path("again/recipe.yaml").read_bytes() == Path("run/recipe.yaml").read_bytes()
    for directory in ("run", "again"):
        repeated = read_tensors(Path(directory, "model"))
        assert repeated.keys() == whole.keys() and all(torch.equal(whole[n], t) for n, t in repeated.items()), directory
