"""How a run's text or records are cut into examples: the `segment` of a recipe.

A segment turns the material into two `Source`s, one to learn from and one held out. Each kind is one small class, so a
recipe names the kind and its settings and nothing else: windows, pieces and pairs cut running text; labelled,
dialogues, prompted, preferences and comparisons read records; rollouts ask the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from firth.data import segment
from firth.data.source import Source
from firth.recipes.material import Material

if TYPE_CHECKING:
    from firth.objectives.objective import Objective


@dataclass(frozen=True)
class Cut:
    """train: to learn from. valid: held out, None where there is nothing. bytes_per_target: UTF-8 bytes of held-out text
    per token asked, where every token is asked; 0 elsewhere."""

    train: Source
    valid: Source | None
    bytes_per_target: float = 0.0


class Segment:
    """One way to cut the material. Subclasses are frozen dataclasses."""

    def cut(self, material: Material) -> Cut:
        """The training source and the held-out one."""
        raise NotImplementedError(type(self).__name__)

    def settle(self, objective: Objective, material: Material) -> tuple[Segment, Objective]:
        """Fill in what only the data knows (the names of the classes); the settled recipe is what a run keeps."""
        return self, objective


@dataclass(frozen=True)
class Windows(Segment):
    """Windows of `length` tokens of the running text; the documents in one do not see each other."""

    length: int = 256

    def cut(self, material: Material) -> Cut:
        train, valid = material.stores()
        held = segment.Windows(valid, self.length, tail=True) if valid else None
        # Asked is every token of the held-out store but the first, which nothing stands before.
        ratio = int(valid.bytes.sum()) / max(1, len(valid.tokens) - len(valid)) if valid else 0.0
        return Cut(segment.Windows(train, self.length), held, ratio)


@dataclass(frozen=True)
class Pieces(Segment):
    """Parts of single documents of at most `length` tokens; frame: [CLS] and [SEP] around each."""

    length: int = 128
    frame: bool = True

    def cut(self, material: Material) -> Cut:
        train, valid = material.stores()
        frame = material.tokenizer.vocab if self.frame else None
        held = segment.Pieces(valid, self.length, frame) if valid else None
        return Cut(segment.Pieces(train, self.length, frame), held)


@dataclass(frozen=True)
class Pairs(Segment):
    """Two neighbouring segments and a stranger, together at most `length` tokens."""

    length: int = 128

    def cut(self, material: Material) -> Cut:
        train, valid = material.stores()
        held = segment.Pairs(valid, self.length) if valid and len(valid) > 1 else None
        return Cut(segment.Pairs(train, self.length), held)


SEGMENTS: dict[str, type[Segment]] = {"windows": Windows, "pieces": Pieces, "pairs": Pairs}
"""Name in a recipe -> class."""
