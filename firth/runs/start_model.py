"""The models that a recipe names: their directories, and the model that a run starts from, which is read once.

Continued pretraining is a published pretraining recipe with `init_from`, on one's own text:

    firth train roberta init_from=minilm data.path=MINE               domain- or task-adaptive pretraining (Gururangan 2020)
    firth train gpt init_from=smollm2 peft=lora data.path=MINE

Architecture, tokenizer and position limits are those of the model. The recipe's optimizer, schedule and length are made for random
weights, and are replaced where the user has not set them, unless the rate is no larger (`contrastive:published`) or the model is a
run that began with random weights itself:

    optimizer    AdamW at 5e-4 (LoRA: 1e-3), decay 0.01, betas 0.9 and 0.98, as Gururangan 2020 for its larger batches. MiniLM on
                 French text, 50 steps: held-out loss 6.18 at 2e-4, 5.73 at 5e-4, 6.44 at 1e-3
    schedule     linear after a warmup of 6 % (the same table)
    steps        200, so that a model of 22 M parameters takes some minutes on two cores
    LoRA         on every linear map of the blocks: on queries and values alone it learns a new domain worse (Biderman 2024)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from firth.corpora import catalog
from firth.evaluate.tokenizer_match import load_tokenizer
from firth.model.config import ModelConfig
from firth.model.init import extend_vocab
from firth.model.model import LM
from firth.pretrained.load_save import check_vocab_fits, load_model, load_without_weights, read_config
from firth.runs import config_io
from firth.tokenizer.extend import old_tokens
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.device import default_device
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Schedule
from firth.types import LOGGER, UserError


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


LR, LORA_LR, STEPS = 5e-4, 1e-3, 200

LORA_TARGETS = ("blocks.*",)

KINDS = {
    (False, False): ("an encoder", "roberta"),
    (True, False): ("a decoder", "gpt"),
    (True, True): ("an encoder-decoder", "t5"),
    (False, True): ("an encoder-decoder", "t5"),
}
"""(Causal, with an encoder) -> what such a model is, and a recipe for it."""

TOKENIZER_FIELDS = ("algorithm", "vocab_size", "byte_fallback")
"""Fields of `tokenizer` that describe one that is trained, and contradict that of a start model."""


def continues(data: Mapping[str, Any], start: Any, names: Collection[str]) -> bool:
    """Return whether a published recipe with these assignments goes on from a model: it has an architecture of its own."""
    return "init_from" in names and bool(start) and data.get("model") is not None


def continued(changed: dict[str, Any], assignments: Mapping[str, str], published: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of a run that goes on from a published model.

    Args:
        changed: The recipe with its assignments, as plain data.
        assignments: Dotted field -> text, as the user set them.
        published: The recipe without them.

    Raises:
        UserError: An assignment contradicts the start model.
    """
    start = str(changed["init_from"])
    for field in TOKENIZER_FIELDS:
        if f"tokenizer.{field}" in assignments:
            raise UserError(
                f"tokenizer.{field}={assignments[f'tokenizer.{field}']}: a run with init_from has the tokenizer of {start}: leave it "
                "out, or set tokenizer.extend=N to add N tokens of your text to it"
            )
    base = _config_of(start)
    if base is not None and not {"model", "objective", "objective.kind"} & assignments.keys():
        _check_architecture(str(changed["name"]), published["model"], start, base)
    whole = {} if "model" in assignments else {"model": _model(base, assignments)}
    careful = published["optimizer"]["name"] == "adamw" and published["optimizer"]["lr"] <= LR
    if careful or _began_at_random(Path(start)):
        return changed | whole
    lora = _kind(changed.get("peft")) == "lora"
    optimizer = OptimizerConfig(name="adamw", lr=LORA_LR if lora else LR, weight_decay=0.01, beta2=0.98)
    sections: dict[str, Any] = {
        "optimizer": config_io.to_dict(optimizer),
        "schedule": config_io.to_dict(Schedule("linear", warmup_ratio=0.06)),
        "budget": {"max_steps": STEPS},
        "evaluation": {**published["evaluation"], "every": STEPS // 4},
        "checkpoint": {**published["checkpoint"], "every": STEPS // 4},
    }
    if lora:
        sections["peft"] = {"kind": "lora", "target_modules": list(LORA_TARGETS)}
    filled = {name: _filled(name, default, changed, assignments) for name, default in sections.items()}
    if any(name.startswith("budget.") for name in assignments):
        filled["budget"] = changed["budget"]
    set_here = [name for name in ("optimizer", "schedule", "budget") if filled[name] == sections[name]]
    if set_here:
        words = {
            "optimizer": f"AdamW at {optimizer.lr:g}",
            "schedule": "a linear schedule with 6 % warmup",
            "budget": f"{STEPS} steps",
        }
        LOGGER.info(f"{changed['name']} goes on from {start} with {', '.join(words[name] for name in set_here)}")
    return changed | filled | whole


def _config_of(start: str) -> ModelConfig | None:
    """Return the config of a start model; None if there is none, which the run reports."""
    place = Path(catalog.model_path(start))
    unfinished = (place / "recipe.yaml").is_file() and not (place / "model").is_dir()
    return read_config(model_directory(place)) if place.exists() and not unfinished else None


def _began_at_random(start: Path) -> bool:
    """Return whether a start model is a run of a recipe from random weights, which goes on with the recipe's own rates."""
    file = start / "recipe.yaml"
    return file.is_file() and not config_io.read_yaml(file)[0].get("init_from")


def _check_architecture(name: str, own: Mapping[str, Any], start: str, base: ModelConfig) -> None:
    """Raise a UserError if a recipe is for another kind of model: an encoder, a decoder, or both."""
    wanted = (bool(own.get("causal", True)), bool((own.get("encoder") or {}).get("num_layers")))
    given = (base.causal, base.encoder.num_layers > 0)
    if wanted != given:
        raise UserError(
            f"the recipe {name} trains {KINDS[wanted][0]}, and {start} is {KINDS[given][0]}: take the recipe {KINDS[given][1]}"
        )


def _model(base: ModelConfig | None, assignments: Mapping[str, str]) -> Any:
    """Return the model config: null, which takes that of the start model, or that one with the fields that the user set."""
    mine = [f"{name}={text}" for name, text in assignments.items() if name.startswith("model.")]
    return config_io.override({"model": config_io.to_dict(base)}, mine)["model"] if mine and base is not None else None


def _kind(section: Any) -> str:
    return str(section.get("kind", "") if isinstance(section, Mapping) else section)


def _filled(
    section: str, default: Mapping[str, Any], changed: Mapping[str, Any], assignments: Mapping[str, str]
) -> Any:
    """Return a section with the defaults of continued pretraining where the user has not set its fields."""
    if section in assignments and section != "peft":
        return changed[section]
    own = changed[section] if isinstance(changed.get(section), Mapping) else {}
    if section in assignments:  # peft={kind: lora, ...}
        return {**default, **own}
    return {**own, **default, **{n: own[n] for n in own if f"{section}.{n}" in assignments}}
