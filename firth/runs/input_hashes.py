"""Content hashes of a run's inputs: text, records, models, and the modules of reward functions.

A path does not determine the content of a file, so a run directory keeps `inputs.json` with a digest of each input:

    {"recipe": "9f2c...", "recipe_file": "sha256...",
     "inputs": {"data.path": "51ab...", "init_from": "0c77...", "tokenizer": "e01d..."},
     "files": {"/data/plays/hamlet.txt": [size, mtime, ctime, inode, "sha256..."]}, "digest": "of the rest"}

A run is resumed only if all inputs are unchanged. The recipe is compared without its paths, so a copy of the same files
elsewhere is the same run. A file is hashed again only if its size, a time or its inode has changed; replacing a file and
resetting its modification time still changes `ctime`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from firth import objectives
from firth.corpora import catalog, readers
from firth.data.corpus import PreparedCorpus, is_corpus
from firth.data.examples import ExamplesConfig
from firth.io import user_code
from firth.io.atomic import write_text
from firth.io.gguf import find
from firth.io.integrity import Hashed, check_digest, hashed, stamp, with_digest
from firth.io.safetensors import read_json
from firth.io.sharded import SHARDS
from firth.objectives.objective import components
from firth.runs import config_io
from firth.runs.prepare import text_of
from firth.runs.recipe import Recipe, ResolvedRecipe, load_resolved
from firth.runs.start_model import model_directory
from firth.tokenizer import formats
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import LogLine, UserError

FILE = "inputs.json"

MODEL_FILES = ("config.json", "adapter_config.json", "model.safetensors.index.json")
"""Files of a model or adapter directory that are hashed with its tensors and its tokenizer."""


def has_begun(directory: Path) -> bool:
    """Return whether a run directory holds a checkpoint or a finished run."""
    saved = (path for path in (directory / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit())
    return (directory / "done.json").exists() or any(path.is_dir() for path in saved)


@dataclass
class RunInputs:
    """Digests of the inputs of a run.

    Args:
        digests: Name of the recipe field -> digest of what it names; "" if it is missing.
        functions: Name of the field -> digest of the module of a user's function or objective. Checkpoints do not depend
            on it, because a function that raised may be corrected.
        files: Path -> size, modification time, change time (ns), inode and SHA-256 of each hashed file.
    """

    digests: dict[str, str] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)

    @staticmethod
    def read(recipe: Recipe, directory: Path, log: LogLine, first: Hashed | None = None) -> RunInputs:
        """Hash the inputs of a recipe; the hashes of unchanged files are taken from the directory's inputs.json.

        Args:
            recipe: The recipe of the run.
            directory: The run directory.
            log: Receives progress messages.
            first: What the first rank has hashed; None on that rank, which builds the tokenizer and the token stores.
        """
        inputs = RunInputs(files=recorded(directory).get("files", {}) | (first or {}))
        source = recipe.data
        if first is None and not (recipe.given_tokenizer or source.cache_dir or has_begun(directory)):
            inputs._read_once(recipe, directory, log)
        if source.corpus:
            inputs.digests["data.corpus"] = inputs._of_files(catalog.paths(source.corpus, log), recipe)
        for name, kind, value in config_io.paths(recipe):
            if kind == "files":
                inputs.digests[name] = inputs._of_files(value, recipe)
            elif kind == "task":
                inputs.digests[name] = inputs._sha256(Path(value)) if Path(value).is_file() else ""
            elif kind == "model":
                inputs.digests[name] = inputs._of_model(Path(value))
            elif kind == "tokenizer":
                inputs.digests[name] = Tokenizer.load(value).digest
        for name, function in recipe.examples.functions.items():
            inputs.functions[f"examples.{name}"] = inputs._of_module(function)
        for name in map(objectives.name_of, map(type, components(recipe.objective))):
            if name not in objectives.OBJECTIVES:
                inputs.functions[f"objective {name}"] = inputs._of_module(name)
        examples = config_io.REGISTRIES[ExamplesConfig].name_of(type(recipe.examples))
        if ":" in examples:
            inputs.functions[f"examples {examples}"] = inputs._of_module(examples)
        return inputs

    def check(self, directory: Path) -> None:
        """Compare with the inputs of the run in a directory.

        Raises:
            UserError: An input has changed, or the directory has no record of its inputs.
        """
        before = recorded(directory).get("inputs")
        if not isinstance(before, dict):
            raise UserError(
                f"{directory} holds a run of an older version of firth, which kept no record of its inputs: choose another "
                "directory with --out, or delete that one"
            )
        if "tokenizer" not in self.digests:  # it is built after the others have been compared
            before = {name: digest for name, digest in before.items() if name != "tokenizer"}
        now = self.digests | {name: digest for name, digest in self.functions.items() if name in before}
        for name in [*now, *before]:
            if before.get(name) == now.get(name):
                continue
            if name not in now:
                how = f"with {name}, which this recipe does not set"
            elif name not in before:
                how = f"without {name}, which this recipe sets"
            elif not now[name]:
                how = f"with a {name} that is not there any more"
            else:
                how = f"with another content of {name}"
            raise UserError(
                f"{directory} holds a run that began {how}: put back what it began with, or choose another directory with --out"
            )

    def write(self, directory: Path, recipe: str) -> None:
        """Write inputs.json with the hashes of the recipe and of recipe.yaml."""
        file = _file_hash(directory / "recipe.yaml")
        record = {"recipe": recipe, "recipe_file": file, "inputs": self.digests | self.functions, "files": self.files}
        write_text(directory / FILE, json.dumps(with_digest(record), indent=1) + "\n")

    def identity(self, recipe: str) -> str:
        """Return a short hash of a recipe and its inputs, which a checkpoint is checked against."""
        return _hash([recipe, self.digests])[:16]

    def _read_once(self, recipe: Recipe, directory: Path, log: LogLine) -> None:
        """Hash the text of a run that trains a tokenizer, in the same pass that reads it for that.

        Other runs hash the files alone, at disk speed, so errors of the recipe are found before the text is read.
        """
        source = recipe.data
        paths = source.paths(log) if source.path or source.corpus else []
        if not recipe.examples.reads_documents or not paths or any((directory / "data").glob("*/train")):
            return
        parts = [[path] for path in paths] if source.weights else [paths]
        for part in parts:
            alone = replace(source, path=tuple(part), weights=())
            for validation in (False, True) if source.validation_path else (False,):
                self.files |= text_of(alone, part, validation, directory).hashes

    def _of_files(self, paths: Sequence[str], recipe: Recipe) -> str:
        """Return the digest of files in reading order, and of their names where these determine what is held out.

        A prepared corpus has a digest of its own, so it is not read.
        """
        prepared = [PreparedCorpus.open(path).content for path in paths if is_corpus(path)]
        if prepared:
            rest = [path for path in paths if not is_corpus(path)]
            return _hash([prepared, self._of_files(rest, recipe) if rest else ""])
        documents = recipe.examples.reads_documents
        found = readers.files(paths, tabled=not documents)
        named = documents and (len(found) > 1 or recipe.data.split_by != "file")
        return _hash([(name if named else "", self._sha256(path)) for path, name in found.items()])

    def _of_model(self, path: Path) -> str:
        """Return the digest of a model's tensors, config and tokenizer; "" if the path does not exist."""
        place = (
            path / "adapter" if (path / "adapter").is_dir() and not (path / "model").is_dir() else model_directory(path)
        )
        if not place.exists():
            return ""
        one = find(place)
        if one is not None:
            return _hash(self._sha256(one))
        files = [
            *sorted(place.glob("*.safetensors")),
            *sorted(place.glob(f"{SHARDS}/*")),
            *(place / name for name in MODEL_FILES),
        ]
        tokens = formats.find(place)
        files += [tokens] if tokens is not None else []
        metadata = read_json(place / "firth.json")
        config = {name: metadata.get(name) for name in ("config", "heads", "family")}
        return _hash([[(file.name, self._sha256(file)) for file in files if file.is_file()], config])

    def _of_module(self, name: str) -> str:
        """Return the digest of the files of the module in `module:name`; "" if there are none."""
        files = [(file.name, self._sha256(file)) for file in user_code.module_files(name)]
        return _hash(files) if files else ""

    def _sha256(self, file: Path) -> str:
        status, key = file.stat(), str(file.absolute())
        known = self.files.get(key)
        if known is None or known[:-1] != stamp(status):
            self.files[key] = hashed(file)
        return str(self.files[key][-1])


def recorded(directory: Path) -> dict[str, Any]:
    """Return the content of a run directory's inputs.json; {} if it is missing."""
    found = read_json(directory / FILE)
    if found:
        check_digest(found, directory / FILE, "put it back, or choose another directory with --out")
    return found


def content_hash(recipe: ResolvedRecipe) -> str:
    """Return a short hash of a recipe without its paths, loggers and sharding."""
    return _hash(_identifying(recipe))[:16]


def _identifying(recipe: ResolvedRecipe) -> dict[str, Any]:
    """Return a recipe as plain data without what changes no number: its paths, loggers and sharding."""
    fields: dict[str, Any] = config_io.to_dict(config_io.without_paths(recipe))
    return {name: value for name, value in fields.items() if name not in ("loggers", "distributed")}


def recorded_hash(directory: Path, resolved: ResolvedRecipe) -> str:
    """Return the recorded hash of a started run's recipe, after checking that it is equal except for those.

    The hash is not recomputed: a later version of firth may have more fields, which at their defaults change nothing.

    Raises:
        UserError: The recipes differ (the message names the first field), or recipe.yaml was changed after the run started.
    """
    began, record = load_resolved(directory), recorded(directory)
    before, now = (_identifying(one) for one in (began, resolved))
    if before != now:
        raise UserError(
            f"{directory} holds a run of another recipe: {config_io.difference(before, now)}; choose another directory with "
            "--out, or delete that one"
        )
    file = directory / "recipe.yaml"
    if record.get("recipe_file") != _file_hash(file) and content_hash(began) != record["recipe"]:
        raise UserError(
            f"{file} was changed after the run began: put it back, or train it in another directory: firth train {file} --out "
            "ANOTHER"
        )
    return str(record["recipe"])


def _file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
