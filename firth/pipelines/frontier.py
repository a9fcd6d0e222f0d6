"""Compare models that were aligned in different ways: reward, truth, divergence and compute on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from firth.align.answers import per_token_numbers
from firth.align.rewards import FunctionReward, RewardFunction, RewardModel, Rollout, named_function, score_rollouts
from firth.align.rollouts import RolloutsConfig
from firth.data.dialogues import Prompt, prompts
from firth.evaluate.task import EvaluatedModel, load_evaluated_model
from firth.evaluate.tokenizer_match import check_same_tokenizer
from firth.fields import NonNegativeInt, PositiveInt, TokenCount
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.io.atomic import write_text
from firth.io.json_files import read_json
from firth.pipelines.best_of_n import best_of, kl_bound, load_reward_model
from firth.pipelines.stage import Stage, Summary
from firth.report.charts import Curve, Figure
from firth.report.page import Cell, Report, Section, Table, write
from firth.runs.recipe import load
from firth.types import LOGGER, UserError


class Mean(NamedTuple):
    """A mean over prompts and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class MethodResult:
    """Result of a method; None where it has no such number.

    Args:
        method: Name of the model's directory, "prompt", or "best of n".
        reward: The reward that methods were trained on.
        truth: The true reward.
        kl: Divergence from the reference in nats per answer; of best-of-n the largest that it can have.
        finished: Share of answers with a stop token.
        length: Tokens of an answer.
        samples: Answers that the run sampled to train on; of best-of-n, those sampled for each answer.
        steps: Optimizer steps of the run.
        teraflops: Counted compute of the run, without sampling.
        minutes: Time of the run.
    """

    method: str
    reward: Mean
    truth: Mean | None
    kl: float
    finished: float | None = None
    length: float | None = None
    samples: int | None = None
    steps: int | None = None
    teraflops: float | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class CompareMethods(Stage):
    """Compare models on held-out prompts, and best-of-n of the reference; writes results.json and report.html.

    Each model answers each prompt once, sampled at temperature 1. The divergence is exact at each state of the sampled answers.

    Args:
        models: Runs or model directories with the tokenizer of the reference.
        reference: The model that all started from.
        prompt: A model that is only prompted, such as the one that the reference was finetuned from; "" for none.
        data: Files of records with prompts that no model was trained on.
        reward_function: `module:function`; "" for none.
        reward_model: The run of a reward model; "" for none.
        true_reward_function: A further function, which no method was trained on; "" for none.
        best_of: Numbers of samples for best-of-n.
        max_new_tokens: Most tokens of an answer.
        limit: Most prompts; 0 for all.
        seed: Seed of sampling.
    """

    main: ClassVar[str] = "models"
    output: ClassVar[str] = "results.json"

    models: tuple[str, ...]
    reference: str
    data: tuple[str, ...]
    prompt: str = ""
    reward_function: str = ""
    reward_model: str = ""
    true_reward_function: str = ""
    best_of: tuple[PositiveInt, ...] = (4, 16)
    max_new_tokens: TokenCount = 48
    limit: NonNegativeInt = 200
    seed: NonNegativeInt = 0

    def check(self) -> None:
        if bool(self.reward_function) == bool(self.reward_model):
            raise UserError("set reward_function or reward_model, one of them")

    def run(self, directory: Path) -> Summary:
        start = load_evaluated_model(Path(self.reference))
        shown, _, _ = prompts(self.data, start.tokenizer, start.model.context - self.max_new_tokens)
        shown = shown[: self.limit] if self.limit else shown
        if len(shown) < 2:
            raise UserError(f"{', '.join(self.data)}: a comparison needs two prompts or more that fit the model")
        reward = self._reward(start)
        truth = FunctionReward(named_function(self.true_reward_function)) if self.true_reward_function else None
        results = []
        for name in dict.fromkeys(filter(None, (self.reference, self.prompt, *self.models))):
            LOGGER.info(f"{name}: {len(shown):,} answers")
            results.append(self._measure(name, start, shown, reward, truth))
        results += self._best_of_n(start, shown, reward, truth)
        write_text(directory / self.output, json.dumps([asdict(one) for one in results], indent=1) + "\n")
        write(frontier_report(results), directory / "report.html")
        summary: dict[str, float | str] = {}
        for one in results:
            summary[f"reward, {one.method}"] = one.reward.value
            if one.truth is not None:
                summary[f"truth, {one.method}"] = one.truth.value
            summary[f"KL, {one.method}"] = one.kl
        return summary

    def _reward(self, start: EvaluatedModel) -> RewardFunction:
        """Return the reward, which must read the token ids of the reference."""
        if not self.reward_model:
            return FunctionReward(named_function(self.reward_function))
        loaded = load_reward_model(self.reward_model)
        check_same_tokenizer(
            loaded.tokenizer,
            start.model_directory,
            f"{self.reward_model}:",
            "train the reward model from the same start",
        )
        return RewardModel(loaded.model)

    def _measure(
        self, name: str, start: EvaluatedModel, shown: Sequence[Prompt], reward: RewardFunction, truth: RewardFunction | None
    ) -> MethodResult:  # fmt: skip
        """Return the result of a model."""
        loaded = start if name == self.reference else load_evaluated_model(Path(name))
        check_same_tokenizer(loaded.tokenizer, start.model_directory, f"{name}:", "compare models of one start")
        samples = self._answers(loaded, shown, 1)
        numbers = per_token_numbers(loaded.model, start.model, samples, 32)
        rewards = score_rollouts(reward, samples, start.tokenizer)
        truths = None if truth is None else score_rollouts(truth, samples, start.tokenizer)
        done = Path(name) / "done.json"
        cost = read_json(done)
        return MethodResult(
            "prompt" if name == self.prompt else Path(name).name, _mean(rewards), None if truths is None else _mean(truths),
            kl=float(numbers["kl"].sum(1).mean()),
            finished=float(np.mean([sample.finished for sample in samples])),
            length=float(numbers["real"].sum(1).mean()),
            samples=_sampled(Path(name)),
            steps=cost.get("steps"),
            teraflops=cost["flops"] / 1e12 if "flops" in cost else None,
            minutes=cost["seconds"] / 60 if "seconds" in cost else None,
        )  # fmt: skip

    def _best_of_n(
        self, start: EvaluatedModel, shown: Sequence[Prompt], reward: RewardFunction, truth: RewardFunction | None
    ) -> list[MethodResult]:
        """Return the results of best-of-n of the reference."""
        if not self.best_of:
            return []
        samples = self._answers(start, shown, max(self.best_of))
        scores = score_rollouts(reward, samples, start.tokenizer).reshape(len(shown), -1)
        true = None if truth is None else score_rollouts(truth, samples, start.tokenizer).reshape(len(shown), -1)
        return [
            MethodResult(
                f"best of {n}",
                _mean(best_of(scores, n)),
                None if true is None else _mean(best_of(scores, n, true)),
                kl=kl_bound(n),
                samples=n,
            )
            for n in self.best_of
        ]

    def _answers(self, loaded: EvaluatedModel, shown: Sequence[Prompt], count: int) -> list[Rollout]:
        """Return `count` sampled answers to each prompt, those of one prompt in sequence."""
        repeated = [prompt for prompt in shown for _ in range(count)]
        written = Engine(loaded.model, loaded.tokenizer).generate(
            [prompt.tokens for prompt in repeated], Sampling(max_new_tokens=self.max_new_tokens, seed=self.seed)
        )
        return [Rollout.of(p.tokens, w, p.fields) for p, w in zip(repeated, written, strict=True)]


def _sampled(directory: Path) -> int | None:
    """Return the answers that a run sampled to train on; None if it samples none or is not a run."""
    recipe, metrics = directory / "recipe.yaml", directory / "metrics.jsonl"
    if not recipe.is_file() or not metrics.is_file():
        return None
    examples = load(str(directory)).examples
    if not isinstance(examples, RolloutsConfig):
        return None
    phases = sum(json.loads(line)["split"] == "rollouts" for line in metrics.read_text("utf-8").splitlines())
    return phases * examples.rollout_size


def _mean(values: np.ndarray) -> Mean:
    return Mean(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))


def frontier_report(results: Sequence[MethodResult]) -> Report:
    """Return the page: reward and truth over the divergence, and the table of all methods."""

    def figure(title: str, y: str, found: Sequence[tuple[MethodResult, Mean]]) -> Figure:
        curves = [
            Curve(one.method, [one.kl], [mean.value], points=True, intervals=[_interval(mean)]) for one, mean in found
        ]
        return Figure(title, "KL from the reference, nats per answer", y, tuple(curves))

    figures = [figure("Reward", "reward", [(one, one.reward) for one in results])]
    true = [(one, one.truth) for one in results if one.truth is not None]
    if true:
        figures.append(figure("Truth", "true reward", true))
    note = (
        "Intervals are 95%, over prompts. The KL of best-of-n is the largest that it can have. Samples are the answers that a "
        "run sampled to train on; best-of-n samples them for each answer. Compute counts training steps, without sampling and without the "
        "runs that a method starts from."
    )
    return Report(
        "Methods side by side", sections=(Section("", figures=figures, tables=(Table("", HEAD, rows(results), note),)),)
    )


HEAD = ("method", "reward", "± se", "truth", "± se", "KL", "tokens", "finished", "samples", "steps", "TFLOP", "minutes")
"""Columns of the table of methods."""


def rows(results: Sequence[MethodResult]) -> list[tuple[Cell, ...]]:
    """Return the rows of the table of methods."""
    return [
        (
            one.method, *_cells(one.reward), *_cells(one.truth), round(one.kl, 3), _rounded(one.length, 1), _rounded(one.finished, 3),
            one.samples, one.steps, _rounded(one.teraflops, 2), _rounded(one.minutes, 1),
        )
        for one in results
    ]  # fmt: skip


def printed(results: Sequence[MethodResult]) -> str:
    """Return the table of methods as lines of text, without columns that are empty in all rows."""
    body = [["" if cell is None else str(cell) for cell in row] for row in rows(results)]
    columns = [column for column in zip(HEAD, *body, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in zip(*columns, strict=True)
    )


def read_results(path: Path) -> list[MethodResult]:
    """Return the results that a `CompareMethods` stage wrote."""
    found = json.loads(path.read_text("utf-8"))
    means = [{name: one[name] and Mean(*one[name]) for name in ("reward", "truth")} for one in found]
    return [MethodResult(**{**one, **mean}) for one, mean in zip(found, means, strict=True)]


def _interval(mean: Mean) -> tuple[float, float]:
    return mean.value - 1.96 * mean.stderr, mean.value + 1.96 * mean.stderr


def _cells(mean: Mean | None) -> tuple[float | None, float | None]:
    return (None, None) if mean is None else (round(mean.value, 4), round(mean.stderr, 4))


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
