"""A stage of a pipeline: a frozen dataclass of settings that reads files or runs and writes into a directory of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from firth.fields import Validated

Summary = Mapping[str, float | str]
"""Numbers of a finished stage: name -> value."""


@dataclass(frozen=True)
class Stage(Validated):
    """Base class of stages.

    Attributes:
        main: The field that the value of the stage's kind sets: `sample: $sft` is `sample` with `model: $sft`.
        output: What `$NAME` of a later stage refers to: a file in the stage's directory, or "" for the directory.
    """

    main: ClassVar[str]
    output: ClassVar[str] = ""

    def check(self) -> None:
        """Raise UserError for settings that cannot work, before any stage runs."""

    def run(self, directory: Path) -> Summary:
        """Run the stage, or resume it, and return numbers for the report.

        Args:
            directory: The directory of the stage; it may hold what an interrupted run left.
        """
        raise NotImplementedError
