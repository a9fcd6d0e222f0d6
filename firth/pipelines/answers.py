"""Sample several answers to each prompt: the first step of comparisons, of best-of-n and of AI feedback."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Interval

from firth.evaluate.prompting.requests import GenerateRequest, sample_seed
from firth.fields import NonNegativeInt, PositiveFloat, ShareAboveZero, TokenCount
from firth.pipelines.records import Asker, read_prompts, write_records
from firth.pipelines.stage import Stage, Summary, Weights


@dataclass(frozen=True)
class SampleAnswers(Stage):
    """Sample answers to prompts; writes {"prompt", "samples": [...]} with the other fields of each record.

    Args:
        model: A run, a model directory, an adapter, a GGUF file, or `openai:URL`.
        data: Files of records with a prompt of one user message.
        num_samples: Answers to each prompt.
        temperature: Temperature of sampling.
        top_p: Nucleus of sampling.
        max_new_tokens: Most tokens of an answer.
        chat: Whether prompts are messages of the model's chat template.
        limit: Most prompts; 0 for all.
        seed: Seed of sampling.
        weights: Data type of the weights, but not of an endpoint's; "" takes bf16 where it is faster.
    """

    main: ClassVar[str] = "model"
    output: ClassVar[str] = "answers.jsonl"

    model: str
    data: tuple[str, ...]
    num_samples: Annotated[int, Interval(ge=1, le=1000)] = 4
    temperature: PositiveFloat = 1.0
    top_p: ShareAboveZero = 1.0
    max_new_tokens: TokenCount = 64
    chat: bool = True
    limit: NonNegativeInt = 0
    seed: NonNegativeInt = 0
    weights: Weights = ""

    def run(self, directory: Path) -> Summary:
        prompts = read_prompts(self.data, self.limit)
        requests = [
            GenerateRequest(
                prompt.prompt,
                (),
                self.max_new_tokens,
                self.temperature,
                self.top_p,
                sample_seed(self.seed, prompt.prompt, number),
                self.chat,
            )
            for prompt in prompts
            for number in range(self.num_samples)
        ]
        locations = [prompt.location for prompt in prompts for _ in range(self.num_samples)]
        replies = Asker(self.model, self.weights).write(requests, locations)
        texts = np.array([reply.text.strip() for reply in replies], object).reshape(len(prompts), self.num_samples)
        write_records(
            directory / self.output,
            (
                {**prompt.fields, "prompt": prompt.prompt, "samples": samples}
                for prompt, samples in zip(prompts, texts.tolist(), strict=True)
            ),
        )
        return {
            "prompts": len(prompts),
            "answers": len(replies),
            "different": sum(len(set(row)) for row in texts.tolist()) / len(replies),
            "finished": sum(reply.finish == "stop" for reply in replies) / len(replies),
        }
