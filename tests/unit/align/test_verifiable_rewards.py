"""Rewards that read the record, sums of rewards, the adaptive KL penalty, held-out prompts, and the sampler's probabilities."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.align.held_out import HeldOutPrompts
from firth.align.rewards import FunctionReward, Rollout, WeightedRewards, score_rollouts
from firth.align.rollouts import RolloutsConfig, RolloutSource, next_kl_coef
from firth.data.dialogues import Prompt
from firth.generate.engine import Engine
from firth.generate.output import Completion
from firth.generate.sampling import Sampling
from firth.model.config import decoder_config
from firth.model.model import LM
from firth.objectives.policy_gradient import GRPO
from firth.types import UserError
from tests.support.byte_tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
CONFIG = decoder_config(vocab_size=TOKENIZER.vocab.size, hidden_size=32, num_layers=1, num_heads=2, max_positions=32)
PROMPTS = [TOKENIZER.encode(text) for text in ("1+2=", "3+4=", "5+0=", "2+2=")]
FIELDS = [
    {"prompt": p, "result": r, "level": i}
    for i, (p, r) in enumerate(zip(("1+2=", "3+4=", "5+0=", "2+2="), "3754", strict=True))
]


def policy(seed: int = 0) -> LM:
    torch.manual_seed(seed)
    model = LM(CONFIG, GRPO().heads(CONFIG))
    with torch.no_grad():
        model.heads["lm"].weight.normal_(std=0.02)
    return model


def sample(text: str, fields: dict[str, object]) -> Rollout:
    return Rollout(TOKENIZER.encode("1+2="), TOKENIZER.encode(text), text, True, fields)


def vowels(text: str) -> float:
    return float(sum(c in "aeiou" for c in text))


def source(model: LM, reward: object = FunctionReward(vowels), **config: object) -> RolloutSource:
    settings = {"rollout_size": 8, "num_generations": 2, "max_new_tokens": 6, "advantages": "grpo"} | config
    return RolloutSource(
        PROMPTS, TOKENIZER, reward, model, config=RolloutsConfig(**settings), steps=1, stops=[3], fields=FIELDS  # type: ignore[arg-type]
    )  # fmt: skip


# ---- what a function is called with


def test_a_function_gets_what_its_parameters_name() -> None:
    seen: list[object] = []

    def named(completion: str, prompt: str, result: str, bonus: float = 0.5) -> float:
        seen.append((completion, prompt, result, bonus))
        return float(completion == result)

    def everything(completion: str, **fields: object) -> float:
        seen.append(fields)
        return 2.0

    def text(answer: str) -> float:
        seen.append(answer)
        return 3.0

    fields = {"prompt": "1+2=", "result": "3", "answer": "unused"}
    for function, score in ((named, 1.0), (everything, 2.0), (text, 3.0), (len, 1.0)):
        assert FunctionReward(function)([sample("3", fields)]).tolist() == [score]
    assert seen == [("3", "1+2=", "3", 0.5), fields, "3"]


def test_a_field_that_the_record_lacks_is_named() -> None:
    def correct(completion: str, solution: str) -> float:
        return float(completion == solution)

    reward = FunctionReward(correct)
    assert reward.missing({"solution": "3"}) == []
    with pytest.raises(UserError, match=r"needs the field 'solution', which the record lacks, for the prompt '1\+2='"):
        score_rollouts(reward, [sample("3", {"result": "3"})], TOKENIZER)


@pytest.mark.parametrize(("value", "problem"), [(float("nan"), "returned nan"), (None, "raised TypeError")])
def test_a_reward_of_several_that_fails_is_named_with_the_prompt(value: float, problem: str) -> None:
    rewards = WeightedRewards(
        {"fine": FunctionReward(vowels), "broken": FunctionReward(lambda text: value)}, (1.0, 0.5)
    )
    with pytest.raises(UserError, match=rf"{problem}.*for the prompt '1\+2=' and the answer 'aa'"):
        rewards.scores([sample("aa", {})], TOKENIZER)


def test_several_rewards_are_added_with_their_weights() -> None:
    parts = {"vowels": FunctionReward(vowels), "length": FunctionReward(len)}
    rewards = WeightedRewards(parts, (1.0, -0.25))
    assert rewards([sample("abe", {}), sample("xxxx", {})]).tolist() == [2 - 0.75, -1.0]
    model = policy()
    rollouts = source(copy.deepcopy(model), rewards)
    row = rollouts.prepare(model, 0)
    assert row["reward"] == pytest.approx(row["reward/vowels"] - 0.25 * row["reward/length"])
    resumed = source(copy.deepcopy(model), rewards)
    resumed.restore(rollouts.state())
    assert repr(resumed.history) == repr(rollouts.history)
    with pytest.raises(UserError, match=r"reward_weights has 2 numbers for 1 rewards"):
        RolloutsConfig(reward_function=("a:b",), reward_weights=(1.0, 2.0))


def test_every_answer_is_scored_with_its_own_record() -> None:
    seen: list[tuple[str, str, int]] = []

    def watch(completion: str, prompt: str, result: str, level: int) -> float:
        seen.append((prompt, result, level))
        return 0.0

    model = policy()
    source(copy.deepcopy(model), FunctionReward(watch)).prepare(model, 0)
    assert sorted(seen) == sorted((f["prompt"], f["result"], f["level"]) for f in FIELDS for _ in range(2))


# ---- the KL penalty


def test_the_kl_penalty_follows_its_target() -> None:
    """Ziegler 2019: up by at most a fifth of the gain, down likewise, unchanged at the target."""
    assert next_kl_coef(0.2, 6.0, 6.0, 0.1) == 0.2
    assert next_kl_coef(0.2, 60.0, 6.0, 0.1) == pytest.approx(0.2 * 1.02)
    assert next_kl_coef(0.2, 0.0, 6.0, 0.1) == pytest.approx(0.2 * 0.98)
    assert next_kl_coef(0.2, 6.6, 6.0, 0.1) == pytest.approx(0.2 * 1.01)


def test_an_adaptive_penalty_is_logged_and_resumed() -> None:
    """The policy is far from the reference, so the penalty rises by 2% per phase; a resumed source continues with it."""
    model, frozen = policy(), policy(seed=5)
    with torch.no_grad():
        frozen.heads["lm"].weight.normal_(std=1.0)
    rollouts = source(frozen, kl_coef=0.1, kl_target=0.01)
    found = [rollouts.prepare(model, k)["kl_coef"] for k in range(3)]
    assert found == pytest.approx([0.1, 0.102, 0.10404])
    resumed = source(frozen, kl_coef=0.1, kl_target=0.01)
    resumed.restore(rollouts.state())
    assert resumed.prepare(model, 3) == rollouts.prepare(model, 3)
    fixed = source(frozen, kl_coef=0.1)
    assert [fixed.prepare(model, k)["kl_coef"] for k in range(2)] == [0.1, 0.1]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_is_the_named_estimate(estimator: str) -> None:
    model, frozen = policy(), policy(seed=5)
    with torch.no_grad():
        frozen.heads["lm"].weight.normal_(std=0.3)
    rollouts = source(frozen, kl_coef=0.5, kl_estimator=estimator)
    row = rollouts.prepare(model, 0)
    total = 0.0
    for i in range(len(rollouts)):
        example = rollouts[i]
        d = (example["old"] - example["reference"])[example["mask"]].astype(float)
        total += {"k1": d.sum(), "k2": (d**2 / 2).sum(), "k3": (np.exp(-d) - 1 + d).sum()}[estimator]
    assert row["penalized"] == pytest.approx(row["reward"] - 0.5 * total / len(rollouts), abs=1e-4)


# ---- the sampler


def test_sampler_and_training_agree_in_fp32() -> None:
    model = policy()
    rollouts = source(copy.deepcopy(model))
    assert rollouts.prepare(model, 0)["sampler_difference"] < 1e-5
    assert rollouts.notes == []


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_a_sampler_that_disagrees_is_reported_and_corrected(monkeypatch: pytest.MonkeyPatch, cap: float) -> None:
    """The sampler claims every token was half as likely, or a tenth: the weights are 2, and 10 cut to the cap."""
    model = policy()
    exact = source(copy.deepcopy(model))
    exact.prepare(model, 0)
    generate = Engine.generate

    def wrong(self: Engine, prompts: list[np.ndarray], sampling: Sampling) -> list[Completion]:
        shift = [0.4, 3.0]
        return [
            Completion(c.tokens, c.logprobs - np.float32(shift[i % 2]), c.text, c.finish)
            for i, c in enumerate(generate(self, prompts, sampling))
        ]

    monkeypatch.setattr(Engine, "generate", wrong)
    rollouts = source(copy.deepcopy(model), importance_sampling_cap=cap)
    assert rollouts.prepare(model, 0)["sampler_difference"] == pytest.approx(3.0, abs=1e-4)
    [note] = rollouts.notes
    assert ("truncated importance sampling" in note) is bool(cap)
    for i in range(len(rollouts)):
        weight = (np.exp(0.4), 2.0)[i % 2] if cap else 1.0
        assert np.allclose(rollouts[i]["advantage"], exact[i]["advantage"] * weight, atol=1e-4)


# ---- held-out prompts


def test_held_out_prompts_are_scored_alike_at_every_step() -> None:
    model = policy()
    prompts = [Prompt(tokens, fields, "file:1") for tokens, fields in zip(PROMPTS, FIELDS, strict=True)]
    rewards = WeightedRewards.of(
        FunctionReward(lambda completion, result: float(result in completion) + len(completion))
    )
    held = HeldOutPrompts(prompts, TOKENIZER, rewards, copy.deepcopy(model), 6, 0, FunctionReward(vowels), [3])
    first = held.measure(model, 0)
    assert first == held.measure(model, 0)
    assert first["kl_per_answer"] == pytest.approx(0, abs=1e-5)
    assert set(first) == {"reward", "truth", "kl_per_answer", "finished", "length"}
    written = Engine(model, TOKENIZER, [3]).generate(PROMPTS, Sampling(max_new_tokens=6, seed=0))
    assert first["truth"] == pytest.approx(np.mean([vowels(w.text) for w in written]))
    assert held.measure(model, 2)["truth"] == pytest.approx(
        np.mean(
            [
                vowels(w.text)
                for w in Engine(model, TOKENIZER, [3]).generate(
                    [PROMPTS[0], PROMPTS[3]], Sampling(max_new_tokens=6, seed=0)
                )
            ]
        )
    )


def test_unfinished_held_out_answers_get_their_score() -> None:
    model, stops = policy(), list(range(0, TOKENIZER.vocab.size, 4))
    prompts = [Prompt(tokens, fields, "file:1") for tokens, fields in zip(PROMPTS, FIELDS, strict=True)] * 8
    rewards = WeightedRewards.of(FunctionReward(vowels))
    held = HeldOutPrompts(prompts, TOKENIZER, rewards, model, 3, 0, stops=stops, unfinished_score=-2.0)
    written = Engine(model, TOKENIZER, stops).generate(PROMPTS * 8, Sampling(max_new_tokens=3, seed=0))
    scores = [vowels(w.text) if w.finish == "stop" else -2.0 for w in written]
    assert 0 < scores.count(-2.0) < len(scores)
    assert held.measure(model, 0)["reward"] == pytest.approx(np.mean(scores))


def test_prompts_keep_the_fields_of_their_records(tmp_path: Path) -> None:
    from firth.data.dialogues import prompts
    from firth.tokenizer.train import train

    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "1+2=", "result": "3"}\n{"messages": [{"role": "user", "content": "hi"}]}\n'
    )
    tokenizer = train(["1+2= hi"] * 9, "byte-bpe", vocab_size=270)
    found, _, _ = prompts([str(tmp_path / "p.jsonl")], tokenizer, 64)
    assert [p.fields["prompt"] for p in found] == ["1+2=", "hi"]
    assert found[0].fields["result"] == "3"
    assert found[0].location.endswith("p.jsonl:1")
