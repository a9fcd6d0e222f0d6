"""GRPO, RLOO and PPO-ptx: the exact policy gradient on an enumerable toy, what must not move the policy, rows of text."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from firth.align.advantages import AdvantageEstimator, GroupNormalized, LeaveOneOut
from firth.data.collate import collate, label_fields_of, pack
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.objective import Objective
from firth.objectives.policy_gradient import GRPO, PER_TOKEN, PPO, RLOO, PolicyObjective, Reinforce, kl_estimate
from firth.training.step import step
from firth.types import Batch, DataStats, Example, UserError
from tests.support.byte_tokenizer import ByteTokenizer

VOCAB = ByteTokenizer.vocab
CONFIG = ModelConfig(vocab_size=VOCAB.size, hidden_size=32, num_layers=1, num_heads=2, max_positions=64)


def model_for(objective: Objective, config: ModelConfig = CONFIG, std: float = 0.2) -> LM:
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def example(prompt: list[int], answer: list[int], **numbers: float) -> Example:
    """Return an answer whose tokens all have these numbers."""
    mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
    found = {name: np.where(mask, numbers.get(name, 0.0), 0.0).astype(np.float32) for name in PER_TOKEN}
    return {"tokens": np.array(prompt + answer), "mask": mask} | found


def batch_of(objective: Objective, rows: list[Example]) -> Batch:
    built = [objective.build_example(row, VOCAB, np.random.default_rng(0)) for row in rows]
    return collate(built, label_fields_of(objective))


def gradient(model: LM, objective: Objective, batches: list[Batch]) -> torch.Tensor:
    model.zero_grad()
    step(model, objective, batches)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---- the exact policy gradient

TINY = ModelConfig(vocab_size=5, hidden_size=8, num_layers=1, num_heads=1, max_positions=4)
ANSWERS = list(itertools.product(range(5), repeat=2))
"""All answers of two of five tokens."""
REWARD = np.array([float(a == 3) + 2.0 * float(b == a) for a, b in ANSWERS])


def log_p(model: LM) -> torch.Tensor:
    """Return the log-probabilities of each token of each answer after the prompt 0: (25, 2)."""
    answers = torch.tensor(ANSWERS)
    rows = torch.cat((torch.zeros(25, 1, dtype=torch.int64), answers), 1)
    when = torch.arange(2).expand(25, 2)
    hidden = model({"tokens": rows[:, :-1], "query_time": when, "key_time": when})
    return model.heads["lm"](hidden).log_softmax(-1).gather(-1, answers[..., None])[..., 0]


POLICY_GRADIENTS: dict[str, tuple[Objective, AdvantageEstimator, float]] = {
    "reinforce": (Reinforce(), LeaveOneOut(), 1.0),
    "rloo": (RLOO(), LeaveOneOut(), 1.0),
    "dr_grpo": (GRPO(loss_type="dr_grpo", normalizer=2, beta=0.0), GroupNormalized("none"), 2.0 * 4 / 3),
    "dapo": (GRPO(beta=0.0), GroupNormalized("none"), 2.0 * 4 / 3),
    "grpo": (GRPO(loss_type="grpo", beta=0.0), GroupNormalized("none"), 2.0 * 4 / 3),
}
"""Objective, advantages, and what its gradient is multiplied by to be that of the expected reward: the two tokens of every
answer, and n / (n - 1) where the mean of a group contains the answer itself."""


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_gradient_is_that_of_the_expected_reward(name: str) -> None:
    """12,000 answers in groups of four, through the objective itself, against the sum over all answers, within the noise."""
    objective, estimator, factor = POLICY_GRADIENTS[name]
    model = model_for(Reinforce(), TINY, std=0.5)
    p = log_p(model).sum(-1).exp()
    exact = torch.cat(
        [g.flatten() for g in torch.autograd.grad((p * torch.tensor(REWARD)).sum(), list(model.parameters()))]
    )
    drawn = torch.multinomial(p.detach(), 12_000, replacement=True, generator=torch.Generator().manual_seed(1)).numpy()
    rewards = np.zeros((len(drawn), 2))
    rewards[:, 1] = REWARD[drawn]
    advantage = estimator(rewards, rewards, np.ones((len(drawn), 2), bool), 4)[0][:, 0]
    old = log_p(model).detach().numpy()
    # Answers with the same tokens and advantage share an example; their number weighs its gradient.
    kinds, counts = np.unique(np.stack((drawn, advantage.round(6))), axis=1, return_counts=True)
    parts = np.array_split(np.arange(kinds.shape[1]), 40)
    estimates, sizes = [], []
    for part in parts:
        rows = []
        for i in part:
            which, value = int(kinds[0, i]), float(kinds[1, i])
            row = example([0], list(ANSWERS[which]), advantage=value)
            row["old"][1:] = old[which]
            rows += [row] * int(counts[i])
        estimates.append(-gradient(model, objective, [batch_of(objective, rows)]) * factor)
        sizes.append(len(rows))
    found = torch.stack([g * n for g, n in zip(estimates, sizes, strict=True)]).sum(0) / sum(sizes)
    scores = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(one, list(model.parameters()), retain_graph=True)])
        for one in log_p(model).sum(-1)
    ])  # fmt: skip
    centered = torch.tensor(REWARD - float((p.detach() * torch.tensor(REWARD)).sum()))
    deviation = ((p.detach()[:, None] * (centered[:, None] * scores) ** 2).sum(0) / len(drawn)).sqrt()
    assert ((found - exact).abs() <= 6 * deviation + 1e-4).all()
    assert float(exact.norm()) > 15 * float(deviation.norm()), (
        "the gradient must be well above the noise of the comparison"
    )


def test_std_normalization_divides_by_one_number() -> None:
    """Within a group, the advantages with and without the division differ by one factor."""
    rewards = np.array([[0.0], [1.0], [1.0], [1.0], [0.0], [4.0], [8.0], [4.0]])
    real = np.ones((8, 1), bool)
    plain, scaled, batch = (
        GroupNormalized(scale)(rewards, rewards, real, 4)[0].reshape(2, 4)  # type: ignore[arg-type]
        for scale in ("none", "group", "batch")
    )
    assert plain[0].tolist() == [-0.75, 0.25, 0.25, 0.25]
    assert np.allclose(scaled * (rewards.reshape(2, 4).std(1, ddof=1, keepdims=True) + 1e-4), plain)
    assert np.allclose(batch * (rewards.std(ddof=1) + 1e-4), plain)


def test_a_group_of_equal_rewards_has_no_advantage() -> None:
    rewards = np.full((4, 3), 0.3)
    for estimator in (GroupNormalized("group"), GroupNormalized("batch"), GroupNormalized("none"), LeaveOneOut()):
        assert np.allclose(estimator(rewards, rewards, np.ones((4, 3), bool), 4)[0], 0, atol=1e-9)
    with pytest.raises(UserError, match="at least two answers"):
        GroupNormalized()(rewards[:1], rewards[:1], np.ones((1, 3), bool), 1)


# ---- one step

POLICIES: dict[str, PolicyObjective] = {
    "ppo": PPO(),
    "grpo": GRPO(loss_type="grpo", beta=0.1),
    "dapo": GRPO(clip_range_high=0.28, beta=0.1),
    "dr_grpo": GRPO(loss_type="dr_grpo", normalizer=9),
    "gspo": GRPO(loss_type="grpo", importance_sampling_level="sequence"),
    "rloo": RLOO(),
}


def sampled(count: int, seed: int = 0) -> list[Example]:
    """Return answers of different lengths with random numbers per token."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = example(rng.integers(7, VOCAB.size, rng.integers(1, 6)).tolist(),
                      rng.integers(7, VOCAB.size, rng.integers(1, 12)).tolist())  # fmt: skip
        at, answer_advantage = row["mask"], rng.normal()
        for name in PER_TOKEN:
            row[name][at] = rng.normal(size=at.sum()) if name in ("values", "returns") else answer_advantage
        row["old"][at] = row["reference"][at] = rng.normal(-5.5, 0.1, at.sum())
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", POLICIES)
def test_padding_packing_and_splitting_change_no_gradient(name: str) -> None:
    objective = POLICIES[name]
    model = model_for(objective, std=0.05)
    rows = sampled(7)
    built = [objective.build_example(row, VOCAB, np.random.default_rng(0)) for row in rows]
    fields = label_fields_of(objective)
    whole = gradient(model, objective, [collate(built, fields)])
    assert float(whole.norm()) > 0.01
    for batches in ([collate(built[:2], fields), collate(built[2:], fields)], [pack(built, 40, fields)]):
        assert torch.allclose(gradient(model, objective, batches), whole, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_zero_advantage_does_not_move_the_policy(name: str) -> None:
    objective = POLICIES[name]
    objective = replace(objective, beta=0.0) if isinstance(objective, GRPO) else objective
    objective = replace(objective, value_coef=0.0) if isinstance(objective, PPO) else objective
    model = model_for(objective)
    rows = sampled(4)
    for row in rows:
        row["advantage"][:] = 0.0
    assert not gradient(model, objective, [batch_of(objective, rows)]).any()


@pytest.mark.parametrize("high", [None, 0.28])
def test_grpo_stops_at_the_two_bounds(high: float | None) -> None:
    """A token whose probability has risen by more than 1 + c' is not raised further, and may still fall."""
    objective = GRPO(beta=0.0, clip_range=0.2, clip_range_high=high)
    model = model_for(objective)
    [row] = sampled(1)
    with torch.no_grad():
        seen = batch_of(objective, [row])
        outputs = objective.forward(model, seen)
        now = (
            model.heads["lm"](outputs["hidden"])[0].log_softmax(-1).gather(-1, seen["labels"][0].clamp(min=0)[:, None])
        )
    for ratio, advantage, moves in (
        (1.25, 1.0, high is not None),
        (1.3, 1.0, False),
        (1.3, -1.0, True),
        (0.79, -1.0, False),
    ):
        row["old"][1:] = np.where(row["mask"][1:], now[:, 0].numpy() - np.log(ratio), 0)
        row["advantage"][:] = advantage
        assert bool(gradient(model, objective, [batch_of(objective, [row])]).any()) is moves, (ratio, advantage)


def test_a_sequence_ratio_is_the_geometric_mean() -> None:
    objective = GRPO(loss_type="grpo", beta=0.0, importance_sampling_level="sequence", clip_range=5.0)
    model = model_for(objective, std=0.05)
    rows = sampled(3)
    terms = step(model, objective, [batch_of(objective, rows)])
    expected = []
    for row in rows:
        one = batch_of(objective, [row])
        with torch.no_grad():
            at = one["labels"][0] != -100
            own = model.heads["lm"](objective.forward(model, one)["hidden"])[0].log_softmax(-1)
            now = own.gather(-1, one["labels"][0].clamp(min=0)[:, None])[at, 0]
            expected.append(-float((now - one["old"][0][at]).mean().exp() * one["advantage"][0][at][0]))
    assert float(terms["policy"]) == pytest.approx(np.mean(expected), rel=1e-4)


def test_dr_grpo_divides_by_the_longest_answer() -> None:
    stats = DataStats(max_answer_tokens=24)
    configured = GRPO(loss_type="dr_grpo").configure(lambda: stats, CONFIG)
    assert configured == GRPO(loss_type="dr_grpo", normalizer=24)
    assert GRPO().configure(lambda: stats, CONFIG) == GRPO()
    model, rows = model_for(GRPO()), sampled(5)
    tokens = sum(int(row["mask"].sum()) for row in rows)
    by_token, by_answer = (
        float(step(model, objective, [batch_of(objective, rows)])["policy"])
        for objective in (GRPO(beta=0.0), GRPO(loss_type="dr_grpo", normalizer=24, beta=0.0))
    )
    assert by_answer == pytest.approx(by_token * tokens / (5 * 24), rel=1e-5)


# ---- KL


def test_the_expectations_of_the_kl_estimators() -> None:
    rng = np.random.default_rng(0)
    p, q = (torch.tensor(rng.dirichlet(np.ones(12))).log() for _ in range(2))
    exact = float((p.exp() * (p - q)).sum())
    mean = {name: float((p.exp() * kl_estimate(p, q, name)).sum()) for name in ("k1", "k2", "k3")}  # type: ignore[arg-type]
    assert mean["k1"] == pytest.approx(exact)
    assert mean["k3"] == pytest.approx(exact)
    assert abs(mean["k2"] - exact) > 0.01
    assert float(kl_estimate(p, q, "k1").min()) < 0 <= float(kl_estimate(p, q, "k3").min())


def test_the_bias_correction_gives_the_gradient_of_the_kl() -> None:
    """Over all tokens: the weighted estimate has the gradient of the divergence itself, the plain one has not."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=6), requires_grad=True)
    q = torch.tensor(rng.dirichlet(np.ones(6))).log()
    p = logits.log_softmax(0)
    [exact] = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    frozen = p.detach()
    weighted = (p - frozen).exp() * kl_estimate(p, q)
    [corrected] = torch.autograd.grad((frozen.exp() * weighted).sum(), logits, retain_graph=True)
    [plain] = torch.autograd.grad((frozen.exp() * kl_estimate(p, q)).sum(), logits)
    assert torch.allclose(corrected, exact)
    assert not torch.allclose(plain, exact, atol=1e-3)


# ---- PPO-ptx


@pytest.mark.parametrize(
    "objective", [PPO(ptx_coef=0.5), GRPO(ptx_coef=0.5), RLOO(ptx_coef=0.5)], ids=lambda o: type(o).__name__
)
def test_text_rows_add_their_own_loss(objective: PolicyObjective) -> None:
    """The gradient of the step is that of the answers plus ptx_coef times that of pretraining on the text."""
    model = model_for(objective)
    rows, text = sampled(3), [{"tokens": np.arange(10, 10 + n)} for n in (5, 9)]
    plain = replace(objective, ptx_coef=0.0)
    answers = gradient(model, plain, [batch_of(plain, rows)])
    model.zero_grad()
    pretraining = step(model, CausalLM(), [batch_of(CausalLM(), text)])
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    model.zero_grad()
    terms = step(model, objective, [batch_of(objective, [rows[0], text[0], rows[1], rows[2], text[1]])])
    both = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    assert float(terms["ptx"]) == pytest.approx(0.5 * float(pretraining["tokens"]), rel=1e-5)
    assert torch.allclose(both, answers + 0.5 * torch.cat(parts), atol=1e-5)
