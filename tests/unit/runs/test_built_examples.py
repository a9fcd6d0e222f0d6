"""What the objective of a user builds is checked before the model is built; the error names the objective, the field and the fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from firth.data.attention_fields import causal
from firth.io.user_code import find_class
from firth.model.config import decoder_config, encoder_config
from firth.model.model import LM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective, TokenObjective
from firth.runs.compatibility import check_built, check_pattern, is_users
from firth.training.step import step
from firth.types import IGNORE, UserError

TOKENS, SIZE = np.array([5, 6, 7]), 10


@dataclass(frozen=True)
class Causal(TokenObjective):
    """Next token."""

    attention = "causal"


@dataclass(frozen=True)
class Wrong(TokenObjective):
    """An attention pattern that does not exist."""

    attention = "both"


@dataclass(frozen=True)
class NoLoss(Objective):
    """Labels without a loss."""

    labels: ClassVar = {"tokens": "labels"}


@dataclass(frozen=True)
class OtherTerm(NoLoss):
    """A loss under another name than that of its labels."""

    def loss(self, model, outputs, batch):
        return {"text": outputs["hidden"].sum()}


@dataclass
class Mutable(TokenObjective):
    """A dataclass that is not frozen."""


class Plain(Causal):
    """A class whose own fields would not be settings."""


@pytest.mark.parametrize("kind", [Mutable, Plain])
def test_an_objective_is_a_frozen_dataclass(kind: type) -> None:
    assert find_class(f"{__name__}:Causal", Objective, "objective") is Causal
    with pytest.raises(UserError, match=rf":{kind.__name__}' is no objective: derive a @dataclass\(frozen=True\)"):
        find_class(f"{__name__}:{kind.__name__}", Objective, "objective")


def built(**fields: object) -> dict[str, object]:
    """Return a correct example with other fields; None removes one."""
    example = {"tokens": TOKENS, "labels": np.array([6, IGNORE, 9])} | causal(3) | fields
    return {name: value for name, value in example.items() if value is not None}


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"labels": None}, r"there is no field 'labels', the labels of 'tokens'; it returned key_time"),
        ({"tokens": None}, r"there is no field 'tokens', the tokens that the model sees"),
        ({"labels": torch.tensor([6, 7, 9])}, r"the field 'labels' is a torch\.Tensor: return NumPy arrays"),
        ({"labels": [6, 7, 9]}, r"the field 'labels' is a builtins\.list: return NumPy arrays"),
        ({"labels": np.array([6, 7])}, r"the field 'labels' is int64 of shape \(2,\): it must be whole numbers of shape \(3,\)"),
        ({"labels": np.array([6.0, 7, 9])}, r"the field 'labels' is float64 of shape \(3,\)"),
        ({"labels": np.array([6, 7, 10])}, r"the field 'labels' has the id 10: the 10 ids of the model begin at 0"),
        ({"labels": np.array([6, 7, -1])}, r"the field 'labels' has the id -1"),
        ({"tokens": np.array([5, 6, IGNORE])}, r"the field 'tokens' has the id -100"),
        ({"tokens": 5}, r"the field 'tokens' is the single number 5: return an array"),
        ({"labels": 6}, r"the field 'labels' is int64 of shape \(\): it must be whole numbers of shape \(3,\)"),
        ({"names": np.array(["a"])}, r"the field 'names' is an array of <U1: return arrays of numbers"),
        ({"query_time": None}, r"attention is 'causal', but there is no field 'query_time', so each token would see all"),
    ],
)  # fmt: skip
def test_a_wrong_example_is_an_error(fields: dict[str, object], fault: str) -> None:
    check_built(Causal(), [built()], SIZE)
    with pytest.raises(UserError, match=rf"^build_example of objective [\w.]+:Causal: {fault}"):
        check_built(Causal(), [built(), built(**fields)], SIZE)


def test_an_example_is_a_dictionary() -> None:
    for example, written in ((None, "None"), ([TOKENS], r"\[array\(\[5, 6, 7\]\)\]")):
        with pytest.raises(UserError, match=rf":Causal: it returned {written}: return a dictionary of NumPy arrays$"):
            check_built(Causal(), [example], SIZE)


def test_only_objectives_outside_firth_are_checked() -> None:
    assert is_users(Causal())
    assert not is_users(MLM())


def test_an_unknown_attention_pattern_is_an_error() -> None:
    with pytest.raises(UserError, match=r":Wrong has attention 'both': take any, causal, bidirectional, permuted"):
        check_pattern(Wrong(), encoder_config(vocab_size=SIZE, hidden_size=64, num_layers=1))


@pytest.mark.parametrize(
    ("objective", "fault"),
    [
        (NoLoss(), ":NoLoss has no method loss"),
        (OtherTerm(), "OtherTerm returned text and not 'tokens', a term of its"),
    ],
)
def test_a_missing_loss_term_is_an_error(objective: Objective, fault: str) -> None:
    model = LM(decoder_config(vocab_size=SIZE, hidden_size=64, num_layers=1), {})
    batch = {name: torch.as_tensor(value)[None] for name, value in built().items()}
    with pytest.raises(UserError, match=fault):
        step(model, objective, [batch])
