"""Critique and revision (Constitutional AI, Bai 2022): a model criticizes its own answer by a principle, and writes a better one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from firth.evaluate.prompting.requests import GenerateRequest, sample_seed
from firth.fields import NonNegativeFloat, NonNegativeInt, TokenCount
from firth.pipelines.judge import PRINCIPLES
from firth.pipelines.records import Asker, read_prompts, write_records
from firth.pipelines.stage import Stage, Summary, Weights
from firth.types import UserError

CRITIQUE = "{principle}\n\nRequest: {prompt}\n\nAnswer: {answer}\n\nSay in one or two sentences what is wrong with this answer."
REVISION = (
    "{principle}\n\nRequest: {prompt}\n\nAnswer: {answer}\n\nCriticism: {critique}\n\nWrite a better answer to the request, "
    "without comment."
)


@dataclass(frozen=True)
class ReviseAnswers(Stage):
    """Answer prompts, criticize and revise the answers; writes preferences of the revision over the answer.

    Records are {"prompt", "chosen": revision, "rejected": first answer, "critique", "principle"}: for a reward model or DPO, and
    for finetuning on the revisions (`examples.completion_template="{chosen}"`). Unchanged answers are left out.

    Args:
        model: A run, a model directory, an adapter, a GGUF file, or `openai:URL`.
        data: Files of records with a prompt of one user message.
        principles: One is drawn for each prompt.
        temperature: Temperature of all three texts; 0 is greedy.
        max_new_tokens: Most tokens of each text.
        chat: Whether requests are messages of the model's chat template.
        limit: Most prompts; 0 for all.
        seed: Seed of principles and samples.
        weights: Data type of the weights, but not of an endpoint's; "" takes bf16 where it is faster.
    """

    main: ClassVar[str] = "model"
    output: ClassVar[str] = "revisions.jsonl"

    model: str
    data: tuple[str, ...]
    principles: tuple[str, ...] = PRINCIPLES
    temperature: NonNegativeFloat = 0.7
    max_new_tokens: TokenCount = 128
    chat: bool = True
    limit: NonNegativeInt = 0
    seed: NonNegativeInt = 0
    weights: Weights = ""

    def check(self) -> None:
        if not any(principle.strip() for principle in self.principles):
            raise UserError("the list of principles is empty: write what a better answer is")

    def run(self, directory: Path) -> Summary:
        prompts = read_prompts(self.data, self.limit)
        asker = Asker(self.model, self.weights)
        rng = np.random.default_rng(self.seed)
        principles = [self.principles[i].strip() for i in rng.integers(len(self.principles), size=len(prompts))]

        def write(texts: list[str]) -> list[str]:
            requests = [
                GenerateRequest(
                    text, (), self.max_new_tokens, self.temperature, 1.0, sample_seed(self.seed, text, 0), self.chat
                )
                for text in texts
            ]
            return [reply.text.strip() for reply in asker.write(requests, [prompt.location for prompt in prompts])]

        answers = write([prompt.prompt for prompt in prompts])
        fields = [
            {"principle": principle, "prompt": prompt.prompt, "answer": answer}
            for principle, prompt, answer in zip(principles, prompts, answers, strict=True)
        ]
        critiques = write([CRITIQUE.format(**one) for one in fields])
        fields = [one | {"critique": critique} for one, critique in zip(fields, critiques, strict=True)]
        revisions = write([REVISION.format(**one) for one in fields])
        changed = [
            (one, revision)
            for one, revision in zip(fields, revisions, strict=True)
            if revision and revision != one["answer"]
        ]
        write_records(
            directory / self.output,
            (
                {
                    "prompt": one["prompt"], "chosen": revision, "rejected": one["answer"],
                    "critique": one["critique"], "principle": one["principle"],
                }
                for one, revision in changed
            ),
        )  # fmt: skip
        return {"prompts": len(prompts), "revised": len(changed), "unchanged": len(prompts) - len(changed)}
