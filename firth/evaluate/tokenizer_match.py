"""Models that exchange token ids must have one tokenizer: compare digests, because equal sizes prove nothing.

`save_model` and the adapter writer store the digest of the tokenizer in `firth.json`. A directory of another library has no
digest there, and its own tokenizer files are read.
"""

from __future__ import annotations

from pathlib import Path

from firth.io.safetensors import read_json
from firth.tokenizer import formats
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

RECORD, KEY = "firth.json", "tokenizer"
"""The file of a model or adapter directory that holds the digest, and the key it has there."""


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer of a model or adapter directory.

    Args:
        directory: a directory with tokenizer files, or a GGUF file.

    Returns:
        The tokenizer.

    Raises:
        UserError: there is none, or it is not the one that the weights were trained with.
    """
    tokenizer = Tokenizer.load(directory)
    stated = _stated(directory)
    if stated and stated != tokenizer.digest:
        raise UserError(
            f"{directory}: tokenizer.json is not the tokenizer that this model was trained with (firth.json has the digest "
            f"{stated[:12]}, the file has {tokenizer.digest[:12]}): copy the whole directory again"
        )
    return tokenizer


def check_same_tokenizer(tokenizer: Tokenizer, directory: Path, name: str, cure: str) -> None:
    """Refuse a model whose weights were trained with another tokenizer than the run's.

    Args:
        tokenizer: the tokenizer of the run.
        directory: the model directory.
        name: what the model is to the run, at the beginning of the sentence.
        cure: what to do, at the end of the sentence.

    Raises:
        UserError: the digests differ.
    """
    if _digest(directory) != tokenizer.digest:
        raise UserError(
            f"{name} {directory} has another tokenizer than this run, so the same ids mean other tokens to it: {cure}"
        )


def check_adapter(tokenizer: Tokenizer, adapter: Path) -> None:
    """Refuse an adapter that was trained with another tokenizer than its base has.

    An adapter of peft may bring a tokenizer with more tokens than its base, so there only the shared ids are compared.

    Args:
        tokenizer: the tokenizer of the base.
        adapter: the directory of the adapter.

    Raises:
        UserError: the tokenizers differ.
    """
    stated = _stated(adapter)
    same = stated == tokenizer.digest
    if not stated:
        same = formats.find(adapter) is None or _same_ids(tokenizer, Tokenizer.load(adapter))
    if not same:
        raise UserError(
            f"the adapter {adapter} was trained with another tokenizer than its base has, so the same ids mean other tokens "
            "to it: take the base that it was trained on"
        )


def check_adapter_base(adapter: Path, base: Path) -> None:
    """Check an adapter against a base on disk, as `check_adapter` does; a base without a tokenizer is not checked."""
    if formats.find(base) is not None:
        check_adapter(load_tokenizer(base), adapter)


def _stated(directory: Path) -> str:
    """The digest in firth.json; "" where there is none."""
    return str(read_json(directory / RECORD).get(KEY) or "")


def _digest(directory: Path) -> str:
    """The digest of the tokenizer that the weights were trained with; UserError where nothing says which."""
    return _stated(directory) or Tokenizer.load(directory).digest


def _same_ids(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether every id that both have is the same token in both."""
    ours, theirs = ({i: token for token, i in t.engine.get_vocab().items()} for t in (first, second))
    return all(ours[i] == theirs[i] for i in ours.keys() & theirs.keys())
