"""The published recipes: their sizes and their parameter counts on the meta device."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

from firth.model.flops import num_parameters
from firth.model.heads import LMHead, pooled
from firth.model.model import LM
from firth.model.presets import PRESETS
from firth.runs import config_io
from firth.runs.compatibility import check_pattern
from firth.runs.recipe import Recipe, load, published
from firth.runs.recipe_names import RECIPES
from firth.types import UserError

COUNTS = {  # the released checkpoints', head and tied matrix counted once
    "gpt": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "llama-7b": 6_738_415_616,
}
ABOUT = {"gpt3": 175e9, "bert-base": 110e6, "bert-large": 340e6}  # as the papers round them


def on_meta(name: str, pooler: bool = False) -> int:
    """Return the parameter count of a published model with its head, on the meta device."""
    config = PRESETS[name]
    with torch.device("meta"):
        parts = {"lm": LMHead(config)} | ({"next": pooled(config.hidden_size, 2)} if pooler else {})
        return sum(p.numel() for p in LM(config, parts).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_parameters_match_the_released_checkpoint(name: str) -> None:
    assert on_meta(name) == num_parameters(PRESETS[name]) == COUNTS[name]


@pytest.mark.parametrize("name", ABOUT)
def test_parameters_match_the_paper(name: str) -> None:
    count = on_meta(name, pooler=name.startswith("bert"))
    assert count == pytest.approx(ABOUT[name], rel=0.015)


def test_bert_parameter_count_is_exact() -> None:
    """BertForPreTraining of bert-base-uncased has 110,106,428 (transformers 5.23)."""
    assert on_meta("bert-base", pooler=True) == 110_106_428


def sizes_of(name: str) -> list[str]:
    """Return the sizes of a recipe, from its error message."""
    with pytest.raises(UserError, match="there is") as refusal:
        published(f"{name}:no-such-size")
    return str(refusal.value).rpartition("there is ")[2].split(", ")


def has_sizes(name: str) -> bool:
    """Return whether a recipe comes in sizes; post-training recipes do not."""
    module, function = RECIPES[name].split(":")
    size = inspect.signature(getattr(importlib.import_module(module), function)).parameters.get("size")
    return size is not None and size.default == "tiny"


PRETRAINED = [name for name in RECIPES if has_sizes(name)]


@pytest.mark.parametrize("name", PRETRAINED)
def test_every_size_is_a_valid_recipe(name: str) -> None:
    sizes = sizes_of(name)
    assert {"tiny", "published"} <= set(sizes)
    assert published(name) == published(f"{name}:tiny")
    for size in sizes:
        recipe = load(f"{name}:{size}")
        assert recipe.name.startswith(name) and recipe.model is not None
        check_pattern(recipe.objective, recipe.model)
        again = config_io.from_dict(Recipe, config_io.to_dict(recipe))
        assert again == recipe


def test_size_of_a_recipe_with_one_size_is_rejected() -> None:
    with pytest.raises(UserError, match="one size"):
        published("classification:tiny")
