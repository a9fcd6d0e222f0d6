"""SFT, rankings, REINFORCE and PPO against explicit formulas."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from firth.align.advantages import GAE, LeaveOneOut, whiten
from firth.data.collate import collate, counted_fields, pack
from firth.model.config import ModelConfig, encoder_decoder_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.objectives.policy_gradient import PER_TOKEN, PPO, Reinforce, kl_estimate
from firth.objectives.reward_model import Ranking, RewardModeling
from firth.objectives.sft import SFT, Seq2SeqSFT
from firth.training.step import step
from firth.types import IGNORE, Example, UserError
from tests.support.byte_tokenizer import ByteTokenizer

V = ByteTokenizer.vocab.size
CONFIG = ModelConfig(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64)
VOCAB = ByteTokenizer.vocab


def model_for(objective: Objective, config: ModelConfig = CONFIG, std: float = 0.3) -> LM:
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def sampled(count: int, seed: int = 0) -> list[Example]:
    """Return answers with random numbers per token."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        prompt, answer = rng.integers(1, 6), rng.integers(1, 12)
        n = prompt + answer
        numbers = {name: rng.normal(size=n).astype(np.float32) for name in PER_TOKEN}
        numbers["old"], numbers["reference"] = -np.abs(numbers["old"]) - 5, -np.abs(numbers["reference"]) - 5
        examples.append({"tokens": rng.integers(7, V, n), "mask": np.arange(n) >= prompt} | numbers)
    return examples


def built(objective: Objective, examples: list[Example]) -> list[Example]:
    return [objective.build_example(e, VOCAB, np.random.default_rng(0)) for e in examples]


def label_fields(objective: Objective) -> set[str]:
    return {*counted_fields(objective).values(), "labels"}


# ---- SFT


def test_sft_labels_are_the_answer_and_its_stop_token() -> None:
    tokens, mask = np.array([2, 50, 51, 60, 61, 6, 17]), np.array([0, 0, 0, 1, 1, 1, 0], bool)
    seen = SFT().build_example({"tokens": tokens, "mask": mask}, VOCAB, np.random.default_rng(0))
    assert seen["tokens"].tolist() == [2, 50, 51, 60, 61, 6]
    assert seen["labels"].tolist() == [IGNORE, IGNORE, 60, 61, 6, IGNORE]


def test_sft_is_the_mean_over_answer_tokens() -> None:
    model = model_for(SFT())
    rows = sampled(4)
    batch = collate(built(SFT(), rows))
    terms = step(model, SFT(), [batch])
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model.heads["lm"](
                model({"tokens": torch.tensor(row["tokens"][None]), **causal(len(row["tokens"]))})
            )
        log_p = logits[0].log_softmax(-1)
        for at in np.flatnonzero(row["mask"]):
            total -= float(log_p[at - 1, row["tokens"][at]])
            count += 1
    assert float(terms["tokens"]) == pytest.approx(total / count, abs=1e-4)


def causal(n: int) -> dict[str, torch.Tensor]:
    return {"query_time": torch.arange(n)[None], "key_time": torch.arange(n)[None]}


def test_seq2seq_learns_from_encoder_to_decoder() -> None:
    config = encoder_decoder_config(vocab_size=V, hidden_size=32, num_layers=1, num_heads=2, max_positions=32)
    torch.manual_seed(0)
    model = LM(config, Seq2SeqSFT().heads(config))
    rows = [{"source": np.array([50 + i, 51]), "target": np.array([70 + i, 3])} for i in range(4)]
    batch = collate(built(Seq2SeqSFT(), rows))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(float(step(model, Seq2SeqSFT(), [batch])["tokens"]))
        optimizer.step()
    assert losses[-1] < 0.1 < 4 < losses[0], "only the source determines the target, so the encoder must be used"


# ---- rankings


def ranked(ranks: list[int], seed: int = 0) -> Example:
    rng = np.random.default_rng(seed)
    answers = [rng.integers(7, V, rng.integers(2, 9)) for _ in ranks]
    return {"answers": answers, "masks": [np.ones(len(a), bool) for a in answers], "rank": np.array(ranks)}


def scores_of(model: LM, example: Example) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([
            model.heads["reward"](model({"tokens": torch.tensor(a[None]), **causal(len(a))})[0, -1])[0]
            for a in example["answers"]
        ])  # fmt: skip


def test_ranking_loss_is_the_mean_over_pairs() -> None:
    objective = Ranking(num_answers=4)
    model = model_for(objective)
    groups = [ranked([2, 0, 1, 3]), ranked([1, 0], 1), ranked([0, 0, 1], 2)]
    terms = step(model, objective, [collate(built(objective, groups), label_fields(objective))])
    losses, right = [], []
    for group in groups:
        r = scores_of(model, group)
        pairs = [(i, j) for i, j in itertools.permutations(range(len(r)), 2) if group["rank"][i] < group["rank"][j]]
        losses.append(np.mean([math.log1p(math.exp(float(r[j] - r[i]))) for i, j in pairs]))
        right.append(np.mean([float(r[i] > r[j]) for i, j in pairs]))
    assert float(terms["reward"]) == pytest.approx(np.mean(losses), abs=1e-4)
    assert float(terms["accuracy"]) == pytest.approx(np.mean(right), abs=1e-6)


def test_a_ranking_of_two_is_a_preference() -> None:
    group = ranked([0, 1], 3)
    (a, b), (m, n) = group["answers"], group["masks"]
    pair = {"chosen_tokens": a, "chosen_mask": m, "rejected_tokens": b, "rejected_mask": n}
    model = model_for(RewardModeling())
    whole = step(model, RewardModeling(), [collate(built(RewardModeling(), [pair]), label_fields(RewardModeling()))])
    for likelihood in ("pairs", "order"):
        objective = Ranking(num_answers=3, likelihood=likelihood)  # type: ignore[arg-type]
        terms = step(model, objective, [collate(built(objective, [group]), label_fields(objective))])
        assert float(terms["reward"]) == pytest.approx(float(whole["reward"]), abs=1e-5)
        assert float(terms["margin"]) == pytest.approx(float(whole["margin"]), abs=1e-5)


def test_centering_of_a_ranking_is_that_of_its_pairs() -> None:
    """The mean of (r_i + r_j)^2 over the compared pairs; for two answers that of a preference."""
    objective = Ranking(num_answers=3, center_rewards_coefficient=0.5)
    model = model_for(objective)
    groups = [ranked([2, 0, 1]), ranked([1, 0], 1)]
    terms = step(model, objective, [collate(built(objective, groups), label_fields(objective))])
    squares = []
    for group in groups:
        r = scores_of(model, group).tolist()
        squares.append(np.mean([(a + b) ** 2 for a, b in itertools.combinations(r, 2)]))
    assert float(terms["center"]) == pytest.approx(0.5 * np.mean(squares), rel=1e-4)
    plain = step(
        model, Ranking(num_answers=3), [collate(built(Ranking(num_answers=3), groups), label_fields(objective))]
    )
    assert "center" not in plain
    assert float(plain["reward"]) == pytest.approx(float(terms["reward"]), abs=1e-6)


def test_a_missing_margin_is_an_error() -> None:
    on = np.ones(2, bool)
    pair = {"chosen_tokens": np.array([9, 20]), "chosen_mask": on, "rejected_tokens": np.array([9, 30]), "rejected_mask": on,
            "margin": np.array([np.nan])}  # fmt: skip
    with pytest.raises(UserError, match="a preference has no `margin`"):
        built(RewardModeling(margin_weight=1.0), [pair])
    [seen] = built(RewardModeling(margin_weight=2.0), [pair | {"margin": np.array([0.75])}])
    assert seen["expected_margin"] == 1.5
    assert "expected_margin" not in built(RewardModeling(), [pair])[0]


def test_plackett_luce_sums_to_one_over_orders() -> None:
    objective = Ranking(num_answers=3, likelihood="order")
    model = model_for(objective)
    total = 0.0
    for order in itertools.permutations(range(3)):
        group = ranked(list(order), 4)
        terms = step(model, objective, [collate(built(objective, [group]), label_fields(objective))])
        total += math.exp(-float(terms["reward"]))
    assert total == pytest.approx(1.0, abs=1e-4)


def test_a_ranking_of_ties_is_not_counted() -> None:
    objective = Ranking(num_answers=3)
    model = model_for(objective)
    ties, real = ranked([1, 1, 1]), ranked([0, 1, 2], 1)
    both = step(model, objective, [collate(built(objective, [ties, real]), label_fields(objective))])
    one = step(model, objective, [collate(built(objective, [real]), label_fields(objective))])
    assert float(both["reward"]) == pytest.approx(float(one["reward"]), abs=1e-5)
    with pytest.raises(UserError, match="a ranking of 4 answers"):
        objective.build_example(ranked([0, 1, 2, 3]), VOCAB, np.random.default_rng(0))


def test_reward_is_read_at_the_last_answer_token() -> None:
    """A chat template writes a line break after the turn; a sampled answer has none."""
    pair = {"chosen_tokens": np.array([9, 20, 6]), "chosen_mask": np.array([False, True, True]),
            "rejected_tokens": np.array([9, 30, 31, 6]), "rejected_mask": np.array([False, True, True, True])}  # fmt: skip
    behind = dict(pair)
    for side in ("chosen", "rejected"):
        behind[f"{side}_tokens"] = np.append(pair[f"{side}_tokens"], 17)
        behind[f"{side}_mask"] = np.append(pair[f"{side}_mask"], False)
    one, two = built(RewardModeling(), [pair, behind])
    assert all(np.array_equal(one[name], two[name]) for name in one)


# ---- advantages


def test_gae_matches_its_definition() -> None:
    """A_t is the sum over k of (gamma lam)^k (r + gamma v' - v) at t + k, written as a double loop."""
    rng = np.random.default_rng(0)
    lengths, gamma, lam = [5, 1, 8], 0.97, 0.9
    real = np.arange(8) < np.array(lengths)[:, None]
    rewards, values = rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
    advantage, returns = GAE(gamma, lam, whiten=False)(rewards, values, real, group=1)
    for i, n in enumerate(lengths):
        for t in range(n):
            expected = 0.0
            for k in range(t, n):
                after = values[i, k + 1] if k + 1 < n else 0.0
                expected += (gamma * lam) ** (k - t) * (rewards[i, k] + gamma * after - values[i, k])
            assert advantage[i, t] == pytest.approx(expected)
            assert returns[i, t] == pytest.approx(expected + values[i, t])
        assert not advantage[i, n:].any()
    white, same = GAE(gamma, lam)(rewards, values, real, group=1)
    assert np.allclose(same, returns)
    assert np.allclose(white[real], (advantage[real] - advantage[real].mean()) / advantage[real].std())


def test_gae_at_its_limits_is_monte_carlo_and_one_step() -> None:
    rng = np.random.default_rng(1)
    real = np.ones((2, 6), bool)
    rewards, values = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    _, returns = GAE(1.0, 1.0, whiten=False)(rewards, values, real, group=1)
    assert np.allclose(returns, rewards[:, ::-1].cumsum(1)[:, ::-1])
    advantage, _ = GAE(1.0, 0.0, whiten=False)(rewards, values, real, group=1)
    assert np.allclose(advantage, rewards + np.c_[values[:, 1:], [0, 0]] - values)


def test_baseline_is_the_mean_of_the_other_answers() -> None:
    real = np.ones((4, 2), bool)
    rewards = np.array([[0, 1.0], [0, 3.0], [0, 5.0], [1.0, 6.0]])
    advantage, _ = LeaveOneOut()(rewards, rewards, real, group=2)
    assert advantage[:, 0].tolist() == [-2, 2, -2, 2]
    advantage, _ = LeaveOneOut()(rewards, rewards, real, group=1)
    assert np.allclose(advantage[:, 1], [1 - 5, 3 - 13 / 3, 5 - 11 / 3, 7 - 3])


def test_whitened_values_are_standardized() -> None:
    x = np.random.default_rng(0).normal(3, 7, (5, 9))
    real = np.arange(9) < np.array([3, 9, 1, 5, 4])[:, None]
    white = whiten(x, real)
    assert white[real].mean() == pytest.approx(0, abs=1e-9)
    assert white[real].std() == pytest.approx(1, abs=1e-6)
    assert not white[~real].any()


# ---- PPO


def test_ppo_matches_its_formulas() -> None:
    objective = PPO(clip_range=0.2, value_clip_range=0.3, value_coef=0.5)
    model = model_for(objective, std=0.1)
    rows = sampled(6)
    terms = step(model, objective, [collate(built(objective, rows), label_fields(objective))])
    sums = dict.fromkeys(("policy", "value", "kl_per_token", "approx_kl", "entropy", "clipped", "value_error"), 0.0)
    count = 0
    for row in rows:
        n = len(row["tokens"])
        with torch.no_grad():
            hidden = model({"tokens": torch.tensor(row["tokens"][None]), **causal(n)})[0]
            log_p = model.heads["lm"](hidden).log_softmax(-1)
            critic = model.heads["critic"]
            values = critic.heads["value"](critic({"tokens": torch.tensor(row["tokens"][None]), **causal(n)})[0])[:, 0]
        for t in np.flatnonzero(row["mask"]):
            now, value = float(log_p[t - 1, row["tokens"][t]]), float(values[t - 1])
            old, ref, before, adv, ret = (float(row[name][t]) for name in PER_TOKEN)
            ratio = math.exp(now - old)
            clipped_ratio = min(max(ratio, 0.8), 1.2)
            clipped_value = before + min(max(value - before, -0.3), 0.3)
            sums["policy"] -= min(ratio * adv, clipped_ratio * adv)
            sums["value"] += 0.5 * 0.5 * max((value - ret) ** 2, (clipped_value - ret) ** 2)
            sums["kl_per_token"] += ratio * (math.exp(ref - now) - 1 - (ref - now))
            sums["approx_kl"] += ratio - 1 - (now - old)
            sums["entropy"] -= ratio * now
            sums["clipped"] += clipped_ratio * adv < ratio * adv
            sums["value_error"] += (value - ret) ** 2
            count += 1
    assert 0 < sums["clipped"] < count
    for name, expected in sums.items():
        assert float(terms[name]) == pytest.approx(expected / count, rel=1e-4, abs=1e-5), name


def test_ppo_kl_is_that_of_the_current_policy() -> None:
    """Weighting every token by the old policy gives the exact divergence of the new one."""
    rng = np.random.default_rng(0)
    old, new, start = (torch.tensor(rng.dirichlet(np.ones(12))).log() for _ in range(3))
    exact = float((new.exp() * (new - start)).sum())
    ratio = (new - old).exp()
    assert float((old.exp() * ratio * kl_estimate(new, start)).sum()) == pytest.approx(exact, rel=1e-9)
    assert abs(float((old.exp() * kl_estimate(new, start)).sum()) - exact) > 0.01


def test_clipped_tokens_have_no_gradient() -> None:
    objective = PPO(value_coef=0.0)
    model = model_for(objective)
    [row] = sampled(1)
    row["old"] = np.full_like(row["old"], -30.0)  # the ratio is far above 1 + clip
    row["advantage"] = np.ones_like(row["advantage"])
    step(model, objective, [collate(built(objective, [row]), label_fields(objective))])
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    row["advantage"] = -np.ones_like(row["advantage"])  # but its probability may always decrease
    step(model, objective, [collate(built(objective, [row]), label_fields(objective))])
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_kl_estimate_is_unbiased_and_nonnegative() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, generator=generator)
    p, q = ((base + 0.3 * torch.randn(50, generator=generator)).log_softmax(0) for _ in range(2))
    exact = float((p.exp() * (p - q)).sum())
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    estimate = kl_estimate(p[tokens], q[tokens])
    assert float(estimate.min()) >= 0
    error = float(estimate.std()) / len(tokens) ** 0.5
    assert abs(float(estimate.mean()) - exact) < 4 * error
    naive = p[tokens] - q[tokens]
    assert float(naive.min()) < 0
    assert float(estimate.std()) < float(naive.std())


# ---- padding, packing and splitting, for all per-token objectives


@pytest.mark.parametrize("objective", [SFT(), Reinforce(), PPO()], ids=lambda o: type(o).__name__)
def test_padding_packing_and_splitting_do_not_change_gradients(objective: Objective) -> None:
    model = model_for(objective, std=0.2)
    rows = built(objective, sampled(7))

    def gradient(batches: list[dict[str, torch.Tensor]]) -> tuple[dict[str, float], torch.Tensor]:
        model.zero_grad()
        terms = step(model, objective, batches)
        return {k: float(v) for k, v in terms.items()}, torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, expected = gradient([collate(rows, label_fields(objective))])
    others = {
        "split": [collate(rows[:2], label_fields(objective)), collate(rows[2:], label_fields(objective))],
        "packed": [pack(rows, 40, label_fields(objective))],
    }
    for name, batches in others.items():
        terms, found = gradient(batches)
        assert terms == pytest.approx(whole, rel=1e-4, abs=1e-5), name
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-3), name


# ---- the policy gradient


def test_reinforce_is_the_mean_over_answers() -> None:
    model = model_for(Reinforce())
    rows = sampled(5)
    terms = step(model, Reinforce(), [collate(built(Reinforce(), rows), label_fields(Reinforce()))])
    total = 0.0
    for row in rows:
        n = len(row["tokens"])
        with torch.no_grad():
            log_p = model.heads["lm"](model({"tokens": torch.tensor(row["tokens"][None]), **causal(n)}))[0].log_softmax(
                -1
            )
        total -= sum(float(log_p[t - 1, row["tokens"][t]] * row["advantage"][t]) for t in np.flatnonzero(row["mask"]))
    assert float(terms["policy"]) == pytest.approx(total / 5, rel=1e-4)


def test_reinforce_matches_the_exact_gradient() -> None:
    """All answers of two of five tokens are enumerated: the exact gradient of E[R] against REINFORCE's average."""
    config = ModelConfig(vocab_size=5, hidden_size=8, num_layers=1, num_heads=1, max_positions=4)
    torch.manual_seed(0)
    model = LM(config, {"lm": LMHead(config)})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    answers = torch.tensor(list(itertools.product(range(5), repeat=2)))
    rows = torch.cat((torch.zeros(25, 1, dtype=torch.int64), answers), 1)
    reward = torch.tensor([float(a == 3) + 2.0 * float(b == a) for a, b in answers.tolist()])

    def log_p() -> torch.Tensor:
        hidden = model(
            {
                "tokens": rows[:, :-1],
                "query_time": torch.arange(2).expand(25, 2),
                "key_time": torch.arange(2).expand(25, 2),
            }
        )
        return model.heads["lm"](hidden).log_softmax(-1).gather(-1, answers[..., None])[..., 0].sum(-1)

    def flat(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])

    now = log_p()
    p = now.detach().exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-5)
    exact = flat((now.exp() * reward).sum())
    scores = torch.stack([flat(one) for one in now])  # grad log p of each answer: (25, parameters)
    n = 20_000
    counts = torch.bincount(
        torch.multinomial(p, n, replacement=True, generator=torch.Generator().manual_seed(1)), minlength=25
    )
    errors = {}
    for name, baseline in {"none": 0.0, "mean": float((p * reward).sum())}.items():
        advantage = reward - baseline
        examples = [
            {
                "tokens": rows[i].numpy(),
                "mask": np.array([False, True, True]),
                "advantage": np.full(3, float(advantage[i])),
            }
            for i in range(25)
        ]
        # n samples through the objective itself, each answer as often as it was drawn.
        model.zero_grad()
        seen = built(Reinforce(), examples)
        drawn = [seen[i] for i in range(25) for _ in range(int(counts[i]))]
        for part in np.array_split(np.arange(n), 4):
            batch = collate([drawn[i] for i in part], label_fields(Reinforce()))
            terms = Reinforce().loss(model, Reinforce().forward(model, batch), batch)
            (terms["policy"] / n).backward()
        found = -torch.cat([q.grad.flatten() for q in model.parameters()])
        deviation = ((p[:, None] * (advantage[:, None] * scores) ** 2).sum(0) - exact**2).clamp(min=0).sqrt() / n**0.5
        assert ((found - exact).abs() <= 5 * deviation + 1e-5).all(), name
        errors[name] = float(deviation.norm())
    assert errors["mean"] < errors["none"], "a baseline lowers the variance"
    assert float(exact.norm()) > 20 * errors["mean"], "the gradient must be well above the noise of the comparison"
