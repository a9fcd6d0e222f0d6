"""Outputs of task heads per example, shared by validation during training, `evaluate` and `predict`.

    classes   a score for each class        score   one number              choice   a score for each option
    tags      a score for each tag, of each labeled word                    span     two scores for each token

`HeadReader.metrics` are computed over all outputs, because sums over batches cannot give them: F1, Matthews' and rank
correlation, SQuAD's metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from firth.data.collate import collate, label_fields_of
from firth.data.source import Source
from firth.data.tags import has_spans
from firth.evaluate import answer_spans, entity_metrics, metrics
from firth.evaluate.perplexity import groups
from firth.generate.decoding_batch import inference_mode
from firth.model.model import LM
from firth.objectives.extractive_qa import QuestionAnswering
from firth.objectives.multiple_choice import MultipleChoice
from firth.objectives.objective import Objective, components, supervised
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Batch, Example, Outputs

HeadOutput = tuple[np.ndarray, np.ndarray]
"""Label of one example, as in the batch, and its scores."""

Kind = TypeVar("Kind", bound=Objective)


def component(objective: Objective, kind: type[Kind]) -> Kind:
    """Return the component of class `kind` of an objective that has one."""
    return next(one for one in reversed(components(objective)) if isinstance(one, kind))


def _one(field: str, head: str) -> Callable[[LM, Objective, Outputs, Batch], list[HeadOutput]]:
    """Return the reader of a head with one output per text, whose labels are in `field` of the batch."""

    def read(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
        states, labels = supervised(outputs["hidden"], batch[field])
        scores = model.heads[head](states).float().cpu().numpy()
        return list(zip(labels.cpu().numpy(), scores, strict=True))

    return read


def _choice(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
    scores = component(objective, MultipleChoice).scores(model, outputs, batch)
    return list(zip(batch["choice"].cpu().numpy(), scores.cpu().numpy(), strict=True))


def _tags(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
    states, labels = supervised(outputs["hidden"], batch["tags"])
    ends = np.cumsum((batch["tags"] != IGNORE).sum(-1).cpu().numpy())[:-1]
    scores = model.heads["tags"](states).float().cpu().numpy()
    return list(zip(np.split(labels.cpu().numpy(), ends), np.split(scores, ends), strict=True))


def _span(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
    scores = model.heads["span"](outputs["hidden"]).float().cpu().numpy()  # (B, T, 2)
    labels = np.stack([(batch[field] != IGNORE).int().argmax(-1).cpu().numpy() for field in ("starts", "ends")], -1)
    lengths = [scores.shape[1]] * len(scores)
    if "key_time" in batch:
        lengths = (batch["key_time"] != NEVER).sum(-1).tolist()
    return [(label, s[:n]) for label, s, n in zip(labels, scores, lengths, strict=True)]


def _class_metrics(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    gold, predicted = np.array([label for label, _ in found]), np.array([s.argmax() for _, s in found])
    out = {"macro_f1": metrics.macro_f1(gold, predicted), "matthews": metrics.matthews(gold, predicted)}
    return out | ({"f1": metrics.f1(gold == 1, predicted == 1)} if len(objective.constraints.class_names) == 2 else {})


def _score_metrics(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    gold, predicted = np.array([label for label, _ in found]), np.array([s[0] for _, s in found])
    return {"pearson": metrics.pearson(gold, predicted), "spearman": metrics.spearman(gold, predicted)}


def _tag_metrics(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    classes = objective.constraints.class_names
    if not has_spans(classes):
        return {}
    pairs = [([classes[i] for i in labels], [classes[i] for i in s.argmax(-1)]) for labels, s in found]
    return entity_metrics.scores(*np.array([entity_metrics.counts(*pair) for pair in pairs]).T)


def _span_metrics(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    """Return exact match and F1 of the answer texts over all windows of a question, as `firth evaluate` does."""
    qa = component(objective, QuestionAnswering)
    outputs = [scores for _, scores in found]
    return answer_spans.squad_metrics(source, outputs, bool(qa.has_unanswerable), qa.position)


@dataclass(frozen=True)
class HeadReader:
    """How to read a task head.

    Args:
        read: Returns the outputs of a batch that is not packed, one per example.
        metrics: Computes metrics from all outputs, the objective and the source of the examples in the same order.
    """

    read: Callable[[LM, Objective, Outputs, Batch], list[HeadOutput]]
    metrics: Callable[[Sequence[HeadOutput], Objective, Source], dict[str, float]]


HEADS: dict[str, HeadReader] = {
    "classes": HeadReader(_one("class", "classes"), _class_metrics),
    "score": HeadReader(_one("score", "score"), _score_metrics),
    "choice": HeadReader(_choice, lambda found, objective, source: {}),
    "tags": HeadReader(_tags, _tag_metrics),
    "span": HeadReader(_span, _span_metrics),
}
"""Name of a head -> how it is read."""


def head_of(heads: Mapping[str, object]) -> str:
    """Return the name of the task head among a model's heads; empty if there is none."""
    return next((name for name in HEADS if name in heads), "")


def head_outputs(
    model: LM, objective: Objective, head: str, examples: Iterable[Example], vocab: Vocab
) -> Iterator[HeadOutput]:
    """Yield the outputs of a head for examples in their order.

    Args:
        model: The model.
        objective: Its objective, whose `build_example` must draw no random numbers.
        head: Name of the head.
        examples: The examples.
        vocab: The vocabulary of the model.
    """
    rng, device = np.random.default_rng(0), model.tokens.weight.device
    label_fields = label_fields_of(objective)
    built = (objective.build_example(example, vocab, rng) for example in examples)
    with inference_mode(model):
        for group in groups(built, max_tokens=8192):
            batch = {name: field.to(device) for name, field in collate(group, label_fields).items()}
            yield from HEADS[head].read(model, objective, objective.forward(model, batch), batch)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis.

    >>> softmax(np.array([0.0, 0.0, -np.inf])).tolist()
    [0.5, 0.5, 0.0]
    """
    shifted = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))
