"""Ids that the tokenizer does not have are never sampled, chosen or scored, however large the embedding table.

The expected values are those of the same model with a table without rows for such ids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers

from firth.align.rewards import FunctionReward
from firth.align.rollouts import RolloutsConfig, RolloutSource
from firth.data.collate import collate
from firth.data.examples import DataConfig
from firth.evaluate.task import load_evaluated_model
from firth.evaluate.tasks.likelihood import likelihood
from firth.generate import embeddings
from firth.generate.engine import Engine
from firth.generate.fill import fill_masks
from firth.generate.sampling import Sampling
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.config_groups import LMHeadConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.presets import llama
from firth.objectives.objective import token_loss
from firth.objectives.replaced_tokens import RTD
from firth.pretrained import gguf
from firth.pretrained.load_save import save_model
from firth.runs.prepare import RunData
from firth.runs.start_model import StartModel
from firth.tokenizer.gguf_write import metadata
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import IGNORE

TEXT = "the king is dead, long live the queen; the fool speaks and nobody listens to the fool. " * 9
EXTRA_ROWS = 46
"""Rows of the table without a token."""

CONFIGS: dict[str, Callable[[int], ModelConfig]] = {
    "softcap": lambda vocab: decoder_config(vocab, 32, 1, 2, max_positions=64),
    "tied": lambda vocab: ModelConfig(vocab, 32, 1, 2, max_positions=64),
    "t5": lambda vocab: encoder_decoder_config(vocab, 32, 1, 2, max_positions=64),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([TEXT], "byte-bpe", 330, num_sentinels=4)


def exact_and_wide(make: Callable[[int], ModelConfig], size: int) -> tuple[LM, LM]:
    """Return a model of `size` ids, and the same one with extra rows that have the highest logits."""
    torch.manual_seed(0)
    exact = LM(make(size), {"lm": LMHead(make(size))})
    for parameter in exact.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    wide = LM(make(size + EXTRA_ROWS), {"lm": LMHead(make(size + EXTRA_ROWS))})
    state = exact.state_dict()
    for name, tensor in wide.state_dict().items():
        if tensor.shape == state[name].shape:
            tensor.copy_(state[name])
        else:
            tensor[:size] = state[name]
            tensor[size:] = 40 * torch.randn_like(tensor[size:])
    return exact.eval(), wide.eval()


def prompts(tokenizer: Tokenizer) -> list[np.ndarray]:
    return [tokenizer.encode(text) for text in ("the king", "nobody listens to", "the fool speaks")]


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_wide_tables_generate_and_score_like_exact_ones(tokenizer: Tokenizer, name: str, weights: str | None) -> None:
    one, other = (Engine(m, tokenizer, weights=weights) for m in exact_and_wide(CONFIGS[name], tokenizer.vocab.size))
    given = prompts(tokenizer)
    for sampling in (
        Sampling(max_new_tokens=12, temperature=0),
        Sampling(max_new_tokens=12, seed=3),
        Sampling(max_new_tokens=12, temperature=5.0, top_p=0.99),
        Sampling(max_new_tokens=12, temperature=0, repetition_penalty=3.0),
        Sampling(max_new_tokens=12, top_k=400, min_p=1e-9),
    ):
        for a, b in zip(one.generate(given, sampling), other.generate(given, sampling), strict=True):
            assert a.tokens.tolist() == b.tokens.tolist() and a.text == b.text
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    options = [tokenizer.encode(text) for text in (" is dead", " speaks", " long live the queen")]
    np.testing.assert_allclose(one.score(given, options), other.score(given, options), atol=1e-3)
    np.testing.assert_allclose(one.options(given[0], options), other.options(given[0], options), atol=1e-3)
    assert one.choose(given[0], options) == other.choose(given[0], options)


def test_masks_are_filled_with_tokens_only(tokenizer: Tokenizer) -> None:
    one, other = exact_and_wide(lambda vocab: encoder_config(vocab, 32, 1, 2, max_positions=64), tokenizer.vocab.size)
    text = f"the {tokenizer.token(tokenizer.vocab.mask)} is dead"
    [found], [expected] = (fill_masks(Engine(m, tokenizer).model, tokenizer, text, 400) for m in (other, one))
    assert [c.token for c in found] == [c.token for c in expected]
    np.testing.assert_allclose([c.probability for c in found], [c.probability for c in expected], atol=1e-5)
    # Extra rows are not among the nearest neighbors of a word.
    assert len(embeddings.nearest(other, tokenizer, "the", 400)) == len(embeddings.nearest(one, tokenizer, "the", 400))


def test_likelihood_is_normalized_over_tokens_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:300])
    found = []
    for name, model in zip(("exact", "wide"), exact_and_wide(CONFIGS["softcap"], tokenizer.vocab.size), strict=True):
        save_model(model, tokenizer, tmp_path / name)
        evaluated = load_evaluated_model(tmp_path / name)
        found.append(likelihood(evaluated, [str(tmp_path / "a.txt")], None, lambda _: None)["nll"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("name", ["softcap", "tied"])
def test_training_loss_is_over_tokens_only(tokenizer: Tokenizer, name: str) -> None:
    """Loss and gradients are those of the exact table; extra rows have a gradient of zero."""
    size = tokenizer.vocab.size
    batch = torch.from_numpy(tokenizer.encode("the king is dead, long live the queen").astype(np.int64))[None]
    grads = []
    for model in exact_and_wide(CONFIGS[name], size):
        model.restrict_vocab(tokenizer.vocab)
        loss = token_loss(model, model({"tokens": batch[:, :-1]}), batch[:, 1:])
        loss.backward()
        weight = model.heads["lm"].weight.grad
        assert weight is not None
        # Computed from the logits, it is the same.
        logits = model.heads["lm"](model({"tokens": batch[:, :-1]}))
        expected = torch.nn.functional.cross_entropy(logits[0], batch[0, 1:], reduction="sum")
        assert float(expected.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        grads.append((float(loss.detach()), weight))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    torch.testing.assert_close(grads[1][1][:size], grads[0][1], atol=1e-5, rtol=1e-4)
    assert not grads[1][1][size:].any()


def test_rollouts_use_tokens_only(tokenizer: Tokenizer) -> None:
    """Sampled answers, log-probabilities of policy and reference, KL and entropy."""
    found = []
    for model, reference in zip(
        exact_and_wide(CONFIGS["tied"], tokenizer.vocab.size),
        exact_and_wide(CONFIGS["tied"], tokenizer.vocab.size),
        strict=True,
    ):
        with torch.no_grad():  # a policy that differs from the reference
            model.places.weight.mul_(1.1)
        source = RolloutSource(
            prompts(tokenizer), tokenizer, FunctionReward(lambda text: float(len(text))), reference,
            config=RolloutsConfig(rollout_size=6, max_new_tokens=8), steps=1,
        )  # fmt: skip
        found.append(source.prepare(model, 0))
        assert max(int(s.tokens.max()) for s in source.samples) < tokenizer.vocab.size
    assert found[0]["kl_per_answer"] > 0
    for name in ("reward", "kl_per_answer", "kl_per_token_estimate", "entropy"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-3, abs=1e-4), name


def test_frozen_models_of_a_run_use_tokens_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The reference of DPO and KTO and a teacher give the same log-probabilities as with an exact table."""
    exact, wide = exact_and_wide(CONFIGS["tied"], tokenizer.vocab.size)
    save_model(wide, tokenizer, tmp_path / "model")
    data = RunData(DataConfig(), tokenizer, tmp_path, start=StartModel(str(tmp_path / "model")))
    batch = torch.from_numpy(tokenizer.encode("the king is dead, long live the queen").astype(np.int64))[None]
    expected = float(token_loss(exact, exact({"tokens": batch[:, :-1]}), batch[:, 1:]).detach())
    teacher = data.frozen_model(str(tmp_path / "model"), "examples.teacher", "the teacher", "train it again")
    for model in (data.frozen_start("the reference"), teacher):
        at = batch.to(model.tokens.weight.device)
        found = token_loss(model, model({"tokens": at[:, :-1]}), at[:, 1:])
        assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_replaced_tokens_are_drawn_from_tokens_only(tokenizer: Tokenizer) -> None:
    """ELECTRA's generator, a submodel with its own LM head."""
    config = encoder_config(tokenizer.vocab.size + EXTRA_ROWS, 32, 1, 2, max_positions=64).with_fields(
        {"embedding.size": 32}
    )
    objective = RTD(mlm_probability=0.5, generator_size=1.0)
    torch.manual_seed(0)
    model = LM(config, objective.heads(config)).eval()
    generator = model.language_model
    with torch.no_grad():
        generator.heads["lm"].bias[tokenizer.vocab.size :] = 100.0
    model.restrict_vocab(tokenizer.vocab)
    example = objective.build_example(
        {"tokens": tokenizer.encode(TEXT)[:60]}, tokenizer.vocab, np.random.default_rng(0)
    )
    batch = collate([example])
    batch["chance"][:] = 1 - 2**-24  # the largest number that can be drawn
    drew = objective.forward(model, batch)["sampled"]
    assert len(drew) == int((batch["labels"] != IGNORE).sum()) and int(drew.max()) < tokenizer.vocab.size


def test_gaps_in_the_token_ids_are_never_generated() -> None:
    """Unused ids in the middle, as in a tokenizer whose added tokens start at a round number."""
    ids = {piece: i + 2 * (i >= 3) for i, piece in enumerate(["<unk>", "a", "b", "c", "d"])}  # 0 1 2 5 6
    rust = Rust(models.WordLevel(ids, unk_token="<unk>"))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    tokenizer = Tokenizer(rust)
    assert tokenizer.vocab.absent(8).tolist() == [3, 4, 7]
    config = ModelConfig(8, 16, 1, 2, max_positions=32, tie_embeddings=False, lm_head=LMHeadConfig(bias=True))
    torch.manual_seed(0)
    model = LM(config, {"lm": LMHead(config)}).eval()
    with torch.no_grad():
        model.heads["lm"].bias[[3, 4, 7]] = 50.0
    engine = Engine(model, tokenizer, stops=())
    written = engine.generate([tokenizer.encode("a b")] * 8, Sampling(max_new_tokens=20, seed=1))
    assert {*np.concatenate([w.tokens for w in written]).tolist()} <= {0, 1, 2, 5, 6}
    scores = [engine.score([tokenizer.encode("a b")], [np.array([i])])[0] for i in (0, 1, 2, 5, 6)]
    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-5)


def test_unused_gguf_pieces_are_not_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """llama.cpp names extra rows [PAD330], of the type "unused"."""
    file = tmp_path / "wide.gguf"
    _, wide = exact_and_wide(lambda vocab: llama(vocab, 64, 1, 2, 96, max_positions=64), tokenizer.vocab.size)
    gguf.write(wide, tokenizer, file, "F32")
    names = metadata(tokenizer, wide.config.vocab_size, False)["tokenizer.ggml.tokens"]
    assert names[-1] == f"[PAD{wide.config.vocab_size - 1}]"
    evaluated = load_evaluated_model(file)
    assert (
        evaluated.model.config.vocab_size == tokenizer.vocab.size + EXTRA_ROWS
        and evaluated.vocab.size == tokenizer.vocab.size
    )
    answers = Engine(evaluated.model, evaluated.tokenizer, stops=()).generate(
        [evaluated.tokenizer.encode("the king")], Sampling(max_new_tokens=30, temperature=0)
    )
    assert int(answers[0].tokens.max()) < tokenizer.vocab.size
