"""What a task's head says of each example: the one way in which training's checks, `evaluate` and `predict` ask it.

    classes   a score for each class        score   one number              choice   a score for each option
    tags      a score for each tag, of each word that is asked              span     two scores for each token

`measures` are numbers over all answers, which no sum over batches can give: F1, Matthews' and rank correlation, SQuAD's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from firth.data.collate import collate
from firth.data.source import Source
from firth.data.tags import has_spans
from firth.evaluate import answer_spans, entity_metrics, metrics
from firth.evaluate.perplexity import groups
from firth.generate.decoding import attention_pattern_of
from firth.model.model import LM
from firth.objectives.extractive_qa import QuestionAnswering
from firth.objectives.layer_mixture import LayerMixture
from firth.objectives.multiple_choice import MultipleChoice
from firth.objectives.objective import Objective, Sum, supervised
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Batch, Example, Outputs

HeadOutput = tuple[np.ndarray, np.ndarray]
"""Of one example: what is right, as the batch has it, and the scores."""

Kind = TypeVar("Kind", bound=Objective)


def addend(objective: Objective, kind: type[Kind]) -> Kind:
    """The addend of a kind, of an objective that has it."""
    if isinstance(objective, Sum):
        found = [one for one in (objective.first, objective.second) if isinstance(one, (kind, Sum))]
        return addend(found[-1], kind)
    assert isinstance(objective, kind)
    return objective


def _one(field: str, part: str) -> Callable[[LM, Objective, Outputs, Batch], list[HeadOutput]]:
    """Of a head that is asked once per text, where the batch's field has the answer."""

    def read(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
        states, right = supervised(outputs["hidden"], batch[field])
        scores = model.heads[part](states).float().cpu().numpy()
        return list(zip(right.cpu().numpy(), scores, strict=True))

    return read


def _choice(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
    scores = addend(objective, MultipleChoice).scores(model, outputs, batch)
    return list(zip(batch["choice"].cpu().numpy(), scores.cpu().numpy(), strict=True))


def _tags(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
    states, right = supervised(outputs["hidden"], batch["tags"])
    ends = np.cumsum((batch["tags"] != IGNORE).sum(-1).cpu().numpy())[:-1]
    scores = model.heads["tags"](states).float().cpu().numpy()
    return list(zip(np.split(right.cpu().numpy(), ends), np.split(scores, ends), strict=True))


def _span(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
    scores = model.heads["span"](outputs["hidden"]).float().cpu().numpy()  # (B, T, 2)
    right = np.stack([(batch[field] != IGNORE).int().argmax(-1).cpu().numpy() for field in ("starts", "ends")], -1)
    lengths = [scores.shape[1]] * len(scores)
    if "key_time" in batch:
        lengths = (batch["key_time"] != NEVER).sum(-1).tolist()
    return [(r, s[:n]) for r, s, n in zip(right, scores, lengths, strict=True)]


def _classified(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    right, said = np.array([r for r, _ in found]), np.array([s.argmax() for _, s in found])
    out = {"macro_f1": metrics.macro_f1(right, said), "matthews": metrics.matthews(right, said)}
    return out | ({"f1": metrics.f1(right == 1, said == 1)} if len(objective.class_names) == 2 else {})


def _scored(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    right, said = np.array([r for r, _ in found]), np.array([s[0] for _, s in found])
    return {"pearson": metrics.pearson(right, said), "spearman": metrics.spearman(right, said)}


def _tagged(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    classes = objective.class_names
    if not has_spans(classes):
        return {}
    told = [([classes[i] for i in r], [classes[i] for i in s.argmax(-1)]) for r, s in found]
    return entity_metrics.scores(*np.array([entity_metrics.counts(*pair) for pair in told]).T)


def _spanned(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    """By the text, over all windows of a question, as `firth evaluate` has it."""
    spans = addend(objective, QuestionAnswering)
    return answer_spans.measured(source, [scores for _, scores in found], bool(spans.has_unanswerable), spans.position)


@dataclass(frozen=True)
class HeadReader:
    """read: what it says of a batch that is not packed, example by example. measures: (answers, objective, the source of the
    examples, in their order) -> numbers."""

    read: Callable[[LM, Objective, Outputs, Batch], list[HeadOutput]]
    metrics: Callable[[Sequence[HeadOutput], Objective, Source], dict[str, float]]


HEADS: dict[str, HeadReader] = {
    "classes": HeadReader(_one("class", "classes"), _classified),
    "score": HeadReader(_one("score", "score"), _scored),
    "choice": HeadReader(_choice, lambda found, objective, source: {}),
    "tags": HeadReader(_tags, _tagged),
    "span": HeadReader(_span, _spanned),
}
"""Part of a model -> how it is read."""


def head_of(parts: Mapping[str, object]) -> str:
    """The part that is a task's head; empty where there is none."""
    return next((name for name in HEADS if name in parts), "")


def readings(
    model: LM, objective: Objective, part: str, examples: Iterable[Example], vocab: Vocab
) -> Iterator[HeadOutput]:
    """What the head says of examples, in their order; their views must draw nothing."""
    if "mixture" in model.heads:
        objective = LayerMixture() + objective
    rng, device = np.random.default_rng(0), model.tokens.weight.device
    answers = {*objective.labels.values(), *objective.metrics.values()}
    shown = (objective.build_example(example, vocab, rng) for example in examples)
    with attention_pattern_of(model):
        for group in groups(shown, room=8192):
            batch = {name: field.to(device) for name, field in collate(group, answers).items()}
            yield from HEADS[part].read(model, objective, objective.forward(model, batch), batch)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis.

    >>> softmax(np.array([0.0, 0.0, -np.inf])).tolist()
    [0.5, 0.5, 0.0]
    """
    shifted = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))
