"""Self-improvement: sample rationales, keep some, and finetune on them.

LMSI (Huang 2022) needs no gold answers: it keeps the rationales that reach the majority answer of a question. STaR (Zelikman 2022)
keeps those that reach the gold answer; where none does, the model gets the answer as a hint (rationalization), and a
rationale that reaches it is kept as if it had been found without the hint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Interval

from firth.evaluate.prompting.metrics import INVALID, FilterChain, apply_filters
from firth.evaluate.prompting.prompt_task import PromptConfig, PromptTask
from firth.evaluate.prompting.prompts import Item, render
from firth.evaluate.prompting.requests import ReplyCache
from firth.evaluate.prompting.runner import run_tasks
from firth.evaluate.prompting.task_files import load_tasks
from firth.fields import NonNegativeInt, PositiveFloat, Share, TokenCount
from firth.io.atomic import cache_directory
from firth.pipelines.stage import Stage, Summary, Weights, open_responder, write_records
from firth.types import LOGGER, UserError

HINT = "(Hint: the answer is {{_gold}}.)"
"""What is added to a question for rationalization."""


@dataclass(frozen=True)
class Sampled:
    """Samples of a question.

    Args:
        item: The question.
        texts: The sampled texts.
        answers: The answer in each, the same text for equal answers; "" where there is none.
        right: Whether each answer is the gold answer; empty without gold answers.
    """

    item: Item
    texts: Sequence[str]
    answers: Sequence[str]
    right: Sequence[bool]

    def majority(self) -> tuple[str, float]:
        """Return the most frequent answer and its share of all samples; of equally frequent ones the first."""
        found = Counter(answer for answer in self.answers if answer)
        if not found:
            return "", 0.0
        answer, count = found.most_common(1)[0]
        return answer, count / len(self.answers)

    def majority_is_right(self) -> bool:
        """Return whether the most frequent answer is the gold answer."""
        answer, _ = self.majority()
        return bool(answer) and self.right[list(self.answers).index(answer)]

    def kept(self, keep: str, min_share: float) -> list[str]:
        """Return the different texts that reach the majority answer, or the gold answer for "correct"."""
        answer, share = self.majority()
        wanted = self.right if keep == "correct" else [bool(answer) and one == answer for one in self.answers]
        enough = keep == "correct" or share >= min_share
        return list(dict.fromkeys(t for t, ok in zip(self.texts, wanted, strict=True) if ok)) if enough else []


@dataclass(frozen=True)
class SampleRationales(Stage):
    """Sample answers with rationales and keep some; writes {"prompt", "completion"} for `sft`.

    The prompt of a record is the question alone, without the examples that the samples were made with.

    Args:
        model: A run, a model directory, an adapter, a GGUF file, or `openai:URL`.
        task: A task that generates answers with a rationale and has a filter that reads the answer, such as gsm8k.
        data: Files of the questions; those of the task file if empty.
        examples: Files of the examples in prompts.
        keep: "majority" (LMSI) or "correct" (STaR, which needs gold answers).
        min_share: For "majority": least share of the samples that agree.
        rationalize: For "correct": whether questions without a correct sample are repeated with the answer as a hint.
        num_samples: Samples of each question.
        temperature: Temperature of sampling.
        shots: Examples in each prompt, with their rationales; -1 for the task's own number.
        max_new_tokens: Most tokens of a sample.
        chat: Whether prompts are messages of the model's chat template.
        limit: Most questions; 0 for all.
        seed: Seed of examples and samples.
        weights: Data type of the weights, but not of an endpoint's; "" takes bf16 where it is faster.
    """

    main: ClassVar[str] = "model"
    output: ClassVar[str] = "rationales.jsonl"

    model: str
    task: str
    data: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    keep: Literal["majority", "correct"] = "majority"
    min_share: Share = 0.0
    rationalize: bool = False
    num_samples: Annotated[int, Interval(ge=1, le=1000)] = 8
    temperature: PositiveFloat = 0.7
    shots: Annotated[int, Interval(ge=-1)] = -1
    max_new_tokens: TokenCount = 128
    chat: bool = False
    limit: NonNegativeInt = 0
    seed: NonNegativeInt = 0
    weights: Weights = ""

    def check(self) -> None:
        if self.rationalize and self.keep != "correct":
            raise UserError("rationalize=true needs the gold answers of keep=correct")
        if self.keep == "majority" and self.num_samples < 2:
            raise UserError("keep=majority needs num_samples of 2 or more")

    def run(self, directory: Path) -> Summary:
        task, *others = load_tasks(self.task, self.data, self.examples)
        if others:
            raise UserError(f"{self.task}: these are {len(others) + 1} tasks: name one of them")
        if task.output_type != "generate_until":
            raise UserError(f"{self.task}: rationales are generated, and this task is of type {task.output_type}")
        if self.keep == "correct" and not any(metric.name == "exact_match" for metric in task.metrics):
            raise UserError(f"{self.task}: keep=correct needs the metric exact_match, by which answers are right")
        items = task.items[: self.limit] if self.limit else task.items
        sampled = self._sample(task, items)
        kept = [(one, one.kept(self.keep, self.min_share)) for one in sampled]
        records = [self._record(task, one.item, text) for one, texts in kept for text in texts]
        missed = [one for one, texts in kept if not texts]
        summary: dict[str, float | str] = {
            "questions": len(sampled),
            "samples": len(sampled) * self.num_samples,
            "kept questions": len(sampled) - len(missed),
            "records": len(records),
        }
        if all(one.right for one in sampled):
            summary["accuracy of a sample"] = float(np.mean([one.right for one in sampled]))
            summary["accuracy of the majority"] = float(np.mean([one.majority_is_right() for one in sampled]))
        if self.rationalize and missed:
            hinted = self._rationalized(task, missed)
            summary["rationalized questions"] = len({id(item) for item, _ in hinted})
            records += [self._record(task, item, text) for item, text in hinted]
        if not records:
            raise UserError(
                f"{self.task}: no rationale of {len(sampled)} questions was kept: sample more, or lower min_share"
            )
        write_records(directory / self.output, records)
        return summary

    def _sample(self, task: PromptTask, items: Sequence[Item]) -> list[Sampled]:
        """Return the samples of some questions."""
        responder = open_responder(self.model, self.weights)
        replies = ReplyCache(cache_directory() / "replies", responder.digest)
        config = PromptConfig(
            shots=None if self.shots < 0 else self.shots, chat=self.chat, votes=self.num_samples,
            temperature=self.temperature, seed=self.seed, max_new_tokens=self.max_new_tokens,
            cot="few-shot" if task.rationale and self.shots else "",
        )  # fmt: skip
        selected = replace(task, items=items, pool=task.pool or task.items)
        try:
            [result] = run_tasks(
                [selected],
                responder,
                config,
                replies,
                lambda done, total: LOGGER.info(f"{done:,} of {total:,} replies"),
            )
        finally:
            replies.close()
        chain = task.filters[-1] if task.filters else FilterChain("none", ())
        found = []
        for item, one in zip(items, result.items, strict=True):
            texts = [str(text) for text in one.replies]
            answers = [apply_filters(chain.filters, [text])[0] for text in texts]
            right = [answer not in ("", INVALID) and task.is_right(answer, item) for answer in answers]
            found.append(Sampled(item, texts, _canonical(task, answers), right if task.target else []))
        return found

    def _rationalized(self, task: PromptTask, missed: Sequence[Sampled]) -> list[tuple[Item, str]]:
        """Return (question, rationale) for the questions that the model answers with the hint."""

        def with_gold(item: Item) -> Item:
            return Item({**item.fields, "_gold": _gold(task, item)}, item.location)

        question = task.prompt if "{" in task.prompt else "{{" + task.prompt + "}}"
        hinted = replace(task, prompt=f"{question} {HINT}", pool=[with_gold(item) for item in task.pool or task.items])
        sampled = self._sample(hinted, [with_gold(one.item) for one in missed])
        return [
            (one.item, text)
            for one, again in zip(missed, sampled, strict=True)
            for text in again.kept("correct", 0.0)
            if "(Hint" not in text  # it would teach to repeat what no later prompt contains
        ]

    def _record(self, task: PromptTask, item: Item, text: str) -> dict[str, str]:
        description = render(task.description, item) if task.description else ""
        return {"prompt": description + render(task.prompt, item), "completion": text.strip()}


def _canonical(task: PromptTask, answers: Sequence[str]) -> list[str]:
    """Return each answer as the first that the task's metric holds for equal, so that "42" and "42." are one vote."""
    first: list[str] = []
    for answer in answers:
        if answer in ("", INVALID):
            continue
        if not any(task.equal_answers(answer, one) for one in first):
            first.append(answer)
    return [next((one for one in first if task.equal_answers(answer, one)), "") for answer in answers]


def _gold(task: PromptTask, item: Item) -> str:
    """Return the gold answer of a question as its filters read it; the whole gold text if they find none in it."""
    gold = str(task.gold_of(item)[0])
    read = apply_filters(task.filters[-1].filters, [gold])[0] if task.filters else gold
    return gold.strip() if read in ("", INVALID) else read
