"""Rollouts, rewards and precomputed fields: training improves the reward, resumes bit for bit, and logs correct numbers."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.align.advantages import GroupNormalized, LeaveOneOut
from firth.align.answers import per_token_numbers
from firth.align.precompute import PrecomputedSource, precompute
from firth.align.rewards import (
    FunctionReward,
    PreferencePair,
    PreferencePairs,
    RewardModel,
    Rollout,
    read_preference_pairs,
    sample_preference,
    write_preference_pairs,
)
from firth.align.rollouts import RolloutsConfig, RolloutSource
from firth.data import conversations
from firth.data.collate import Batches
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.io.integrity import read_record
from firth.model.config import decoder_config
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.objectives.policy_gradient import GRPO, PER_TOKEN, PPO, Reinforce
from firth.objectives.preferences import DPO, build_comparison, ref_logprobs
from firth.objectives.reward_model import RewardModeling
from firth.report.sections import gao_fit, parting
from firth.training.step import step
from firth.types import UserError
from tests.support.byte_tokenizer import ByteTokenizer

VOCAB = ByteTokenizer.vocab
CONFIG = decoder_config(vocab_size=VOCAB.size, hidden_size=32, num_layers=1, num_heads=2, max_positions=32)
truth = FunctionReward(lambda text: sum(c in "aeiou" for c in text) / 8)
"""The true reward of the toy task: the number of vowels among eight letters."""


def policy(*objectives: Objective, seed: int = 0) -> LM:
    """Return a small model with the heads of objectives, whose weights give a nearly uniform distribution."""
    torch.manual_seed(seed)
    model = LM(CONFIG, {name: head for objective in objectives for name, head in objective.heads(CONFIG).items()})
    with torch.no_grad():
        for block in model.stack.blocks:
            for linear in (block.attention.o, block.mlp.down):
                linear.weight.normal_(std=0.02)
        model.heads["lm"].weight.normal_(std=0.02)
    return model


def letters_only(model: LM) -> LM:
    """Train the model, for a few steps, to write letters from a to p."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    rng = np.random.default_rng(0)
    for _ in range(30):
        rows = torch.tensor(rng.integers(7 + ord("a"), 7 + ord("q"), (32, 10)))
        when = torch.arange(9).expand(32, 9)
        optimizer.zero_grad()
        hidden = model({"tokens": rows[:, :-1], "query_time": when, "key_time": when})
        model.heads["lm"].nll(hidden.flatten(0, 1), rows[:, 1:].flatten()).div(32 * 9).backward()
        optimizer.step()
    return model


PROMPTS = [ByteTokenizer().encode(text) for text in ("a", "bc", "def", "g", "hi", "jkl", "m", "no")]


def rollouts(frozen: LM, **changes: object) -> RolloutSource:
    settings = {
        "config": RolloutsConfig(rollout_size=32, max_new_tokens=8, kl_coef=0.02),
        "steps": 4,
        "stops": [3],
        "seed": 5,
    } | changes
    return RolloutSource(PROMPTS, ByteTokenizer(), truth, frozen, **settings)  # type: ignore[arg-type]


def run(model: LM, objective: Objective, source: RolloutSource, steps: int, rate: float, start: int = 0, rows: int = 16,
        optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:  # fmt: skip
    batches = Batches(source, objective, VOCAB, batch_size=rows, seed=0)
    optimizer = optimizer or torch.optim.Adam(model.parameters(), rate)
    for k in range(start, start + steps):
        source.prepare(model, k)
        optimizer.zero_grad()
        step(model, objective, batches.batches(k))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return optimizer


# ---- learning


@pytest.mark.slow
def test_ppo_raises_the_true_reward_with_nonnegative_kl() -> None:
    objective = PPO()
    model = letters_only(policy(objective))
    source = rollouts(copy.deepcopy(model), true_reward_function=truth)
    run(model, objective, source, steps=80, rate=3e-3)
    reward = [row["reward"] for row in source.history]
    assert len(reward) == 20
    assert reward[0] < 0.45, "five letters of sixteen are vowels"
    assert np.mean(reward[-3:]) > 0.8
    assert all(
        row["kl_per_answer"] >= 0 and row["kl_per_token"] >= 0 and row["kl_per_token_estimate"] >= 0
        for row in source.history
    )
    assert source.history[0]["kl_per_answer"] < 1e-3 < source.history[-1]["kl_per_answer"], (
        "the first rollouts are sampled from the reference"
    )
    assert source.history[-1]["entropy"] < source.history[0]["entropy"]
    assert [row["truth"] for row in source.history] == pytest.approx(reward)
    assert source.prepare(model, 79) == {}, "the rollouts of this step exist"
    assert source.prepare(model, 80) == source.history[-1]


@pytest.mark.slow
def test_over_optimization_appears_and_is_named() -> None:
    """The proxy counts vowels, e a little more; the truth counts different ones. At first they agree; later all letters are e."""
    objective = PPO()
    model = letters_only(policy(objective))
    proxy = FunctionReward(lambda text: sum(c in "aeiou" for c in text) / 8 + 0.5 * text.count("e") / 8)
    variety = FunctionReward(lambda text: len(set(text) & set("aeiou")) / 4)
    source = RolloutSource(
        PROMPTS, ByteTokenizer(), proxy, copy.deepcopy(model), config=RolloutsConfig(rollout_size=32, max_new_tokens=8, kl_coef=0.0),
        steps=2, stops=[3], seed=5, true_reward_function=variety,
    )  # fmt: skip
    run(model, objective, source, steps=120, rate=3e-3)
    rows = [row | {"step": 2 * row["phase"] + 1} for row in source.history]
    found = parting(rows)
    assert found is not None
    assert 3 < found.step < 100
    assert found.truth[0] > found.truth[1] + 0.2
    assert found.truth[0] > rows[0]["truth"] + 0.1, "the true score rises first"
    assert found.reward[1] > found.reward[0]
    fit = gao_fit([row["kl_per_answer"] for row in rows], [row["truth"] for row in rows])
    assert fit is not None and fit.alpha > 0 and fit.beta > 0


@pytest.mark.slow
def test_a_large_kl_coef_keeps_the_policy_near_the_reference() -> None:
    final = {}
    for beta in (0.0, 1.0):
        objective = PPO()
        model = letters_only(policy(objective))
        config = RolloutsConfig(rollout_size=32, max_new_tokens=8, kl_coef=beta)
        source = rollouts(copy.deepcopy(model), config=config)
        run(model, objective, source, steps=40, rate=3e-3)
        final[beta] = source.history[-1]["kl_per_answer"]
    assert final[1.0] < 0.5 * final[0.0]


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 4])
def test_reinforce_raises_the_true_reward(group: int) -> None:
    objective = Reinforce()
    model = letters_only(policy(objective))
    config = RolloutsConfig(rollout_size=32, num_generations=group, max_new_tokens=8, kl_coef=0.0)
    source = rollouts(copy.deepcopy(model), config=config, steps=1, advantage_estimator=LeaveOneOut())
    run(model, objective, source, steps=60, rate=3e-3, rows=32)
    reward = [row["reward"] for row in source.history]
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.3


def sampled_pairs(model: LM, count: int = 64, noise: float = 0.0) -> list[PreferencePair]:
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    engine = Engine(model, ByteTokenizer(), stops=[3])
    one, two = (
        [
            Rollout.of(p, w)
            for p, w in zip(prompts, engine.generate(prompts, Sampling(max_new_tokens=8, seed=s)), strict=True)
        ]
        for s in (0, 1000)
    )
    return sample_preference(one, two, truth, tokenizer=ByteTokenizer(), noise=noise, rng=np.random.default_rng(0))


@pytest.mark.slow
def test_dpo_raises_the_margin_and_the_true_reward() -> None:
    model = letters_only(policy(DPO()))
    frozen = copy.deepcopy(model)
    source = precompute(PreferencePairs(sampled_pairs(model)), frozen, build_comparison, ref_logprobs)
    objective = DPO(beta=0.1)
    batches = Batches(source, objective, VOCAB, batch_size=16, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    log = []
    for k in range(100):
        optimizer.zero_grad()
        log.append({name: float(x) for name, x in step(model, objective, batches.batches(k)).items()})
        optimizer.step()
    assert log[0]["dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert log[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert np.mean([row["margin"] for row in log[-4:]]) > 0.5
    assert np.mean([row["accuracy"] for row in log[-4:]]) > 0.9
    for row in log:
        assert row["margin"] == pytest.approx(0.1 * (row["chosen"] - row["rejected"]), abs=1e-3)

    def mean_truth(m: LM) -> float:
        answers = Engine(m, ByteTokenizer(), stops=[3]).generate(PROMPTS * 8, Sampling(max_new_tokens=8, seed=7))
        return float(np.mean([truth.scorer(a.text) for a in answers]))

    assert mean_truth(model) > mean_truth(frozen) + 0.15


def agreement(reward_model: RewardModel, pairs: list[PreferencePair]) -> float:
    """Return the fraction of pairs that a reward model ranks as they were."""
    chosen, rejected = (reward_model([getattr(c, side) for c in pairs]) for side in ("chosen", "rejected"))
    return float((chosen > rejected).mean())


@pytest.mark.slow
def test_a_reward_model_agrees_with_held_out_preferences() -> None:
    writer = letters_only(policy(PPO()))
    pairs = sampled_pairs(writer, 512)
    held, trained = pairs[:120], pairs[120:]
    model = policy(RewardModeling(), PPO(), seed=1)
    before = agreement(RewardModel(model), held)
    batches = Batches(PreferencePairs(trained), RewardModeling(), VOCAB, batch_size=32, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for k in range(100):
        optimizer.zero_grad()
        step(model, RewardModeling(), batches.batches(k))
        optimizer.step()
    reward_model = RewardModel(model, batch_size=7)
    assert before < 0.7
    # Most pairs differ by one letter of eight, so a small reward model is not always right.
    assert agreement(reward_model, held) > 0.8
    sides = [c.chosen for c in held] + [c.rejected for c in held]
    normal = reward_model.normalized(sides)
    assert normal(sides).mean() == pytest.approx(0, abs=1e-5)
    assert normal(sides).std() == pytest.approx(1, abs=1e-5)
    assert np.allclose(normal.normalized(sides)(sides), normal(sides), atol=1e-5)
    [alone] = reward_model(sides[:1])
    assert alone == pytest.approx(reward_model(sides)[0], abs=1e-4), "padding must not change a score"


# ---- contents of a rollout batch


def test_first_ratio_is_one() -> None:
    objective = PPO()
    model = letters_only(policy(objective))
    source = rollouts(copy.deepcopy(model))
    source.prepare(model, 0)
    terms = step(model, objective, Batches(source, objective, VOCAB, batch_size=32, seed=0).batches(0))
    assert float(terms["approx_kl"]) == pytest.approx(0, abs=1e-6)
    assert float(terms["clipped"]) == 0
    assert float(terms["kl_per_token"]) == pytest.approx(0, abs=1e-6)
    assert float(terms["policy"]) == pytest.approx(0, abs=1e-3), "advantages are whitened over the rollout batch"


@pytest.mark.slow
def test_an_example_holds_tokens_and_numbers_per_token() -> None:
    objective = PPO()
    model, frozen = letters_only(policy(objective)), letters_only(policy(objective, seed=3))
    config = RolloutsConfig(rollout_size=16, max_new_tokens=8, kl_coef=0.3)
    source = rollouts(frozen, config=config)
    source.prepare(model, 0)
    penalized = []
    for i in range(len(source)):
        example, sample = source[i], source.samples[i]
        tokens, mask = example["tokens"], example["mask"]
        assert np.array_equal(tokens, np.concatenate((sample.prompt, sample.answer)))
        assert np.array_equal(np.flatnonzero(mask), len(sample.prompt) + np.arange(len(sample.answer)))
        n = len(tokens) - 1
        for who, name in ((model, "old"), (frozen, "reference")):
            with torch.no_grad():
                when = torch.arange(n)[None]
                hidden = who(
                    {"tokens": torch.tensor(tokens[None, :-1].astype(np.int64)), "query_time": when, "key_time": when}
                )
                log_p = who.heads["lm"](hidden)[0].log_softmax(-1)
            expected = log_p[torch.arange(n), torch.tensor(tokens[1:].astype(np.int64))].numpy()
            assert np.allclose(example[name][1:][mask[1:]], expected[mask[1:]], atol=1e-4)
        assert all(not example[name][~mask].any() for name in PER_TOKEN)
        away = (example["old"] - example["reference"])[mask].sum()
        penalized.append(truth.scorer(sample.text) - 0.3 * away)
        # With gamma 1 and a value head that is still zero, the return of the first token under lam = 1 is the whole.
    assert source.history[-1]["penalized"] == pytest.approx(np.mean(penalized), abs=1e-3)
    white = np.concatenate([source[i]["advantage"][source[i]["mask"]] for i in range(len(source))])
    assert white.mean() == pytest.approx(0, abs=1e-5)
    assert white.std() == pytest.approx(1, abs=1e-3)


def test_an_unfinished_answer_gets_the_unfinished_score() -> None:
    model = letters_only(policy(PPO()))
    ends = [7 + ord("e")]
    config = RolloutsConfig(rollout_size=32, max_new_tokens=4, unfinished_score=-2.0, kl_coef=0.0)
    source = rollouts(copy.deepcopy(model), config=config, steps=1, stops=ends)
    source.prepare(model, 0)
    scores = [truth.scorer(s.text) if s.finished else -2.0 for s in source.samples]
    assert 0 < source.history[-1]["finished"] < 1
    assert source.history[-1]["reward"] == pytest.approx(np.mean(scores), abs=1e-6)


def test_a_perfect_critic_explains_all_of_the_discounted_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers twice: the returns of the first time are the values of the second."""
    start = letters_only(policy(PPO()))
    config = RolloutsConfig(rollout_size=16, max_new_tokens=6, gamma=0.9)

    def drawn() -> RolloutSource:
        source = rollouts(copy.deepcopy(start), config=config, steps=1, advantage_estimator=config.estimator())
        source.prepare(copy.deepcopy(start), 0)
        return source

    first = drawn()
    assert first.history[-1]["explained_variance"] < 0.9
    returns = [first[i]["returns"][first[i]["mask"]] for i in range(len(first))]

    def numbers(*given: object) -> dict[str, np.ndarray]:
        found = per_token_numbers(*given)  # type: ignore[arg-type]
        found["values"][found["real"]] = np.concatenate(returns)
        return found

    monkeypatch.setattr("firth.align.rollouts.per_token_numbers", numbers)
    assert drawn().history[-1]["explained_variance"] == pytest.approx(1, abs=1e-5)


def test_rollouts_are_sampled_once_and_use_every_prompt() -> None:
    model = letters_only(policy(PPO()))
    source = rollouts(
        copy.deepcopy(model), config=RolloutsConfig(rollout_size=4, num_generations=2, max_new_tokens=2), steps=3
    )
    with pytest.raises(UserError, match="prepare"):
        source[0]
    seen = []
    for k in range(12):
        source.prepare(model, k)
        if k % 3 == 0:
            assert np.array_equal(source.samples[0].prompt, source.samples[1].prompt)
            seen += [bytes(s.prompt) for s in source.samples[::2]]
    assert [row["phase"] for row in source.history] == [0, 1, 2, 3]
    assert len(set(seen)) == 8, "eight prompts, two per rollout batch: all are used once in four"
    with pytest.raises(UserError, match=r"must be a positive multiple of examples\.num_generations=3"):
        RolloutsConfig(rollout_size=4, num_generations=3)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, 6, 8])
@pytest.mark.parametrize("objective", [PPO(), GRPO()], ids=["ppo", "grpo"])
def test_a_run_killed_within_a_rollout_batch_resumes_exactly(objective: Objective, stop: int) -> None:
    """As with a checkpoint, weights, optimizer and the source's arrays are kept; everything else is created again."""
    start = letters_only(policy(objective))
    frozen = copy.deepcopy(start)
    settings: dict[str, object] = {}
    if isinstance(objective, GRPO):
        settings = {
            "config": RolloutsConfig(rollout_size=32, num_generations=4, max_new_tokens=8, kl_coef=0.0),
            "advantage_estimator": GroupNormalized(),
        }
    uninterrupted, source = copy.deepcopy(start), rollouts(frozen, **settings)
    run(uninterrupted, objective, source, steps=10, rate=3e-3)

    first, interrupted = copy.deepcopy(start), rollouts(frozen, **settings)
    optimizer = run(first, objective, interrupted, steps=stop, rate=3e-3)
    kept = {name: array.copy() for name, array in interrupted.state().items()}
    weights, moments = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())

    second, resumed = policy(objective, seed=9), rollouts(frozen, **settings)
    second.load_state_dict(weights)
    again = torch.optim.Adam(second.parameters(), 3e-3)
    again.load_state_dict(moments)
    resumed.restore(kept)
    run(second, objective, resumed, steps=10 - stop, rate=3e-3, start=stop, optimizer=again)
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    # repr, because a reward that is not logged is nan.
    assert repr(resumed.history) == repr(source.history)
    assert [s.text for s in resumed.samples] == [s.text for s in source.samples]


# ---- rewards and preferences


def sample(text: str, prompt: str = "q") -> Rollout:
    return Rollout(
        ByteTokenizer().encode(prompt), np.append(ByteTokenizer().encode(text), 3).astype(np.int32), text, True
    )


def test_preferences_without_noise_follow_the_reward() -> None:
    first, second = (
        [sample("ab"), sample("xy"), sample("xx"), sample("ab")],
        [sample("ee"), sample("xa"), sample("zz"), sample("ab")],
    )
    kept = sample_preference(first, second, truth, tokenizer=ByteTokenizer(), rng=np.random.default_rng(0))
    assert [(c.chosen.text, c.rejected.text) for c in kept] == [("ee", "ab"), ("xa", "xy")]
    assert [c.margin for c in kept] == pytest.approx([1 / 8, 1 / 8])
    with pytest.raises(UserError, match="same prompt"):
        sample_preference(
            [sample("a", "p")], [sample("b", "q")], truth, tokenizer=ByteTokenizer(), rng=np.random.default_rng(0)
        )


def test_noisy_preferences_follow_bradley_terry() -> None:
    first, second = [sample("aaaa")] * 4000, [sample("axyz")] * 4000
    kept = sample_preference(first, second, truth, tokenizer=ByteTokenizer(), noise=0.5, rng=np.random.default_rng(0))
    share = np.mean([c.chosen.text == "aaaa" for c in kept])
    expected = 1 / (1 + np.exp(-(3 / 8) / 0.5))
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 4000) ** 0.5)
    assert all(c.margin == pytest.approx(3 / 8 if c.chosen.text == "aaaa" else -3 / 8) for c in kept)


def test_preference_pairs_survive_a_file(tmp_path: Path) -> None:
    kept = sample_preference(
        [sample("é€")], [sample("aa")], truth, tokenizer=ByteTokenizer(), rng=np.random.default_rng(0)
    )
    write_preference_pairs(kept, tmp_path / "c.jsonl", ByteTokenizer().decode)
    [back] = read_preference_pairs(tmp_path / "c.jsonl")
    a, b = PreferencePairs(kept)[0], PreferencePairs([back])[0]
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert (back.chosen.text, back.rejected.text, back.margin) == ("aa", "é€", kept[0].margin)
    # The texts have the common format of preferences.
    record = json.loads((tmp_path / "c.jsonl").read_text())
    prompt, chosen, rejected = conversations.comparison(record)
    assert prompt == [{"role": "user", "content": ByteTokenizer().decode(kept[0].chosen.prompt)}]
    assert [chosen[0]["content"], rejected[0]["content"]] == ["aa", "é€"]
    (tmp_path / "c.jsonl").write_text('{"prompt": [1]}\n')
    with pytest.raises(UserError, match=r"c\.jsonl:1: this is not a pair of answers"):
        read_preference_pairs(tmp_path / "c.jsonl")


# ---- precomputed fields


def precomputed(model: LM, count: int, **where: object) -> tuple[PrecomputedSource, PreferencePairs]:
    source = PreferencePairs(
        [PreferencePair(sample("ab" * (i % 5 + 1)), sample("x" * (i % 3 + 1)), 0.0) for i in range(count)]
    )
    return precompute(source, model, build_comparison, ref_logprobs, batch_size=2, **where), source  # type: ignore[arg-type]


@pytest.mark.slow
def test_precomputed_fields_are_those_of_each_example() -> None:
    model = letters_only(policy(DPO()))
    found, source = precomputed(model, 50)
    for i in (0, 13, 31, 32, 49):
        rows = build_comparison(source[i])
        with torch.no_grad():
            expected = ref_logprobs(model, {name: torch.as_tensor(x)[None] for name, x in rows.items()})["reference"][0]
        assert np.allclose(found[i]["reference"], expected.numpy(), atol=1e-4)
        assert found[i].keys() == source[i].keys() | {"reference"}


@pytest.mark.slow
def test_precompute_resumes_and_detects_another_model(tmp_path: Path) -> None:
    model = letters_only(policy(DPO()))
    whole, _ = precomputed(model, 50)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt(done)

    with pytest.raises(KeyboardInterrupt, match="32"):
        precomputed(model, 50, directory=tmp_path, progress=interrupt)
    [place] = tmp_path.iterdir()
    assert read_record(place / "done.json") == {"done": 32, "fields": ["reference"]}
    finished: list[int] = []
    resumed, _ = precomputed(model, 50, directory=tmp_path, progress=finished.append)
    assert finished == [50]
    assert np.array_equal(resumed.fields["reference"], whole.fields["reference"])
    precomputed(model, 50, directory=tmp_path, progress=finished.append)
    assert finished == [50], "finished fields are only opened"
    other, _ = precomputed(letters_only(policy(DPO(), seed=4)), 50, directory=tmp_path)
    assert not np.allclose(other.fields["reference"], whole.fields["reference"])


def test_precompute_detects_restricted_ids(tmp_path: Path) -> None:
    """The same weights, with and without probability 0 for some ids."""
    model = policy(DPO())
    free, _ = precomputed(model, 4, directory=tmp_path)
    for ids in ([250], [250, 251]):
        model.heads["lm"].restrict_vocab(torch.tensor(ids))  # type: ignore[operator]
        kept, _ = precomputed(model, 4, directory=tmp_path)
        alone, _ = precomputed(model, 4)
        assert np.array_equal(kept.fields["reference"], alone.fields["reference"])
        assert (kept.fields["reference"] > free.fields["reference"]).all()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_precompute_detects_changed_examples(tmp_path: Path) -> None:
    """One record is changed: the numbers of the old one are not reused."""
    model = letters_only(policy(DPO()))
    pairs = [PreferencePair(sample("ab" * (i % 5 + 1)), sample("x" * (i % 3 + 1)), 0.0) for i in range(500)]
    source = PreferencePairs(pairs)
    before = precompute(source, model, build_comparison, ref_logprobs, directory=tmp_path)
    for changed in (3, 250, 498):
        pairs[changed] = PreferencePair(sample("abcab"), sample("xy"), 0.0)
        after = precompute(PreferencePairs(pairs), model, build_comparison, ref_logprobs, directory=tmp_path)
        assert not np.allclose(before[changed]["reference"], after[changed]["reference"])
