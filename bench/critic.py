"""How well does PPO's critic predict? Explained variance on rollouts that it has not seen, beside a constant per position.

    python -m bench.critic                               # all that is not there yet; about two hours on one thread
    python -m bench.critic --only shared reward          # some of the arms
    python -m bench.critic --seeds 0                     # one of the seeds
    python -m bench.critic --ceiling reward              # a critic fitted offline on ten times the rollouts of that arm
    python -m bench.critic --table                       # markdown for docs/results/index.md, of what is there

The demo's models (Shakespeare, 1.1 M parameters): a decoder, instruction tuning, 700 comparisons, a reward model; then
100 steps of PPO (25 phases) for each arm and seed. Every base model is a run and every arm a file: a stopped command continues.

For each phase and each sampled token: `value` is the critic's estimate before it has seen the phase, `return` is what
followed, the sum of the penalized rewards to the end of the answer. Explained variance is 1 - var(return - value) /
var(return) over the tokens of a phase. The baseline estimates the return by its mean at that position over the five
phases before. Both are means over the last third of the phases.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from firth.align.advantages import GAE, discounted_returns
from firth.align.rewards import FunctionReward, RewardModel, Rollout, sample_preference, write_preference_pairs
from firth.align.rollouts import RolloutConfig, RolloutSource, explained_variance
from firth.corpora import catalog
from firth.data.collate import Batches
from firth.demo import plays
from firth.demo.data import read_rows
from firth.demo.scorers import SCORERS
from firth.demo.sizes import SIZES
from firth.generate.decoding import rectangle
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.model import LM
from firth.objectives.ppo import PPO, critic_states, init_critic
from firth.objectives.ppo import values as values_of
from firth.pretrained.load_save import init_from, load_model
from firth.recipes import post_training
from firth.runs.prepare import DataConfig, train_tokenizer
from firth.runs.recipe import TokenizerConfig
from firth.runs.run import run
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.train.schedule import Budget, Schedule
from firth.train.trainer import TrainerConfig, train

SIZE = SIZES["small"]
SEEDS = (0, 1, 2)
STEPS, ANSWERS, ROWS = 100, 64, 32
PROMPT, ANSWER = 40, 32
"""The most tokens of a prompt and of an answer in the runs of PPO."""
DRAWN = 512
"""Answers that are drawn at once for an offline critic."""

BEFORE = 5
"""Phases that the baseline is fitted on."""


@dataclass(frozen=True)
class Arm:
    """critic: its own trunk, or a head on the policy's. start: whose weights an own trunk begins with. rate: of the
    critic; None: the policy's. clip_value, value_lam, epochs: as in `PPO`, `GAE` and a recipe's `segment`."""

    critic: Literal["own", "shared"] = "own"
    start: Literal["reward", "policy"] = "reward"
    rate: float | None = None
    clip_value: float = 0.2
    value_lam: float | None = None
    epochs: int = 2


ARMS = {
    "shared": Arm(critic="shared"),
    "policy": Arm(start="policy"),
    "reward": Arm(),
    "reward-1e-3": Arm(rate=1e-3),
    "reward-1e-3-free": Arm(rate=1e-3, clip_value=0.0),
    "reward-1e-3-free-sums": Arm(rate=1e-3, clip_value=0.0, value_lam=1.0),
    "reward-free-sums": Arm(clip_value=0.0, value_lam=1.0),
    "policy-1e-3-free-sums": Arm(start="policy", rate=1e-3, clip_value=0.0, value_lam=1.0),
    "reward-free-sums-4": Arm(clip_value=0.0, value_lam=1.0, epochs=4),
}
"""free: values are not clipped. sums: the critic learns plain sums of rewards (value_lam 1). 4: epochs."""


def base(results: Path) -> Path:
    """Material, tokenizer, decoder, instruction tuning, comparisons and the reward model, as the demo makes them."""
    out = results / "base"
    material, tokenizer_at = out / "material", out / "tokenizer"
    if not (material / "material.json").exists():
        plays.make_data(
            catalog.fetch("shakespeare", echo=print),
            material,
            max_labeled_train=SIZE.max_labeled_train,
            max_labeled_valid=SIZE.max_labeled_valid,
            seed=0,
        )
    file = {name: str(material / f"{name}.jsonl") for name in
            ("train", "valid", "dialogues-train", "dialogues-valid", "preferences-train", "preferences-valid")}  # fmt: skip
    if not (tokenizer_at / "merges.json").exists():
        train_tokenizer([file["train"]], tokenizer_at, algorithm="byte-bpe", vocab_size=SIZE.vocab_size)
    tokenizer = Tokenizer.load(tokenizer_at)
    made = SIZE.pretraining_recipes(tokenizer.vocab.size)["decoder"]
    text = DataConfig(path=(file["train"],), validation_path=(file["valid"],), cache_dir=str(out / "stores"))
    run(replace(made, name="decoder", data=text, tokenizer=TokenizerConfig(path=str(tokenizer_at))), out / "decoder")
    talk = DataConfig(path=(file["dialogues-train"],), validation_path=(file["dialogues-valid"],))
    run(
        replace(SIZE.sft_recipe(post_training.sft()), name="sft", data=talk, init_from=str(out / "decoder")),
        out / "sft",
    )
    if not Path(file["preferences-valid"]).exists():
        model = load_model(out / "sft" / "model")
        for part, count in (("train", SIZE.num_train_comparisons), ("valid", SIZE.num_valid_comparisons)):
            prompts = asked(tokenizer, Path(file[f"dialogues-{part}"]))[:count]
            first, second = (drawn(model, tokenizer, prompts, seed) for seed in (1, 100_001))
            rng = np.random.default_rng((0, len(part)))
            found = sample_preference(
                first,
                second,
                FunctionReward(SCORERS["thou"]),
                tokenizer=tokenizer,
                noise=SIZE.preference_noise,
                rng=rng,
            )
            write_preference_pairs(found, Path(file[f"preferences-{part}"]), tokenizer.decode)
    pairs = DataConfig(path=(file["preferences-train"],), validation_path=(file["preferences-valid"],))
    run(
        replace(
            SIZE.reward_model_recipe(post_training.reward_model()),
            name="reward",
            data=pairs,
            init_from=str(out / "sft"),
        ),
        out / "reward",
    )
    return out


def asked(tokenizer: Tokenizer, path: Path) -> list[np.ndarray]:
    """The prompts of a file that leave room for an answer."""
    turns = ([{"role": "user", "content": row["prompt"]}] for row in read_rows(path))
    prompts = (chat.encode(tokenizer, turn, open=True)[0] for turn in turns)
    return [prompt for prompt in prompts if len(prompt) <= SIZE.max_positions - SIZE.max_answer_tokens]


def drawn(
    model: LM, tokenizer: Tokenizer, prompts: Sequence[np.ndarray], seed: int, answer: int = SIZE.max_answer_tokens
) -> list[Rollout]:
    written = Engine(model, tokenizer).generate(prompts, Sampling(max_new_tokens=answer, seed=seed))
    return [Rollout.of(p, w) for p, w in zip(prompts, written, strict=True)]


@dataclass(frozen=True)
class Recorder:
    """Credit that keeps what it is given: one file a phase, so that a run that was stopped has them all."""

    credit: GAE
    directory: Path
    phase: Callable[[], int]

    def __call__(
        self, rewards: np.ndarray, values: np.ndarray, real: np.ndarray, group: int
    ) -> tuple[np.ndarray, np.ndarray]:
        self.directory.mkdir(parents=True, exist_ok=True)
        np.savez(
            self.directory / f"{self.phase():04d}.npz", returns=discounted_returns(rewards), values=values, real=real
        )
        return self.credit(rewards, values, real, group)


@dataclass(frozen=True)
class Bases:
    """The models that every arm begins with."""

    directory: Path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.directory / "tokenizer")

    @cached_property
    def prompts(self) -> list[np.ndarray]:
        every = asked(self.tokenizer, self.directory / "material" / "dialogues-train.jsonl")
        return [prompt for prompt in every if len(prompt) <= PROMPT]

    @cached_property
    def start(self) -> LM:
        return load_model(self.directory / "sft" / "model")

    @cached_property
    def judge(self) -> RewardModel:
        plain = RewardModel(load_model(self.directory / "reward" / "model"))
        return plain.normalized(drawn(self.start, self.tokenizer, self.prompts[:64], 0, ANSWER))

    def source(self, arm: Arm, seed: int, directory: Path) -> RolloutSource:
        phase = RolloutConfig(
            rollout_size=ANSWERS, steps=ANSWERS * arm.epochs // ROWS, max_new_tokens=ANSWER, kl_coef=0.05
        )
        source = RolloutSource(
            self.prompts, self.tokenizer, self.judge, self.start, config=phase, true_reward_function=FunctionReward(SCORERS["thou"]),
            seed=seed,
            critic=self.judge if arm.start == "reward" else None,
            advantage_estimator=Recorder(GAE(value_lam=arm.value_lam), directory, lambda: len(source.history)),
            batch_size=ANSWERS,
        )  # fmt: skip
        return source


def learn(bases: Bases, name: str, seed: int, steps: int, out: Path) -> LM:
    """One run of PPO, or what is left of it; the model it ends with, critic included."""
    arm, directory = ARMS[name], out / f"{name}-{seed}"
    objective = PPO(critic=arm.critic, value_clip_range=arm.clip_value)
    torch.manual_seed(seed)
    model = LM(bases.start.config, objective.heads(bases.start.config))
    init_from(model, bases.directory / "sft" / "model")
    source = bases.source(arm, seed, directory / "phases")
    batches = Batches(source, objective, bases.tokenizer.vocab, batch_size=ROWS, seed=seed)
    optimizer = replace(post_training.ppo().optimizer, critic_lr=arm.rate)
    train(
        model, objective, batches, directory, budget=Budget(max_steps=steps), optimizer=optimizer,
        schedule=Schedule("constant", warmup_ratio=0.05), config=TrainerConfig(save_every=20, keep=1), recipe=name,
    )  # fmt: skip
    return model


def measured(directory: Path) -> dict[str, float]:
    """The means over the last third of the phases of a run."""
    phases = [dict(np.load(path)) for path in sorted((directory / "phases").glob("*.npz"))]
    rows: list[tuple[float, float]] = []
    for at in range(len(phases) * 2 // 3, len(phases)):
        known, phase = phases[at - BEFORE : at], phases[at]
        real, returns = phase["real"], phase["returns"]
        guess = by_position(known, real.shape[1])
        constant = np.broadcast_to(guess, real.shape)[real]
        rows.append(
            (explained_variance(returns[real], phase["values"][real]), explained_variance(returns[real], constant))
        )
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    last = [row for row in log if row["split"] == "rollouts"][-len(rows) :]
    critic, constant = (statistics.mean(column) for column in zip(*rows, strict=True))
    return {"critic": critic, "constant": constant} | {
        name: statistics.mean(row[name] for row in last) for name in ("reward", "truth", "kl_per_answer")
    }


def by_position(phases: Sequence[Mapping[str, np.ndarray]], length: int) -> np.ndarray:
    """The mean return at each position (length,), the mean of all where nothing was as long."""
    sums, counts = np.zeros(length), np.zeros(length)
    for phase in phases:
        n = min(length, phase["real"].shape[1])
        sums[:n] += np.where(phase["real"], phase["returns"], 0.0).sum(0)[:n]
        counts[:n] += phase["real"].sum(0)[:n]
    return np.where(counts > 0, sums / np.maximum(counts, 1), sums.sum() / counts.sum())


def ceiling(bases: Bases, name: str, seed: int, steps: int, out: Path) -> dict[str, float]:
    """What a critic learns offline, of the policy that a run ends with: ten times the run's answers to learn from.

    The same trunk from the reward model, three epochs at 5e-4 falling to 0, on plain sums of rewards; measured after each
    epoch on as many fresh answers as the run saw (the best counts), beside the run's own critic and a constant per position
    of the same ten times.
    """
    model = learn(bases, name, seed, steps, out)
    answers = steps * ROWS // ARMS[name].epochs
    drawn_at = out / f"{name}-{seed}-{steps}-drawn"
    phase = RolloutConfig(rollout_size=DRAWN, steps=1, max_new_tokens=ANSWER, kl_coef=0.05)
    rows: list[Answered] = []
    source = RolloutSource(
        bases.prompts, bases.tokenizer, bases.judge, bases.start, config=phase, seed=1000 + seed, batch_size=256,
        critic=bases.judge,
        advantage_estimator=Recorder(GAE(), drawn_at, lambda: len(source.history)),
    )  # fmt: skip
    source.number = 0  # the critic is the run's: none is started
    for k in range(1, 1 + -(-11 * answers // DRAWN)):
        source.prepare(model, k)
        kept = dict(np.load(drawn_at / f"{k - 1:04d}.npz"))
        for sample, returns, values, real in zip(
            source.samples, kept["returns"], kept["values"], kept["real"], strict=True
        ):
            rows.append((sample.tokens, returns[real], values[real]))
    fresh, known = rows[:answers], rows[answers : 11 * answers]
    critic = PPO().heads(bases.start.config)["critic"]
    host = LM(bases.start.config, {"critic": critic})
    init_critic(host, bases.judge.model, bases.judge.mean, bases.judge.scale)
    told = np.concatenate([returns for _, returns, _ in fresh])
    by_place = np.concatenate([np.arange(len(returns)) for _, returns, _ in known])
    level = np.concatenate([returns for _, returns, _ in known])
    constant = np.array([level[by_place == at].mean() for at in range(ANSWER)])
    return {
        "offline": max(explained_variance(told, estimates(host, fresh)) for _ in fit(host, known)),
        "online": explained_variance(told, np.concatenate([values for _, _, values in fresh])),
        "constant": explained_variance(told, np.concatenate([constant[: len(returns)] for _, returns, _ in fresh])),
    }


Answered = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The tokens of prompt and answer, and per token of the answer its return and the run's own estimate of it."""


def read_values(host: LM, rows: Sequence[Answered]) -> torch.Tensor:
    """The critic's values of all tokens of the answers, in row order."""
    batch = rectangle([tokens[:-1] for tokens, _, _ in rows], torch.device("cpu"))
    at = torch.zeros(batch["tokens"].shape, dtype=torch.bool)
    for row, (tokens, returns, _) in enumerate(rows):
        at[row, len(tokens) - 1 - len(returns) : len(tokens) - 1] = True
    return values_of(host, critic_states(host, torch.empty(0), batch)[at])


def fit(host: LM, rows: Sequence[Answered], epochs: int = 3, size: int = 64, rate: float = 5e-4) -> Iterator[int]:
    """Least squares on the returns, in a random order; yields after each epoch."""
    optimizer = torch.optim.AdamW(host.heads["critic"].parameters(), rate, betas=(0.9, 0.95), weight_decay=0.0)
    rng, each = np.random.default_rng(0), len(rows) // size
    steps = epochs * each
    plan = [
        some for _ in range(epochs) for some in rng.permutation(len(rows))[: each * size].reshape(each, size).tolist()
    ]
    for k, group in enumerate(plan):
        some = [rows[i] for i in group]
        for one in optimizer.param_groups:
            one["lr"] = rate * (1 - k / steps)
        told = torch.from_numpy(np.concatenate([returns for _, returns, _ in some])).float()
        with torch.autocast("cpu", torch.bfloat16):
            error = (read_values(host, some) - told).square().mean()
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(host.heads["critic"].parameters(), 1.0)
        optimizer.step()
        if k % 50 == 0:
            print(f"offline critic: step {k} of {steps}, squared error {float(error.detach()):.3f}", flush=True)
        if k % each == each - 1:
            yield k


@torch.no_grad()
def estimates(host: LM, rows: Sequence[Answered]) -> np.ndarray:
    return np.concatenate([read_values(host, rows[i : i + 256]).numpy() for i in range(0, len(rows), 256)])


def table(out: Path, steps: int) -> str:
    """Every arm that is there, mean and least and greatest over its seeds."""
    lines = [
        "| arm | seeds | critic | constant per position | reward | true reward | KL an answer |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ARMS:
        found = [json.loads(path.read_text("utf-8")) for path in sorted(out.glob(f"{name}-[0-9]-{steps}.json"))]
        if found:
            cells = [
                spread([row[key] for row in found])
                for key in ("critic", "constant", "reward", "truth", "kl_per_answer")
            ]
            lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(numbers: Sequence[float]) -> str:
    """Mean, and least to greatest of several."""
    mean = f"{statistics.mean(numbers):.2f}"
    return mean if len(numbers) == 1 else f"{mean} ({min(numbers):.2f} to {max(numbers):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--ceiling", choices=ARMS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--results", type=Path, default=Path("runs/critic"))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    out: Path = given.results
    if given.ceiling:
        for seed in given.seeds:
            found = ceiling(Bases(base(out)), given.ceiling, seed, given.steps, out)
            (out / f"{given.ceiling}-{seed}-{given.steps}-ceiling.json").write_text(json.dumps(found), "utf-8")
            print(found)
        return
    if not given.table:
        bases = Bases(base(out))
        for seed in given.seeds:
            for name in given.only:
                file = out / f"{name}-{seed}-{given.steps}.json"
                if not file.exists():
                    learn(bases, name, seed, given.steps, out)
                    file.write_text(json.dumps(measured(out / f"{name}-{seed}")), "utf-8")
    print(table(out, given.steps))


if __name__ == "__main__":
    main()
