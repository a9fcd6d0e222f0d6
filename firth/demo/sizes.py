"""Sizes of the demo: the recipes of its stages.

small takes about seven minutes on two cores. tiny is for tests.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from firth.model.config import decoder_config, encoder_config, encoder_decoder_config
from firth.objectives.masked_lm import MLM
from firth.recipes.decoders import gpt
from firth.recipes.encoders import roberta
from firth.recipes.seq2seq import t5
from firth.runs.alignment_examples import RefLogprobsConfig, RolloutsConfig, SampledPreferencesConfig
from firth.runs.examples import ChunksConfig, DialoguesConfig, WindowsConfig
from firth.runs.labeled_examples import LabeledConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget


@dataclass(frozen=True)
class DemoSize:
    """Size of a demo.

    Args:
        vocab_size: Size of the tokenizer.
        hidden_size: Width of the models.
        num_layers: Layers of the encoder and the decoder.
        max_positions: Longest sequence.
        steps: Pretraining steps of encoder, encoder-decoder and decoder.
        labels: Labeled passages to train on, at most.
        held_labels: Labeled passages to evaluate on, at most.
        finetune_steps: Finetuning steps; the next four likewise for each stage.
        comparisons: Prompts for which two answers are sampled and compared.
        held_comparisons: The same, held out.
        noise: Standard deviation of the noise in the simulated preferences, in units of the true reward.
        answer: Most tokens of an answer.
        sample: Most tokens of a printed sample.
        judged: Held-out prompts for the final comparison.
    """

    vocab_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 3
    max_positions: int = 256
    steps: tuple[int, int, int] = (1300, 480, 600)
    labels: int = 300
    held_labels: int = 1500
    finetune_steps: int = 60
    sft_steps: int = 120
    reward_steps: int = 60
    dpo_steps: int = 80
    ppo_steps: int = 60
    comparisons: int = 700
    held_comparisons: int = 250
    noise: float = 0.4
    answer: int = 40
    sample: int = 60
    judged: int = 128

    def pretraining(self, vocab: int) -> dict[str, Recipe]:
        """The three families, smallest shapes that still show what each learns."""
        of = {
            "vocab_size": vocab,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "max_positions": self.max_positions,
        }
        mlm, spans, causal = self.steps
        evaluation = EvalConfig(every=max(50, causal // 4), max_examples=128)
        checkpoint = CheckpointConfig(every=100, keep=1)
        return {
            "encoder": dataclasses.replace(
                roberta("small"), objective=MLM(mlm_probability=0.3), model=encoder_config(**of), examples=ChunksConfig(max_length=96),
                batch=BatchConfig(size=24, pack_to_length=96), optimizer=OptimizerConfig(embedding_lr=4e-3, scalar_lr=2e-3),
                budget=Budget(max_steps=mlm), evaluation=evaluation, checkpoint=checkpoint,
            ),
            "encoder-decoder": dataclasses.replace(
                t5("small"), model=encoder_decoder_config(**(of | {"num_layers": max(1, self.num_layers - 1)})),
                examples=ChunksConfig(max_length=96, add_special_tokens=False), batch=BatchConfig(size=24),
                budget=Budget(max_steps=spans), evaluation=evaluation, checkpoint=checkpoint,
            ),
            "decoder": dataclasses.replace(
                gpt("small"), model=decoder_config(**of), examples=WindowsConfig(max_length=128), batch=BatchConfig(size=24),
                budget=Budget(max_steps=causal), evaluation=evaluation, checkpoint=checkpoint,
            ),
        }  # fmt: skip

    def finetune(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(
            recipe, examples=LabeledConfig(max_length=48), batch=BatchConfig(size=32), budget=Budget(max_steps=self.finetune_steps),
            optimizer=dataclasses.replace(recipe.optimizer, lr=5e-4),
            evaluation=EvalConfig(every=max(1, self.finetune_steps // 4), max_examples=2000), checkpoint=CheckpointConfig(every=0, keep=1),
        )  # fmt: skip

    def sft(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(
            recipe, examples=DialoguesConfig(max_length=self.max_positions // 2), budget=Budget(max_steps=self.sft_steps),
            evaluation=EvalConfig(every=max(1, self.sft_steps // 4), max_examples=200), checkpoint=CheckpointConfig(every=100, keep=1),
        )  # fmt: skip

    def reward(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(
            recipe, examples=SampledPreferencesConfig(), budget=Budget(max_steps=self.reward_steps),
            evaluation=EvalConfig(every=max(1, self.reward_steps // 4), max_examples=2000), checkpoint=CheckpointConfig(every=0, keep=1),
        )  # fmt: skip

    def dpo(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(
            recipe, examples=RefLogprobsConfig(base=SampledPreferencesConfig()), budget=Budget(max_steps=self.dpo_steps),
            optimizer=dataclasses.replace(recipe.optimizer, lr=1e-4),
            evaluation=EvalConfig(every=max(1, self.dpo_steps // 4), max_examples=2000), checkpoint=CheckpointConfig(every=0, keep=1),
        )  # fmt: skip

    def ppo(self, recipe: Recipe, *, reward: str, scorer: str) -> Recipe:
        examples = RolloutsConfig(
            rollout_size=64,
            num_epochs=2,
            max_new_tokens=self.answer,
            reward_model=reward,
            true_reward_function=scorer,
            kl_coef=0.05,
            max_prompt_length=self.max_positions - self.answer,
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
        steps=(4, 4, 4),
        labels=40,
        held_labels=60,
        finetune_steps=4,
        sft_steps=4,
        reward_steps=3,
        dpo_steps=3,
        ppo_steps=4,
        comparisons=24,
        held_comparisons=12,
        answer=8,
        sample=8,
        judged=8,
    ),
}
