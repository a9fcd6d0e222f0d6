"""What cannot be trained is refused when the recipe is read: an objective that its architecture cannot serve.

>>> from firth.model.shape import decoder
>>> from firth.objectives.mlm import MLM
>>> refuse_misfit(MLM(), decoder(vocab=10, width=64, depth=1))  # doctest: +ELLIPSIS
Traceback (most recent call last):
...
firth.types.UserError: objective mlm reads a text from both sides, which a causal decoder cannot: set shape.causal=false ...
"""

from __future__ import annotations

from firth import objectives
from firth.model.shape import Reads, Shape
from firth.objectives.objective import Objective, Sum
from firth.recipes.segments import SEGMENTS, Segment
from firth.types import UserError

NEEDS: dict[Reads, tuple[str, str]] = {
    "left": ("reads a text from left to right", "set shape.causal=true and shape.encoder=0 (a decoder)"),
    "both": ("reads a text from both sides", "set shape.causal=false (an encoder)"),
    "free": ("reads a text in an order of its own", "take attention with shape.causal=false"),
    "prefix": ("reads a prompt both ways and writes on in one row", "take attention with shape.causal=false"),
    "apart": (
        "reads a text from left to right and from right to left, by two readers who do not meet",
        "set shape.recurrent=lstm, shape.causal=false and shape.apart=true",
    ),
    "alone": ("reads each token by itself", "set shape.depth=0, shape.position=none and shape.norm_at=post"),
    "source": ("reads a source and writes an answer", "set shape.encoder (an encoder-decoder)"),
    "latent": ("squeezes a text through a latent", "set shape.encoder and shape.latent (a variational autoencoder)"),
}
"""A way of reading -> what the objective does, and the shape that serves it."""


def refuse_misfit(objective: Objective, shape: Shape) -> None:
    """Raise a UserError that names both, and what would fit, if the shape does not honour what the objective asks."""
    reads = objective.reads()
    if reads in shape.honours:
        if lacking := objective.lacks(shape):
            raise UserError(f"objective {_name(objective)} cannot be trained with this shape: {lacking}")
        return
    does, remedy = NEEDS[reads]
    known = {name: objectives.find(name)() for name in objectives.OBJECTIVES}
    served = sorted(
        name for name, one in known.items() if one.reads() in shape.honours - {"any"} and not one.lacks(shape)
    )
    raise UserError(
        f"objective {_name(objective)} {does}, which {shape.noun} cannot: {remedy}, "
        f"or take an objective that it serves: {', '.join(served)}"
    )


def refuse_cut(objective: Objective, shape: Shape, *, pack: int, accumulate: int, ranks: int = 1) -> None:
    """Raise a UserError if a step is packed or cut up in a way that the shape or the objective cannot bear."""
    if pack and not shape.packs:
        raise UserError(
            f"{shape.noun} reads one document a row, and batch.pack={pack} puts several there: set batch.pack=0"
        )
    if objective.whole and accumulate * ranks > 1:
        raise UserError(
            f"objective {_name(objective)} compares all examples of a step with each other, and {ranks} ranks of "
            f"{accumulate} micro-batches would compare only their own: set batch.accumulate=1 and train on one rank"
        )


def refuse_memory(shape: Shape, segment: Segment, pack: int) -> None:
    """Raise a UserError if the shape's memory is asked of rows that have no text before them.

    (That positions must reach back before a row, `Shape` says itself.)
    """
    if shape.memory and pack:
        raise UserError(
            f"shape.memory={shape.memory} needs rows of one text each, and batch.pack={pack} puts several into a row: "
            "set batch.pack=0, or shape.memory=0"
        )
    if shape.memory and not segment.remembers:
        told = ", ".join(name for name, kind in SEGMENTS.items() if kind.remembers)
        mine = next((name for name, kind in SEGMENTS.items() if kind is type(segment)), type(segment).__name__)
        raise UserError(
            f"shape.memory={shape.memory} needs the tokens that stand before each row, which segment {mine} does not give: "
            f"take segment={told}, or set shape.memory=0"
        )


def _name(objective: Objective) -> str:
    """As a recipe calls it; the addend that makes the demand, of a sum."""
    while isinstance(objective, Sum):
        objective = objective.second if objective.first.reads() == "any" else objective.first
    known = (name for name in objectives.OBJECTIVES if objectives.find(name) is type(objective))
    return next(known, type(objective).__name__)
