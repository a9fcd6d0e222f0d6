"""The models that a recipe names: their directories, and the model that a run starts from, which is read once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from firth.evaluate.tokenizer_match import load_tokenizer
from firth.model.extend_vocab import extend_vocab
from firth.model.model import LM
from firth.pretrained.load_save import check_vocab_fits, load_model, load_without_weights
from firth.tokenizer.extend import old_tokens
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.device import default_device
from firth.types import UserError


def model_directory(path: str | Path) -> Path:
    """Return the model directory of a run directory, or the path itself if it is no run directory."""
    path = Path(path)
    return path / "model" if (path / "model").is_dir() else path


def required_model(path: str, field: str, what: str) -> Path:
    """Return the model directory of a path; UserError with the field and what it is for if the path is empty."""
    if not path:
        raise UserError(f"the recipe lacks `{field}`: {what}")
    return model_directory(path)


class StartModel:
    """The model that a run starts from (`init_from`).

    A run needs it several times: its config resolves the recipe, its weights initialize the model, and DPO and PPO keep it as
    the frozen reference. It is read when it is first needed and kept until `release`. A sharded run needs only its shape, if it
    has no reference, and reads the weights into its shards.

    Args:
        path: A run or model directory, or a GGUF file; empty for a run that starts from scratch.
        extended: Its tokenizer with more tokens (`tokenizer.extend`), for which the model gets rows; None: its own.
    """

    def __init__(self, path: str = "", extended: Tokenizer | None = None) -> None:
        self.path, self.extended = path, extended

    @cached_property
    def _read(self) -> LM:
        directory = model_directory(self.path)
        model = load_model(directory)
        if self.extended is not None:
            old = load_tokenizer(directory)
            check_vocab_fits(old, model.config, self.path)
            extend_vocab(model, old.vocab.size, old_tokens(old, self.extended))
        return model

    @property
    def shape(self) -> LM | None:
        """The model, which may have no weights (on the meta device); None for a run that starts from scratch."""
        return self._shape if self.path else None

    @cached_property
    def _shape(self) -> LM:
        return self._read if "_read" in self.__dict__ else load_without_weights(model_directory(self.path))

    @property
    def model(self) -> LM | None:
        """The model, in evaluation mode; None for a run that starts from scratch."""
        return self._read if self.path else None

    def frozen(self, what: str) -> LM:
        """Return the model on the device that the run trains on, as a reference that is not trained.

        Args:
            what: What the run needs it for.

        Raises:
            UserError: The recipe has no `init_from`.
        """
        required_model(self.path, "init_from", what)
        return self._read.to(default_device())

    def release(self) -> None:
        """Forget the model, after the weights of the run have been initialized from it."""
        self.__dict__.pop("_read", None)
        self.__dict__.pop("_shape", None)
