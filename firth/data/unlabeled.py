"""Few labels and many texts without one: what semi-supervised learning reads (`firth.objectives.semi_supervised`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from firth.data.shuffle import epoch_permutation
from firth.data.source import Source, WrappedSource
from firth.types import IGNORE, Example, UserError


class UnlabeledSource(WrappedSource):
    """The examples of a source as if nobody knew their class: label IGNORE."""

    @property
    def counts(self) -> Mapping[str, int]:
        return {"unlabelled": len(self)}

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        return {}

    def __getitem__(self, index: int) -> Example:
        return self.source[index] | {"label": np.int64(IGNORE)}


def choose_labeled(source: Source, few: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of `few` labelled examples, as many of each class as can be, and of all the others; both ascending.

    Which they are is drawn by the seed. UserError if a class has fewer than its share.
    """
    labels = np.array([int(source[i]["label"]) for i in range(len(source))])
    _, drawn = epoch_permutation(len(source), seed, np.arange(len(source)))
    classes = np.unique(labels)
    chosen = np.zeros(len(source), bool)
    for place, label in enumerate(classes):
        share = few // len(classes) + (place < few % len(classes))
        these = drawn[labels[drawn] == label][:share]
        if len(these) < share:
            raise UserError(
                f"{few} labelled examples were asked for, and class {label} has {len(these)} of its {share}"
            )
        chosen[these] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)
