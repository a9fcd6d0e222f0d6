"""`model.vocab_size` is that of the tokenizer, and a run with `init_from` takes the model config of its base."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from firth.compare.compare import ComparisonConfig, compare
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.train import train
from firth.training.schedule import Budget
from firth.types import UserError

TEXT = "\n".join(
    f"The {a} {b} the boat {c}." for a in ("otter", "baker", "pilot") for b in ("paints", "sells") for c in ("at dawn", "in Leeds")
)  # fmt: skip
BODY = [
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=1",
    "model.intermediate_size=64",
    "model.max_positions=32",
    "examples.max_length=16",
    "max_steps=1",
    "batch.size=4",
    "evaluation.every=0",
    "data.validation_fraction=0",
    "precision=fp32",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a tokenizer of 290 ids, and runs: `trained` with a size of 300, `given` with that tokenizer."""
    folder = tmp_path_factory.mktemp("vocab")
    (folder / "text.txt").write_text(TEXT)
    train([TEXT], "byte-bpe", 290).save(folder / "tokenizer")
    for name, setting in (("trained", "tokenizer.vocab_size=300"), ("given", f"tokenizer.path={folder / 'tokenizer'}")):
        run(load("gpt", [*BODY, f"data.path={folder / 'text.txt'}", setting]), folder / name, lambda _: None)
    return folder


def error_of(name: str, settings: list[str], out: Path) -> str:
    with pytest.raises(UserError) as caught:
        run(load(name, settings), out, lambda _: None)
    return str(caught.value)


def test_another_vocab_size_is_rejected(place: Path, tmp_path: Path) -> None:
    """On the command line, in a whole model config, in a user's file; with a trained and a given tokenizer."""
    text, given = f"data.path={place / 'text.txt'}", f"tokenizer.path={place / 'tokenizer'}"
    message = (
        "model.vocab_size={} is not the number of ids of the tokenizer, which is {}: "
        "leave model.vocab_size out, and it is taken from there"
    )
    assert error_of(
        "gpt", [*BODY, text, "tokenizer.vocab_size=300", "model.vocab_size=10"], tmp_path / "a"
    ) == message.format(10, 300)
    assert error_of("gpt", [*BODY, text, given, "model.vocab_size=4096"], tmp_path / "b") == message.format(4096, 290)
    whole = "model={vocab_size: 10, hidden_size: 32, num_layers: 1, num_heads: 1, max_positions: 32}"
    assert error_of("gpt", [*BODY[5:], text, given, whole], tmp_path / "c") == message.format(10, 290)
    recipe = yaml.safe_load((place / "given" / "recipe.yaml").read_text())
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(recipe | {"model": recipe["model"] | {"vocab_size": 8192}}))
    assert error_of(str(mine), [], tmp_path / "d") == message.format(8192, 290)
    settings = [*BODY[:6], text, "data.split_by=line", "tokenizer.vocab_size=300", "gpt.model.vocab_size=10"]
    with pytest.raises(
        UserError, match=r"^gpt: model.vocab_size=10 is not the number of ids of the tokenizer, which is 300"
    ):
        compare(
            ["gpt"],
            settings,
            ComparisonConfig(Budget(max_flops=1e9), (1.0,), 1, "none"),
            tmp_path / "e",
            log=lambda _: None,
        )


def test_finished_run_repeats(place: Path, tmp_path: Path) -> None:
    """Its recipe has the actual number of ids; a recipe with another tokenizer or size differs."""
    for name, count in (("trained", 300), ("given", 290)):
        file = place / name / "recipe.yaml"
        assert yaml.safe_load(file.read_text())["model"]["vocab_size"] == count
        assert run(load(str(file)), tmp_path / name, lambda _: None).steps == 1
        weights = [one / "model" / "model.safetensors" for one in (place / name, tmp_path / name)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    for name, setting, count in (
        ("trained", "tokenizer.vocab_size=280", 280),
        ("trained", f"tokenizer.path={place / 'tokenizer'}", 290),
        ("given", "tokenizer.path=", 290),
        ("gpt", "tokenizer.vocab_size=280", 280),
        ("gpt", f"tokenizer.path={place / 'tokenizer'}", 290),
        ("gpt", f"init_embeddings_from={place / 'given'}", 290),
    ):
        config = load(str(place / name / "recipe.yaml") if name != "gpt" else name, [setting]).model
        assert config is not None and config.vocab_size == count, (name, setting)


def test_vocab_size_may_be_omitted(place: Path, tmp_path: Path) -> None:
    for shape in (
        "{hidden_size: 32, num_layers: 1, num_heads: 1}",
        "{vocab_size: null, hidden_size: 32, num_layers: 1, num_heads: 1}",
    ):
        made = load("classification", [f"model={shape}", "tokenizer.vocab_size=500"]).model
        assert made is not None and made.vocab_size == 500
    made = load(
        "classification",
        ["model={hidden_size: 32, num_layers: 1, num_heads: 1}", f"tokenizer.path={place / 'tokenizer'}"],
    ).model
    assert made is not None and made.vocab_size == 290
    small = [*BODY, f"data.path={place / 'text.txt'}", "tokenizer.vocab_size=4000"]
    done = run(load("gpt", small), tmp_path / "small", lambda _: None)
    ids = yaml.safe_load((done.directory / "recipe.yaml").read_text())["model"]["vocab_size"]
    assert ids < 4000  # a text with fewer than the recipe and its tokenizer have


def test_init_from_sets_the_model_config(place: Path, tmp_path: Path) -> None:
    """A published model config is replaced by that of the base; one that the user set is an error that names the fix."""
    assert load("gpt", [f"init_from={place / 'given'}"]).model is None
    on = [f"data.path={place / 'text.txt'}", *BODY[5:], f"init_from={place / 'given'}"]
    assert run(load("gpt", on), tmp_path / "on", lambda _: None).steps == 1
    message = error_of("gpt", [*on, "model.hidden_size=96"], tmp_path / "a")
    assert message.endswith("model.hidden_size is 32, not 96; use the same model config, as model=null does")
    assert run(load(str(place / "trained" / "recipe.yaml"), on), tmp_path / "b", lambda _: None).steps == 1
    recipe = yaml.safe_load((place / "trained" / "recipe.yaml").read_text())
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(recipe | {"model": recipe["model"] | {"intermediate_size": 96}}))
    message = error_of(str(mine), on, tmp_path / "c")
    assert message.endswith("model.intermediate_size is 64, not 96; use the same model config, as model=null does")
    assert run(load(str(mine), [*on, "model=null"]), tmp_path / "c", lambda _: None).steps == 1
    message = error_of("classification", [*on, "model.dropout=0.1"], tmp_path / "d")
    assert message == (
        "the model config lacks hidden_size, num_layers, num_heads: a run with init_from has the model config of "
        f"{place / 'given'}, so leave out model.dropout"
    )


@pytest.mark.parametrize("settings", [["model=null"], []])
def test_recipe_without_model_or_init_from_is_rejected(settings: list[str], tmp_path: Path) -> None:
    """Before any text is read."""
    message = error_of("gpt" if settings else "classification", settings, tmp_path / "none")
    assert (
        "has neither a model config nor init_from: start from a model with init_from=RUN, or give a whole model config"
        in message
    )
    assert not (tmp_path / "none").exists()


def test_init_from_an_unfinished_run_is_rejected(place: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text((place / "given" / "recipe.yaml").read_text())
    for field in ("init_from", "init_embeddings_from"):
        message = error_of("gpt", [f"{field}={tmp_path / 'none'}"], tmp_path / "out")
        assert message == (
            f"{field}={tmp_path / 'none'}: there is no such run or model directory, no GGUF file and no model of the catalog "
            "(minilm, smollm2)"
        )
        message = error_of("gpt", [f"{field}={tmp_path / 'begun'}"], tmp_path / "out")
        cure = f"finish it with `firth train {tmp_path / 'begun'}`"
        assert message == f"{field}={tmp_path / 'begun'}: this run has no model yet: {cure}"


def test_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    message = error_of("gpt", [*BODY, f"data.path={tmp_path / 'empty.txt'}"], tmp_path / "out")
    assert message == f"{tmp_path / 'empty.txt'}: there is no text in it: every document is empty"
