"""Few labeled and many unlabeled texts, for semi-supervised learning (`firth.objectives.semi_supervised`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig, WrappingConfig
from firth.data.labeled import LabeledConfig
from firth.data.shuffle import epoch_permutation
from firth.data.source import MixtureSource, Source, SubsetSource, UnlabeledSource
from firth.fields import NonNegativeInt, PositiveFloat, path_field
from firth.types import UserError

if TYPE_CHECKING:
    from firth.objectives.objective import Objective


def choose_labeled(source: Source, num_labeled: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of `num_labeled` labeled examples, balanced over the classes, and those of all others; both ascending.

    The choice depends on the seed.

    Raises:
        UserError: A class has fewer examples than its share.
    """
    labels = np.array([int(source[i]["label"]) for i in range(len(source))])
    _, drawn = epoch_permutation(len(source), seed, np.arange(len(source)))
    classes = np.unique(labels)
    chosen = np.zeros(len(source), bool)
    for class_index, label in enumerate(classes):
        share = num_labeled // len(classes) + (class_index < num_labeled % len(classes))
        of_class = drawn[labels[drawn] == label][:share]
        if len(of_class) < share:
            raise UserError(
                f"{num_labeled} labeled examples are required, and class {label} has only {len(of_class)} of its {share}"
            )
        chosen[of_class] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


@dataclass(frozen=True)
class PartiallyLabeledConfig(WrappingConfig):
    """Labeled records and unlabeled texts. Set one of `num_labeled` and `unlabeled_path`.

    Args:
        base: The labeled examples.
        num_labeled: For an experiment: this many records keep their label, balanced over the classes; the others lose it.
        unlabeled_ratio: Unlabeled texts per labeled text in every batch.
        unlabeled_path: Files of unlabeled texts. Held-out texts are removed from them.
    """

    base: ExamplesConfig = LabeledConfig()
    num_labeled: NonNegativeInt = 0
    unlabeled_ratio: PositiveFloat = 3.0
    unlabeled_path: tuple[str, ...] = path_field("files", ())

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        if bool(self.num_labeled) == bool(self.unlabeled_path):
            raise UserError(
                "set one of examples.unlabeled_path=[FILE], files of texts without a label, and examples.num_labeled=N, a trial "
                "in which N records keep their label and the others are read without it"
            )
        whole = self.base.build(data, objective)
        if self.unlabeled_path:
            parts: list[Source] = [whole.train, self._unlabeled(whole.validation, data)]
            return replace(whole, train=MixtureSource(parts, [1.0, self.unlabeled_ratio]))
        known, others = choose_labeled(whole.train, self.num_labeled, data.seed)
        if not len(others):
            raise UserError(
                f"all {self.num_labeled} records keep their label and none is left without: lower examples.num_labeled"
            )
        data.log(
            f"a trial: {len(known):,} of {len(whole.train):,} records keep their label (examples.num_labeled={self.num_labeled})"
        )
        parts = [SubsetSource(whole.train, known), UnlabeledSource(SubsetSource(whole.train, others))]
        return replace(whole, train=MixtureSource(parts, [1.0, self.unlabeled_ratio]))

    def _unlabeled(self, valid: Source | None, data: BuildContext) -> Source:
        """Return the texts of `unlabeled_path` without those that are held out."""
        texts = self.base.unlabeled(self.unlabeled_path, data)
        if valid is None:
            return texts
        held = np.isin(texts.group_ids, valid.group_ids)
        if held.all():
            raise UserError(
                f"all {len(texts):,} texts of examples.unlabeled_path are held out, so none is left to train on: give other files"
            )
        if held.any():
            data.log(
                f"{held.sum():,} of {len(texts):,} texts in examples.unlabeled_path are left out: they are held out; the first is number "
                f"{held.argmax() + 1:,}"
            )
        return UnlabeledSource(SubsetSource(texts, np.flatnonzero(~held))) if held.any() else texts
