"""Segments of the last stages: comparisons that a judge makes, what a frozen reference says of them, and answers that the
model itself writes and is paid for.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from firth.align.annotate import annotate
from firth.align.credit import GAE, Baseline
from firth.align.rewards import Comparisons, Judge, RewardModel, Sample, Truth, read_comparisons
from firth.align.rollouts import Phase
from firth.align.rollouts import Rollouts as OnPolicy
from firth.data import records
from firth.data.source import Source
from firth.data.split import held_out_keys
from firth.evaluate.tokenizer_match import check_same_tokenizer
from firth.generate.engine import Engine
from firth.generate.sample import Sampling
from firth.model.lm import LM
from firth.model.weights import load_model
from firth.objectives.dpo import comparison, reference
from firth.objectives.objective import Objective
from firth.objectives.ppo import PER_TOKEN
from firth.ranges import FiniteFloat, NonNegativeFloat, PositiveInt, TokenCount
from firth.recipes import held_out_texts
from firth.recipes.held_out_texts import HeldOutTexts
from firth.recipes.material import Material
from firth.recipes.segments import COMPARED, Cut, Preferences, Segment, model_directory, needed, recorded
from firth.types import UserError


@dataclass(frozen=True)
class Sampled(Segment):
    """Comparisons of answers that a model of ours has sampled, with the very tokens it wrote (`firth.align.rewards`)."""

    gives: ClassVar[frozenset[str]] = COMPARED

    def cut(self, material: Material, objective: Objective) -> Cut:
        def read(paths: Sequence[str]) -> Source:
            return Comparisons([c for path in paths for c in read_comparisons(Path(path))])

        return recorded(material, read)


@dataclass(frozen=True)
class Referenced(Segment):
    """Comparisons with the log-probabilities that the model they start from gives to both answers: what DPO reads."""

    pairs: Segment = Preferences()

    @property
    def given(self) -> frozenset[str]:
        return self.pairs.given | {"reference"}

    def cut(self, material: Material, objective: Objective) -> Cut:
        model = load_model(needed(material.start, "start", "the model that DPO starts from and is held to"))
        model.restrict(material.tokenizer.vocab)
        plain = self.pairs.cut(material, objective)
        known = [
            annotate(source, model, comparison, reference, directory=material.directory / "reference" / part)
            if source is not None else None
            for part, source in (("train", plain.train), ("valid", plain.valid))
        ]  # fmt: skip
        assert known[0] is not None
        return dataclasses.replace(plain, train=known[0], valid=known[1])


@dataclass(frozen=True)
class Rollouts(Segment):
    """Answers that the model itself writes to the prompts of the records, judged, and learnt from for `epochs`.

    answers: drawn per phase, `group` to each prompt.
    max_new: most tokens of an answer. longest: most tokens of a prompt. beta: the price of a nat of divergence from
    the start. reward: the run of a reward model; or scorer: a function of the answer's text as `module:function`.
    truth: a second such function that is measured and not learnt from. unfinished: the score of an answer that ran to max_new
    without a stop token; not set, the judge gives it. credit: "gae" for PPO, "group" for REINFORCE.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"tokens", "mask", *PER_TOKEN})
    wants: ClassVar[frozenset[str]] = frozenset({"mask"})

    answers: PositiveInt = 64
    group: PositiveInt = 1
    epochs: PositiveInt = 2
    max_new: TokenCount = 48
    longest: TokenCount = 192
    beta: NonNegativeFloat = 0.05
    reward: str = ""
    scorer: str = ""
    truth: str = ""
    unfinished: FiniteFloat | None = None
    credit: Literal["gae", "group"] = "gae"

    def cut(self, material: Material, objective: Objective) -> Cut:
        start = load_model(needed(material.start, "start", "the model that writes the first answers and is held to"))
        found, keys = records.prompts(material.source.paths(material.echo), material.tokenizer, self.longest)
        aside = held_out_keys(keys, 0.0 if material.source.valid else material.source.held_out, len(found))
        prompts, held = ([p for p, out in zip(found, aside, strict=True) if out == side] for side in (False, True))
        if material.source.valid:
            held, _ = records.prompts(material.source.valid, material.tokenizer, self.longest)
        if bool(self.reward) == bool(self.scorer):
            raise UserError("rollouts need one judge: set segment.reward=RUN or segment.scorer=module:function")
        judge: Judge = Truth(function(self.scorer)) if self.scorer else self._reward_model(material, prompts, start)
        steps, over = divmod(self.answers * self.epochs, material.rows)
        if over or not steps:
            raise UserError(
                f"{self.answers} answers for {self.epochs} epochs do not fill steps of batch.rows={material.rows} evenly"
            )
        source = OnPolicy(
            prompts, material.tokenizer, judge, start, seed=material.seed,
            phase=Phase(
                answers=self.answers, group=self.group, steps=steps, max_new=self.max_new, beta=self.beta,
                unfinished=self.unfinished,
            ),
            credit=Baseline() if self.credit == "group" else GAE(),
            truth=Truth(function(self.truth)) if self.truth else None,
        )  # fmt: skip
        shown = [{"tokens": prompt} for prompt in (held or prompts)[: held_out_texts.COUNT]]
        return Cut(source, None, texts=HeldOutTexts(shown, bool(held), judge, self.max_new))

    def _reward_model(self, material: Material, prompts: Sequence[np.ndarray], start: LM) -> Judge:
        """Its zero and unit are those of the start's own answers, so that beta means the same beside every judge."""
        run = model_directory(self.reward)
        cure = "train the reward model from the same start as the policy"
        check_same_tokenizer(material.tokenizer, run, "segment.reward:", cure)
        judge = RewardModel(load_model(run))
        some = [prompts[i] for i in range(0, len(prompts), max(1, len(prompts) // 64))][:64]
        written = Engine(start, material.tokenizer).generate(some, Sampling(max_new=self.max_new, seed=material.seed))
        return judge.normalised([Sample.of(p, w) for p, w in zip(some, written, strict=True)])


def function(name: str) -> Callable[[str], float]:
    """The scorer that `module:function` names; UserError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        found: Callable[[str], float] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{name!r} names no function: write package.module:function ({error})") from None
    return found


SEGMENTS: dict[str, type[Segment]] = {"sampled": Sampled, "referenced": Referenced, "rollouts": Rollouts}
"""Name in a recipe -> class, beside those of `firth.recipes.segments`."""
