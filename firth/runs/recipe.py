"""A run is one expression: a frozen, typed tree that says everything the run depends on.

    Recipe(name="gpt", objective=CausalLM(), examples=Windows(length=256), data=Text(corpus="shakespeare"), ...)

The same tree in YAML is what `firth train mine.yaml` reads and what every run directory keeps as `recipe.yaml`;
running that file again repeats the run. `firth train gpt batch.size=64 data.path=mine/` starts from a published
recipe (a function in this room, see `RECIPES`) and changes fields.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from firth import objectives
from firth.model.config import ModelConfig
from firth.objectives.objective import Objective
from firth.runs import config_io
from firth.runs.compatibility import EXAMPLES, check_batching, check_fields, check_memory, check_pattern
from firth.runs.examples import ExamplesConfig, model_directory
from firth.runs.peft_options import PEFT_METHODS, FullFinetuning, PeftConfig, check_peft
from firth.runs.prepare import DataConfig
from firth.runs.recipe_names import RECIPES
from firth.tokenizer.tokenizer import Tokenizer
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule
from firth.types import UserError
from firth.validated import NonNegativeInt, OptionalTokenCount, PositiveInt, Range, Ranged


@dataclass(frozen=True)
class TokenizerConfig(Ranged, section="tokenizer"):
    """Where the tokenizer comes from: `path` (a tokenizer.json, a model or a run), else trained on the source's text.

    algorithm: see `firth.tokenizer.train`. size: number of ids. byte_fallback: whether bpe and unigram write rare characters as
    bytes, so that nothing is unknown. sample: bytes of text that training looks at, drawn over the whole corpus.
    """

    path: str = config_io.path_field("tokenizer", "")
    algorithm: Literal["bpe", "byte-bpe", "wordpiece", "unigram", "word"] = "byte-bpe"
    vocab_size: Annotated[int, Range(ge=1, lt=1 << 31)] = 8192
    byte_fallback: bool = True
    sample_bytes: PositiveInt = 200_000_000


DEFAULT_SIZE = TokenizerConfig().vocab_size

GROUPED_STEPS = 50
"""Steps that share their examples out by length, where a recipe leaves it open."""


@dataclass(frozen=True)
class BatchConfig(Ranged, section="batch"):
    """How many examples a step holds over all ranks and micro-batches, and how they are laid into rows.

    pack: several to a row of this many tokens, kept apart; 0: one to a row, padded to the longest of its step. "auto": rows as
    long as the segment's longest example, or like lengths (`sort`) where no row can hold two. sort: the examples of so many
    steps are sorted by length and dealt to these steps, so that little is padding (`firth.data.shuffle.length_grouped_batches`).
    """

    size: PositiveInt = 16
    gradient_accumulation_steps: PositiveInt = 1
    pack_to_length: OptionalTokenCount | Literal["auto"] = 0
    group_by_length: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pack_to_length != "auto" and self.pack_to_length and self.group_by_length:
            raise UserError("batch.pack_to_length and batch.group_by_length both spare padding: set one of them to 0")

    @property
    def packed_length(self) -> int:
        """Tokens of a packed row; 0 where rows are not packed, or where that is still open."""
        return 0 if self.pack_to_length == "auto" else self.pack_to_length

    def resolve(self, longest: int, packs: bool) -> BatchConfig:
        """With nothing left open. longest: tokens of an example at most, 0 if that is unknown; packs: whether rows can hold
        several."""
        if self.pack_to_length != "auto":
            return self
        pack = longest if packs and not self.group_by_length else 0
        return replace(
            self,
            pack_to_length=pack,
            group_by_length=self.group_by_length or (0 if pack or not longest else GROUPED_STEPS),
        )


@dataclass(frozen=True)
class EvalConfig(Ranged, section="evaluation"):
    """Evaluation on held-out examples during training.

    Args:
        every: Steps between evaluations; 0 evaluates at the end only.
        max_examples: Held-out examples to evaluate, at most.
        best_metric: The metric that chooses the exported checkpoint (accuracy, f1, loss, ...); empty exports the last step.
        patience: Stop after this many evaluations in a row without a new best (by the loss if `best_metric` is empty); 0
            never stops early.

    Raises:
        UserError: `patience` is set and `every` is not.
    """

    every: NonNegativeInt = 0
    max_examples: PositiveInt = 512
    best_metric: str = ""
    patience: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience and not self.every:
            raise UserError("evaluation.patience counts evaluations during training: set evaluation.every too")


@dataclass(frozen=True)
class CheckpointConfig(Ranged, section="checkpoint"):
    """When checkpoints are written.

    Args:
        every: Steps between checkpoints; 0 writes one at the end only.
        keep: Checkpoints to keep besides the best one.
    """

    every: NonNegativeInt = 500
    keep: PositiveInt = 2


@dataclass(frozen=True)
class Recipe(Ranged):
    """Everything a run depends on.

    start: a run or model directory whose weights to begin from. adapt: how much of them is trained
    (`firth.runs.peft_options`). embeddings: one of the same tokenizer whose token vectors alone are taken over, into a model
    that knows nothing else (`firth.generate.word_vectors`). shape: None takes the shape of `start`; its `vocab` may be left out, and
    is then the tokenizer's number of ids. samples: texts that the model continues before training and after, for the report; it
    fills those with a <mask> in them, and word vectors name a word's neighbours. unigram: a model that starts from nothing begins with the
    frequencies of the answers (`firth.model.init`). precision: "auto" is what this machine is measured to be fast at.
    segmentation: how an objective of whole words finds them (`firth.tokenizer.segmentation`); "auto" is by ICU's dictionaries where
    they are installed. A run goes on only where words are found as they were when it began.
    compile: torch.compile the blocks; on a CPU that takes a compiler of C++ and half a minute, and gains a twentieth.
    recompute: keep no activations inside of attention blocks, and run these again on the way back.
    """

    name: str
    objective: Objective
    examples: ExamplesConfig
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig | None = None
    init_from: str = config_io.path_field("model", "")
    peft: PeftConfig = FullFinetuning()
    init_embeddings_from: str = config_io.path_field("model", "")
    init_head_from_frequencies: bool = True
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Schedule = Schedule()
    budget: Budget = field(default_factory=lambda: Budget(max_steps=1000))
    evaluation: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample_prompts: tuple[str, ...] = ()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    word_segmentation: Literal["auto", "icu", "uax29"] = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: NonNegativeInt = 0

    def hash(self) -> str:
        """A short name of the recipe's content, paths included."""
        return _hash(config_io.to_dict(self))


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


config_io.REGISTRIES[Objective] = config_io.Registry(
    "objective",
    lambda: list(objectives.OBJECTIVES),
    objectives.find,
    join=lambda first, second: first + second,
    split=lambda total: (total.first, total.second),
)
config_io.REGISTRIES[PeftConfig] = config_io.Registry(
    "way to adapt", lambda: list(PEFT_METHODS), PEFT_METHODS.__getitem__
)
config_io.SHORT_FORMS[DataConfig] = "path"
config_io.REGISTRIES[ExamplesConfig] = config_io.Registry(
    "kind of examples", lambda: list(EXAMPLES), EXAMPLES.__getitem__
)


def published(name: str) -> Recipe:
    """The recipe of this name, among RECIPES; NAME:SIZE for one that comes in several sizes."""
    name, colon, size = name.partition(":")
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(RECIPES)}"
        raise UserError(f"there is no recipe {name!r} and no such file; {hint}")
    module, function = RECIPES[name].split(":")
    make: Callable[..., Recipe] = getattr(importlib.import_module(module), function)
    if not colon:
        return _of_tokenizer(make())
    if "size" not in inspect.signature(make).parameters:
        raise UserError(f"the recipe {name!r} comes in one size: leave out {colon + size!r}")
    return _of_tokenizer(make(size))


def _of_tokenizer(recipe: Recipe) -> Recipe:
    """Return a recipe whose model has as many ids as its tokenizer: published tables may be padded (T5's 32,128 rows)."""
    if recipe.model is None:
        return recipe
    return replace(recipe, model=replace(recipe.model, vocab_size=recipe.tokenizer.vocab_size))


ONE_OF = (("budget", ("max_steps", "max_seconds", "max_flops")), ("data", ("path", "corpus")))
"""Fields of which one is set: the one that the user sets replaces what the recipe has of the others."""


SHORT_KEYS = ("max_steps", "max_seconds", "max_flops")
"""Fields of `budget` that may be written without it: `max_steps=500` is `budget.max_steps=500`."""


def _expand_assignment(assignment: str) -> str:
    """Return an assignment with the full name of its field."""
    return f"budget.{assignment}" if assignment.partition("=")[0] in SHORT_KEYS else assignment


def _expand_keys(data: dict[str, Any], lines: dict[tuple[str, ...], str]) -> dict[str, Any]:
    """Return the fields of a YAML file with short keys moved into `budget`; `lines` gets the lines of the long ones."""
    short = {name: data[name] for name in SHORT_KEYS if name in data}
    if not short:
        return data
    lines |= {("budget", name): lines[name,] for name in short if (name,) in lines}
    rest = {name: value for name, value in data.items() if name not in short}
    return rest | {"budget": {**_mapping(rest.get("budget")), **short}}


def _one_of_each(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Remove the fields that an assignment replaces: `max_seconds=70` in a recipe of 600 steps leaves the seconds."""
    names = {one.partition("=")[0] for one in assignments}
    for parent, fields in ONE_OF:
        inner = data.get(parent)
        if not isinstance(inner, dict):
            continue
        given = [name for name in fields if f"{parent}.{name}" in names and inner.get(name)]
        if len(given) > 1:
            both = " and ".join(f"{parent}.{name}" for name in given)
            raise UserError(f"{both} are set together, and one of them replaces the other: leave one out")
        for name in fields if given else ():
            if name not in given:
                inner.pop(name, None)
    return data


WHOLE = (
    "begin from a model with init_from=RUN, or give a whole model config, for an encoder "
    "model='{hidden_size: 128, num_layers: 2, num_heads: 2, causal: false}'"
)
"""What cures a recipe without a shape."""


def _fill_vocab(changed: dict[str, Any], data: Mapping[str, Any], names: Collection[str]) -> None:
    """Set the shape's number of ids where the user leaves it open: to that of a given tokenizer, else to `tokenizer.vocab_size`.

    It is open where it is not there or null, and where the recipe had the size of its own tokenizer and assignments choose
    another tokenizer. Any other number is checked against the tokenizer when the run begins (`check_vocab`).

    Args:
        changed: The recipe with its assignments, as plain data.
        data: The recipe without them.
        names: The fields that the assignments set.
    """
    model, plan = changed.get("model"), _mapping(changed.get("tokenizer"))
    if not isinstance(model, dict):
        return
    before, size = (
        _mapping(data.get("model")).get("vocab_size"),
        _mapping(data.get("tokenizer")).get("vocab_size", DEFAULT_SIZE),
    )
    follows = before == size and "model.vocab_size" not in names and "model" not in names
    chosen = any(one.split(".")[0] in ("tokenizer", "init_embeddings_from", "init_from") for one in names)
    if model.get("vocab_size") is not None and not (follows and chosen):
        return
    path, begins = plan.get("path"), changed.get("init_from") or changed.get("init_embeddings_from")
    given = Path(path) if path else model_directory(begins) if begins else None
    size = plan.get("vocab_size", DEFAULT_SIZE)
    if given is not None:
        with suppress(UserError):  # a tokenizer that is not there is refused when the run begins
            size = Tokenizer.load(given).vocab.size
    model["vocab_size"] = (
        size if isinstance(size, int) and size > 0 else DEFAULT_SIZE
    )  # a wrong size has its own sentence


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def load(name: str, assignments: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, a run directory or a published name, with `field=value` assignments laid over it.

    Raises UserError naming the field, the file and line and the nearest existing name where something does not fit.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "recipe.yaml"
    lines: dict[tuple[str, ...], str] = {}
    if path.suffix in (".yaml", ".yml") or path.exists():
        data, lines = config_io.read_yaml(path)
        data = _expand_keys(data, lines)
        file = True
    else:
        data, file = config_io.to_dict(published(name)), False
    assignments = [_expand_assignment(one) for one in assignments]
    changed: dict[str, Any] = _one_of_each(config_io.override(data, assignments), assignments)
    names = {one.partition("=")[0] for one in assignments}
    if (
        "init_from" in names
        and changed.get("init_from")
        and not file
        and not any(n.split(".")[0] == "model" for n in names)
    ):
        changed["model"] = None  # the model to begin from has one; the published one is nobody's wish
    if data.get("model") is None and isinstance(changed.get("model"), dict):
        missing = [one for one in ("hidden_size", "num_layers", "num_heads") if one not in changed["model"]]
        if missing and changed.get("init_from"):
            raise UserError(
                f"the model config lacks {', '.join(missing)}: a run with init_from has the model config of {changed['init_from']}, so leave out "
                f"{', '.join(sorted(n for n in names if n.startswith('model')))}"
            )
        if missing:
            raise UserError(
                f"the model config lacks {', '.join(missing)}, and the recipe {name!r} has none of its own: {WHOLE}"
            )
    _fill_vocab(changed, data, names)
    said = {tuple(name.split(".")): text for name, _, text in (one.partition("=") for one in assignments)}
    recipe: Recipe = config_io.from_dict(Recipe, changed, config_io.SourceLocation((), lines, said))
    if not recipe.data.path and {("data",), ("data", "path")} & said.keys():
        raise UserError("data.path=[] names no file: name files or directories, or set data.corpus=NAME")
    check_peft(recipe.peft, recipe.init_from)
    if recipe.model is not None:
        check_pattern(recipe.objective, recipe.model, recipe.examples)
        check_batching(
            recipe.objective,
            recipe.model,
            pack=recipe.batch.packed_length,
            accumulate=recipe.batch.gradient_accumulation_steps,
        )
        check_memory(recipe.model, recipe.examples, recipe.batch.packed_length)
    check_fields(recipe.objective, recipe.examples, recipe.model)
    return recipe
