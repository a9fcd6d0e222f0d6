"""Post-training of a model that generates: instruction tuning, reward models, preference optimization, PPO, GRPO, RLOO, REINFORCE.

    firth train sft init_from=runs/gpt data.path=dialogues.jsonl
    firth train reward_model init_from=runs/sft data.path=preferences.jsonl
    firth train ranking init_from=runs/sft data.path=rankings.jsonl
    firth train dpo init_from=runs/sft data.path=preferences.jsonl
    firth train dpo objective.loss_type=ipo init_from=runs/sft data.path=preferences.jsonl
    firth train simpo init_from=runs/sft data.path=preferences.jsonl
    firth train orpo init_from=runs/gpt data.path=preferences.jsonl
    firth train kto init_from=runs/sft data.path=labeled.jsonl
    firth train ppo init_from=runs/sft examples.reward_model=runs/reward_model data.path=dialogues.jsonl
    firth train grpo init_from=runs/sft examples.reward_function=my.module:score data.path=problems.jsonl
    firth train rloo init_from=runs/sft examples.reward_function=my.module:score data.path=problems.jsonl
    firth train reinforce init_from=runs/sft examples.reward_function=my.module:score data.path=dialogues.jsonl

Records: dialogues {"messages"} or {"prompt", "completion"}; preferences {"prompt", "chosen", "rejected"}; labeled answers
{"prompt", "completion", "label"}, the label true or false; rankings {"prompt", "answers"}, the best first. All use AdamW at a
small learning rate: Muon's updates of equal size help a model that starts from random weights and damage a pretrained one.
"""

from __future__ import annotations

from dataclasses import replace

from firth.align.precompute import RefLogprobsConfig, UnpairedPreferencesConfig
from firth.align.rollouts import RolloutsConfig
from firth.data.dialogues import DialoguesConfig, PreferencesConfig, RankingsConfig
from firth.objectives.policy_gradient import GRPO, PPO, RLOO, Reinforce
from firth.objectives.preferences import DPO, KTO, ORPO, SimPO
from firth.objectives.reward_model import Ranking, RewardModeling
from firth.objectives.sft import SFT
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule


def sft() -> Recipe:
    """Return supervised finetuning on the answers in dialogues, stop token included."""
    return Recipe(
        name="sft",
        objective=SFT(),
        examples=DialoguesConfig(max_length=256),
        batch=BatchConfig(size=32),
        optimizer=OptimizerConfig(name="adamw", lr=5e-4, weight_decay=0.0),
        schedule=Schedule("linear", warmup_ratio=0.05),
        budget=Budget(max_steps=400),
        evaluation=EvalConfig(every=200, max_examples=400),
        checkpoint=CheckpointConfig(every=200),
    )


def reward_model() -> Recipe:
    """Return a reward model trained on preferences."""
    return Recipe(
        name="reward_model",
        objective=RewardModeling(),
        examples=PreferencesConfig(max_length=256),
        batch=BatchConfig(size=16),
        optimizer=OptimizerConfig(name="adamw", lr=2e-4, weight_decay=0.0),
        schedule=Schedule("linear", warmup_ratio=0.1),
        budget=Budget(max_steps=200),
        evaluation=EvalConfig(every=50, max_examples=1000),
        checkpoint=CheckpointConfig(every=200),
    )


def ranking() -> Recipe:
    """Return a reward model trained on rankings of several answers to a prompt."""
    return replace(
        reward_model(),
        name="ranking",
        objective=Ranking(),
        examples=RankingsConfig(max_length=256),
        batch=BatchConfig(size=8),
    )


def dpo() -> Recipe:
    """Return direct preference optimization (Rafailov 2023)."""
    return Recipe(
        name="dpo",
        objective=DPO(beta=0.1),
        examples=RefLogprobsConfig(base=PreferencesConfig(max_length=256)),
        batch=BatchConfig(size=16),
        optimizer=OptimizerConfig(name="adamw", lr=5e-5, weight_decay=0.0),
        schedule=Schedule("linear", warmup_ratio=0.1),
        budget=Budget(max_steps=200),
        evaluation=EvalConfig(every=50, max_examples=1000),
        checkpoint=CheckpointConfig(every=200),
    )


def simpo() -> Recipe:
    """Return SimPO (Meng 2024): preferences by the log-probability per token, without a reference model."""
    return replace(dpo(), name="simpo", objective=SimPO(), examples=PreferencesConfig(max_length=256))


def orpo() -> Recipe:
    """Return ORPO (Hong 2024): finetuning on the chosen answers and preferences in one, without a reference model."""
    recipe = replace(dpo(), name="orpo", objective=ORPO(), examples=PreferencesConfig(max_length=256))
    return replace(recipe, optimizer=replace(recipe.optimizer, lr=2e-4))


def kto() -> Recipe:
    """Return KTO (Ethayarajh 2024): answers that are labeled desirable or undesirable, without pairs."""
    return replace(dpo(), name="kto", objective=KTO(), examples=UnpairedPreferencesConfig(max_length=256))


def reinforce() -> Recipe:
    """Return REINFORCE with the mean reward of a group of answers as its baseline."""
    return Recipe(
        name="reinforce",
        objective=Reinforce(),
        examples=RolloutsConfig(rollout_size=64, num_generations=4, num_epochs=1, advantages="rloo"),
        batch=BatchConfig(size=64),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.0),
        schedule=Schedule("constant", warmup_ratio=0.05),
        budget=Budget(max_steps=100),
        checkpoint=CheckpointConfig(every=25),
    )


def rloo() -> Recipe:
    """Return RLOO: the reward of an answer against the mean of the other answers to the same prompt (Ahmadian 2024)."""
    return replace(reinforce(), name="rloo", objective=RLOO())


def grpo() -> Recipe:
    """Return GRPO (Shao 2024): groups of eight answers, no critic, and the KL penalty in the loss."""
    return replace(
        reinforce(),
        name="grpo",
        objective=GRPO(),
        examples=RolloutsConfig(rollout_size=64, num_generations=8, num_epochs=1, kl_coef=0.0, advantages="grpo"),
    )


def ppo() -> Recipe:
    """Return PPO with a KL penalty. The critic starts from the reward model, at ten times the policy's learning rate."""
    return Recipe(
        name="ppo",
        objective=PPO(value_clip_range=0.0),
        examples=RolloutsConfig(rollout_size=64, num_epochs=2),
        batch=BatchConfig(size=32),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, critic_lr=1e-3, weight_decay=0.0, beta2=0.95),
        schedule=Schedule("constant", warmup_ratio=0.05),
        budget=Budget(max_steps=160),
        checkpoint=CheckpointConfig(every=40),
    )
