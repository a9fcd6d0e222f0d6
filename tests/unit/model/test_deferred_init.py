"""A recorded initialization gives the numbers of an ordinary one, and keeps only a few weights at a time."""

from typing import Any

import pytest
import torch
from torch import nn

from firth.model import init
from firth.model.init import fork_rng, record_init
from firth.model.model import LM
from firth.objectives.policy_gradient import PPO
from firth.runs.recipe import published
from firth.runs.recipe_names import RECIPES
from tests.support.objective_cases import CASES

FROM_SCRATCH = [name for name in RECIPES if published(name).model is not None]


def check_equal(make: object) -> None:
    """Check the weights of a model, and the random state after it was built."""
    torch.manual_seed(7)
    model, after = make(), torch.rand(3)  # type: ignore[operator]
    with record_init() as record:
        empty = make()  # type: ignore[operator]
    record.bind(empty)
    found: dict[str, torch.Tensor] = {}
    torch.manual_seed(7)
    record.replay(lambda name, x: found.update({name: x.clone()}))
    assert torch.equal(torch.rand(3), after)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_recipes_have_the_same_weights(name: str) -> None:
    recipe = published(name)
    assert recipe.model is not None
    config = recipe.model.with_fields({"vocab_size": 300, "num_layers": min(2, recipe.model.num_layers)})
    check_equal(lambda: LM(config, recipe.objective.heads(config)))


@pytest.mark.parametrize("name", ["rtd", "regression", "tagging", "classification"])
def test_heads_have_the_same_weights(name: str) -> None:
    config = published("bert").model.with_fields({"vocab_size": 100, "num_layers": 1})  # type: ignore[union-attr]
    objective = CASES[name][0]
    check_equal(lambda: LM(config, objective.heads(config)))


def test_a_critic_does_not_change_the_weights_of_the_policy() -> None:
    config = published("gpt").model.with_fields({"vocab_size": 100, "num_layers": 1})  # type: ignore[union-attr]
    check_equal(lambda: LM(config, PPO().heads(config)))


def test_a_forked_random_state_is_restored() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with fork_rng():
                self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)

    check_equal(Model)


def test_few_weights_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 matrices are built and overwritten, of which two at most exist at a time."""

    def build() -> nn.Module:
        layers = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(24)))
        for layer in layers:
            nn.init.normal_(layer.weight)
        return layers

    alive: list[int] = []
    run = init._run

    def counted(operation: Any, real: dict[int, torch.Tensor]) -> None:
        run(operation, real)
        alive.append(len(real))

    monkeypatch.setattr(init, "_run", counted)
    with record_init() as record:
        model = build()
    record.bind(model)
    names: list[str] = []
    record.replay(lambda name, _: names.append(name))
    assert len(names) == 24
    assert max(alive) <= 2
