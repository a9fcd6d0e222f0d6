"""Labels of whole texts: classes, numbers and multiple choice.

Sequence classification: a linear layer on one hidden state, logits = A h + b, trained together with the model.

(GPT, Radford 2018, section 3.2; BERT, Devlin 2019, section 4.1.)

An encoder attends in both directions and is read at [CLS]; a decoder attends to the left and is read at the last token, the
only one that has seen the whole text. An encoder-decoder encodes the text and is read at the first token that its decoder
would predict: T5's text-to-text (Raffel 2020, section 2.4) with a target of one word, whose row of the vocabulary matrix is
learned too. (BART's decoder reads the whole text once more, at twice the cost.)

Regression: predict a number from one hidden state, with the squared error (BERT on STS-B, Devlin 2019, section 4.1).

    a man plays a guitar / a man is playing music         3.2 of 5

The labels are standardized, so that prices and ratings are learned with the same learning rate; the head of the exported
model is converted to the units of the data. (The original learns STS-B's 0 to 5 as they are: `mean=0 std=1`.)

Multiple choice: one score for each option, and a softmax over them (GPT, Radford 2018, figure 1; BERT on SWAG,
Devlin 2019, section 4.4).

    [CLS] She opens the door [SEP] and walks in. [SEP]          1.9   <-
    [CLS] She opens the door [SEP] of the sea. [SEP]           -0.4

Every option is a row that starts with the context, and a question is a group of them.
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
from firth.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, ShareBelowOne
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.heads import standardized_head
from firth.model.model import LM
from firth.objectives.objective import (
    Objective,
    cannot_train,
    choice_loss,
    forward_flops,
    hidden_states,
    num_correct,
    supervised,
)
from firth.objectives.reward_model import last_state, last_token_mask
from firth.pretrained.families import families_of
from firth.pretrained.families.conversion import head_of
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Constraints, DataStats, Example, Metric, Outputs, UserError

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


@dataclass(frozen=True)
class Regression(ReadoutObjective):
    """Predict the number of a text: {"tokens", "score"} (and "token_type_ids" of a pair).

    Shown: the whole text. Predicted: z = (score - mean) / std, at the readout position. Loss: (a h + b - z)^2. The metric
    "squared_error" is in the units of the data.

    Args:
        position: See `ReadoutObjective`.
        mean: Subtracted from the scores; None: the mean of the data.
        std: The scores are divided by it; None: the standard deviation of the data.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"tokens": np.array([1, 5, 2]), "score": 4.0}
    >>> Regression(mean=3.0, std=2.0).build_example(example, vocab, np.random.default_rng(0))["score"].tolist()
    [0.5, -100.0, -100.0]
    """

    labels = {"score": "score"}
    metrics = {"squared_error": Metric("score")}

    mean: float | None = None
    std: PositiveFloat | None = None

    inputs = frozenset({"tokens", "score"})

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Self:
        mean = stats().mean if self.mean is None else self.mean
        return dataclasses.replace(super().configure(stats, config), mean=mean, std=self.std or stats().std)

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"score": standardized_head(config.hidden_size, self.mean or 0.0, self.std or 1.0)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        score = (float(example["score"]) - (self.mean or 0.0)) / (self.std or 1.0)
        return label_at_position("score", score, example, self.readout, vocab)

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, targets = supervised(outputs["hidden"], batch["score"])
        error = (model.heads["score"](states)[:, 0].float() - targets).square().sum()
        return {"score": error, "squared_error": error.detach() * (self.std or 1.0) ** 2}


@dataclass(frozen=True)
class MultipleChoice(Objective):
    """Predict which option is correct: {"options": rows of {"tokens", "token_type_ids"}, "label": its index}.

    Shown: one row for each option. Predicted: the index y of the correct one. Loss: -log softmax(r)[y], r_k the score of
    option k.

    Args:
        max_options: Rows of a group (0: the data's largest number of options). A question with fewer repeats its first row,
            which is masked out of the softmax.
        position: Where a row is read: "first" for an encoder, "last" for a decoder; "auto" is the one that fits the model.

    >>> vocab = Vocab(size=9, roles={"pad": 0}, special=np.arange(9) < 1)
    >>> example = {"options": [{"tokens": np.array([5, 6, 7])}, {"tokens": np.array([5, 8])}], "label": 1}
    >>> seen = MultipleChoice(max_options=3).build_example(example, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["absent"].tolist(), int(seen["choice"])
    ([[5, 6, 7], [5, 8, 0], [5, 6, 7]], [False, False, True], 1)
    """

    labels = {"choice": "choice"}
    metrics = {"accuracy": Metric("choice")}
    constraints = Constraints(packable=False)

    max_options: NonNegativeInt = 0
    position: Literal["auto", "first", "last"] = "auto"

    inputs = frozenset({"options", "label"})

    @property
    def attention(self) -> AttentionPattern:
        return READOUTS[self.position]

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Objective:
        position: Literal["first", "last"] = "last" if readout_of(config) == "last" else "first"
        return dataclasses.replace(
            self,
            position=position if self.position == "auto" else self.position,
            max_options=self.max_options or stats().max_options,
        )

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"choice": classification_head(config.hidden_size, 1)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        rows = [
            row | (attention_fields.causal(len(row["tokens"])) if self.position == "last" else {})
            for row in example["options"]
        ]
        size = self.max_options or len(rows)
        if not 2 <= len(rows) <= size:
            raise UserError(
                f"a question with {len(rows)} options does not fit into a group of 2 to {size}: set `max_options`"
            )
        absent = np.arange(size) >= len(rows)
        shown = attention_fields.group(rows + rows[:1] * (size - len(rows)))
        return shown | {"absent": absent, "choice": np.int64(example["label"])}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch, self._readout(batch))}

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        return forward_flops(model, batch, self._readout(batch)) if forward is None else forward

    def _readout(self, batch: Batch) -> Tensor:
        """Return where each row is read, (B, K, T) bool."""
        if self.position == "last":
            return last_token_mask(batch)
        first = torch.zeros_like(batch["tokens"], dtype=torch.bool)
        first[..., 0] = True
        return first

    def scores(self, model: LM, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the score of each option, (B, K) float32; minus infinity for padding options."""
        hidden = outputs["hidden"]
        states = last_state(hidden, batch) if self.position == "last" else hidden[..., 0, :]  # (B, K, hidden_size)
        scores: Tensor = model.heads["choice"](states)[..., 0].float()
        return scores.masked_fill(batch["absent"], float("-inf"))

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        scores = self.scores(model, outputs, batch)
        return {"choice": choice_loss(scores, batch["choice"]), "accuracy": num_correct(scores, batch["choice"])}
