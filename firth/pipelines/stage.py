"""A stage of a pipeline: a frozen dataclass of settings that reads files or runs and writes into a directory of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from firth.corpora.readers import files
from firth.fields import Validated
from firth.io import user_code

Summary = Mapping[str, float | str]
"""Numbers of a finished stage: name -> value."""

Weights = Literal["", "fp32", "bf16", "int8"]
"""Data type of the weights of a model that replies, as `--weights` of `firth evaluate`."""


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

    def inputs(self) -> Iterator[Path]:
        """Yield the files that the stage reads, so that a finished stage is not skipped after one has changed."""
        for field in fields(self):
            yield from files_of(field.name, getattr(self, field.name))

    def run(self, directory: Path) -> Summary:
        """Run the stage, or resume it, and return numbers for the report.

        Args:
            directory: The directory of the stage; it may hold what an interrupted run left.
        """
        raise NotImplementedError


def files_of(name: str, value: Any) -> Iterator[Path]:
    """Yield the files that a setting names: records, weights of models, recipes, tasks and modules of a user's functions.

    Args:
        name: Name of the field.
        value: Its value; only texts and lists of texts name files.
    """
    texts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    if name in ("data", "examples") and texts:
        yield from files(texts, tabled=True)
        return
    for text in map(str, texts):
        if "function" in name:
            yield from user_code.module_files(text)
        elif Path(text).is_dir():
            yield from sorted(Path(text).rglob("*.safetensors"))
        elif text and Path(text).is_file():
            yield Path(text)
