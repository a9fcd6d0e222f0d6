"""Few labeled and many unlabeled texts, for semi-supervised learning (`firth.objectives.semi_supervised`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from firth.data.shuffle import epoch_permutation
from firth.data.source import Source, WrappedSource
from firth.types import IGNORE, Example, UserError


class UnlabeledSource(WrappedSource):
    """The examples of a source with their labels replaced by IGNORE."""

    @property
    def counts(self) -> Mapping[str, int]:
        return {"unlabeled": len(self)}

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        return {}

    def __getitem__(self, index: int) -> Example:
        return self.source[index] | {"label": np.int64(IGNORE)}


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
