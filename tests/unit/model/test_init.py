"""Models that are initialized one weight at a time, and rows for tokens that were added to a tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from firth.model import init
from firth.model.config import decoder_config, encoder_config
from firth.model.flops import num_parameters
from firth.model.heads import LMHead
from firth.model.init import extend_vocab, fork_rng, record_init
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


PARTS = [[3, 4], [5], []]


def model(tied: bool, vocab_size: int = 12) -> LM:
    make = encoder_config if tied else decoder_config
    torch.manual_seed(0)
    config = make(vocab_size, 16, 1, num_heads=2, max_positions=8).with_fields({"tie_embeddings": tied})
    return LM(config, {"lm": LMHead(config)}).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("first", [12, 11])  # 11: one row of the table is padding, and a new token takes it
def test_new_rows_are_means_of_old_ones(tied: bool, first: int) -> None:
    one, before = model(tied), model(tied)
    extend_vocab(one, first, PARTS)
    assert one.config.vocab_size == first + 3 == one.tokens.num_embeddings
    for rows, old in ((one.tokens.weight, before.tokens.weight), (one.heads["lm"].weight, before.heads["lm"].weight)):
        assert torch.equal(rows[:first], old[:first]) and len(rows) == first + 3
        assert torch.allclose(rows[first], old[[3, 4]].mean(0)) and torch.equal(rows[first + 1], old[5])
        assert (rows[first + 2] - old.mean(0)).abs().max() < 5 * old.std(0).max()
    assert (one.heads["lm"].weight is one.tokens.weight) == tied
    assert sum(p.numel() for p in one.parameters()) == num_parameters(one.config) + (
        sum(p.numel() for p in before.parameters()) - num_parameters(before.config)
    )


def test_old_texts_have_the_old_logits() -> None:
    one, before, tokens = model(True), model(True), torch.tensor([[1, 5, 7, 2]])
    extend_vocab(one, 12, PARTS)
    with torch.no_grad():
        new, old = (m.heads["lm"](m({"tokens": tokens})) for m in (one, before))
    assert torch.equal(new[..., :12], old)
    assert torch.allclose(new[..., 12], old[..., [3, 4]].mean(-1), atol=1e-6)
