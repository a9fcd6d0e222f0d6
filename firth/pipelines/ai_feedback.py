"""AI feedback: a model compares answers under written principles (Lee 2023; Bai 2022), or revises its own (Bai 2022).

Each pair is shown to a judge in both orders, and its log-probabilities of "A" and "B" are read. A judge that prefers the same
position in both orders has no opinion on the pair: it is dropped as a tie, which removes the position bias.

>>> decide(2.0, -1.0), decide(-0.5, 0.5), decide(1.0, 0.5)
(1.5, -0.5, None)

In critique and revision (Constitutional AI) a model criticizes its own answer by a principle, and writes a better one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from firth.corpora.readers import records
from firth.data.conversations import comparison
from firth.evaluate.prompting.requests import GenerateRequest, ScoreRequest, sample_seed
from firth.evaluate.prompting.responders import PREFIX
from firth.fields import NonNegativeFloat, NonNegativeInt, TokenCount
from firth.pipelines.stage import Asker, Stage, Summary, Weights, read_prompts, write_records
from firth.tokenizer.chat import Message
from firth.types import UserError

PRINCIPLES = ("Choose the answer that is more helpful, honest and harmless.",)
QUESTION = (
    "Compare two answers to a request. {principle}\n\nRequest: {prompt}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\n"
    "Which answer is better, A or B?"
)
"""The prompt of the judge."""
LEAD = "The better answer is"
"""How the judge's reply begins, before the letter."""


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one prompt.

    Args:
        location: File and line of the record.
        prompt: The prompt, a text or messages.
        first: An answer, a text or messages.
        second: Another one.
        truth: Whether the record says that the first is the better one; None if it says nothing.
    """

    location: str
    prompt: str | Sequence[Message]
    first: str | Sequence[Message]
    second: str | Sequence[Message]
    truth: bool | None


def decide(forward: float, backward: float) -> float | None:
    """Return the log-odds that the first answer is better, or None if the two orders disagree.

    Args:
        forward: log p("A") - log p("B") with the first answer as A.
        backward: The same with the first answer as B.
    """
    return (forward - backward) / 2 if forward * backward < 0 else None


@dataclass(frozen=True)
class JudgePairs(Stage):
    """Label pairs of answers by a judge; writes {"prompt", "chosen", "rejected", "log_odds"}.

    Records are those of `SampleAnswers` ({"prompt", "samples"}: all pairs of different answers), or preferences ({"prompt", "chosen",
    "rejected"}), with whose labels the agreement of the judge is then reported.

    Args:
        data: Files of the records.
        model: The judge: a run, a model directory, an adapter, a GGUF file, or `openai:URL`.
        principles: What the judge should prefer; with several, their log-odds are added.
        chat: Whether the question is a message of the judge's chat template; endpoints get plain text.
        limit: Most records; 0 for all.
        weights: Data type of the weights, but not of an endpoint's; "" takes bf16 where it is faster.
    """

    main: ClassVar[str] = "data"
    output: ClassVar[str] = "preferences.jsonl"

    data: tuple[str, ...]
    model: str
    principles: tuple[str, ...] = PRINCIPLES
    chat: bool = True
    limit: NonNegativeInt = 0
    weights: Weights = ""

    def check(self) -> None:
        if not any(principle.strip() for principle in self.principles):
            raise UserError("the list of principles is empty: write what the judge prefers")

    def run(self, directory: Path) -> Summary:
        pairs = list(answer_pairs(self.data, self.limit))
        requests = [
            self._request(principle, pair, swapped, letter)
            for pair in pairs
            for swapped in (False, True)
            for principle in self.principles
            for letter in "AB"
        ]
        locations = [pair.location for pair in pairs for _ in range(len(requests) // len(pairs))]
        scores = Asker(self.model, self.weights, scored=True).score(requests, locations)
        logprobs = np.array([score.logprob for score in scores]).reshape(len(pairs), 2, len(self.principles), 2)
        differences = (logprobs[..., 0] - logprobs[..., 1]).sum(-1)  # (pairs, 2)
        decisions = [decide(forward, backward) for forward, backward in differences.tolist()]
        labeled = [(pair, odds) for pair, odds in zip(pairs, decisions, strict=True) if odds is not None]
        if not labeled:
            raise UserError(
                f"the judge {self.model} prefers the same position in both orders of all {len(pairs):,} pairs, so none is "
                "labeled: use a stronger judge"
            )
        write_records(directory / self.output, (labeled_record(pair, odds) for pair, odds in labeled))
        summary: dict[str, float | str] = {
            "pairs": len(pairs),
            "labeled": len(labeled),
            "ties": len(pairs) - len(labeled),
            "share of A": float((differences > 0).mean()),
        }
        known = [(pair.truth, odds) for pair, odds in labeled if pair.truth is not None]
        if known:
            agreement = np.mean([(odds > 0) == truth for truth, odds in known])
            summary["agreement"] = float(agreement)
            summary["agreement, standard error"] = float(np.sqrt(agreement * (1 - agreement) / len(known)))
        return summary

    def _request(self, principle: str, pair: AnswerPair, swapped: bool, letter: str) -> ScoreRequest:
        first, second = (pair.second, pair.first) if swapped else (pair.first, pair.second)
        question = QUESTION.format(
            principle=principle.strip(), prompt=_text(pair.prompt), first=_text(first), second=_text(second)
        )
        if self.chat and not self.model.startswith(PREFIX):
            return ScoreRequest(question, f" {letter}", True, LEAD)
        return ScoreRequest(f"{question}\n\n{LEAD}", f" {letter}")


def _text(value: str | Sequence[Message]) -> str:
    """Return a prompt or an answer as the judge reads it; of several messages each with its role."""
    return value if isinstance(value, str) else "\n\n".join(f"{one['role']}: {one['content']}" for one in value)


def _short(messages: Sequence[Message], role: str) -> str | Sequence[Message]:
    """Return a single message of a role as a text, and any others as they are."""
    return messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == role else messages


def labeled_record(pair: AnswerPair, odds: float) -> dict[str, Any]:
    """Return a preference record."""
    chosen, rejected = (pair.first, pair.second) if odds > 0 else (pair.second, pair.first)
    return {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected, "log_odds": abs(odds)}


def answer_pairs(paths: Sequence[str], limit: int = 0) -> Iterator[AnswerPair]:
    """Yield the pairs of answers in some files.

    The chosen answer of a preference is the first or the second one in turns, so that no order tells the label.

    Raises:
        UserError: A record is of neither form, or there is no pair.
    """
    count = 0
    for number, (location, record) in enumerate(records(paths)):
        if limit and number == limit:
            break
        if "samples" in record:
            samples = record["samples"]
            if not isinstance(samples, list) or not all(isinstance(text, str) for text in samples):
                raise UserError(f"{location}: samples must be a list of texts")
            if not isinstance(record.get("prompt"), str):
                raise UserError(f"{location}: the record has samples, and no prompt that is a text")
            for first, second in itertools.combinations(dict.fromkeys(samples), 2):
                count += 1
                yield AnswerPair(location, record["prompt"], first, second, None)
            continue
        try:
            prompt, chosen, rejected = comparison(record)
        except UserError as error:
            raise UserError(f"{location}: {error}") from error
        better, worse = _short(chosen, "assistant"), _short(rejected, "assistant")
        first, second = (better, worse) if number % 2 == 0 else (worse, better)
        count += 1
        yield AnswerPair(location, _short(prompt, "user"), first, second, number % 2 == 0)
    if not count:
        raise UserError(f"{', '.join(paths)}: there are no two different answers to a prompt")


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
