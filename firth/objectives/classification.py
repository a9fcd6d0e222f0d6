"""Classification: a linear reading of one state, y ~ A h_T + b, with the gradient through everything.

(GPT, Radford 2018, section 3.2; BERT, Devlin 2019, section 4.1.)

An encoder reads both ways and answers at [CLS]; a decoder reads left to right and answers at the last token, the only
one that has seen the whole text. An encoder-decoder reads the text with its encoder and answers at the first token that
its decoder would write: T5's text to text (Raffel 2020, section 2.4) with an answer of one word, and that word's place in
the vocabulary learnt with it. (BART's decoder reads the whole text once more, at twice the cost.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from firth.data import layout
from firth.model.lm import LM
from firth.model.shape import Reads, Shape
from firth.objectives.objective import Objective, asked, choice_loss, correct
from firth.text.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs

Place = Literal["first", "last", "answer"]


def place(shape: Shape, reads: Reads = "any") -> Place:
    """Where a class is read off a model of this shape that has learnt to read a text so.

    >>> from firth.model.shape import decoder, encoder, encoder_decoder
    >>> [place(make(vocab=9, width=64, depth=1)) for make in (encoder, decoder, encoder_decoder)]
    ['first', 'last', 'answer']
    """
    if "source" in shape.honours:
        return "answer"
    return "first" if "both" in shape.honours and reads != "left" else "last"


def answers(width: int, count: int) -> nn.Linear:
    """A linear reading of a state, one number for each answer, that begins near zero."""
    head = nn.Linear(width, count)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


@dataclass(frozen=True)
class Classification(Objective):
    """Which of the classes a text has: {"tokens", "label"} (and "segments", of a pair).

    classes: their names; a label is a number into them. at: "first" for an encoder, "last" for a decoder, "answer" for an
    encoder-decoder (`place`).

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"tokens": np.array([1, 5, 6, 2]), "label": 1}
    >>> seen = Classification(classes=("bad", "good")).view(example, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["class"].tolist()
    ([1, 5, 6, 2], [1, -100, -100, -100])
    """

    targets: ClassVar[dict[str, str]] = {"class": "class"}
    measures: ClassVar[dict[str, str]] = {"accuracy": "class"}

    classes: tuple[str, ...] = ()
    at: Place = "first"

    def reads(self) -> Reads:
        ways: dict[Place, Reads] = {"first": "both", "last": "left", "answer": "source"}
        return ways[self.at]

    def named(self, classes: Callable[[], tuple[str, ...]]) -> Objective:
        return self if self.classes else dataclasses.replace(self, classes=classes())

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        return {"classes": answers(shape.width, len(self.classes))}

    def view(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        shown = {name: example[name] for name in ("tokens", "segments") if name in example}
        if self.at == "answer":
            asked_ = layout.seq2seq(example["tokens"], np.array([example["label"]]), vocab.pad)
            asked_["class"] = asked_.pop("labels")
            return asked_
        n = len(shown["tokens"])
        answer = np.full(n, IGNORE)
        answer[0 if self.at == "first" else -1] = example["label"]
        return shown | {"class": answer} | (layout.causal(n) if self.at == "last" else {})

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, wanted = asked(outputs["hidden"], batch["class"])
        scores = model.parts["classes"](states)  # (N, classes)
        return {"class": choice_loss(scores, wanted), "accuracy": correct(scores, wanted)}
