"""Checks that models which share token ids have the same tokenizer.

`save_model` and the adapter writer store the digest of the tokenizer in `firth.json`. A directory of another library has no
digest, so its tokenizer files are read. Equal vocabulary sizes are no proof.
"""

from __future__ import annotations

from pathlib import Path

from firth.io.safetensors import read_json
from firth.io.sharded import is_checkpoint, run_of
from firth.tokenizer import formats
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

RECORD, KEY = "firth.json", "tokenizer"
"""File of a model or adapter directory that holds the digest, and its key in that file."""


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer of a model or adapter directory.

    Args:
        directory: A directory with tokenizer files, a checkpoint of a run, or a GGUF file.

    Returns:
        The tokenizer.

    Raises:
        UserError: There is no tokenizer, or it is not the one that the weights were trained with.
    """
    place = run_of(directory) / "tokenizer" if is_checkpoint(directory) else directory
    tokenizer = Tokenizer.load(place)
    stored = _stored_digest(directory)
    if stored and stored != tokenizer.digest:
        raise UserError(
            f"{place}: tokenizer.json is not the tokenizer that this model was trained with (firth.json has the digest "
            f"{stored[:12]}, the file has {tokenizer.digest[:12]}): copy the whole directory again"
        )
    return tokenizer


def check_same_tokenizer(tokenizer: Tokenizer, directory: Path, name: str, cure: str) -> None:
    """Raise an error for a model whose weights were trained with another tokenizer than the run's.

    Args:
        tokenizer: The tokenizer of the run.
        directory: The model directory.
        name: Role of the model in the run, which starts the error message.
        cure: What to do, which ends the error message.

    Raises:
        UserError: The digests differ.
    """
    if _digest(directory) != tokenizer.digest:
        raise UserError(
            f"{name} {directory} has another tokenizer than this run, so the same ids are different tokens: {cure}"
        )


def check_adapter(tokenizer: Tokenizer, adapter: Path) -> None:
    """Raise an error for an adapter that was trained with another tokenizer than its base has.

    An adapter of peft may have a tokenizer with more tokens than its base, so only the shared ids are compared there.

    Args:
        tokenizer: The tokenizer of the base.
        adapter: The directory of the adapter.

    Raises:
        UserError: The tokenizers differ.
    """
    stored = _stored_digest(adapter)
    same = stored == tokenizer.digest
    if not stored:
        same = formats.find(adapter) is None or _same_ids(tokenizer, Tokenizer.load(adapter))
    if not same:
        raise UserError(
            f"the adapter {adapter} was trained with another tokenizer than its base has, so the same ids are different "
            "tokens: use the base that it was trained on"
        )


def check_adapter_base(adapter: Path, base: Path) -> None:
    """Check an adapter against a base directory (see `check_adapter`); a base without a tokenizer is not checked."""
    if formats.find(base) is not None:
        check_adapter(load_tokenizer(base), adapter)


def _stored_digest(directory: Path) -> str:
    """Return the digest in firth.json; "" if there is none."""
    return str(read_json(directory / RECORD).get(KEY) or "")


def _digest(directory: Path) -> str:
    """Return the digest of the tokenizer that the weights were trained with; UserError if it is unknown."""
    return _stored_digest(directory) or Tokenizer.load(directory).digest


def _same_ids(first: Tokenizer, second: Tokenizer) -> bool:
    """Return whether every id that both have is the same token in both."""
    ours, theirs = ({i: token for token, i in t.engine.get_vocab().items()} for t in (first, second))
    return all(ours[i] == theirs[i] for i in ours.keys() & theirs.keys())
