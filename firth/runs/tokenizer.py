"""The tokenizer of a run, and warnings about words, names and sentences that it cannot find.

The tokenizer of a run directory, with a record of what it was made from.

`tokenizer/made_from.json` holds a hash of the training text and settings, or the digest of the tokenizer that it is a copy of,
and the hashes of its files. A tokenizer that a failed run left is reused only if the record matches.

Report, before a run, where an objective does not find the words, names or sentences that it looks for and falls back.

Words, names and sentences are found by Unicode's rules (`firth.tokenizer.segmentation`). Some scripts do not separate words, some
have no capitals, and some texts have no full stop; the objective then masks subwords or random spans, or splits anywhere.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from firth.corpora.input_files import ReadStats
from firth.data.examples import ExamplesConfig
from firth.data.noise import facts
from firth.data.source import Source
from firth.evaluate.tokenizer_match import load_tokenizer
from firth.io.atomic import write_text
from firth.io.integrity import file_facts, verify_files
from firth.io.json_files import check_all, read_object
from firth.objectives.objective import Objective
from firth.runs.examples import training_texts
from firth.runs.input_hashes import RunInputs, has_begun
from firth.runs.prepare import train_tokenizer
from firth.runs.recipe import Recipe
from firth.tokenizer import segmentation
from firth.tokenizer.extend import extend, stripped_accents, tokens_per_word
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.tokenizer.vocab import Vocab
from firth.types import Example, LogLine, UserError

RECORD = "made_from.json"
FILES = ("tokenizer.json", "tokenizer_config.json")
"""Files of a tokenizer whose hashes are recorded."""


def tokenizer_of(
    recipe: Recipe, directory: Path, log: LogLine, inputs: RunInputs | None = None, sentinels: int | None = None
) -> Tokenizer:
    """Return the tokenizer of a run: a copy of `Recipe.given_tokenizer`, or one trained on the run's text.

    Args:
        recipe: The recipe of the run.
        directory: The run directory, which keeps the tokenizer.
        log: Receives progress messages.
        inputs: The inputs of the run, if they have been read.
        sentinels: Number of `<extra_id_n>` tokens of a trained tokenizer; None for what the objective needs.

    Raises:
        UserError: The directory holds checkpoints of a run with another tokenizer.
    """
    sentinels = sentinels_of(recipe) if sentinels is None else sentinels
    inputs = inputs or RunInputs.read(recipe, directory, log)
    own, config, source = directory / "tokenizer", recipe.tokenizer, recipe.data
    path = recipe.given_tokenizer
    given = load_tokenizer(Path(path)) if path else None
    record: dict[str, Any] = (
        {"text": _text_hash(recipe, inputs, sentinels), "size": config.vocab_size}
        if given is None
        else {"digest": given.digest}
        if not config.extend
        else {"text": _text_hash(recipe, inputs, sentinels), "extends": given.digest, "added": config.extend}
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
        log(f"{own}: an earlier run made this tokenizer of another text or with other settings; it is rebuilt")
    shutil.rmtree(own, ignore_errors=True)
    if given is not None:
        (_extended(given, recipe, log) if config.extend else given).save(own)
        made = Tokenizer.load(own)
        record["resolved_size"] = made.vocab.size
    else:
        train_tokenizer(
            source.paths(log), own, algorithm=config.algorithm, vocab_size=config.vocab_size, text_field=source.text_field,
            split_by=source.split_by, sample_bytes=config.sample_bytes, seed=recipe.seed, log=log, byte_fallback=config.byte_fallback,
            num_sentinels=sentinels,
            texts=lambda counts: training_texts(recipe.examples, source, source.paths(log), counts),
        )  # fmt: skip
        made = Tokenizer.load(own)
        record["resolved_size"] = made.vocab.size if _repeats(made, recipe, sentinels, log) else config.vocab_size
    record |= {"digest": made.digest, "files": {name: file_facts(own / name) for name in FILES}}
    write_text(own / RECORD, json.dumps(record, indent=1) + "\n")
    return made


MEASURED_TEXTS = 200
"""Texts of which the tokens per word are reported."""


def _extended(given: Tokenizer, recipe: Recipe, log: LogLine) -> Tokenizer:
    """Return the tokenizer of the start model with `tokenizer.extend` more tokens, and report what they spare."""
    source, config = recipe.data, recipe.tokenizer
    paths = source.paths(log)

    def texts() -> Iterator[str]:
        return training_texts(recipe.examples, source, paths, ReadStats())

    made = extend(given, texts(), config.extend, seed=recipe.seed, sample_bytes=config.sample_bytes)
    some = list(islice(texts(), MEASURED_TEXTS))
    before, after = (tokens_per_word(one, some) for one in (given, made))
    log(
        f"{recipe.name}: {made.vocab.size - given.vocab.size:,} tokens of this text are added to the {given.vocab.size:,} of "
        f"{recipe.init_from}: {after:.2f} tokens per word, {before:.2f} before"
    )
    if lost := stripped_accents(given, some):
        log(
            f"{recipe.name}: the tokenizer of {recipe.init_from} removes the accents of {lost:.1%} of the letters of this text"
        )
    return made


def check_vocab(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raise a UserError if `model.vocab_size` differs from the tokenizer's number of ids.

    A tokenizer that is trained on a small text, or that of a prepared corpus, may have another number of ids than
    `tokenizer.vocab_size`; a model config of that size is then changed. In a run with `init_from` the weights determine the size.
    """
    if recipe.model is None or recipe.init_from:
        return
    stated, config, count = recipe.model.vocab_size, recipe.tokenizer, tokenizer.vocab.size
    trained = not config.path and not recipe.init_embeddings_from
    if stated != count and not (trained and stated == config.vocab_size):
        raise UserError(
            f"model.vocab_size={stated} is not the number of ids of the tokenizer, which is {count}: leave model.vocab_size out, and it "
            "is taken from there"
        )


def resolved_size(directory: Path) -> int:
    """Return `tokenizer.vocab_size` of a run's resolved recipe: the actual number of ids.

    If training with that number would give another tokenizer (the characters it knows depend on the size), it is the requested
    size, so that the recipe repeats the run.
    """
    return int(_record(directory / "tokenizer")["resolved_size"])


def _record(own: Path) -> dict[str, Any]:
    """Return the record of what the tokenizer in a directory was made from; {} if there is none."""
    if not (own / RECORD).exists():
        return {}
    hint = f"delete {own}, and it is made again"
    found = read_object(own / RECORD, {"resolved_size": int, "digest": str}, hint)
    files = found.get("files", {})  # older versions keep none
    check_all([files], {}, f"{own / RECORD}", hint)
    check_all(files.values(), {"bytes": int, "sha256": str}, f"{own / RECORD}", hint)
    verify_files(files, own, hint)
    return found


def _repeats(made: Tokenizer, recipe: Recipe, sentinels: int, log: LogLine) -> bool:
    """Return whether training with the actual number of ids gives the same tokenizer.

    It is trained again to find out, which is cheap: a text with fewer ids than requested is small.
    """
    config, source, size = recipe.tokenizer, recipe.data, made.vocab.size
    if size == config.vocab_size:
        return True
    texts = training_texts(recipe.examples, source, source.paths(log), ReadStats())
    try:
        again = train(
            texts, config.algorithm, size, seed=recipe.seed, sample_bytes=config.sample_bytes, num_sentinels=sentinels,
            byte_fallback=config.byte_fallback,
        )  # fmt: skip
    except UserError:  # too few for what it needs at least
        return False
    return again.digest == made.digest


def _kept(own: Path, record: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer in a directory if its record matches; a resolved recipe has the actual number of ids."""
    made = _record(own)
    if not made or not (own / "tokenizer.json").exists():
        return None
    sizes = (made.get("size"), made.get("resolved_size")) if "size" in record else (None,)
    same = all(made.get(name) == record.get(name) for name in ("text", "extends", "added"))
    if not same or record.get("size") not in sizes:
        return None
    tokenizer = Tokenizer.load(own)
    wanted = record.get("digest", made.get("digest"))
    return tokenizer if tokenizer.digest == made.get("digest") == wanted else None


def sentinels_of(recipe: Recipe) -> int:
    """Return the number of `<extra_id_n>` tokens that the recipe's objective needs."""
    return recipe.objective.constraints.num_sentinels


def _text_hash(recipe: Recipe, inputs: RunInputs, sentinels: int) -> str:
    """Return a hash of the training text and the settings of a tokenizer, except the number of ids."""
    source, config = recipe.data, recipe.tokenizer
    settings = [
        {name: digest for name, digest in inputs.digests.items() if name in ("data.path", "data.corpus")},
        [source.text_field, source.split_by, source.validation_fraction, bool(source.validation_path), source.weights],
        [config.algorithm, config.sample_bytes, config.byte_fallback, sentinels, recipe.seed],
        recipe.examples.tokenizer_settings,
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


SAMPLED_EXAMPLES = 64
"""Examples to inspect, evenly spaced."""
MIN_SHARE = 0.05
"""Smallest fraction of the examples or letters that is reported."""

REPORTS = {
    "words": "{share:.0%} of the letters are of scripts that do not separate words (Chinese, Japanese, Thai, Khmer, ...), so "
    "whole words fall back on subwords there; install firth[icu] to find words by ICU's dictionaries",
    "names": "{share:.0%} of the texts have no name, date or number that capitals or digits show, so salient spans fall back on "
    "random spans there",
    "sentences": "{share:.0%} of the texts are a single sentence, so there is no order of sentences to change there",
    "pairs": "{share:.0%} of the texts have no end of a sentence, so their pairs fall back on cuts anywhere",
}
"""Unit -> what is reported where it is not found."""


def fallbacks(objective: Objective, examples: ExamplesConfig, source: Source, vocab: Vocab) -> list[str]:
    """Return a sentence for each unit that the objective or the examples look for and often do not find.

    Args:
        objective: The objective.
        examples: The kind of examples.
        source: The training examples, of which SAMPLED_EXAMPLES are inspected.
        vocab: The vocabulary.
    """
    units = examples.text_units | objective.constraints.text_units
    if not units or vocab.spelling is None or not len(source):
        return []
    some = np.linspace(0, len(source) - 1, min(SAMPLED_EXAMPLES, len(source))).astype(int).tolist()
    texts = [text for i in some if len(text := _tokens(source[i]))]
    shares = {unit: _missing(unit, texts, vocab) for unit in sorted(units)} if texts else {}
    return [REPORTS[unit].format(share=share) for unit, share in shares.items() if share >= MIN_SHARE]


def resolve_segmentation(objective: Objective, wanted: Literal["auto", "icu", "uax29"]) -> Literal["icu", "uax29"]:
    """Return how an objective finds whole words on this machine; `wanted` if that is set and it does not look for words.

    Raises:
        UserError: This machine does not have the segmentation that the run started with or the recipe sets.
    """
    here: Literal["icu", "uax29"] = "icu" if segmentation.has_dictionary() else "uax29"
    if wanted == "auto" or wanted == here:
        return here
    if "words" in objective.constraints.text_units:
        hint = "install firth[icu]" if wanted == "icu" else "uninstall icu4py"
        raise UserError(
            f"word_segmentation={wanted}, and this machine finds words by {here}, which would mask other words: {hint}, or set "
            "word_segmentation=auto for a new run"
        )
    return wanted


def _tokens(example: Example) -> np.ndarray:
    parts = [example[name] for name in ("tokens", "first", "second") if name in example]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _missing(unit: str, texts: list[np.ndarray], vocab: Vocab) -> float:
    """Return the fraction of the letters (for words) or texts (for other units) where a unit is not found."""
    if unit == "words":
        if segmentation.has_dictionary():
            return 0.0
        letters = [c for text in texts for c in vocab.text(text) if c.isalpha()]
        return float(segmentation.unspaced(np.array(list(map(ord, letters)))).mean()) if letters else 0.0
    if unit == "names":
        return float(np.mean([not facts(text, vocab).any() for text in texts]))
    return float(np.mean([vocab.sentences(text).sum() < 2 for text in texts]))
