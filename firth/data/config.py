"""Configuration of a run's data: the `data` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from firth.corpora import catalog
from firth.fields import PositiveFloat, ShareBelowOne, Validated, path_field
from firth.types import LogLine, UserError


@dataclass(frozen=True)
class DataConfig(Validated, section="data"):
    """Configuration of the data: files or a corpus, and what is held out.

    Args:
        path: Files, directories or globs (text, JSONL, Parquet; .gz, .zst), or corpora of `firth prepare`, also at addresses (s3://).
        corpus: A corpus of `firth fetch` in place of `path`, or NAME/FILE for one of its side files.
        weights: Sampling weight of each path, in any unit; without weights each path contributes all it holds.
        text_field: The field of a record that holds the text.
        split_by: A text file is one document ("file"), or one document per "blank" line or "line".
        validation_path: Files to validate on. Without them `validation_fraction` of the documents is held out.
        validation_fraction: Fraction of documents (by name, never single lines) or records (by prompt) to hold out. Documents
            with the same content and records with the same prompt are held out together (`firth.data.split`). Of a prepared corpus
            it was chosen when the corpus was prepared.
        cache_dir: Directory of token stores that several runs share; empty uses the run directory.
    """

    path: tuple[str, ...] = path_field("files", ())
    corpus: str = ""
    weights: tuple[PositiveFloat, ...] = ()
    text_field: str = "text"
    split_by: str = "file"
    validation_path: tuple[str, ...] = path_field("files", ())
    validation_fraction: ShareBelowOne = 0.05
    cache_dir: str = path_field("place", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, paths in (("path", self.path), ("validation_path", self.validation_path)):
            if not all(paths):
                raise UserError(f"data.{name}={list(paths)} has an empty name, which would be the working directory")
        if self.path:  # the model card must not state the language and license of a corpus that is not read
            object.__setattr__(self, "corpus", "")

    def paths(self, log: LogLine) -> list[str]:
        """Return the training files.

        Raises:
            UserError: Neither `path` nor `corpus` is set.
        """
        if self.path:
            return list(self.path)
        if not self.corpus:
            raise UserError("the recipe has no data: set data.path=FILES or data.corpus=NAME (see `firth list`)")
        return catalog.paths(self.corpus, log)
