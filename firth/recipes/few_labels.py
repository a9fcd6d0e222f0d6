"""Classifiers from few labels, and from many noisy ones, each beginning from a pretrained encoder.

    firth train semi_supervised start=runs/bert source=labelled.csv segment.others=[more.txt]     one text a line
    firth train semi_supervised start=runs/bert source=labelled.csv segment.few=100               a trial: 100 keep theirs
    firth train weak start=runs/bert source.path=labelled.jsonl segment.annotators=5 segment.accuracy=0.7
    firth train weak start=runs/bert source.path=voted.jsonl segment=votes               records {"text", "labels": [...]}

Beside them: `classify` on the labelled records alone; and `firth train weak objective=classification`, which reads
the majority's label of the same votes. What was measured of them is in docs/results.md.
"""

from __future__ import annotations

from dataclasses import replace

from firth.objectives.penalty import Penalty
from firth.objectives.semi_supervised import Consistency
from firth.objectives.weak import Weak
from firth.recipes.labels import Partly, Voted
from firth.recipes.recipe import Recipe
from firth.recipes.tasks import classify


def semi_supervised() -> Recipe:
    """100 labels, and every other text for consistency with itself; the penalty stands in the decay's place."""
    plain = classify()
    return replace(
        plain, name="semi_supervised", objective=Consistency(ramp=100) + Penalty(weight=1e-6), segment=Partly(few=100),
        batch=replace(plain.batch, rows=64), optimizer=replace(plain.optimizer, weight_decay=0.0),
    )  # fmt: skip


def weak() -> Recipe:
    """Five annotators, each right seven times of ten, and all their votes."""
    return replace(classify(), name="weak", objective=Weak(), segment=Voted())
