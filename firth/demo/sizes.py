"""How large a demo is: the recipes of its stages at two sizes.

small is meant to be watched: about six minutes on two cores. tiny checks that the path is whole, in a test.
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
    """vocab, width, depth, context of the models. Steps of each stage. labels, held_labels: labelled passages to learn
    from and to be tested on, at most.

    comparisons, held_comparisons: prompts that two answers are drawn for. noise: the judge's inconstancy, in units of
    true score. answer, sample: most tokens of an answer and of a printed sample. judged: held-out prompts at the end.
    """

    vocab: int = 4096
    width: int = 128
    depth: int = 3
    context: int = 256
    steps: tuple[int, int, int] = (1300, 480, 600)
    labels: int = 300
    held_labels: int = 1500
    classify_steps: int = 60
    instruct_steps: int = 120
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
        of = {"vocab_size": vocab, "hidden_size": self.width, "num_layers": self.depth, "max_positions": self.context}
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
                t5("small"), model=encoder_decoder_config(**(of | {"num_layers": max(1, self.depth - 1)})),
                examples=ChunksConfig(max_length=96, add_special_tokens=False), batch=BatchConfig(size=24),
                budget=Budget(max_steps=spans), evaluation=evaluation, checkpoint=checkpoint,
            ),
            "decoder": dataclasses.replace(
                gpt("small"), model=decoder_config(**of), examples=WindowsConfig(max_length=128), batch=BatchConfig(size=24),
                budget=Budget(max_steps=causal), evaluation=evaluation, checkpoint=checkpoint,
            ),
        }  # fmt: skip

    def classify(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(
            recipe, examples=LabeledConfig(max_length=48), batch=BatchConfig(size=32), budget=Budget(max_steps=self.classify_steps),
            optimizer=dataclasses.replace(recipe.optimizer, lr=5e-4),
            evaluation=EvalConfig(every=max(1, self.classify_steps // 4), max_examples=2000), checkpoint=CheckpointConfig(every=0, keep=1),
        )  # fmt: skip

    def instruct(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(
            recipe, examples=DialoguesConfig(max_length=self.context // 2), budget=Budget(max_steps=self.instruct_steps),
            evaluation=EvalConfig(every=max(1, self.instruct_steps // 4), max_examples=200), checkpoint=CheckpointConfig(every=100, keep=1),
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
        examples = RolloutsConfig(rollout_size=64, num_epochs=2, max_new_tokens=self.answer, reward_model=reward, true_reward_function=scorer, kl_coef=0.05,
                           max_prompt_length=self.context - self.answer)  # fmt: skip
        return dataclasses.replace(
            recipe,
            examples=examples,
            budget=Budget(max_steps=self.ppo_steps),
            checkpoint=CheckpointConfig(every=16, keep=1),
        )


SIZES = {
    "small": DemoSize(),
    "tiny": DemoSize(
        vocab=600, width=32, depth=1, context=128, steps=(4, 4, 4), labels=40, held_labels=60, classify_steps=4, instruct_steps=4,
        reward_steps=3, dpo_steps=3, ppo_steps=4, comparisons=24, held_comparisons=12, answer=8, sample=8, judged=8,
    ),
}  # fmt: skip
