"""The margin loss and InfoNCE against their formulas, and the recipes they reject."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from firth.data.collate import collate, pack
from firth.model.config import ModelConfig
from firth.model.config_groups import InitConfig
from firth.model.model import LM
from firth.objectives.contrastive import Contrastive, InfoNCE
from firth.objectives.objective import Objective
from firth.runs.compatibility import check_batching
from firth.runs.recipe import load
from firth.tokenizer.vocab import Vocab
from firth.training.step import step
from firth.types import Example, UserError
from tests.support.objective_cases import gradient, label_fields

VOCAB = Vocab(size=60, roles={"pad": 0, "cls": 2, "sep": 3}, special=np.arange(60) < 5)
CONFIG = ModelConfig(
    vocab_size=60,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    max_positions=32,
    causal=False,
    dropout=0.1,
    init=InitConfig(std=0.3),
)


def text(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(5, 60, int(rng.integers(2, 12)))


def triple(rng: np.random.Generator) -> Example:
    return {"first": text(rng), "second": text(rng), "other": text(rng)}


def labeled(rng: np.random.Generator) -> Example:
    first, second = text(rng), text(rng)
    token_type_ids = np.repeat([0, 1], (len(first) + 2, len(second) + 1))
    tokens = np.concatenate(([2], first, [3], second, [3]))
    return {"tokens": tokens, "token_type_ids": token_type_ids, "label": int(rng.integers(2))}


def build_examples(objective: Objective, make, count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    return [objective.build_example(make(rng), VOCAB, rng) for _ in range(count)]


def build_model(objective: Objective) -> LM:
    torch.manual_seed(0)
    return LM(CONFIG, objective.heads(CONFIG)).eval()


def vectors(model: LM, row: Example, at: str) -> list[torch.Tensor]:
    """Representations of the texts of a group, each encoded by itself, without padding."""
    out = []
    for tokens, key_time in zip(row["tokens"], row["key_time"], strict=True):
        states = model({"tokens": torch.tensor(tokens[key_time == 0])[None]})[0]
        out.append(F.normalize(states[0] if at == "first" else states.mean(0), dim=0))
    return out


@pytest.mark.parametrize("at", ["mean", "first"])
@pytest.mark.parametrize("make", [triple, labeled])
def test_the_margin_loss_is_its_formula(at: str, make) -> None:
    pairs = "neighbors" if make is triple else "labeled"
    objective = Contrastive(position=at, margin=1.2, pairs=pairs)  # type: ignore[arg-type]
    model = build_model(objective)
    rows = build_examples(objective, make, 6)
    terms = step(model, objective, [collate(rows, label_fields(objective))])
    losses, near, nearer = [], [], []
    with torch.no_grad():
        for row in rows:
            first, *rest = vectors(model, row, at)
            d = [float((first - one).norm()) for one in rest]
            for distance, m in zip(d, row["similar"], strict=True):
                losses.append(m * distance**2 + (1 - m) * max(0.0, 1.2 - distance) ** 2)
                near += [distance**2] * int(m)
            nearer.append(d[0] < d[-1])
    assert float(terms["contrastive"]) == pytest.approx(np.mean(losses), abs=1e-5)
    assert float(terms["alignment"]) == pytest.approx(np.mean(near), abs=1e-5)
    assert float(terms["nearer"]) == pytest.approx(np.mean(nearer) if make is triple else 0.0, abs=1e-6)


def test_infonce_is_its_formula() -> None:
    objective = InfoNCE(positives="neighbors", temperature=0.1)
    model = build_model(objective)
    rows = build_examples(objective, triple, 5)
    terms = step(model, objective, [collate(rows, label_fields(objective))])
    with torch.no_grad():
        h = [vectors(model, row, "mean") for row in rows]
    scores = torch.stack([torch.stack([a @ b for _, b in h]) for a, _ in h]) / 0.1
    losses = [-math.log(float(scores[i, i].exp() / scores[i].exp().sum())) for i in range(5)]
    assert float(terms["infonce"]) == pytest.approx(np.mean(losses), abs=1e-4)
    assert float(terms["accuracy"]) == pytest.approx(float((scores.argmax(1) == torch.arange(5)).float().mean()))


def test_dropout_positives_differ_only_in_training() -> None:
    objective = InfoNCE()
    rows = build_examples(objective, lambda rng: {"tokens": VOCAB.add_special_tokens(text(rng))}, 4)
    batch, model = collate(rows, label_fields(objective)), build_model(objective)
    one, other = model(batch).unbind(1)
    assert torch.allclose(one, other, atol=1e-5)  # two rows of one batch: some kernels add in another order
    one, other = model.train()(batch).unbind(1)
    assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("objective", [Contrastive(), Contrastive(position="first"), InfoNCE(positives="neighbors")])
def test_ten_steps_lower_the_loss(objective: Objective) -> None:
    model = build_model(objective).train()
    batch = collate(build_examples(objective, triple, 8), label_fields(objective))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    found = []
    for _ in range(10):
        found.append(step(model, objective, [batch]))
        optimizer.step()
        optimizer.zero_grad()
    assert all(float(found[-1][term]) < float(found[0][term]) for term in objective.labels)


def test_only_pairs_allow_split_batches() -> None:
    for objective, same in ((Contrastive(), True), (InfoNCE(positives="neighbors"), False)):
        model, rows = build_model(objective), build_examples(objective, triple, 6)
        full = gradient(model, objective, [collate(rows, label_fields(objective))])
        split = gradient(
            model, objective, [collate(rows[:2], label_fields(objective)), collate(rows[2:], label_fields(objective))]
        )
        assert torch.allclose(full, split, rtol=1e-4, atol=1e-6) == same
        assert objective.constraints.needs_full_batch != same


def test_incompatible_recipes_are_rejected() -> None:
    with pytest.raises(
        UserError, match=r"2 micro-batches would compare only their own: set batch.gradient_accumulation_steps=1"
    ):
        check_batching(InfoNCE(), CONFIG, pack=0, accumulate=2)
    with pytest.raises(UserError, match="train on one rank"):
        check_batching(InfoNCE(), CONFIG, pack=0, accumulate=1, ranks=2)
    check_batching(Contrastive(), CONFIG, pack=0, accumulate=2)
    with pytest.raises(UserError, match=r"infonce cannot be trained with this model: .* set model.dropout=0.1"):
        load("contrastive", ["objective=infonce"])
    with pytest.raises(UserError, match=r"batch\.gradient_accumulation_steps=1"):
        load("contrastive:published", ["batch.gradient_accumulation_steps=2"])
    with pytest.raises(UserError, match="reads a text from both sides"):
        load("contrastive", ["model.causal=true"])
    with pytest.raises(UserError, match=r"cannot be packed: set batch\.pack_to_length=0"):
        pack(build_examples(Contrastive(), triple, 3), 64, label_fields(Contrastive()))


def test_no_text_of_a_group_leaks_into_another() -> None:
    objective = Contrastive()
    example = triple(np.random.default_rng(3))
    changed = example | {"other": 5 + (example["other"] - 5 + 3) % 55}
    model = build_model(objective)
    rows = [objective.build_example(e, VOCAB, np.random.default_rng(0)) for e in (example, changed)]
    one, two = (model(collate([row], label_fields(objective)))[0] for row in rows)
    assert torch.equal(one[:2], two[:2]) and not torch.equal(one[2], two[2])
