"""The tokenizer that a run directory keeps, bound to what it was made of.

`tokenizer/made_from.json` holds a hash of the text and the settings of its training, or the digest of the tokenizer that it
is a copy of, and the hashes of its files. A tokenizer that a failed run left there serves the next one only if that agrees.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from firth.corpora.read_stats import ReadStats
from firth.evaluate.tokenizer_match import load_tokenizer
from firth.io.atomic import write_text
from firth.io.integrity import file_facts, verify_files
from firth.io.json_files import check_all, read_object
from firth.runs.examples import model_directory, training_texts
from firth.runs.inputs import RunInputs, has_begun
from firth.runs.prepare import Echo, train_tokenizer
from firth.runs.recipe import Recipe
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError

RECORD = "made_from.json"
FILES = ("tokenizer.json", "tokenizer_config.json")
"""Files of a tokenizer whose hashes the record keeps."""


def tokenizer_of(
    recipe: Recipe, directory: Path, echo: Echo, inputs: RunInputs | None = None, sentinels: int | None = None
) -> Tokenizer:
    """Return the run's own tokenizer: a copy from a path or from the model it starts from, or trained on its text.

    Args:
        recipe: the recipe of the run.
        directory: its directory, which keeps the tokenizer.
        echo: progress.
        inputs: its inputs, if they are read already.
        sentinels: how many `<extra_id_n>` one that is trained has; None for what the recipe's objective needs.

    Raises:
        UserError: the directory holds checkpoints of a run with another tokenizer.
    """
    sentinels = sentinels_of(recipe) if sentinels is None else sentinels
    inputs = inputs or RunInputs.read(recipe, directory, echo)
    own, plan, source = directory / "tokenizer", recipe.tokenizer, recipe.data
    begins = recipe.init_from or recipe.init_embeddings_from
    path = plan.path or (str(model_directory(begins)) if begins else "")
    given = load_tokenizer(Path(path)) if path else None
    record: dict[str, Any] = (
        {"digest": given.digest}
        if given is not None
        else {"text": _text_hash(recipe, inputs, sentinels), "size": plan.vocab_size}
    )
    kept = _kept(own, record)
    if kept is not None:
        return kept
    exists = (own / "tokenizer.json").exists()
    if exists and has_begun(directory):
        raise UserError(
            f"{directory} holds a run of another recipe: its tokenizer was made of another text or with other settings; "
            "choose another directory with --out, or delete that one"
        )
    if exists:
        echo(f"{own}: an earlier run made this tokenizer of another text or with other settings; it is made again")
    shutil.rmtree(own, ignore_errors=True)
    if given is not None:
        given.save(own)
        made = Tokenizer.load(own)
        record["resolved_size"] = made.vocab.size
    else:
        train_tokenizer(
            source.paths(echo), own, algorithm=plan.algorithm, vocab_size=plan.vocab_size, text_field=source.text_field,
            split_by=source.split_by, sample_bytes=plan.sample_bytes, seed=recipe.seed, echo=echo, byte_fallback=plan.byte_fallback,
            num_sentinels=sentinels,
            texts=lambda counts: training_texts(recipe.examples, source, source.paths(echo), counts),
        )  # fmt: skip
        made = Tokenizer.load(own)
        record["resolved_size"] = made.vocab.size if _repeats(made, recipe, sentinels, echo) else plan.vocab_size
    record |= {"digest": made.digest, "files": {name: file_facts(own / name) for name in FILES}}
    write_text(own / RECORD, json.dumps(record, indent=1) + "\n")
    return made


def check_vocab(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Refuse a number of ids in a recipe that is not its tokenizer's.

    A tokenizer that is trained may have fewer ids than `tokenizer.vocab_size`, where the text is small: a shape of that size follows.

    Raises:
        UserError: `model.vocab_size` is another number. Of a run with a start the weights decide.
    """
    if recipe.model is None or recipe.init_from:
        return
    stated, plan, count = recipe.model.vocab_size, recipe.tokenizer, tokenizer.vocab.size
    trained = not plan.path and not recipe.init_embeddings_from
    if stated != count and not (trained and stated == plan.vocab_size):
        raise UserError(
            f"model.vocab_size={stated} is not the number of ids of the tokenizer, which is {count}: leave model.vocab_size out, and it "
            "is taken from there"
        )


def resolved_size(directory: Path) -> int:
    """Return `tokenizer.vocab_size` as the resolved recipe of a run has it: the ids that there are.

    Where the algorithm makes another tokenizer when it is asked for these (the characters it knows depend on the size), it is
    the size that was asked for, so that the recipe repeats the run.
    """
    return int(_record(directory / "tokenizer")["resolved_size"])


def _record(own: Path) -> dict[str, Any]:
    """What the tokenizer in a directory was made of; empty where nothing says it."""
    if not (own / RECORD).exists():
        return {}
    cure = f"delete {own}, and it is made again"
    found = read_object(own / RECORD, {"resolved_size": int, "digest": str}, cure)
    files = found.get("files", {})  # older versions keep none
    check_all([files], {}, f"{own / RECORD}", cure)
    check_all(files.values(), {"bytes": int, "sha256": str}, f"{own / RECORD}", cure)
    verify_files(files, own, cure)
    return found


def _repeats(made: Tokenizer, recipe: Recipe, sentinels: int, echo: Echo) -> bool:
    """Whether training with the number of ids that there are makes the same tokenizer.

    It is trained once more to know, which costs little: a text with fewer ids than are asked for is small.
    """
    plan, source, size = recipe.tokenizer, recipe.data, made.vocab.size
    if size == plan.vocab_size:
        return True
    texts = training_texts(recipe.examples, source, source.paths(echo), ReadStats())
    try:
        again = train(
            texts, plan.algorithm, size, seed=recipe.seed, sample_bytes=plan.sample_bytes, num_sentinels=sentinels,
            byte_fallback=plan.byte_fallback,
        )  # fmt: skip
    except UserError:  # too few for what it needs at least
        return False
    return again.digest == made.digest


def _kept(own: Path, record: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer in a directory, if it was made of this. A resolved recipe asks for the ids that there are."""
    made = _record(own)
    if not made or not (own / "tokenizer.json").exists():
        return None
    sizes = (made.get("size"), made.get("resolved_size")) if "text" in record else (None,)
    if made.get("text") != record.get("text") or record.get("size") not in sizes:
        return None
    tokenizer = Tokenizer.load(own)
    wanted = record.get("digest", made.get("digest"))
    return tokenizer if tokenizer.digest == made.get("digest") == wanted else None


def sentinels_of(recipe: Recipe) -> int:
    """Return how many `<extra_id_n>` the recipe's objective needs in a tokenizer."""
    return max(one.num_sentinels for one in recipe.objective.components())


def _text_hash(recipe: Recipe, inputs: RunInputs, sentinels: int) -> str:
    """A hash of the training text of a tokenizer, and of the settings by which it is read, but for the number of ids."""
    source, plan = recipe.data, recipe.tokenizer
    told = [
        {name: digest for name, digest in inputs.digests.items() if name in ("data.path", "data.corpus")},
        [source.text_field, source.split_by, source.validation_fraction, bool(source.validation_path), source.weights],
        [plan.algorithm, plan.sample_bytes, plan.byte_fallback, sentinels, recipe.seed],
        recipe.examples.tokenizer_settings,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
