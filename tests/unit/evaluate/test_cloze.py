"""Cloze score: every objective predicts the same tokens, the answer does not leak, and the score follows from the logits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from firth.corpora.readers import Document
from firth.data.collate import collate
from firth.data.token_store import TokenStore
from firth.evaluate.perplexity import ClozeItem, cloze_items, cloze_score, most_frequent_baseline
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM, PrefixLM
from firth.objectives.classification import Classification
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.sentence_pairs import NSP
from firth.objectives.seq2seq import Denoising, SpanCorruption
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE

ROLES = {"pad": 0, "eos": 1, "mask": 2, "cls": 3, "sep": 4, "bos": 5}
VOCAB = Vocab(size=60, roles=ROLES, special=np.arange(60) < 12, sentinels=np.arange(6, 12))
SIZES = {"vocab_size": 60, "hidden_size": 64, "num_layers": 1}
OBJECTIVES: dict[str, tuple[Objective, ModelConfig]] = {
    "causal": (CausalLM(), decoder_config(**SIZES)),
    "mlm": (MLM(), encoder_config(**SIZES)),
    "nsp + mlm": (NSP() + MLM(), encoder_config(**SIZES)),
    "span corruption": (SpanCorruption(), encoder_decoder_config(**SIZES)),
    "span corruption in one row": (SpanCorruption(layout="prefix"), encoder_config(**SIZES)),
    "prefix lm": (PrefixLM(), encoder_config(**SIZES)),
    "prefix lm, encoder and decoder": (PrefixLM(layout="seq2seq"), encoder_decoder_config(**SIZES)),
    "denoise": (Denoising(), encoder_decoder_config(**SIZES)),
    "denoise by deletion, in one row": (Denoising(noises=("deletion",), layout="prefix"), encoder_config(**SIZES)),
}
TOKENS = np.arange(20, 32)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_token_is_predicted_and_does_not_leak(name: str) -> None:
    objective, config = OBJECTIVES[name]
    for at in (1, 5, 11):
        example = objective.hide((TOKENS[:at], TOKENS[at + 1 :]), VOCAB, TOKENS[at])
        assert example is not None
        assert example["labels"][example["labels"] != IGNORE].tolist() == [TOKENS[at]]
        changed = objective.hide((TOKENS[:at], TOKENS[at + 1 :]), VOCAB, 50)
        assert changed is not None
        torch.manual_seed(0)
        model = LM(config, objective.heads(config)).eval()
        index = int(np.flatnonzero(example["labels"] != IGNORE)[0])
        with torch.no_grad():
            states = [objective.forward(model, collate([one]))["hidden"][0, index] for one in (example, changed)]
        assert torch.equal(*states)


def test_inputs_of_each_objective() -> None:
    short = np.array([20, 21]), np.array([23])
    assert MLM().hide(short, VOCAB, 22)["tokens"].tolist() == [3, 20, 21, 2, 23, 4]
    assert CausalLM().hide(short, VOCAB, 22)["tokens"].tolist() == [5, 20, 21]
    spans = SpanCorruption().hide(short, VOCAB, 22)
    assert spans["source_tokens"].tolist() == [20, 21, 6, 23, 1]
    assert spans["tokens"].tolist()[:2] == [0, 6]
    assert [piece.tolist() for piece in short] == [[20, 21], [23]]
    assert Classification(class_names=("a", "b")).hide(short, VOCAB, 22) is None


def test_only_denoising_objectives_fill_gaps_of_any_length() -> None:
    gaps = [np.array([20, 21]), np.array([], np.int64), np.array([23])]
    prompts = {name: objective.hide(gaps, VOCAB) for name, (objective, _) in OBJECTIVES.items()}
    found = {name: shown["tokens"].tolist() for name, shown in prompts.items() if shown is not None}
    spans, masks, nothing = [20, 21, 6, 7, 23, 1], [20, 21, 2, 2, 23, 1], [20, 21, 23, 1]
    assert found == {
        "span corruption": spans, "span corruption in one row": spans, "denoise": masks,
        "denoise by deletion, in one row": nothing,
    }  # fmt: skip
    assert (Classification() + MLM()).hide(gaps, VOCAB) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_score_equals_that_of_single_items(name: str) -> None:
    objective, config = OBJECTIVES[name]
    rng = np.random.default_rng(0)
    torch.manual_seed(1)
    model = LM(config, objective.heads(config))
    questions = [ClozeItem(rng.integers(12, 60, n), int(rng.integers(1, n))) for n in rng.integers(8, 40, 30)]
    right, bits = [], []
    for item in questions:
        example = objective.hide(item.pieces, VOCAB, item.answer)
        index = int(np.flatnonzero(example["labels"] != IGNORE)[0])
        with torch.no_grad():
            logits = model.heads["lm"](objective.forward(model, collate([example]))["hidden"][0, index])
            probabilities = logits.softmax(-1)
        right.append(int(probabilities.argmax()) == item.tokens[item.at])
        bits.append(-float(torch.log2(probabilities[item.tokens[item.at]])))
    found = cloze_score(model, objective, questions, VOCAB)
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["bits"] == pytest.approx(np.mean(bits), rel=1e-5)
    assert model.training


def test_objectives_without_token_prediction_have_no_score() -> None:
    objective = Classification(class_names=("a", "b"))
    config = encoder_config(**SIZES)
    assert cloze_score(LM(config, objective.heads(config)), objective, [ClozeItem(TOKENS, 3)], VOCAB) == {}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["the king is dead and long live the queen of all the sea " * 20], "byte-bpe", 380)


def test_items_are_fixed_and_spread_over_the_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [Document(f"d{i}", "the king is dead and long live the queen " * 5) for i in range(40)]
    store = TokenStore.build(iter([*texts, Document("short", "the")]), tokenizer, tmp_path / "store")
    found = cloze_items(store, tokenizer.vocab, count=25, length=32)
    again = cloze_items(store, tokenizer.vocab, count=25, length=32)
    assert [(i.tokens.tolist(), i.at) for i in found] == [(i.tokens.tolist(), i.at) for i in again]
    assert 20 <= len(found) <= 25
    most_frequent = np.bincount(store.tokens).argmax()
    assert most_frequent_baseline(store, found) == np.mean([i.tokens[i.at] == most_frequent for i in found]) > 0
    for item in found:
        assert 8 <= len(item.tokens) <= 32
        assert len(item.tokens) // 4 <= item.at < 3 * len(item.tokens) // 4
        assert not tokenizer.vocab.special[item.tokens[item.at]]
