"""Classifiers from few labels, and from many noisy ones, each beginning from a pretrained encoder.

Few labels and many texts without one: a classifier of the labelled records is the teacher, and its classes of the texts that
it is sure of are learned like labels (pseudo-labels).

    firth train classification init_from=runs/bert data=labelled.csv --out runs/teacher
    firth train semi_supervised init_from=runs/bert data=labelled.csv examples.teacher=runs/teacher examples.unlabeled_path=[more.txt]

`more.txt` has one text a line; a table or JSON lines will do too. A trial of the method on records that all have a label is
`examples.num_labeled=100` in place of `examples.unlabeled_path`: 100 keep theirs. `objective=consistency examples=partially_labeled` needs no teacher: the
model must judge a text alike when words are masked. It was worse than the labelled records alone with every seed.

Several labels for each record, some of them wrong: all votes are learned from.

    firth train weak_supervision init_from=runs/bert data.path=voted.jsonl              records {"text", "labels": [...]}
    firth train weak_supervision init_from=runs/bert data=labelled.csv examples=simulated_annotators    a simulation: the labels are replaced by votes

The simulation has `examples.num_annotators=5` annotators who are right with probability `examples.annotator_accuracy=0.7`.

Baselines: `classify` on the labelled records alone, and `firth train weak_supervision objective=classification`, which reads the majority of
the same votes. The measurements are in docs/results/index.md.
"""

from __future__ import annotations

from dataclasses import replace

from firth.objectives.multi_annotator import MultiAnnotator
from firth.objectives.semi_supervised import PseudoLabels
from firth.objectives.weight_penalty import WeightPenalty
from firth.recipes.finetuning import classification
from firth.runs.noisy_label_examples import MultiAnnotatorConfig, PseudoLabeledConfig
from firth.runs.recipe import Recipe


def semi_supervised() -> Recipe:
    """A class for a text, from few labels and a teacher's pseudo-labels of other texts; a penalty replaces weight decay.

    Confidence and ramp are those that were measured (docs/results/index.md): above the labels alone with each of three seeds.
    """
    plain = classification()
    return replace(
        plain, name="semi_supervised", objective=PseudoLabels(confidence=0.8, ramp_steps=30) + WeightPenalty(weight=1e-6), examples=PseudoLabeledConfig(),
        batch=replace(plain.batch, size=64), optimizer=replace(plain.optimizer, weight_decay=0.0),
    )  # fmt: skip


def weak_supervision() -> Recipe:
    """A class for a text, from the votes of several annotators."""
    return replace(classification(), name="weak", objective=MultiAnnotator(), examples=MultiAnnotatorConfig())
