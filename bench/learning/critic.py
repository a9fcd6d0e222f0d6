"""Explained variance of PPO's critic on unseen rollouts, against a constant per position.

    python -m bench.learning.critic                               # all missing runs; about two hours on one thread
    python -m bench.learning.critic --only shared reward          # some of the arms
    python -m bench.learning.critic --seeds 0                     # one of the seeds
    python -m bench.learning.critic --ceiling reward              # fit a critic offline on ten times the rollouts of an arm
    python -m bench.learning.critic --table                       # markdown of the existing results for docs/results/index.md

The demo's models (Shakespeare, 1.1 M parameters): a decoder, instruction tuning, 700 comparisons, a reward model; then
100 steps of PPO (25 phases) for each arm and seed. Every base model is a run and every arm a file, so a stopped command can
be continued.

For each phase and each sampled token, `value` is the critic's estimate before it is trained on the phase, and `return` is
the sum of the penalized rewards to the end of the answer. Explained variance is 1 - var(return - value) / var(return) over
the tokens of a phase. The baseline estimates the return by its mean at that position over the previous five phases. Both
are means over the last third of the phases.
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
from firth.align.rollouts import RolloutsConfig, RolloutSource, explained_variance
from firth.corpora import catalog
from firth.data.collate import Batches
from firth.data.examples import DataConfig
from firth.demo import data
from firth.demo.data import SCORERS, read_rows
from firth.demo.sizes import SIZES
from firth.generate.decoding_batch import rectangle
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.model import LM
from firth.objectives.policy_gradient import PPO, critic_states, init_critic
from firth.objectives.policy_gradient import values as values_of
from firth.pretrained.load_save import init_from, load_model
from firth.recipes import post_training
from firth.runs.prepare import train_tokenizer
from firth.runs.recipe import TokenizerConfig
from firth.runs.run import run
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.schedule import Budget, Schedule
from firth.training.trainer import TrainerConfig, train

SIZE = SIZES["small"]
SEEDS = (0, 1, 2)
STEPS, ANSWERS, ROWS = 100, 64, 32
PROMPT, ANSWER = 40, 32
"""Maximum tokens of a prompt and of an answer in the PPO runs."""
OFFLINE_BATCH = 512
"""Answers per rollout for an offline critic."""

BASELINE_PHASES = 5
"""Phases that the baseline is fitted on."""


@dataclass(frozen=True)
class Arm:
    """Kind of critic.

    Args:
        critic: "own" for a stack of its own, "shared" for a head on the policy's.
        start: Model whose weights a stack of its own starts from.
        lr: Learning rate of the critic; None for the policy's.
        value_clip_range: As in `PPO`.
        value_lam: As in `GAE`.
        epochs: As in the examples of a recipe.
    """

    critic: Literal["own", "shared"] = "own"
    start: Literal["reward", "policy"] = "reward"
    lr: float | None = None
    value_clip_range: float = 0.2
    value_lam: float | None = None
    epochs: int = 2


ARMS = {
    "shared": Arm(critic="shared"),
    "policy": Arm(start="policy"),
    "reward": Arm(),
    "reward-1e-3": Arm(lr=1e-3),
    "reward-1e-3-free": Arm(lr=1e-3, value_clip_range=0.0),
    "reward-1e-3-free-sums": Arm(lr=1e-3, value_clip_range=0.0, value_lam=1.0),
    "reward-free-sums": Arm(value_clip_range=0.0, value_lam=1.0),
    "policy-1e-3-free-sums": Arm(start="policy", lr=1e-3, value_clip_range=0.0, value_lam=1.0),
    "reward-free-sums-4": Arm(value_clip_range=0.0, value_lam=1.0, epochs=4),
}
"""free: values are not clipped. sums: the targets are sums of rewards (value_lam 1). 4: epochs."""


def make_base(results: Path) -> Path:
    """Prepare data, tokenizer, decoder, SFT model, comparisons and reward model as the demo does; return the directory."""
    out = results / "base"
    data_dir, tokenizer_at = out / "material", out / "tokenizer"
    if not (data_dir / "material.json").exists():
        data.make_play_data(
            catalog.fetch("shakespeare", log=print),
            data_dir,
            max_labeled_train=SIZE.max_labeled_train,
            max_labeled_valid=SIZE.max_labeled_valid,
            seed=0,
        )
    file = {name: str(data_dir / f"{name}.jsonl") for name in
            ("train", "valid", "dialogues-train", "dialogues-valid", "preferences-train", "preferences-valid")}  # fmt: skip
    if not (tokenizer_at / "merges.json").exists():
        train_tokenizer([file["train"]], tokenizer_at, algorithm="byte-bpe", vocab_size=SIZE.vocab_size)
    tokenizer = Tokenizer.load(tokenizer_at)
    recipe = SIZE.pretraining_recipes(tokenizer.vocab.size)["decoder"]
    text = DataConfig(path=(file["train"],), validation_path=(file["valid"],), cache_dir=str(out / "stores"))
    run(replace(recipe, name="decoder", data=text, tokenizer=TokenizerConfig(path=str(tokenizer_at))), out / "decoder")
    dialogues = DataConfig(path=(file["dialogues-train"],), validation_path=(file["dialogues-valid"],))
    run(
        replace(SIZE.sft_recipe(post_training.sft()), name="sft", data=dialogues, init_from=str(out / "decoder")),
        out / "sft",
    )
    if not Path(file["preferences-valid"]).exists():
        model = load_model(out / "sft" / "model")
        for part, count in (("train", SIZE.num_train_comparisons), ("valid", SIZE.num_valid_comparisons)):
            prompts = read_prompts(tokenizer, Path(file[f"dialogues-{part}"]))[:count]
            first, second = (sample_answers(model, tokenizer, prompts, seed) for seed in (1, 100_001))
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


def read_prompts(tokenizer: Tokenizer, path: Path) -> list[np.ndarray]:
    """Return the prompts of a file that leave room for an answer."""
    turns = ([{"role": "user", "content": row["prompt"]}] for row in read_rows(path))
    prompts = (chat.encode(tokenizer, end_sample, open=True)[0] for end_sample in turns)
    return [prompt for prompt in prompts if len(prompt) <= SIZE.max_positions - SIZE.max_answer_tokens]


def sample_answers(
    model: LM, tokenizer: Tokenizer, prompts: Sequence[np.ndarray], seed: int, answer: int = SIZE.max_answer_tokens
) -> list[Rollout]:
    written = Engine(model, tokenizer).generate(prompts, Sampling(max_new_tokens=answer, seed=seed))
    return [Rollout.of(p, w) for p, w in zip(prompts, written, strict=True)]


@dataclass(frozen=True)
class RecordingEstimator:
    """Advantage estimator that records its inputs, one file per phase, so that a continued run has them all."""

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
class BaseModels:
    """Models that every arm starts from."""

    directory: Path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.directory / "tokenizer")

    @cached_property
    def prompts(self) -> list[np.ndarray]:
        every = read_prompts(self.tokenizer, self.directory / "material" / "dialogues-train.jsonl")
        return [prompt for prompt in every if len(prompt) <= PROMPT]

    @cached_property
    def start(self) -> LM:
        return load_model(self.directory / "sft" / "model")

    @cached_property
    def reward_model(self) -> RewardModel:
        unnormalized = RewardModel(load_model(self.directory / "reward" / "model"))
        return unnormalized.normalized(sample_answers(self.start, self.tokenizer, self.prompts[:64], 0, ANSWER))

    def source(self, arm: Arm, seed: int, directory: Path) -> RolloutSource:
        phase = RolloutsConfig(rollout_size=ANSWERS, num_epochs=arm.epochs, max_new_tokens=ANSWER, kl_coef=0.05)
        source = RolloutSource(
            self.prompts, self.tokenizer, self.reward_model, self.start, config=phase, steps=phase.steps(ROWS),
            true_reward_function=FunctionReward(SCORERS["thou"]),
            seed=seed,
            critic=self.reward_model if arm.start == "reward" else None,
            advantage_estimator=RecordingEstimator(GAE(value_lam=arm.value_lam), directory, lambda: len(source.history)),
            batch_size=ANSWERS,
        )  # fmt: skip
        return source


def train_arm(bases: BaseModels, name: str, seed: int, steps: int, out: Path) -> LM:
    """Run or continue PPO; return the final model, with its critic."""
    arm, directory = ARMS[name], out / f"{name}-{seed}"
    objective = PPO(critic=arm.critic, value_clip_range=arm.value_clip_range)
    torch.manual_seed(seed)
    model = LM(bases.start.config, objective.heads(bases.start.config))
    init_from(model, bases.directory / "sft" / "model")
    source = bases.source(arm, seed, directory / "phases")
    batches = Batches(source, objective, bases.tokenizer.vocab, batch_size=ROWS, seed=seed)
    optimizer = replace(post_training.ppo().optimizer, critic_lr=arm.lr)
    train(
        model, objective, batches, directory, budget=Budget(max_steps=steps), optimizer=optimizer,
        schedule=Schedule("constant", warmup_ratio=0.05), config=TrainerConfig(save_every=20, keep=1), recipe=name,
    )  # fmt: skip
    return model


def mean_metrics(directory: Path) -> dict[str, float]:
    """Return the means over the last third of the phases of a run."""
    phases = [dict(np.load(path)) for path in sorted((directory / "phases").glob("*.npz"))]
    rows: list[tuple[float, float]] = []
    for at in range(len(phases) * 2 // 3, len(phases)):
        previous, phase = phases[at - BASELINE_PHASES : at], phases[at]
        real, returns = phase["real"], phase["returns"]
        means = by_position(previous, real.shape[1])
        constant = np.broadcast_to(means, real.shape)[real]
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
    """Return the mean return at each position (length,), or the overall mean where no answer is as long."""
    sums, counts = np.zeros(length), np.zeros(length)
    for phase in phases:
        n = min(length, phase["real"].shape[1])
        sums[:n] += np.where(phase["real"], phase["returns"], 0.0).sum(0)[:n]
        counts[:n] += phase["real"].sum(0)[:n]
    return np.where(counts > 0, sums / np.maximum(counts, 1), sums.sum() / counts.sum())


def ceiling(bases: BaseModels, name: str, seed: int, steps: int, out: Path) -> dict[str, float]:
    """Fit a critic offline on answers of a run's final policy, ten times as many as in the run; return explained variances.

    The critic starts from the reward model and is trained for three epochs at 5e-4 decaying to 0, on sums of rewards. It is
    evaluated after each epoch on as many new answers as the run had (the best counts), against the run's own critic and a
    constant per position fitted on the same answers.
    """
    model = train_arm(bases, name, seed, steps, out)
    answers = steps * ROWS // ARMS[name].epochs
    drawn_at = out / f"{name}-{seed}-{steps}-drawn"
    phase = RolloutsConfig(rollout_size=OFFLINE_BATCH, max_new_tokens=ANSWER, kl_coef=0.05)
    rows: list[ValueRow] = []
    source = RolloutSource(
        bases.prompts, bases.tokenizer, bases.reward_model, bases.start, config=phase, steps=1, seed=1000 + seed, batch_size=256,
        critic=bases.reward_model, advantage_estimator=RecordingEstimator(GAE(), drawn_at, lambda: len(source.history)),
    )  # fmt: skip
    source.number = 0  # the critic of the run is used: none is initialized
    for k in range(1, 1 + -(-11 * answers // OFFLINE_BATCH)):
        source.prepare(model, k)
        kept = dict(np.load(drawn_at / f"{k - 1:04d}.npz"))
        for sample, returns, values, real in zip(
            source.samples, kept["returns"], kept["values"], kept["real"], strict=True
        ):
            rows.append((sample.tokens, returns[real], values[real]))
    test_rows, train_rows = rows[:answers], rows[answers : 11 * answers]
    critic = PPO().heads(bases.start.config)["critic"]
    critic_model = LM(bases.start.config, {"critic": critic})
    init_critic(critic_model, bases.reward_model.model, bases.reward_model.mean, bases.reward_model.scale)
    targets = np.concatenate([returns for _, returns, _ in test_rows])
    positions = np.concatenate([np.arange(len(returns)) for _, returns, _ in train_rows])
    all_returns = np.concatenate([returns for _, returns, _ in train_rows])
    constant = np.array([all_returns[positions == at].mean() for at in range(ANSWER)])
    return {
        "offline": max(
            explained_variance(targets, estimates(critic_model, test_rows)) for _ in fit(critic_model, train_rows)
        ),
        "online": explained_variance(targets, np.concatenate([values for _, _, values in test_rows])),
        "constant": explained_variance(
            targets, np.concatenate([constant[: len(returns)] for _, returns, _ in test_rows])
        ),
    }


ValueRow = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Tokens of prompt and answer; per token of the answer its return and the estimate of the run's critic."""


def predict_values(critic_model: LM, rows: Sequence[ValueRow]) -> torch.Tensor:
    """Return the critic's values of all tokens of the answers, in row order."""
    batch = rectangle([tokens[:-1] for tokens, _, _ in rows], torch.device("cpu"))
    at = torch.zeros(batch["tokens"].shape, dtype=torch.bool)
    for row, (tokens, returns, _) in enumerate(rows):
        at[row, len(tokens) - 1 - len(returns) : len(tokens) - 1] = True
    return values_of(critic_model, critic_states(critic_model, torch.empty(0), batch)[at])


def fit(
    critic_model: LM, rows: Sequence[ValueRow], epochs: int = 3, size: int = 64, rate: float = 5e-4
) -> Iterator[int]:
    """Fit the returns by least squares in random order; yield after each epoch."""
    optimizer = torch.optim.AdamW(critic_model.heads["critic"].parameters(), rate, betas=(0.9, 0.95), weight_decay=0.0)
    rng, steps_per_epoch = np.random.default_rng(0), len(rows) // size
    steps = epochs * steps_per_epoch
    batches = [
        some
        for _ in range(epochs)
        for some in rng.permutation(len(rows))[: steps_per_epoch * size].reshape(steps_per_epoch, size).tolist()
    ]
    for k, group in enumerate(batches):
        some = [rows[i] for i in group]
        for param_group in optimizer.param_groups:
            param_group["lr"] = rate * (1 - k / steps)
        targets = torch.from_numpy(np.concatenate([returns for _, returns, _ in some])).float()
        with torch.autocast("cpu", torch.bfloat16):
            error = (predict_values(critic_model, some) - targets).square().mean()
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(critic_model.heads["critic"].parameters(), 1.0)
        optimizer.step()
        if k % 50 == 0:
            print(f"offline critic: step {k} of {steps}, squared error {float(error.detach()):.3f}", flush=True)
        if k % steps_per_epoch == steps_per_epoch - 1:
            yield k


@torch.no_grad()
def estimates(critic_model: LM, rows: Sequence[ValueRow]) -> np.ndarray:
    return np.concatenate([predict_values(critic_model, rows[i : i + 256]).numpy() for i in range(0, len(rows), 256)])


def table(out: Path, steps: int) -> str:
    """Return a Markdown table of the existing arms: mean, minimum and maximum over the seeds."""
    lines = [
        "| arm | seeds | critic | constant per position | reward | true reward | KL per answer |",
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
    """Return the mean, with minimum and maximum if there are several numbers."""
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
    args = parser.parse_args()
    out: Path = args.results
    if args.ceiling:
        for seed in args.seeds:
            found = ceiling(BaseModels(make_base(out)), args.ceiling, seed, args.steps, out)
            (out / f"{args.ceiling}-{seed}-{args.steps}-ceiling.json").write_text(json.dumps(found), "utf-8")
            print(found)
        return
    if not args.table:
        bases = BaseModels(make_base(out))
        for seed in args.seeds:
            for name in args.only:
                file = out / f"{name}-{seed}-{args.steps}.json"
                if not file.exists():
                    train_arm(bases, name, seed, args.steps, out)
                    file.write_text(json.dumps(mean_metrics(out / f"{name}-{seed}")), "utf-8")
    print(table(out, args.steps))


if __name__ == "__main__":
    main()
