"""Classification: a linear reading of one state, y ~ A h_T + b, with the gradient through everything.

(GPT, Radford 2018, section 3.2; BERT, Devlin 2019, section 4.1.)

An encoder reads both ways and answers at [CLS]; a decoder reads left to right and answers at the last token, the only
one that has seen the whole text. An encoder-decoder reads the text with its encoder and answers at the first token that
its decoder would write: T5's text to text (Raffel 2020, section 2.4) with an answer of one word, and that word's place in
the vocabulary learnt with it. (BART's decoder reads the whole text once more, at twice the cost.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from firth.data import layout
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.model import LM
from firth.objectives.objective import DataStats, Objective, choice_loss, num_correct, supervised
from firth.pretrained.families import families_of
from firth.pretrained.families.heads import head_of
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs, UserError
from firth.validated import NonNegativeFloat, ShareBelowOne

Readout = Literal["first", "last", "answer"]
READOUTS: dict[str, AttentionPattern] = {"auto": "any", "first": "bidirectional", "last": "causal", "answer": "seq2seq"}
"""Where an answer is read -> how the text has to be read for it; "auto" is settled by the shape."""


def readout_of(config: ModelConfig, reads: AttentionPattern = "any") -> Readout:
    """Where a class is read off a model of this shape that has learnt to read a text so.

    >>> from firth.model.config import decoder_config, encoder_config, encoder_decoder_config
    >>> [readout_of(make(vocab_size=9, hidden_size=64, num_layers=1)) for make in (encoder_config, decoder_config, encoder_decoder_config)]
    ['first', 'last', 'answer']
    """
    if "seq2seq" in config.supported_patterns:
        return "answer"
    return "first" if "bidirectional" in config.supported_patterns and reads != "causal" else "last"


def classification_head(width: int, count: int) -> nn.Linear:
    """A linear reading of a state, one number for each answer, that begins near zero."""
    head = nn.Linear(width, count)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def ask_at_position(name: str, answer: float, example: Example, at: Readout, vocab: Vocab) -> Example:
    """A text with one question about it: the answer stands in the field `name` where it is to be read, IGNORE elsewhere.

    >>> vocab = Vocab(size=9, roles={"pad": 0}, special=np.arange(9) < 1)
    >>> {k: v.tolist() for k, v in ask_at_position("class", 2, {"tokens": np.array([5, 6])}, "answer", vocab).items()}
    {'source_tokens': [5, 6], 'tokens': [0], 'query_time': [0], 'key_time': [0], 'class': [2]}
    """
    if at == "answer":
        shown = layout.seq2seq(example["tokens"], np.zeros(1, np.int64), vocab.start)
        del shown["labels"]
        return shown | {name: np.array([answer])}
    shown = {field: example[field] for field in ("tokens", "token_type_ids") if field in example}
    n = len(shown["tokens"])
    answers = np.full(n, IGNORE, np.asarray(answer).dtype)
    answers[0 if at == "first" else -1] = answer
    return shown | {name: answers} | (layout.causal(n) if at == "last" else {})


@dataclass(frozen=True)
class ReadoutObjective(Objective):
    """What is read off one state of a text. at: "first" for an encoder, "last" for a decoder, "answer" for an
    encoder-decoder; "auto" is whichever suits the shape (`place`). asks: the fields that hold what is asked there."""

    asks: ClassVar[tuple[str, ...]] = ("class",)

    position: Readout | Literal["auto"] = "auto"

    @property
    def place(self) -> Readout:
        """Where the answer is read; at the first token while no shape is known."""
        return "first" if self.position == "auto" else self.position

    def attention_pattern(self) -> AttentionPattern:
        return READOUTS[self.position]

    def for_model(self, config: ModelConfig) -> Objective:
        return dataclasses.replace(self, position=readout_of(config)) if self.position == "auto" else self

    def needed_positions(self, batch: Batch) -> Tensor | None:
        return functools.reduce(torch.logical_or, (batch[name] != IGNORE for name in self.asks))


@dataclass(frozen=True)
class Classification(ReadoutObjective):
    """Which of the classes a text has: {"tokens", "label"} (and "token_type_ids", of a pair).

    classes: their names; a label is a number into them. smoothing: the share of a label that is spread over all classes.
    weights: what an example of each class counts; "balanced" gives every class the same weight in all, however rare it is:
    n / (K n_k), whose mean over the examples is 1. head: "linear", or "family" for the head that transformers' class for such
    texts has (BERT's pooler and its linear map), so that what is exported is that class, head and all.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"tokens": np.array([1, 5, 6, 2]), "label": 1}
    >>> seen = Classification(class_names=("bad", "good")).build_example(example, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["class"].tolist()
    ([1, 5, 6, 2], [1, -100, -100, -100])
    >>> Classification(class_weights="balanced").with_stats(lambda: DataStats(("ham", "spam"), (90, 10))).weights
    (0.5555555555555556, 5.0)
    """

    labels: ClassVar[dict[str, str]] = {"class": "class"}
    metrics: ClassVar[dict[str, str]] = {"accuracy": "class"}

    class_names: tuple[str, ...] = ()
    label_smoothing: ShareBelowOne = 0.0
    class_weights: tuple[NonNegativeFloat, ...] | Literal["balanced"] = ()
    head: Literal["linear", "family"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            self.class_weights
            and self.class_weights != "balanced"
            and self.class_names
            and len(self.class_weights) != len(self.class_names)
        ):
            raise UserError(
                f"there are {len(self.class_weights)} weights for {len(self.class_names)} classes: give one for each"
            )

    def with_stats(self, stats: Callable[[], DataStats]) -> Objective:
        named = self if self.class_names else dataclasses.replace(self, class_names=stats().class_names)
        if self.class_weights != "balanced":
            return named
        counts = stats().class_counts
        share = sum(counts) / len(counts)
        return dataclasses.replace(named, class_weights=tuple(share / n if n else 0.0 for n in counts))

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"tokens", "label"})

    def missing_from(self, config: ModelConfig) -> str:
        # XLNet's, T5's and BART's classes read their answer where none of our places is.
        elsewhere = config.num_encoder_layers or config.position == "xlnet"
        named = any(headed.head_name == "classes" for family in families_of(config) for headed in family.heads)
        if self.head == "linear" or (named and not elsewhere):
            return ""
        return "no class of transformers reads a text with it as firth does, so set objective.head=linear"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        count = len(self.class_names)
        theirs = head_of(families_of(config), "classes", config, count) if self.head == "family" else None
        return {"classes": theirs or classification_head(config.hidden_size, count)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return ask_at_position("class", example["label"], example, self.place, vocab)

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, wanted = supervised(outputs["hidden"], batch["class"])
        scores = model.heads["classes"](states)  # (N, classes)
        return {
            "class": choice_loss(scores, wanted, self.label_smoothing, self.weighing(scores.device)),
            "accuracy": num_correct(scores, wanted),
        }

    def weighing(self, device: torch.device) -> Tensor | None:
        """What each class counts, (classes,); None where all count 1."""
        if self.class_weights == "balanced":
            raise UserError(
                "weights=balanced needs the number of examples of each class, which this data does not tell"
            )
        return torch.tensor(self.class_weights, device=device) if self.class_weights else None
