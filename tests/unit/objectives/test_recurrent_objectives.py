"""word2vec against its definition; the bidirectional language model of ELMo; layer mixtures; token classification."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from firth.data.collate import Batches, collate, pack
from firth.data.source import Source
from firth.data.windows import keep_probabilities, noise_distribution, word_statistics
from firth.model.config import ModelConfig, recurrent_config, word_vector_config
from firth.model.config_groups import NormConfig, PositionConfig, RNNConfig
from firth.model.model import LM
from firth.objectives.causal_lm import BiLM
from firth.objectives.objective import Objective
from firth.objectives.token_tasks import LayerMixture, TokenClassification
from firth.objectives.word2vec import Word2Vec
from firth.recipes.recurrent import elmo_config
from firth.tokenizer.vocab import Vocab
from firth.training.optimizer import Optimizer, OptimizerConfig
from firth.training.step import step
from firth.types import IGNORE, NEVER, Example, UserError
from tests.support.objective_cases import label_fields

VOCAB = Vocab(size=60, roles={"pad": 0, "unk": 1}, special=np.arange(60) < 2)
COUNTS = np.where(np.arange(60) < 2, 0, 1000 // np.arange(1, 61))


def running(rng: np.random.Generator, n: int = 0, documents: int = 1) -> Example:
    n = n or int(rng.integers(40, 90))
    example = {"tokens": rng.integers(2, 60, n).astype(np.int32)}
    if documents > 1:
        example["document_ids"] = np.sort(rng.integers(0, documents, n)).astype(np.int32)
    return example


def words(rng: np.random.Generator) -> Example:
    return running(rng, documents=3) | {
        "kept": keep_probabilities(COUNTS, 0.05),
        "noise": noise_distribution(COUNTS, 0.75),
    }


def tagged(rng: np.random.Generator) -> Example:
    example = running(rng, int(rng.integers(3, 20)))
    tags = rng.integers(0, 4, len(example["tokens"]))
    return example | {"tags": np.where(rng.random(len(tags)) < 0.3, IGNORE, tags)}


def sentence(rng: np.random.Generator) -> Example:
    return running(rng, int(rng.integers(3, 20)))


ELMO = elmo_config(60, 24, 2, characters=8, filters=64)
CASES = {
    "skip-gram": (Word2Vec(noise_words=7), words, word_vector_config(60, 16)),
    "cbow": (Word2Vec(algorithm="cbow", noise_words=7), words, word_vector_config(60, 16)),
    "bilm": (BiLM(), sentence, ELMO),
    "bilm, tied": (
        BiLM(),
        sentence,
        ModelConfig(
            60,
            24,
            1,
            1,
            causal=False,
            norm=NormConfig(placement="post"),
            position=PositionConfig("none"),
            rnn=RNNConfig("gru", separate_directions=True),
        ),
    ),
    "tagging": (TokenClassification(class_names=("a", "b", "c", "d")), tagged, recurrent_config(60, 16, 2, "gru")),
    "layer mixture + tagging": (LayerMixture() + TokenClassification(class_names=("a", "b", "c", "d")), tagged, ELMO),
    "layer mixture, trained": (
        LayerMixture(frozen=False) + TokenClassification(class_names=("a", "b", "c", "d")),
        tagged,
        ModelConfig(60, 16, 2, 2, causal=False, max_positions=64),
    ),
}


def build_case(name: str) -> tuple[Objective, LM, list[Example]]:
    objective, source, config = CASES[name]
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    model.set_token_characters([f"{i} piece" for i in range(60)])
    if "context" in model.heads:  # the initial zeros would hide mistakes
        torch.nn.init.normal_(model.heads["context"].weight, std=0.5)
        torch.nn.init.normal_(model.tokens.weight, std=0.5)
    rng = np.random.default_rng(0)
    return objective, model, [objective.build_example(source(rng), VOCAB, rng) for _ in range(6)]


@pytest.mark.parametrize("name", CASES)
def test_build_example_is_a_pure_function(name: str) -> None:
    objective, source, _ = CASES[name]
    for seed in range(30):
        example = source(np.random.default_rng(seed))
        before = {k: np.copy(v) for k, v in example.items()}
        shown, again = (objective.build_example(example, VOCAB, np.random.default_rng(seed)) for _ in range(2))
        assert shown.keys() == again.keys() >= label_fields(objective)
        assert all(np.array_equal(shown[k], again[k]) for k in shown)
        assert all(np.array_equal(example[k], before[k]) for k in before)
        assert all(shown[field].shape == shown["tokens"].shape for field in label_fields(objective))


def terms_and_gradient(objective: Objective, model: LM, batches: list) -> tuple[dict[str, float], torch.Tensor]:
    model.zero_grad()
    terms = {k: float(v) for k, v in step(model, objective, batches).items()}
    return terms, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", CASES)
def test_split_and_packed_batches_have_the_same_gradient(name: str) -> None:
    objective, model, shown = build_case(name)
    fields = label_fields(objective)
    full, gradient = terms_and_gradient(objective, model, [collate(shown, fields)])
    others = [[collate(shown[:2], fields), collate(shown[2:], fields)]]
    if "noise" in shown[0]:
        with pytest.raises(UserError, match="cannot be packed"):
            pack(shown, 200, fields)
    else:
        others.append([pack(shown, 64, fields)])
    for batches in others:
        terms, other = terms_and_gradient(objective, model, batches)
        assert terms == pytest.approx(full, rel=1e-5)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_lower_every_term(name: str) -> None:
    objective, model, shown = build_case(name)
    batch = collate(shown, label_fields(objective))
    optimizer = Optimizer(OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.0), model)
    first = step(model, objective, [batch])
    for _ in range(10):
        optimizer.step(1.0)
        last = step(model, objective, [batch])
    assert all(last[term] < first[term] for term in objective.labels)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["skipgram", "cbow"])
def test_word2vec_is_its_definition(algorithm: str) -> None:
    """Pair by pair; noise: k times the mean over the row's noise words, for each pair."""
    objective, model, shown = build_case("skip-gram" if algorithm == "skipgram" else "cbow")
    x, c = model.tokens.weight, model.heads["context"].weight
    wanted = torch.zeros(())
    for row in shown:
        n, tokens = len(row["tokens"]), row["tokens"]
        for i in range(n):
            near = [j for j in range(i - row["left"][i], i + row["right"][i] + 1) if j != i]
            inputs, outputs = [x[tokens[i]]] * len(near), [c[tokens[j]] for j in near]
            if algorithm == "cbow" and near:
                inputs, outputs = [torch.stack([x[tokens[j]] for j in near]).mean(0)], [c[tokens[i]]]
            for a, b in zip(inputs, outputs, strict=True):
                mean = torch.stack([F.logsigmoid(-(a @ c[w])) for w in row["noise"]]).mean()
                wanted = wanted - F.logsigmoid(a @ b) - objective.num_negatives * mean
    batch = collate(shown, {"words"})
    got = objective.loss(model, objective.forward(model, batch), batch)["words"]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    both = [torch.autograd.grad(loss, (x, c)) for loss in (wanted, got)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_windows_are_uniform_and_stay_in_their_document() -> None:
    rng = np.random.default_rng(0)
    reach = np.zeros(6, int)
    for _ in range(200):
        example = words(rng) | {"kept": np.ones(60)}
        shown = Word2Vec().build_example(example, VOCAB, rng)
        document = example["document_ids"]
        for i, (left, right) in enumerate(zip(shown["left"], shown["right"], strict=True)):
            assert (document[i - left : i + right + 1] == document[i]).all()
            if 5 <= i < len(document) - 5 and (document[i - 5 : i + 6] == document[i]).all():
                assert left == right
                reach[left] += 1
        assert ((shown["left"] + shown["right"] == 0) == (shown["words"] == IGNORE)).all()
    assert reach[0] == 0
    assert np.abs(reach[1:] / reach.sum() - 0.2).max() < 0.02


def test_subsampling_and_noise_distribution() -> None:
    class Text(Source):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Example:
            return {"tokens": np.repeat(np.arange(60), COUNTS)} | word_statistics(COUNTS, 0.01, 0.75)

    source = Text()
    rng = np.random.default_rng(0)
    seen, drawn = np.zeros(60), np.zeros(60)
    for _ in range(50):
        shown = Word2Vec(noise_words=400).build_example(source[0], VOCAB, rng)
        seen += np.bincount(shown["tokens"], minlength=60)
        drawn += np.bincount(shown["noise"], minlength=60)
    share = COUNTS / COUNTS.sum()
    chance = np.minimum(1, np.sqrt(0.01 / share[2:]) + 0.01 / share[2:])  # word2vec.c's formula
    assert seen[2:] / (50 * COUNTS[2:]) == pytest.approx(chance, abs=0.05)
    assert seen[:2].sum() == drawn[:2].sum() == 0
    assert drawn / drawn.sum() == pytest.approx(COUNTS**0.75 / (COUNTS**0.75).sum(), abs=0.006)
    with pytest.raises(UserError, match="no word that the tokenizer knows"):
        word_statistics(np.zeros(60), 0.01, 0.75)


@pytest.mark.slow
def test_related_words_are_nearer_than_others() -> None:
    """Two halves of a vocabulary that never occur together: after training, a word's neighbors are in its own half."""

    class Halves(Source):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> Example:
            rng = np.random.default_rng(index)
            tokens = rng.integers(2, 31, 64) + 29 * (index % 2)
            return {"tokens": tokens, "kept": np.ones(60), "noise": noise_distribution(np.arange(60) > 1, 0.75)}

    for algorithm in ("skipgram", "cbow"):
        objective = Word2Vec(algorithm=algorithm)
        torch.manual_seed(0)
        model = LM(word_vector_config(60, 16), objective.heads(word_vector_config(60, 16)))
        optimizer = Optimizer(OptimizerConfig(name="adamw", lr=5e-2, weight_decay=0.0), model)
        batches = Batches(Halves(), objective, VOCAB, batch_size=16, seed=0)
        for i in range(100):
            step(model, objective, batches.batches(i))
            optimizer.step(1.0)
        x = F.normalize(model.tokens.weight[2:].detach(), dim=-1)
        like = x @ x.t()
        assert like[:29, :29].mean() > like[:29, 29:].mean() + 0.3


def test_elmo_directions_do_not_see_their_labels() -> None:
    """Exact: with as many different words on both sides, the products that compute their vectors round alike."""
    objective, model, _ = build_case("bilm")
    model.eval()
    rng = np.random.default_rng(3)
    tokens, others = rng.permutation(np.arange(2, 60))[:24].reshape(2, 12)
    example = {"tokens": tokens, "document_ids": np.repeat([0, 1], (5, 7))}

    def states(example: Example) -> torch.Tensor:
        return model(collate([objective.build_example(example, VOCAB, rng)], label_fields(objective)))[0]

    before = states(example)
    for i in range(12):
        changed = np.where(np.arange(12) == i, others, tokens)
        differs = states(example | {"tokens": changed}) != before
        ahead, back = (side.any(-1) for side in differs.chunk(2, -1))
        where, inside = np.arange(12), example["document_ids"] == example["document_ids"][i]
        assert ahead.tolist() == ((where >= i) & inside).tolist()
        assert back.tolist() == ((where <= i) & inside).tolist()
    shown = objective.build_example(example, VOCAB, rng)
    assert shown["next"].tolist() == [*tokens[1:5], IGNORE, *tokens[6:], IGNORE]
    assert shown["previous"].tolist() == [IGNORE, *tokens[:4], IGNORE, *tokens[5:-1]]


def test_frozen_features_stay_unchanged_without_dropout() -> None:
    config = dataclasses.replace(ELMO, dropout=0.5)
    objective = LayerMixture() + TokenClassification(class_names=("a", "b", "c", "d"))
    torch.manual_seed(0)
    model = LM(config, objective.heads(config)).train()
    rng = np.random.default_rng(0)
    batch = collate([objective.build_example(tagged(rng), VOCAB, rng) for _ in range(4)], {"tags"})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert torch.equal(objective.forward(model, batch)["hidden"], objective.forward(model, batch)["hidden"])
    assert model.training
    for name in ("adamw", "muon"):
        optimizer = Optimizer(OptimizerConfig(name=name, lr=1e-2), model)
        for _ in range(2):
            step(model, objective, [batch])
            optimizer.step(1.0)
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still == {n for n in before if not n.startswith("heads.")}
    frozen = objective.flops(model, batch)
    del model.heads["mixture"]
    assert frozen * 3 == pytest.approx(objective.flops(model, batch))


def test_layer_mixture_is_that_of_the_paper() -> None:
    objective, model, shown = build_case("layer mixture + tagging")
    model.eval()
    with torch.no_grad():
        model.heads["mixture"].weights.copy_(torch.tensor([0.5, -1.0, 2.0]))
        model.heads["mixture"].scale.fill_(1.5)
    batch = collate(shown, {"tags"})
    layers = model.all_hidden_states(batch)  # (3, B, T, width)
    s = torch.tensor([0.5, -1.0, 2.0]).softmax(0)
    wanted = 1.5 * (s[0] * layers[0] + s[1] * layers[1] + s[2] * layers[2])
    torch.testing.assert_close(objective.forward(model, batch)["hidden"], wanted)
    e = model.tokens(batch["tokens"])
    real = batch["key_time"] != NEVER
    torch.testing.assert_close(layers[0][real], torch.cat((e, e), -1)[real])


def test_invalid_settings_are_rejected() -> None:
    for bad in ({"window": 0}, {"num_negatives": 0}, {"noise_words": 0}, {"window": 33}):
        with pytest.raises(
            UserError,
            match=r"objective.(window|num_negatives|noise_words)=\d+ should be (greater|less) than or equal to ",
        ):
            Word2Vec(**bad)
    separate = CASES["bilm, tied"][2]
    from firth.objectives.masked_lm import MLM

    with pytest.raises(UserError, match=r"model\.tie_embeddings=false"):
        LM(separate, MLM().heads(separate))
