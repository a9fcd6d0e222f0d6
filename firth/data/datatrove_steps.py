"""Steps of datatrove (extra `scale`) that write a prepared corpus, on one machine, on Ray or on Slurm.

    pipeline = [JsonlReader("text/"), LanguageFilter("en"), FirthTokens("corpus", "tokenizer")]
    tokens = LocalPipelineExecutor(pipeline, tasks=64, workers=8, logging_dir="logs/tokens")
    LocalPipelineExecutor([FirthManifest("corpus", "tokenizer", tasks=64)], depends=tokens, logging_dir="logs/manifest").run()

Each task writes the part of its rank; the manifest is a task of its own after all of them, as in datatrove's own steps. A task that was
killed is run again by datatrove and writes the same bytes. Ray can start a task again while its first process still works: each attempt
writes a directory of its own, which takes the place of the part when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from firth.corpora.readers import Document
from firth.data.corpus import PART_FILE, SPLITS, TOKENIZER, part_directory, write_manifest
from firth.data.prepare_part import PartSettings
from firth.data.token_store import TokenStore
from firth.io.atomic import new_directory
from firth.io.integrity import read_record, write_record
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError:
    raise UserError("the steps of datatrove need the package datatrove: pip install 'firth[scale]'") from None


class FirthTokens(PipelineStep):  # type: ignore[misc]
    """Encode the documents of a task into the part of its rank. It passes on no document.

    Args:
        out: The directory of the corpus.
        tokenizer: A tokenizer, model or run directory that every machine can read.
        validation_fraction: Fraction of the documents to hold out, by their content.
    """

    name = "firth tokens"
    type = "Tokenizer"

    def __init__(self, out: str, tokenizer: str, validation_fraction: float = 0.01) -> None:
        super().__init__()
        self.out, self.tokenizer, self.validation_fraction = str(out), str(tokenizer), validation_fraction

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        tokenizer = Tokenizer.load(self.tokenizer)
        settings = PartSettings(tokenizer.digest, validation_fraction=self.validation_fraction)
        with new_directory(part_directory(Path(self.out), rank)) as place:
            with TemporaryFile("w+", encoding="utf-8", dir=place) as held_out:
                self._build(self._train(data, settings, held_out), tokenizer, place / "train")
                held_out.seek(0)
                self._build((Document("", json.loads(line)) for line in held_out), tokenizer, place / "valid")
            write_record(
                place / PART_FILE,
                {"pieces": [[rank, world_size]], "tokenizer": tokenizer.digest, "fraction": self.validation_fraction},
            )
        yield from ()

    def _train(self, data: Any, settings: PartSettings, held_out: IO[str]) -> Iterator[Document]:
        """Yield the documents to train on; write the others into a file."""
        for found in data:
            text = found.text
            if not text.strip():
                continue
            self.stat_update("documents")
            self.update_doc_stats(found)
            if settings.holds_out(Document(str(found.id), text)):
                held_out.write(json.dumps(text) + "\n")
            else:
                yield Document(str(found.id), text)

    def _build(self, documents: Iterator[Document], tokenizer: Tokenizer, place: Path) -> None:
        """Build a store, unless there are no documents."""
        first = next(documents, None)
        if first is None:
            return
        found = TokenStore.build(_chained(first, documents), tokenizer, place, workers=1)
        self.stat_update("tokens", value=len(found.tokens), unit="token")


def _chained(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest


class FirthManifest(PipelineStep):  # type: ignore[misc]
    """Write corpus.json over the parts of all tasks: one task, after those of `FirthTokens`.

    Args:
        out: The directory of the corpus.
        tokenizer: The tokenizer of the parts.
        tasks: Number of tasks that wrote them.
    """

    name = "firth manifest"
    type = "Writer"

    def __init__(self, out: str, tokenizer: str, tasks: int) -> None:
        super().__init__()
        self.out, self.tokenizer, self.tasks = str(out), str(tokenizer), tasks

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        out, tokenizer = Path(self.out), Tokenizer.load(self.tokenizer)
        fractions = set()
        for number in range(self.tasks):
            file = part_directory(out, number) / PART_FILE
            if not file.is_file():
                raise UserError(
                    f"{file} is missing: task {number} of {self.tasks} has not ended; run its executor again"
                )
            record = read_record(file, {"tokenizer": str}, f"delete {file}")
            if record["tokenizer"] != tokenizer.digest or record["pieces"] != [[number, self.tasks]]:
                raise UserError(
                    f"{file} is of another corpus (tokenizer or number of tasks): delete {out}, and run again"
                )
            fractions.add(record["fraction"])
        stored = [n for n in range(self.tasks) if any((part_directory(out, n) / split).is_dir() for split in SPLITS)]
        if not stored:
            raise UserError(f"{out}: no document is left to write")
        tokenizer.save(out / TOKENIZER)
        settings = PartSettings(tokenizer.digest, validation_fraction=max(fractions))
        write_manifest(out, stored, tokenizer, settings.to_dict(), {"dropped": {}, "examples": {}})
        yield from ()
