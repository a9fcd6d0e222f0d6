"""Where a run's text is and how it is cut into examples: the `source` and the `segment` of a recipe.

A segment turns the source into two `Source`s, one to learn from and one held out. Each kind is one small class with
one method, so a recipe names the kind and its settings and nothing else: windows, pieces and pairs cut running text;
labelled, dialogues, prompted, preferences and references read records; rollouts ask the model itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from firth.align.rollouts import Rollouts as OnPolicy
from firth.data import records, segment
from firth.data.source import Source
from firth.recipes.material import Material
from firth.types import UserError

if TYPE_CHECKING:
    from firth.objectives.objective import Objective

Sources = tuple[Source, Source | None]
"""To learn from, and held out (None where there is nothing to hold out)."""


class Segment:
    """One way to cut the source. Subclasses are frozen dataclasses."""

    def sources(self, material: Material) -> Sources:
        """The training source and the held-out one."""
        raise NotImplementedError(type(self).__name__)

    def settle(self, objective: Objective, material: Material) -> tuple[Segment, Objective]:
        """Fill in what only the data knows (the names of the classes); the settled recipe is what a run keeps."""
        return self, objective
