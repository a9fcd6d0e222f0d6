"""An untrained LM head predicts the label frequencies, if it can represent an offset."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from firth.data.collate import Batches
from firth.data.source import Source
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.classification import Classification
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.seq2seq import SpanCorruption
from firth.runs.build_model import init_head
from firth.tokenizer.vocab import Vocab
from firth.training.step import validate
from firth.types import Example

SIZE = 300
VOCAB = Vocab(
    size=SIZE, roles={"pad": 0, "eos": 1, "mask": 2, "cls": 3, "sep": 4}, special=np.arange(SIZE) < 25,
    sentinels=np.arange(5, 25),
)  # fmt: skip


class Zipf(Source):
    """Independent tokens, the k-th with a probability proportional to 1 / k."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        p = 1 / np.arange(1, SIZE - 24)
        return {"tokens": (25 + rng.choice(SIZE - 25, 60, p=p / p.sum())).astype(np.int32)}


P = 1 / np.arange(1, SIZE - 24)
ENTROPY = float(-(P / P.sum() * np.log(P / P.sum())).sum())

CASES: dict[str, tuple[Objective, ModelConfig]] = {
    "decoder": (CausalLM(), decoder_config(SIZE, 64, 2)),
    "encoder": (MLM(), encoder_config(SIZE, 64, 2)),
    "encoder, no cap": (CausalLM(), decoder_config(SIZE, 64, 2).with_fields({"lm_head.softcap": 0.0})),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_untrained_loss_is_the_unigram_entropy(name: str) -> None:
    objective, config = CASES[name]
    torch.manual_seed(0)
    model = LM(config, objective.heads(config)).eval()
    batches = Batches(Zipf(), objective, VOCAB, batch_size=16, seed=0)
    before = validate(model, objective, batches.all_batches())["loss"]
    assert before > 5
    assert init_head(model, objective, batches) > 10_000
    after = validate(model, objective, batches.all_batches())["loss"]
    assert ENTROPY - 0.05 < after < ENTROPY + 0.1


@pytest.mark.slow
def test_encoder_decoder_labels_include_sentinels() -> None:
    objective, config = SpanCorruption(), encoder_decoder_config(SIZE, 64, 2)
    model = LM(config, objective.heads(config)).eval()
    batches = Batches(Zipf(), objective, VOCAB, batch_size=16, seed=0)
    assert init_head(model, objective, batches)
    logits = model.heads["lm"](objective.forward(model, batches.batches(0)[0])["hidden"])
    assert int(logits.mean((0, 1)).argmax()) in (25, 1, *range(5, 10))  # the commonest word, the end, a first sentinel
    assert validate(model, objective, batches.all_batches())["loss"] < 4.5


def test_head_without_an_offset_is_unchanged() -> None:
    config = ModelConfig(vocab_size=SIZE, hidden_size=64, num_layers=2, num_heads=2)
    model = LM(config, CausalLM().heads(config))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert init_head(model, CausalLM(), Batches(Zipf(), CausalLM(), VOCAB, batch_size=16, seed=0)) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_stack_that_loses_the_constant_is_unchanged() -> None:
    config = decoder_config(SIZE, 64, 4).with_fields({"init.zero_output": False, "init.std": 0.5})
    torch.manual_seed(0)
    model = LM(config, CausalLM().heads(config))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert init_head(model, CausalLM(), Batches(Zipf(), CausalLM(), VOCAB, batch_size=16, seed=0)) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_objective_without_token_labels_is_unchanged() -> None:
    class Labeled(Zipf):
        def __getitem__(self, index: int) -> Example:
            return super().__getitem__(index) | {"label": index % 2}

    objective, config = Classification(class_names=("a", "b")), encoder_config(SIZE, 64, 1)
    model = LM(config, objective.heads(config))
    assert init_head(model, objective, Batches(Labeled(), objective, VOCAB, batch_size=16, seed=0)) == 0
