"""The models of a server, by name: how they are loaded, what each can do, and the text of single tokens."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from firth.evaluate.perplexity import leading_bos
from firth.evaluate.prompting.responders import LocalModel
from firth.evaluate.task import EvaluatedModel, Task, load_evaluated_model
from firth.evaluate.tasks import TASKS, default_task
from firth.evaluate.tasks.generation import can_generate
from firth.evaluate.tokenizer_match import check_adapter_base, load_tokenizer
from firth.generate.quantized import quantize
from firth.peft import adapter_files
from firth.pretrained.load_save import check_vocab_fits
from firth.runs.loaded_model import Model, fast_weights, objective_in
from firth.serve.engine_thread import EngineThread
from firth.serve.responses import ApiError
from firth.serve.structured import Grammars
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import LOGGER, UserError


class TokenTexts:
    """Text of tokens.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.vocab = tokenizer, tokenizer.vocab

    def bytes_of(self, id: int) -> bytes:
        """Return the UTF-8 bytes of a token, with the space before it; they may be a part of a character."""
        if self.vocab.spelling is not None and not self.vocab.special[id]:
            return self.vocab.spelling[id]
        token: str | None = self.tokenizer.engine.id_to_token(id)
        return (token or "").encode()

    def text(self, id: int) -> str:
        """Return the text of a token; U+FFFD where it is a part of a character."""
        return self.bytes_of(id).decode("utf-8", "replace")

    def offsets(self, ids: Iterable[int], start: int = 0) -> list[int]:
        """Return where each token starts, in characters from the first, which starts at `start`.

        A token within a character starts where the character does.
        """
        offsets = Offsets(self, start)
        return [offsets.next(id) for id in ids]

    def joined(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of tokens one after another, with special tokens, so that `offsets` are places in it."""
        if self.vocab.spelling is None:
            return self.tokenizer.decode(ids)
        return b"".join(self.bytes_of(int(id)) for id in ids).decode("utf-8", "replace")

    @cached_property
    def longest(self) -> int:
        """The most characters of a token, no fewer than those of any text that is one token."""
        return max(len(self.bytes_of(id)) for id in range(self.vocab.size))

    def prompt_offsets(self, text: str | None, ids: Sequence[int] | np.ndarray) -> list[int]:
        """Return where each token of a prompt starts in its text; `text` is None for a prompt of token ids."""
        if text is None:
            return self.offsets(int(i) for i in ids)
        _, spans = self.tokenizer.spans(text)
        return [int(start) for start, _ in spans]


class Offsets:
    """Where each next token of a text starts, in characters.

    Args:
        texts: The tokens.
        start: Where the first one starts.
    """

    def __init__(self, texts: TokenTexts, start: int = 0) -> None:
        self.texts, self.length = texts, start
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, id: int) -> int:
        """Return where a token starts that follows those so far; within a character, where the character does."""
        start = self.length
        self.length += len(self.decoder.decode(self.texts.bytes_of(id)))
        return start


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model of the server.

    Args:
        name: Its name in requests.
        model: The model, with the weights that are served.
        created: When it was loaded, in seconds since 1970.
    """

    name: str
    model: Model
    created: int

    @cached_property
    def local(self) -> LocalModel:
        """The model as `firth evaluate` asks it, so that scores are equal."""
        evaluated = self.model.evaluated
        bos = leading_bos(evaluated.model_directory, evaluated.tokenizer)[0]
        return LocalModel(evaluated, bos=bos)

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles structured output for its tokenizer; made when it is first needed, which takes up to a second."""
        return Grammars(self.model.engine)

    @cached_property
    def texts(self) -> TokenTexts:
        """The text of each token."""
        return TokenTexts(self.model.tokenizer)

    @cached_property
    def capabilities(self) -> tuple[str, ...]:
        """What the model can do: names of routes."""
        evaluated, found = self.model.evaluated, ["tokenize", "embeddings"]
        config = evaluated.model.config
        if can_generate(evaluated):
            found.append("completions")
            if _has_template(evaluated):
                found.append("chat")
        if evaluated.model.has_lm_head and not config.encoder.latent_size:
            found.append("score")
        if not config.encoder.latent_size and self.model.with_lm_head().can_fill:
            found.append("fill")
        return tuple(found) if self.task is None else (*found, self.task.route)

    @cached_property
    def task(self) -> Task | None:
        """The task by whose route the model predicts; None if it has no such head."""
        task = TASKS.get(default_task(self.model.evaluated))
        return task if task is not None and task.route else None

    def exceeds(self, text: str, most: int) -> bool:
        """Return whether a text has more characters than `most` tokens can have, which is known without tokenizing it."""
        return len(text) > most * self.texts.longest

    def check_characters(self, text: str, most: int, param: str) -> None:
        """Raise an ApiError for a text that is longer than `most` tokens can be, before it is tokenized."""
        if self.exceeds(text, most):
            raise ApiError(
                400, f"{param}: the text has {len(text):,} characters, and {self.name} reads at most {most:,} tokens: shorten it",
                param=param, code="context_length_exceeded",
            )  # fmt: skip

    def require(self, capability: str) -> None:
        """Raise an ApiError if the model cannot do this."""
        if capability not in self.capabilities:
            raise ApiError(
                400, f"the model {self.name!r} cannot serve {capability}; it serves {', '.join(self.capabilities)}",
                param="model", code="unsupported_by_model",
            )  # fmt: skip


def _has_template(evaluated: EvaluatedModel) -> bool:
    """Return whether a dialogue can be encoded for a model."""
    if evaluated.model.config.encoder.num_layers:
        return False
    try:
        chat.encode(evaluated.tokenizer, [{"role": "user", "content": "a"}], open=True)
    except UserError:
        return False
    return True


@dataclass(frozen=True)
class ModelRegistry:
    """The models of a server and the thread that runs them.

    Args:
        models: Name -> model; the first is the default.
        thread: The thread.
    """

    models: Mapping[str, ServedModel]
    thread: EngineThread = field(default_factory=EngineThread)

    def get(self, name: str | None) -> ServedModel:
        """Return the model of a request; the first model if it names none.

        Raises:
            ApiError: There is no such model.
        """
        name = next(iter(self.models)) if name is None else name
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"there is no model {name[:100]!r}: this server has {known}", param="model", code="model_not_found"
            )
        return self.models[name]


def load_models(sources: Sequence[str], weights: str | None = None, max_rows: int = 16) -> ModelRegistry:
    """Load models; the base of several adapters is loaded once, and also serves under its own name if it is given.

    Args:
        sources: Run or model directories, adapters or GGUF files: PATH, which is named for its last part, or NAME=PATH.
        weights: Format of the weights in memory (`firth.generate.quantized`); None for the stored one, "auto" for bf16 where
            that is faster here. Models without an LM head keep the stored one.
        max_rows: Most answers of a model that are decoded together.

    Raises:
        UserError: Two models have one name, or a model cannot be loaded.
    """
    bases: dict[Path, EvaluatedModel] = {}
    models: dict[str, ServedModel] = {}
    for name, directory in map(_named, sources):
        if name in models:
            raise UserError(f"two models are named {name!r}: give one another name, as in NAME={directory}")
        model = Model(_load(directory, weights, bases), objective_in(directory) if directory.is_dir() else None)
        models[name] = ServedModel(name, model, int(time.time()))
        LOGGER.info(f"{name}: {', '.join(models[name].capabilities)} ({model.config.description})")
    return ModelRegistry(models, EngineThread(max_rows))


def _named(source: str) -> tuple[str, Path]:
    """Return the name and the path of PATH or NAME=PATH.

    >>> _named("runs/gpt/"), _named("small=runs/gpt"), _named("m.gguf")[0]
    (('gpt', PosixPath('runs/gpt')), ('small', PosixPath('runs/gpt')), 'm')
    """
    name, equals, path = source.partition("=")
    if equals and name and not Path(source).exists():
        return name, Path(path)
    found = Path(source)
    return (found.stem if found.suffix == ".gguf" else found.resolve().name), found


def _load(directory: Path, weights: str | None, bases: dict[Path, EvaluatedModel]) -> EvaluatedModel:
    """Load a model; `bases` has what is loaded already, by resolved directory, and is added to."""
    location = directory / "model" if (directory / "model").is_dir() else directory
    if location.resolve() in bases:
        return bases[location.resolve()]
    if not location.is_dir() or not adapter_files.present(location):
        found = bases[location.resolve()] = _converted(load_evaluated_model(directory), weights)
        return found
    base = adapter_files.base_of(location)
    check_adapter_base(location, base)
    shared = _load(base, weights, bases)
    model = adapter_files.load_shared(shared.model, location)
    tokenizer_location = location if (location / "tokenizer.json").is_file() else base
    tokenizer = load_tokenizer(tokenizer_location)
    check_vocab_fits(tokenizer, model.config, f"{tokenizer_location}")
    model.restrict_vocab(tokenizer.vocab)
    return EvaluatedModel(model, tokenizer, directory, tokenizer_location)


def _converted(evaluated: EvaluatedModel, weights: str | None) -> EvaluatedModel:
    """Return a model with its weights in another format; the stored weights are freed."""
    if not evaluated.model.has_lm_head:
        return evaluated
    weights = fast_weights(evaluated.model) if weights == "auto" else weights
    if weights is None:
        return evaluated
    model = quantize(evaluated.model, weights)
    model.restrict_vocab(evaluated.tokenizer.vocab)
    return EvaluatedModel(model, evaluated.tokenizer, evaluated.directory, evaluated.model_directory)
