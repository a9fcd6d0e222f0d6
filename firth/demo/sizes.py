"""Sizes of the demo, each with the recipes of its stages.

`small` takes about seven minutes on two cores; `tiny` is for tests.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from firth.align.precompute import RefLogprobsConfig
from firth.align.rewards import SampledPreferencesConfig
from firth.align.rollouts import RolloutsConfig
from firth.data.dialogues import DialoguesConfig
from firth.data.labeled import LabeledConfig
from firth.data.windows import ChunksConfig, WindowsConfig
from firth.model.config import decoder_config, encoder_config, encoder_decoder_config
from firth.objectives.masked_lm import MLM
from firth.recipes.decoders import gpt
from firth.recipes.encoders import roberta
from firth.recipes.seq2seq import t5
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget


@dataclass(frozen=True)
class DemoSize:
    """Configuration of a demo of one size.

    Args:
        vocab_size: Vocabulary size of the tokenizer.
        hidden_size: Hidden size of the models.
        num_layers: Layers of the encoder and the decoder; the encoder-decoder has one less in each stack.
        max_positions: Longest sequence in tokens.
        pretrain_steps: Pretraining steps of the encoder, the encoder-decoder and the decoder.
        max_labeled_train: Largest number of labeled training passages.
        max_labeled_valid: Largest number of labeled held-out passages.
        finetune_steps: Training steps of each classifier.
        sft_steps: Training steps of instruction tuning.
        reward_steps: Training steps of the reward model.
        dpo_steps: Training steps of DPO.
        ppo_steps: Training steps of PPO.
        num_train_comparisons: Training prompts for which two answers are sampled and compared.
        num_valid_comparisons: Held-out prompts for which two answers are sampled and compared.
        preference_noise: Scale of the logistic noise in the simulated preferences, in units of the true reward.
        max_answer_tokens: Largest number of tokens of an answer.
        max_sample_tokens: Largest number of tokens of a printed sample.
        num_eval_prompts: Held-out prompts of the final comparison.
    """

    vocab_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 3
    max_positions: int = 256
    pretrain_steps: tuple[int, int, int] = (1300, 480, 600)
    max_labeled_train: int = 300
    max_labeled_valid: int = 1500
    finetune_steps: int = 60
    sft_steps: int = 120
    reward_steps: int = 60
    dpo_steps: int = 80
    ppo_steps: int = 60
    num_train_comparisons: int = 700
    num_valid_comparisons: int = 250
    preference_noise: float = 0.4
    max_answer_tokens: int = 40
    max_sample_tokens: int = 60
    num_eval_prompts: int = 128

    def pretraining_recipes(self, vocab_size: int) -> dict[str, Recipe]:
        """Return the pretraining recipes of the three model families.

        Args:
            vocab_size: Vocabulary size of the models.

        Returns:
            Recipes by name: encoder, encoder-decoder, decoder.
        """
        config: dict[str, int] = {
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "max_positions": self.max_positions,
        }
        encoder_steps, encoder_decoder_steps, decoder_steps = self.pretrain_steps
        evaluation = EvalConfig(every=max(50, decoder_steps // 4), max_examples=128)
        checkpoint = CheckpointConfig(every=100, keep=1)
        return {
            "encoder": dataclasses.replace(
                roberta("small"),
                objective=MLM(mlm_probability=0.3),
                model=encoder_config(**config),
                examples=ChunksConfig(max_length=96),
                batch=BatchConfig(size=24, pack_to_length=96),
                optimizer=OptimizerConfig(embedding_lr=4e-3, scalar_lr=2e-3),
                budget=Budget(max_steps=encoder_steps),
                evaluation=evaluation,
                checkpoint=checkpoint,
            ),
            "encoder-decoder": dataclasses.replace(
                t5("small"),
                model=encoder_decoder_config(**(config | {"num_layers": max(1, self.num_layers - 1)})),
                examples=ChunksConfig(max_length=96, add_special_tokens=False),
                batch=BatchConfig(size=24),
                budget=Budget(max_steps=encoder_decoder_steps),
                evaluation=evaluation,
                checkpoint=checkpoint,
            ),
            "decoder": dataclasses.replace(
                gpt("small"),
                model=decoder_config(**config),
                examples=WindowsConfig(max_length=128),
                batch=BatchConfig(size=24),
                budget=Budget(max_steps=decoder_steps),
                evaluation=evaluation,
                checkpoint=checkpoint,
            ),
        }

    def classification_recipe(self, recipe: Recipe) -> Recipe:
        """Return a classification recipe with the settings of this size.

        Args:
            recipe: A published classification recipe.

        Returns:
            The recipe with this size's examples, batch size, budget and learning rate.
        """
        return dataclasses.replace(
            recipe,
            examples=LabeledConfig(max_length=48),
            batch=BatchConfig(size=32),
            budget=Budget(max_steps=self.finetune_steps),
            optimizer=dataclasses.replace(recipe.optimizer, lr=5e-4),
            evaluation=EvalConfig(every=max(1, self.finetune_steps // 4), max_examples=2000),
            checkpoint=CheckpointConfig(every=0, keep=1),
        )

    def sft_recipe(self, recipe: Recipe) -> Recipe:
        """Return an instruction tuning recipe with the settings of this size.

        Args:
            recipe: A published SFT recipe.

        Returns:
            The recipe with this size's examples and budget.
        """
        return dataclasses.replace(
            recipe,
            examples=DialoguesConfig(max_length=self.max_positions // 2),
            budget=Budget(max_steps=self.sft_steps),
            evaluation=EvalConfig(every=max(1, self.sft_steps // 4), max_examples=200),
            checkpoint=CheckpointConfig(every=100, keep=1),
        )

    def reward_model_recipe(self, recipe: Recipe) -> Recipe:
        """Return a reward model recipe with the settings of this size.

        Args:
            recipe: A published reward model recipe.

        Returns:
            The recipe with sampled preferences as examples and this size's budget.
        """
        return dataclasses.replace(
            recipe,
            examples=SampledPreferencesConfig(),
            budget=Budget(max_steps=self.reward_steps),
            evaluation=EvalConfig(every=max(1, self.reward_steps // 4), max_examples=2000),
            checkpoint=CheckpointConfig(every=0, keep=1),
        )

    def dpo_recipe(self, recipe: Recipe) -> Recipe:
        """Return a DPO recipe with the settings of this size.

        Args:
            recipe: A published DPO recipe.

        Returns:
            The recipe with sampled preferences as examples, and this size's budget and learning rate.
        """
        return dataclasses.replace(
            recipe,
            examples=RefLogprobsConfig(base=SampledPreferencesConfig()),
            budget=Budget(max_steps=self.dpo_steps),
            optimizer=dataclasses.replace(recipe.optimizer, lr=1e-4),
            evaluation=EvalConfig(every=max(1, self.dpo_steps // 4), max_examples=2000),
            checkpoint=CheckpointConfig(every=0, keep=1),
        )

    def ppo_recipe(self, recipe: Recipe, *, reward_model: str, true_reward_function: str) -> Recipe:
        """Return a PPO recipe with the settings of this size.

        Args:
            recipe: A published PPO recipe.
            reward_model: Run directory of the reward model.
            true_reward_function: The ground-truth reward as MODULE:FUNCTION; it is logged and not trained on.

        Returns:
            The recipe with this size's rollouts and budget.
        """
        examples = RolloutsConfig(
            rollout_size=64,
            num_epochs=2,
            max_new_tokens=self.max_answer_tokens,
            reward_model=reward_model,
            true_reward_function=true_reward_function,
            kl_coef=0.05,
            max_prompt_length=self.max_positions - self.max_answer_tokens,
        )
        return dataclasses.replace(
            recipe,
            examples=examples,
            budget=Budget(max_steps=self.ppo_steps),
            checkpoint=CheckpointConfig(every=16, keep=1),
        )


SIZES = {
    "small": DemoSize(),
    "tiny": DemoSize(
        vocab_size=600,
        hidden_size=32,
        num_layers=1,
        max_positions=128,
        pretrain_steps=(4, 4, 4),
        max_labeled_train=40,
        max_labeled_valid=60,
        finetune_steps=4,
        sft_steps=4,
        reward_steps=3,
        dpo_steps=3,
        ppo_steps=4,
        num_train_comparisons=24,
        num_valid_comparisons=12,
        max_answer_tokens=8,
        max_sample_tokens=8,
        num_eval_prompts=8,
    ),
}
"""Configurations of the demo by size."""
