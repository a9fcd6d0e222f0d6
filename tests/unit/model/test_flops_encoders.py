"""FLOPs of shared blocks, small embeddings, span boundaries and two models at once, against torch's counter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from firth.data.collate import collate, counted_fields
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.model.presets import bert
from firth.objectives.masked_lm import MLM, SBO
from firth.objectives.objective import Objective, supervised
from firth.objectives.replaced_tokens import RTD
from firth.tokenizer.vocab import Vocab
from firth.types import Batch

VOCAB = Vocab(size=70, roles={"cls": 2, "sep": 3, "mask": 4}, special=np.arange(70) < 5)
PLAIN = replace(bert(70, 32, 3, 4, max_positions=40), intermediate_size=48)


def case(objective: Objective, config: ModelConfig) -> tuple[LM, Batch]:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    examples = [
        objective.build_example({"tokens": VOCAB.add_special_tokens(rng.integers(5, 70, 20))}, VOCAB, rng)
        for _ in range(4)
    ]
    return LM(config, objective.heads(config)), collate(examples, {*counted_fields(objective).values()})


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False)


@pytest.mark.parametrize(
    "config",
    [PLAIN.with_fields({"embedding.size": 12}), PLAIN.with_fields({"embedding.size": 12, "num_layer_groups": 1})],
    ids=["small", "shared"],
)
def test_small_embeddings_and_shared_blocks(config: ModelConfig) -> None:
    objective = MLM()
    model, batch = case(objective, config)
    with counter() as count, sdpa_kernel(SDPBackend.MATH):
        model.heads["lm"](supervised(objective.forward(model, batch)["hidden"], batch["labels"])[0]).sum().backward()
    assert count.get_total_flops() == objective.flops(model, batch)


@pytest.mark.parametrize("config", [PLAIN, PLAIN.with_fields({"embedding.size": 12})], ids=["full", "small"])
def test_both_models_of_electra(config: ModelConfig) -> None:
    objective = RTD(generator_size=0.5)
    model, batch = case(objective, config)
    with counter() as count, sdpa_kernel(SDPBackend.MATH):
        terms = objective.loss(model, objective.forward(model, batch), batch)
        (terms["generator"] + terms["replaced"]).backward()
    found = objective.flops(model, batch)
    assert count.get_total_flops() == found
    assert found > 1.2 * Objective.flops(MLM(), model, batch)


def test_span_boundary_head() -> None:
    """The product with the vocabulary is written out: the counter does not see into the chunked one."""
    objective = SBO()
    model, batch = case(MLM(noise="geometric") + objective, PLAIN.with_fields({"embedding.size": 12}))
    count = int((batch["boundary"] >= 0).sum())
    around = torch.randn(count, 3 * 32, requires_grad=True)
    with counter() as counted:
        (model.heads["boundary"](around) @ model.tokens.weight.T).sum().backward()
    assert count > 5 and counted.get_total_flops() == objective.flops(model, batch, forward=0.0)
