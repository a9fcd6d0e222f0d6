"""The base class of objectives: its size, and sums of objectives."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from firth import objectives
from firth.data.collate import collate, label_fields_of
from firth.model.config import encoder_config
from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective, components, label_positions
from firth.objectives.replaced_tokens import RTD
from firth.objectives.semi_supervised import WeightPenalty
from firth.objectives.sentence_pairs import NSP
from firth.objectives.token_tasks import LayerMixture
from firth.runs.compatibility import SAMPLE_VOCAB, sample_example
from firth.runs.examples import EXAMPLES
from firth.types import Constraints

PACKAGE = Path(objectives.__file__).parents[1]
MEMBERS = {
    "attention", "inputs", "labels", "metrics", "constraints", "configure", "heads", "build_example", "forward", "loss",
    "hide", "flops",
}  # fmt: skip


def test_an_objective_has_twelve_public_members() -> None:
    """Inherited ones are counted."""
    assert {name for name in dir(Objective) if not name.startswith("_")} == MEMBERS


def test_no_other_module_decides_by_a_list_of_objectives() -> None:
    """The demo, and registries of recipes, examples, tasks and stages, have names that may also be those of an objective."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE)
        if where.parts[0] == "demo" or str(where) in (
            "objectives/__init__.py",
            "runs/recipe_names.py",
            "runs/examples.py",
            "pipelines/pipeline.py",  # stages of a pipeline
            "align/rollouts.py",  # the names of advantage estimators, which are those of the methods
        ):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Dict):
                listed = node.keys
            else:
                listed = node.elts if isinstance(node, ast.Set | ast.Tuple | ast.List) else []
            names = [one.value for one in listed if isinstance(one, ast.Constant)]
            if len(objectives.OBJECTIVES.keys() & set(names)) > 1:
                found.append(f"{where}:{node.lineno}: {names}")
    assert found == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_sample_has_the_fields_of_each_kind_of_examples(name: str) -> None:
    fields = EXAMPLES[name]().fields
    assert sample_example(fields).keys() == fields


def test_constraints_of_a_sum_are_those_of_both() -> None:
    both = MLM(num_maskings=10, noise="words") + Classification(class_names=("a", "b")) + WeightPenalty()
    assert both.constraints == Constraints(num_copies=10, text_units=frozenset({"words"}), class_names=("a", "b"))
    assert [type(one) for one in components(both)] == [MLM, Classification, WeightPenalty]


@pytest.mark.parametrize("objective", [NSP() + MLM(), RTD() + WeightPenalty(), WeightPenalty() + RTD()])
def test_a_sum_counts_its_forward_pass_once(objective: Objective) -> None:
    config = encoder_config(vocab_size=SAMPLE_VOCAB.size, hidden_size=32, num_layers=2, num_heads=2)
    model, example = LM(config, objective.heads(config)), sample_example(objective.inputs)
    built = objective.build_example(example, SAMPLE_VOCAB, np.random.default_rng(0))
    batch = collate([built], label_fields_of(objective))
    work, alone = objective.flops(model, batch), [one.flops(model, batch) for one in components(objective)]
    assert max(alone) <= work < sum(alone)
    assert objective.flops(model, batch, 0.0) == sum(one.flops(model, batch, 0.0) for one in components(objective))


def test_a_mixture_of_layers_serves_every_objective() -> None:
    """It is a head of the model, so that the other component keeps its own forward pass."""
    config = encoder_config(vocab_size=SAMPLE_VOCAB.size, hidden_size=32, num_layers=2, num_heads=2)
    objective = LayerMixture() + RTD(generator_size=1.0)
    model = LM(config, objective.heads(config))
    built = objective.build_example(sample_example(objective.inputs), SAMPLE_VOCAB, np.random.default_rng(0))
    batch = collate([built], label_fields_of(objective))
    outputs = objective.forward(model, batch)
    sum(objective.loss(model, outputs, batch)[term] for term in objective.labels).backward()  # type: ignore[union-attr]
    mixture = model.heads["mixture"]
    assert mixture.weights.grad is not None
    states = model.all_hidden_states(batch | {"tokens": outputs["shown"]})
    torch.testing.assert_close(outputs["hidden"], mixture(states))


def test_labels_of_a_row_do_not_say_which_states_are_read() -> None:
    batch = {"tokens": torch.zeros(2, 3), "class": torch.full((2, 3), -100), "penalty": torch.zeros(2)}
    assert label_positions(Classification(), batch) is not None
    assert label_positions(Classification() + WeightPenalty(), batch) is None
