"""Scores of continuations agree with one pass over each pair alone, however prompts are shared."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from firth.generate import scoring
from firth.generate.decoding_batch import rectangle
from firth.generate.scoring import ScoredPair, TokenScores, score_gaps, score_pairs, shared_prefixes
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config, recurrent_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.tokenizer.vocab import Vocab
from firth.types import UserError

ROLES = {"pad": 0, "cls": 1, "sep": 2, "mask": 3, "bos": 1, "eos": 2}
VOCAB = Vocab(size=50, roles=ROLES, special=np.arange(50) < 4).with_decoder_start("pad")
SMALL = decoder_config(50, 64, 2)
CAUSAL: dict[str, ModelConfig] = {
    "rotary": SMALL,
    "learned": SMALL.with_fields({"position.type": "learned"}),
    "t5": SMALL.with_fields({"position.type": "t5"}),
    "grouped": decoder_config(50, 64, 2, num_heads=4),
    "lstm": recurrent_config(50, 32, 2),
    "no-layers-shared": replace(SMALL, num_layer_groups=1),
}


def random_model(config: ModelConfig) -> LM:
    """Return a model whose logits differ from token to token."""
    torch.manual_seed(3)
    model = LM(config, {"lm": LMHead(config)}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def random_pairs(rng: np.random.Generator, count: int = 24) -> list[ScoredPair]:
    """Return pairs of which some share a prompt, and prompts of which some share their beginning."""
    headers = [rng.integers(4, 50, 40), rng.integers(4, 50, 25), np.zeros(0, np.int64)]
    pairs = []
    for i in range(count):
        prompt = np.concatenate(([1], headers[i % 3], rng.integers(4, 50, rng.integers(0, 6))))
        for _ in range(rng.integers(1, 4)):
            pairs.append(ScoredPair(prompt, rng.integers(4, 50, rng.integers(1, 6))))
    return pairs


def found(model: LM, pairs: list[ScoredPair]) -> list[TokenScores]:
    """Return the scores in the order of the pairs."""
    scores = dict(score_pairs(model, VOCAB, pairs))
    assert len(scores) == len(pairs)
    return [scores[i] for i in range(len(pairs))]


def check(model: LM, hidden: torch.Tensor, labels: np.ndarray, scores: TokenScores) -> None:
    """Compare scores with the logits of hidden states (n, hidden_size)."""
    with torch.inference_mode():
        logits = model.heads["lm"](hidden).float().log_softmax(-1)
    expected = logits[torch.arange(len(labels)), torch.from_numpy(labels)]
    np.testing.assert_allclose(scores.logprobs, expected.numpy(), atol=2e-5, rtol=1e-5)
    assert scores.greedy == bool((logits.argmax(-1).numpy() == labels).all())


@pytest.mark.parametrize("name", CAUSAL)
def test_decoder_scores_equal_separate_passes(name: str) -> None:
    """Branches, shared beginnings and padding change nothing."""
    model, pairs = random_model(CAUSAL[name]), random_pairs(np.random.default_rng(0))
    for pair, scores in zip(pairs, found(model, pairs), strict=True):
        row = np.concatenate((pair.prompt, pair.continuation))[:-1]
        with torch.inference_mode():
            hidden = model(rectangle([row], torch.device("cpu")))[0, len(pair.prompt) - 1 :]
        check(model, hidden, pair.continuation, scores)


def test_prefix_lm_scores_equal_separate_passes() -> None:
    """The prompt of a prefix language model is read in both directions."""
    model, pairs = (
        random_model(SMALL.with_fields({"attention.prefix_lm": True, "causal": False})),
        random_pairs(np.random.default_rng(1)),
    )
    for pair, scores in zip(pairs, found(model, pairs), strict=True):
        row = np.concatenate((pair.prompt, pair.continuation))[:-1]
        with torch.inference_mode():
            batch = rectangle([row], torch.device("cpu"), prompts=[len(pair.prompt)])
            hidden = model(batch)[0, len(pair.prompt) - 1 :]
        check(model, hidden, pair.continuation, scores)


def test_encoder_decoder_scores_equal_separate_passes() -> None:
    """A source is encoded once for all of its continuations."""
    model, pairs = random_model(encoder_decoder_config(50, 64, 2)), random_pairs(np.random.default_rng(2))
    cpu = torch.device("cpu")
    for pair, scores in zip(pairs, found(model, pairs), strict=True):
        source = rectangle([pair.prompt], cpu, causal=False)
        batch = {f"source_{name}": field for name, field in source.items()}
        with torch.inference_mode():
            hidden = model(batch | rectangle([np.concatenate(([0], pair.continuation[:-1]))], cpu))[0]
        check(model, hidden, pair.continuation, scores)


@pytest.mark.parametrize("within_word", [False, True])
def test_masked_scores_equal_separate_passes(within_word: bool) -> None:
    """Each token is masked in turn; with word starts, the rest of its word too."""
    model, rng = random_model(encoder_config(50, 64, 2)), np.random.default_rng(4)
    pairs = [
        ScoredPair(pair.prompt, pair.continuation, rng.random(len(pair.continuation)) < 0.5 if within_word else None)
        for pair in [*random_pairs(rng, 6), ScoredPair(np.zeros(0, np.int64), np.array([7, 8, 9]))]
    ]
    for pair, scores in zip(pairs, found(model, pairs), strict=True):
        states = []
        for j in range(len(pair.continuation)):
            row = np.concatenate(([1], pair.prompt, pair.continuation, [2]))
            at = 1 + len(pair.prompt) + j
            row[at] = 3
            if pair.word_starts is not None:
                for k in range(j + 1, len(pair.continuation)):
                    if pair.word_starts[k]:
                        break
                    row[1 + len(pair.prompt) + k] = 3
            with torch.inference_mode():
                states.append(model(rectangle([row], torch.device("cpu"), causal=False))[0, at])
        check(model, torch.stack(states), pair.continuation, scores)


@pytest.mark.parametrize("gaps", [False, True])
def test_texts_are_scored_in_groups(gaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row per token is kept for a group of texts only, whose scores come before the next group is read."""
    rng = np.random.default_rng(5)
    pairs = [ScoredPair(np.zeros(0, np.int64), rng.integers(4, 48, 100)) for _ in range(100)]
    model = random_model((encoder_decoder_config if gaps else encoder_config)(50, 16, 1, num_heads=2))
    vocab = replace(VOCAB, sentinels=np.array([48, 49]))
    score = score_gaps if gaps else score_pairs
    tracemalloc.start()
    scores = score(model, vocab, pairs)
    next(scores)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 100 * 100 * 8 / 2, "half of the rows of all texts"
    few = pairs[:3] + [ScoredPair(np.zeros(0, np.int64), pair.continuation[:9]) for pair in pairs[3:6]]
    together = dict(score(model, vocab, few))
    monkeypatch.setattr(scoring, "MAX_GROUP_TOKENS", 1)
    for i, alone in score(model, vocab, few):
        np.testing.assert_allclose(together[i].logprobs, alone.logprobs, atol=2e-5)
        assert (together[i].most_likely == alone.most_likely).all()
    assert sorted(together) == list(range(6))


def test_shared_prefixes_leave_a_token_of_each_prompt() -> None:
    """The last token of a prompt predicts the continuation, so it is never part of the shared beginning."""
    rng = np.random.default_rng(5)
    prompts = sorted({tuple(rng.integers(0, 2, rng.integers(1, 30)).tolist()) for _ in range(300)})
    groups = shared_prefixes(prompts, minimum=3)
    assert [i for start, stop, _ in groups for i in range(start, stop)] == list(range(len(prompts)))
    for start, stop, length in groups:
        assert all(p[:length] == prompts[start][:length] and length < len(p) for p in prompts[start:stop])
    assert any(length for *_, length in groups)


def test_shared_beginnings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty questions after one header cost the header once."""
    model, rng = random_model(SMALL), np.random.default_rng(6)
    header = rng.integers(4, 50, 200)
    pairs = [
        ScoredPair(np.concatenate((header, rng.integers(4, 50, 5))), np.array([option]))
        for _ in range(10)
        for option in (4, 5, 6, 7)
    ]
    tokens = 0
    forward = LM.forward

    def counted(self: LM, batch: dict[str, torch.Tensor], *args: object) -> torch.Tensor:
        nonlocal tokens
        tokens += batch["tokens"].numel()
        return forward(self, batch, *args)

    monkeypatch.setattr(LM, "forward", counted)
    found(model, pairs)
    assert tokens <= 200 + 40 * 6


def test_pairs_that_cannot_be_scored_are_refused() -> None:
    """An empty prompt, an empty continuation and a pair beyond the context."""
    model = random_model(replace(SMALL, max_positions=8))
    some, none = np.array([4, 5]), np.zeros(0, np.int64)
    for pair, words in ((ScoredPair(none, some), "empty prompt"), (ScoredPair(some, none), "continuation is empty"),
                        (ScoredPair(np.arange(4, 12), some), "reads at most 8")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            found(model, [pair])
