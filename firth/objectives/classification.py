"""Sequence classification: a linear layer on one hidden state, logits = A h + b, trained together with the model.

(GPT, Radford 2018, section 3.2; BERT, Devlin 2019, section 4.1.)

An encoder attends in both directions and is read at [CLS]; a decoder attends to the left and is read at the last token, the
only one that has seen the whole text. An encoder-decoder encodes the text and is read at the first token that its decoder
would predict: T5's text-to-text (Raffel 2020, section 2.4) with a target of one word, whose row of the vocabulary matrix is
learned too. (BART's decoder reads the whole text once more, at twice the cost.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from firth.data import attention_fields
from firth.fields import NonNegativeFloat, ShareBelowOne
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.model import LM
from firth.objectives.objective import DataStats, Objective, cannot_train, choice_loss, num_correct, supervised
from firth.pretrained.families import families_of
from firth.pretrained.families.heads import head_of
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Constraints, Example, Metric, Outputs, UserError

Readout = Literal["first", "last", "answer"]
READOUTS: dict[str, AttentionPattern] = {"auto": "any", "first": "bidirectional", "last": "causal", "answer": "seq2seq"}
"""Readout position -> the attention pattern it needs; "auto" is resolved by the model config."""


def readout_of(config: ModelConfig, pattern: AttentionPattern = "any") -> Readout:
    """Return the readout position of a model that was trained with an attention pattern.

    >>> from firth.model.config import decoder_config, encoder_config, encoder_decoder_config
    >>> [readout_of(make(vocab_size=9, hidden_size=64, num_layers=1)) for make in (encoder_config, decoder_config, encoder_decoder_config)]
    ['first', 'last', 'answer']
    """
    if "seq2seq" in config.supported_patterns:
        return "answer"
    return "first" if "bidirectional" in config.supported_patterns and pattern != "causal" else "last"


def classification_head(width: int, count: int) -> nn.Linear:
    """Return a linear head with `count` outputs and small initial weights."""
    head = nn.Linear(width, count)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def label_at_position(name: str, label: float, example: Example, at: Readout, vocab: Vocab) -> Example:
    """Return a text with one label: the field `name` holds it at the readout position and IGNORE elsewhere.

    >>> vocab = Vocab(size=9, roles={"pad": 0}, special=np.arange(9) < 1)
    >>> {k: v.tolist() for k, v in label_at_position("class", 2, {"tokens": np.array([5, 6])}, "answer", vocab).items()}
    {'source_tokens': [5, 6], 'tokens': [0], 'query_time': [0], 'key_time': [0], 'class': [2]}
    """
    if at == "answer":
        shown = attention_fields.seq2seq(example["tokens"], np.zeros(1, np.int64), vocab.start)
        del shown["labels"]
        return shown | {name: np.array([label])}
    shown = {field: example[field] for field in ("tokens", "token_type_ids") if field in example}
    n = len(shown["tokens"])
    labels = np.full(n, IGNORE, np.asarray(label).dtype)
    labels[0 if at == "first" else -1] = label
    return shown | {name: labels} | (attention_fields.causal(n) if at == "last" else {})


@dataclass(frozen=True)
class ReadoutObjective(Objective):
    """Base of objectives that read one hidden state of a text.

    Args:
        position: The readout position: "first" for an encoder, "last" for a decoder, "answer" for an encoder-decoder;
            "auto" is the one that fits the model config.
    """

    position: Readout | Literal["auto"] = "auto"

    @property
    def readout(self) -> Readout:
        """The readout position; the first token while no model config is known."""
        return "first" if self.position == "auto" else self.position

    @property
    def attention(self) -> AttentionPattern:
        return READOUTS[self.position]

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Self:
        return dataclasses.replace(self, position=readout_of(config)) if self.position == "auto" else self


@dataclass(frozen=True)
class Classification(ReadoutObjective):
    """Predict the class of a text: {"tokens", "label"} (and "token_type_ids" of a pair).

    Shown: the whole text. Predicted: its class y, at the readout position. Loss: -w_y log softmax(A h + b)[y].

    Args:
        position: See `ReadoutObjective`.
        class_names: Names of the classes; a label is an index into them.
        label_smoothing: Share of a label that is spread evenly over all classes.
        class_weights: Weight of an example of each class. "balanced" gives every class the same total weight:
            n / (K n_k), whose mean over the examples is 1.
        head: "linear", or "family" for the head of transformers' class for sequence classification (BERT's pooler and its
            linear layer), so that the export is that class with its head.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"tokens": np.array([1, 5, 6, 2]), "label": 1}
    >>> seen = Classification(class_names=("bad", "good")).build_example(example, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["class"].tolist()
    ([1, 5, 6, 2], [1, -100, -100, -100])
    >>> from firth.model.config import encoder_config
    >>> stats, config = DataStats(("ham", "spam"), (90, 10)), encoder_config(vocab_size=9, hidden_size=64, num_layers=1)
    >>> Classification(class_weights="balanced").configure(lambda: stats, config).class_weights
    (0.5555555555555556, 5.0)
    """

    labels = {"class": "class"}
    metrics = {"accuracy": Metric("class")}

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
                f"there are {len(self.class_weights)} class_weights for {len(self.class_names)} classes: give one for each"
            )

    @property
    def constraints(self) -> Constraints:
        return Constraints(class_names=self.class_names)

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Self:
        # XLNet's, T5's and BART's classes use a readout position that none of ours is.
        elsewhere = config.encoder.num_layers or config.position.type == "xlnet"
        named = any(headed.head_name == "classes" for family in families_of(config) for headed in family.heads)
        if self.head == "family" and (elsewhere or not named):
            raise cannot_train(
                self, "transformers has no class with such a head at the same position, so set objective.head=linear"
            )
        configured = super().configure(stats, config)
        if not self.class_names:
            configured = dataclasses.replace(configured, class_names=stats().class_names)
        if self.class_weights != "balanced" or not (counts := stats().class_counts):
            return configured
        share = sum(counts) / len(counts)
        return dataclasses.replace(configured, class_weights=tuple(share / n if n else 0.0 for n in counts))

    inputs = frozenset({"tokens", "label"})

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        count = len(self.class_names)
        family_head = head_of(families_of(config), "classes", config, count) if self.head == "family" else None
        return {"classes": family_head or classification_head(config.hidden_size, count)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return label_at_position("class", example["label"], example, self.readout, vocab)

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, targets = supervised(outputs["hidden"], batch["class"])
        scores = model.heads["classes"](states)  # (N, classes)
        return {
            "class": choice_loss(scores, targets, self.label_smoothing, self.class_weight_tensor(scores.device)),
            "accuracy": num_correct(scores, targets),
        }

    def class_weight_tensor(self, device: torch.device) -> Tensor | None:
        """Return the weight of each class, (classes,), or None where all are 1."""
        if self.class_weights == "balanced":
            raise UserError(
                "class_weights=balanced needs the number of examples of each class, which is unknown for this data"
            )
        return torch.tensor(self.class_weights, device=device) if self.class_weights else None
