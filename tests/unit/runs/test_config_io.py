"""Recipes as YAML: round trips, and errors that name the field, its line and the nearest name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import yaml

from firth.model.config import decoder_config
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective, Sum
from firth.objectives.sentence_pairs import NSP
from firth.runs import config_io, model_card
from firth.runs.input_hashes import RunInputs, content_hash, recorded_hash
from firth.runs.recipe import Recipe, ResolvedRecipe, load, load_resolved, published
from firth.runs.recipe_names import RECIPES
from firth.types import UserError


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes_round_trip_through_yaml(name: str, tmp_path: Path) -> None:
    recipe = published(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(config_io.write_yaml(recipe))
    assert load(str(path)) == recipe
    assert load(str(tmp_path)).hash() == recipe.hash()
    assert load(str(path), ["seed=1"]).hash() != recipe.hash()


def test_a_sum_of_objectives_is_a_list() -> None:
    both = NSP() + MLM(mlm_probability=0.2)
    plain = config_io.to_dict(both)
    assert [one["kind"] for one in plain] == ["nsp", "mlm"]
    built = config_io.from_dict(Objective, plain)
    assert isinstance(built, Sum) and built == both
    assert config_io.from_dict(Objective, ["nsp", {"kind": "mlm", "mlm_probability": 0.2}]) == both


def test_derived_numbers_follow_an_override() -> None:
    assert load("gpt").model.intermediate_size == 4 * 192
    assert load("gpt", ["model.hidden_size=128", "model.num_heads=2"]).model.intermediate_size == 4 * 128


def test_yaml_numbers_that_look_like_text() -> None:
    """YAML 1.1 reads 1e-5 as a string."""
    assert load("gpt", ["optimizer.lr=1e-5"]).optimizer.lr == 1e-5
    assert load("gpt", ["data.path=mine/"]).data.path == ("mine/",)
    assert load("gpt", ["data.path=[a, b]"]).data.path == ("a", "b")


@pytest.mark.parametrize(
    ("yaml", "line", "message"),
    [
        ("name: x\nobjective: mlm\nexamples: chunks\nbatch:\n  siz: 3\n", 5, "did you mean 'size'"),
        (
            "name: x\nobjective: mlm\nexamples: chunks\nbatch: {size: many}\n",
            4,
            "batch.size='many' should be a valid integer",
        ),
        ("name: x\nobjective: mln\nexamples: chunks\n", 2, "no objective 'mln'; did you mean 'mlm'"),
        ("name: x\nobjective: mlm\nexamples: chunks\noptimiser: {}\n", 4, "did you mean 'optimizer'"),
        (
            "name: x\nobjective: {kind: mlm, noise: nosuch}\nexamples: chunks\n",
            2,
            "objective.noise='nosuch' should be 'iid', ",
        ),
    ],
)
def test_error_names_the_place(yaml: str, line: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml)
    with pytest.raises(UserError) as caught:
        load(str(path))
    # An unknown field is reported at its mapping, whose first line is its own or the one before.
    places = {f"{path}:{line}", f"{path}:{line - 1}", f"{path}:"}
    assert any(str(caught.value).startswith(p) for p in places), str(caught.value)
    assert message in str(caught.value)


def test_invalid_yaml_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: [x\n")
    with pytest.raises(UserError, match="not YAML"):
        load(str(path))
    with pytest.raises(UserError, match="did you mean 'gpt'"):
        load("gtp")
    with pytest.raises(UserError, match="no such file"):
        load(str(tmp_path / "other.yaml"))


def test_missing_field_and_invalid_assignment() -> None:
    with pytest.raises(UserError, match="needs the field 'objective'"):
        config_io.from_dict(Recipe, {"name": "x"})
    with pytest.raises(UserError, match="field=value"):
        load("gpt", ["batch.size"])
    with pytest.raises(UserError, match=r"batch\.rwos|no field 'rwos'"):
        load("gpt", ["batch.rwos=3"])


def test_recipes_are_values() -> None:
    recipe = published("gpt")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 3  # type: ignore[misc]


def test_paths_are_listed_made_absolute_and_removed(tmp_path: Path) -> None:
    recipe = load("ppo", ["init_from=runs/a", "examples.reward_model=/b", "data.path=[x/*.txt, ~/y]", "peft=lora"])
    found = {name: (kind, value) for name, kind, value in config_io.paths(recipe)}
    assert found == {
        "init_from": ("model", "runs/a"), "examples.reward_model": ("model", "/b"), "data.path": ("files", ("x/*.txt", "~/y")),
    }  # fmt: skip
    whole = config_io.absolute_paths(recipe)
    assert whole.data.path == (str(Path.cwd() / "x/*.txt"), str(Path.home() / "y"))
    assert (whole.init_from, whole.examples.reward_model) == (str(Path.cwd() / "runs" / "a"), "/b")
    assert config_io.absolute_paths(whole) == whole
    bare = config_io.without_paths(whole)
    assert bare == config_io.without_paths(recipe) and not list(config_io.paths(bare))
    assert content_hash(whole) == content_hash(recipe) != content_hash(load("ppo", ["init_from=runs/a", "seed=3"]))


def resolve_settings(recipe: Recipe) -> ResolvedRecipe:
    """Return a recipe with a value for each of its open settings."""
    settings = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    settings |= {"batch": recipe.batch.resolve(0, packs=False), "precision": "fp32", "word_segmentation": "uax29"}
    return ResolvedRecipe(**settings)


def test_resolved_recipe_has_nothing_open(tmp_path: Path) -> None:
    resolved = resolve_settings(load("gpt"))
    text = config_io.write_yaml(resolved)
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_resolved(tmp_path) == resolved
    assert config_io.to_dict(load(str(tmp_path))) == config_io.to_dict(resolved)
    assert list(yaml.safe_load(text)) == [field.name for field in dataclasses.fields(Recipe)]
    for name, open_value in (("precision", "auto"), ("word_segmentation", "auto"), ("model", None)):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(text) | {name: open_value}))
        with pytest.raises(UserError, match=name):
            load_resolved(tmp_path)


def test_run_of_an_older_version_keeps_its_hash(tmp_path: Path) -> None:
    """Fields that were added later, at their defaults, change nothing."""
    resolved = resolve_settings(load("gpt", ["batch.size=4"]))
    older = yaml.safe_load(config_io.write_yaml(resolved))
    del older["batch"]["group_by_length"], older["gradient_checkpointing"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(older))
    RunInputs().write(tmp_path, "the hash it had")
    assert recorded_hash(tmp_path, resolved) == "the hash it had"
    for changed in ("batch.group_by_length=8", "gradient_checkpointing=true", "batch.size=5"):
        with pytest.raises(UserError, match=changed.partition("=")[0]):
            recorded_hash(tmp_path, resolve_settings(load("gpt", ["batch.size=4", changed])))


def test_setting_on_a_sum_goes_to_its_component() -> None:
    plain = load("bert")
    assert load("bert", ["objective.mlm_probability=0.2"]).objective == NSP() + MLM(
        mlm_probability=0.2, num_maskings=10
    )
    both = load("bert", ["objective=[nsp, mlm]", "objective.follows=0.4", "objective.mlm_probability=0.2"]).objective
    assert both == NSP(follows=0.4) + MLM(mlm_probability=0.2)
    assert load("bert") == plain
    one = load("bert", ["objective.kind=mlm", "examples=chunks"]).objective
    assert one == MLM()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.follow=0.2"], r"\[nsp, mlm\], and none has a field 'follow'; did you mean 'follows'\?"),
        (
            ["objective=[mlm, rtd]", "objective.mlm_probability=0.2"],
            "mlm and rtd have a field 'mlm_probability': write objective\\[0\\].mlm_probability=",
        ),
        (["objective[2].noise=iid"], r"objective\[2\]: the list has 2 entries, numbered from 0"),
        (["samples.rate=0.2"], "samples"),
    ],
)
def test_ambiguous_setting_on_a_sum_is_rejected(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("bert", settings)


@pytest.mark.parametrize("field", ["steps", "seconds", "flops"])
def test_budget_on_the_command_line_replaces_the_recipes(field: str) -> None:
    length = load("gpt", [f"max_{field}=70"]).budget
    assert {
        name: getattr(length, name) for name in ("max_steps", "max_seconds", "max_flops") if getattr(length, name)
    } == {f"max_{field}": 70}


def test_two_budgets_on_the_command_line_are_rejected() -> None:
    with pytest.raises(UserError, match=r"budget\.max_steps and budget\.max_seconds are set together"):
        load("gpt", ["max_seconds=70", "max_steps=6"])
    with pytest.raises(UserError, match="exactly one of them"):
        load("gpt", ["max_steps=0"])


def test_path_and_corpus_replace_each_other(tmp_path: Path) -> None:
    """Otherwise the model card would state the language of a corpus that was not read."""
    recipe = load("gpt", ["data.path=mine.txt"])
    assert (recipe.data.path, recipe.data.corpus) == (("mine.txt",), "")
    assert load("gpt", ["data=mine.txt"]).data == recipe.data
    (tmp_path / "recipe.yaml").write_text(config_io.write_yaml(recipe))
    other = load(str(tmp_path), ["data.corpus=brown"]).data
    assert (other.path, other.corpus) == ((), "brown")
    with pytest.raises(UserError, match=r"data\.path and data\.corpus are set together"):
        load("gpt", ["data.path=mine.txt", "data.corpus=brown"])


@pytest.mark.parametrize("written", ["data: {path: [mine.txt], corpus: shakespeare}", "data: {path: [mine.txt]}"])
def test_model_card_of_own_text_names_no_language(written: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"name: gpt\nobjective: causal_lm\nexamples: windows\n{written}\n")
    config = decoder_config(50, 32, 1)
    model = LM(config, CausalLM().heads(config))
    text = model_card.text(model_card.read_card(tmp_path, tmp_path, model, "transformers loads it", {}))
    front = yaml.safe_load(text.split("---")[1])
    assert "language" not in front and "`mine.txt`" in text and "shakespeare:" not in text


def test_field_of_a_class_without_fields_is_rejected() -> None:
    with pytest.raises(UserError, match=r"there is no field 'zzz' in CausalLM, which has no fields$"):
        load("gpt", ["objective.zzz=1"])
    with pytest.raises(UserError, match=r"there is no field 'zzz' in MLM; there is mlm_probability, "):
        load("roberta", ["objective.zzz=1"])


@dataclasses.dataclass(frozen=True)
class Norm:
    type: Literal["layer", "rms"] = "layer"
    eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Block:
    norm: Norm = Norm()


@dataclasses.dataclass(frozen=True)
class Network:
    block: Block | None = None


def test_bare_value_sets_the_type_of_a_section(tmp_path: Path) -> None:
    def loaded(written: str, *assignments: str) -> Network:
        path = tmp_path / "mine.yaml"
        path.write_text(written)
        data, lines = config_io.read_yaml(path)
        full = [config_io.expand_short_form(one, Network) for one in assignments]
        given = {tuple(one.partition("=")[0].split(".")): one.partition("=")[2] for one in full}
        built: Network = config_io.from_dict(
            Network, config_io.override(data, full), config_io.SourceLocation((), lines, given)
        )
        assert config_io.from_dict(Network, yaml.safe_load(config_io.write_yaml(built))) == built
        return built

    with_eps = Network(Block(Norm("rms", 1e-6)))
    assert loaded("block: {norm: rms}\n") == loaded("block:\n  norm:\n    type: rms\n") == Network(Block(Norm("rms")))
    assert loaded("block: {norm: rms}\n", "block.norm.eps=1e-6") == with_eps
    assert loaded("block: {norm: {type: layer, eps: 1e-6}}\n", "block.norm=rms") == with_eps
    assert loaded("block: {norm: layer}\n", "block.norm=rms", "block.norm.eps=1e-6") == with_eps
    assert loaded("block: null\n", "block.norm={type: rms, eps: 1e-6}") == with_eps
    assert loaded("block: {norm: {eps: 1e-6}}\n", "block.norm=null") == Network(Block())
    with pytest.raises(UserError, match=rf"^{tmp_path}/mine.yaml:2: block.norm.type='rsm' should be 'layer' or 'rms'"):
        loaded("block:\n  norm: rsm\n")
    with pytest.raises(UserError, match=r"^block.norm.type='rsm' should be 'layer' or 'rms'"):
        loaded("block:\n  norm: {type: rms}\n", "block.norm=rsm")
