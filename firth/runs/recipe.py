"""The configuration of a training run (`Recipe`), and how it is loaded from YAML, a run directory or a published name.

    Recipe(name="gpt", objective=CausalLM(), examples=WindowsConfig(max_length=256), data=DataConfig(corpus="shakespeare"), ...)

A recipe is a tree of frozen dataclasses that holds everything the run depends on. `firth train mine.yaml` reads it as YAML,
and every run directory keeps it as `recipe.yaml`; training from that file repeats the run.
`firth train gpt batch.size=64 data.path=mine/` takes a published recipe (`RECIPES`) and sets fields.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from firth import objectives
from firth.corpora import catalog
from firth.data.corpus import PreparedCorpus, is_corpus
from firth.data.examples import DataConfig, ExamplesConfig
from firth.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    OptionalTokenCount,
    PositiveInt,
    Validated,
    VocabSize,
    path_field,
)
from firth.model.config import ModelConfig
from firth.objectives.objective import Objective, Sum
from firth.runs import config_io
from firth.runs.compatibility import check_batching, check_fields, check_memory, check_pattern
from firth.runs.examples import EXAMPLES
from firth.runs.peft_options import PEFT_METHODS, FullFinetuning, PeftConfig, check_peft
from firth.runs.recipe_names import RECIPES
from firth.runs.start_model import continued, continues, model_directory
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.distributed import DistributedConfig
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule
from firth.types import UserError


@dataclass(frozen=True)
class TokenizerConfig(Validated, section="tokenizer"):
    """Configuration of the tokenizer: an existing one, or one that is trained on the run's text.

    Args:
        path: A tokenizer.json, a model directory or a run directory; empty trains a tokenizer.
        algorithm: Training algorithm (`firth.tokenizer.train`).
        vocab_size: Number of ids.
        byte_fallback: Whether bpe and unigram encode rare characters as bytes, so that no token is unknown.
        sample_bytes: Bytes of text to train on, sampled over the whole corpus.
        extend: Number of tokens of the run's text that are added to the tokenizer of `init_from` (`firth.tokenizer.extend`); the
            embedding of each begins as the mean of its old tokens.
    """

    path: str = path_field("tokenizer", "")
    algorithm: Literal["bpe", "byte-bpe", "wordpiece", "unigram", "word"] = "byte-bpe"
    vocab_size: VocabSize = 8192
    byte_fallback: bool = True
    sample_bytes: PositiveInt = 200_000_000
    extend: NonNegativeInt = 0


DEFAULT_VOCAB_SIZE = TokenizerConfig().vocab_size

GROUPED_STEPS = 50
"""Steps whose examples are grouped by length where the recipe sets neither packing nor grouping."""


@dataclass(frozen=True)
class BatchConfig(Validated, section="batch"):
    """Configuration of the batches.

    Args:
        size: Examples per optimizer step, over all ranks and micro-batches.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        pack_to_length: Tokens per packed row, with attention limited to each example; 0 pads every example to the longest of
            its step. "auto" packs to the longest example, or groups by length where rows cannot be packed.
        group_by_length: Steps whose examples are sorted by length together, which saves padding
            (`firth.data.shuffle.length_grouped_batches`); 0 does not group.

    Raises:
        UserError: Both `pack_to_length` and `group_by_length` are set.
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
        """Tokens per packed row; 0 where rows are not packed or `pack_to_length` is unresolved ("auto")."""
        return 0 if self.pack_to_length == "auto" else self.pack_to_length

    def resolve(self, longest: int, packs: bool) -> ResolvedBatchConfig:
        """Return the configuration with "auto" replaced by numbers.

        Args:
            longest: The most tokens of an example; 0 if unknown.
            packs: Whether rows can be packed.
        """
        pack, group = self.pack_to_length, self.group_by_length
        if pack == "auto":
            pack = longest if packs and not group else 0
            group = group or (0 if pack or not longest else GROUPED_STEPS)
        return ResolvedBatchConfig(self.size, self.gradient_accumulation_steps, pack, group)


@dataclass(frozen=True)
class ResolvedBatchConfig(BatchConfig):
    """Configuration of the batches of a run: `BatchConfig` with a number for "auto".

    Args:
        pack_to_length: Tokens per packed row; 0 for none.
    """

    pack_to_length: OptionalTokenCount = 0


@dataclass(frozen=True)
class EvalTask(Validated, section="evaluation.tasks"):
    """A task that is evaluated at each validation (`firth.runs.evaluation`).

    Args:
        name: in_context, copying, or a task in prompts that firth ships (minimal_pairs).
        file: A task file in place of a name.
        data: Files of the questions, for a task that names none.
        limit: Most texts, sequences or items.
    """

    name: str = ""
    file: str = path_field("task", "")
    data: tuple[str, ...] = path_field("files", ())
    limit: PositiveInt = 64


@dataclass(frozen=True)
class EvalConfig(Validated, section="evaluation"):
    """Evaluation on held-out examples during training.

    Args:
        every: Steps between evaluations; 0 evaluates at the end only.
        max_examples: Held-out examples to evaluate, at most.
        best_metric: The metric that chooses the exported checkpoint (accuracy, f1, loss, ...); empty exports the last step.
        patience: Stop after this many evaluations in a row without a new best (by the loss if `best_metric` is empty); 0
            never stops early.
        tasks: Tasks evaluated at the same steps; their metrics are named task/NAME.

    Raises:
        UserError: `patience` is set and `every` is not.
    """

    every: NonNegativeInt = 0
    max_examples: PositiveInt = 512
    best_metric: str = ""
    patience: NonNegativeInt = 0
    tasks: tuple[EvalTask, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience and not self.every:
            raise UserError("evaluation.patience counts evaluations during training: set evaluation.every too")


@dataclass(frozen=True)
class CheckpointConfig(Validated, section="checkpoint"):
    """When checkpoints are written.

    Args:
        every: Steps between checkpoints; 0 writes one at the end only.
        every_minutes: Minutes of training after which one is written though fewer steps have passed; 0 counts steps only.
        keep: Checkpoints to keep besides the best one.
    """

    every: NonNegativeInt = 500
    every_minutes: NonNegativeFloat = 15.0
    keep: PositiveInt = 2


@dataclass(frozen=True)
class Recipe(Validated):
    """Configuration of a training run.

    Args:
        name: Name of the recipe, shown in logs and reports.
        objective: The training objective, or a sum of objectives.
        examples: How text or records become examples.
        data: Where the text or the records are.
        tokenizer: The tokenizer.
        model: The architecture; None takes that of `init_from`. `vocab_size` may be left out; it is then the tokenizer's.
        init_from: A run or model directory, or a model of the catalog (minilm), to initialize the weights from. A pretraining
            recipe then has the defaults of continued pretraining (`firth.runs.start_model`).
        peft: Which weights are trained (`firth.runs.peft_options`).
        init_embeddings_from: A run or model directory with the same tokenizer, of which only the token embeddings are
            loaded (`firth.generate.embeddings`).
        init_head_from_frequencies: Whether an untrained LM head is initialized from the label frequencies (`firth.model.init`).
        batch: Batch size, packing and gradient accumulation.
        optimizer: The optimizer.
        schedule: The learning-rate schedule.
        budget: When training ends.
        evaluation: Evaluation during training.
        checkpoint: When checkpoints are written.
        distributed: How the model is spread over several processes. A resumed run may change it.
        loggers: Where metrics go besides metrics.jsonl (`firth.training.logging`). A resumed run may change it.
        sample_prompts: Texts for the report, sampled before and after training: the model continues a text, fills each <mask>
            in it, or, for word vectors, lists a word's nearest neighbors.
        precision: "auto" chooses the faster one, as measured on this machine.
        word_segmentation: How whole-word objectives find words (`firth.tokenizer.segmentation`); "auto" uses ICU's dictionaries
            where they are installed. A run can only be resumed with the segmentation that it started with.
        compile: Apply torch.compile to the blocks. On a CPU this needs a C++ compiler, takes half a minute and gains 5 %.
        gradient_checkpointing: Recompute the activations of attention blocks in the backward pass instead of storing them.
        seed: Seed of initialization, shuffling and sampling.
    """

    name: str
    objective: Objective
    examples: ExamplesConfig
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig | None = None
    init_from: str = path_field("model", "")
    peft: PeftConfig = FullFinetuning()
    init_embeddings_from: str = path_field("model", "")
    init_head_from_frequencies: bool = True
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Schedule = Schedule()
    budget: Budget = field(default_factory=lambda: Budget(max_steps=1000))
    evaluation: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    sample_prompts: tuple[str, ...] = ()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    word_segmentation: Literal["auto", "icu", "uax29"] = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: NonNegativeInt = 0

    def hash(self) -> str:
        """Return a short hash of the recipe, paths included."""
        return _hash(config_io.to_dict(self))

    @property
    def given_tokenizer(self) -> str:
        """The tokenizer that a run takes over: `tokenizer.path`, or else that of its start model or prepared corpus; "" for none."""
        base = self.init_from or self.init_embeddings_from
        if self.tokenizer.path or base:
            return self.tokenizer.path or str(model_directory(base))
        prepared = next((path for path in self.data.path if is_corpus(path)), None)
        return "" if prepared is None else str(PreparedCorpus.open(prepared).tokenizer)


@dataclass(frozen=True)
class ResolvedRecipe(Recipe):
    """Configuration of a run in which nothing is open: what `firth.runs.resolve` makes of a `Recipe`.

    It is written into the run directory as `recipe.yaml`, and it is a recipe itself: training it repeats the run. Its paths are
    absolute, its objective has the names and statistics of the classes, and `tokenizer.vocab_size` is that of the tokenizer.

    Args:
        model: The architecture.
        batch: Batch size, packing and gradient accumulation.
        precision: The precision of the forward and backward passes.
        word_segmentation: How whole-word objectives find words.
    """

    model: ModelConfig = field(kw_only=True)
    batch: ResolvedBatchConfig = field(kw_only=True)
    precision: Literal["fp32", "bf16"] = field(kw_only=True)
    word_segmentation: Literal["icu", "uax29"] = field(kw_only=True)


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


config_io.REGISTRIES[Objective] = config_io.Registry(
    "objective",
    lambda: list(objectives.OBJECTIVES),
    objectives.find,
    objectives.name_of,
    objectives.exists,
    join=lambda first, second: first + second,
    split=lambda total: (total.first, total.second) if isinstance(total, Sum) else (),
)
config_io.REGISTRIES[PeftConfig] = config_io.registry_of("way to adapt", PEFT_METHODS, PeftConfig)
config_io.SHORT_FORMS[DataConfig] = "path"
config_io.SHORT_FORMS[EvalTask] = "name"
config_io.REGISTRIES[ExamplesConfig] = config_io.registry_of("kind of examples", EXAMPLES, ExamplesConfig)


@functools.cache
def published(name: str) -> Recipe:
    """Return the published recipe of a name in `RECIPES`, or NAME:SIZE for a recipe with several sizes.

    Raises:
        UserError: There is no such recipe, or it has one size only.
    """
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
    """Return a copy whose `model.vocab_size` is that of the tokenizer: published tables may be padded (T5's 32,128 rows)."""
    if recipe.model is None:
        return recipe
    return replace(recipe, model=replace(recipe.model, vocab_size=recipe.tokenizer.vocab_size))


EXCLUSIVE_FIELDS = (("budget", ("max_steps", "max_seconds", "max_flops")), ("data", ("path", "corpus")))
"""Mutually exclusive fields: the one that the user sets replaces the others of the recipe."""


SHORT_KEYS = ("max_steps", "max_seconds", "max_flops")
"""Fields of `budget` that may be written without the prefix: `max_steps=500` is `budget.max_steps=500`."""


def expand_assignment(assignment: str) -> str:
    """Return an assignment with the full name of its field."""
    if assignment.partition("=")[0] in SHORT_KEYS:
        return f"budget.{assignment}"
    return config_io.expand_short_form(assignment, Recipe)


def _expand_keys(data: dict[str, Any], lines: dict[tuple[str, ...], str]) -> dict[str, Any]:
    """Return the fields of a YAML file with short keys moved into `budget`; `lines` gets the lines of the long ones."""
    short = {name: data[name] for name in SHORT_KEYS if name in data}
    if not short:
        return data
    lines |= {("budget", name): lines[name,] for name in short if (name,) in lines}
    rest = {name: value for name, value in data.items() if name not in short}
    return rest | {"budget": {**_mapping(rest.get("budget")), **short}}


def _drop_replaced(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Remove the fields that an assignment replaces: `max_seconds=70` removes the `max_steps` of a recipe."""
    names = {one.partition("=")[0] for one in assignments}
    for parent, fields in EXCLUSIVE_FIELDS:
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


MODEL_CONFIG_HINT = (
    "start from a model with init_from=RUN, or give a whole model config, for an encoder "
    "model='{hidden_size: 128, num_layers: 2, num_heads: 2, causal: false}'"
)
"""Advice for a recipe without a model config."""


def _fill_vocab(changed: dict[str, Any], data: Mapping[str, Any], names: Collection[str]) -> None:
    """Set a missing `model.vocab_size` to the vocabulary of the given tokenizer, else to `tokenizer.vocab_size`.

    It counts as missing if it is absent or null, and if the recipe had the size of its own tokenizer and the assignments choose
    another tokenizer. Any other number is checked against the tokenizer when the run starts (`check_vocab`).

    Args:
        changed: The recipe with its assignments, as plain data; changed in place.
        data: The recipe without them.
        names: The fields that the assignments set.
    """
    model, tokenizer = changed.get("model"), _mapping(changed.get("tokenizer"))
    if not isinstance(model, dict):
        return
    before, size = (
        _mapping(data.get("model")).get("vocab_size"),
        _mapping(data.get("tokenizer")).get("vocab_size", DEFAULT_VOCAB_SIZE),
    )
    follows = before == size and "model.vocab_size" not in names and "model" not in names
    chosen = any(one.split(".")[0] in ("tokenizer", "init_embeddings_from", "init_from") for one in names)
    if model.get("vocab_size") is not None and not (follows and chosen):
        return
    path, base = tokenizer.get("path"), changed.get("init_from") or changed.get("init_embeddings_from")
    given = Path(path) if path else model_directory(catalog.model_path(base)) if base else None
    size = tokenizer.get("vocab_size", DEFAULT_VOCAB_SIZE)
    if given is not None:
        with suppress(UserError):  # a missing tokenizer is an error when the run starts
            size = Tokenizer.load(given).vocab.size
    model["vocab_size"] = (
        size if isinstance(size, int) and size > 0 else DEFAULT_VOCAB_SIZE
    )  # a wrong size is reported elsewhere


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def load(name: str, assignments: Sequence[str] = ()) -> Recipe:
    """Load a recipe and apply `field=value` assignments.

    Args:
        name: A YAML file, a run directory or a published name.
        assignments: Settings from the command line, such as "batch.size=64".

    Raises:
        UserError: A field or value is invalid. The message names the field, its file and line, and the nearest existing name.
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
    assignments = [expand_assignment(one) for one in assignments]
    changed: dict[str, Any] = _drop_replaced(config_io.override(data, assignments), assignments)
    names = {one.partition("=")[0] for one in assignments}
    given = {field: text for field, _, text in (one.partition("=") for one in assignments)}
    if not file and continues(data, changed.get("init_from"), names):
        changed = continued(changed, given, data)
    if data.get("model") is None and isinstance(changed.get("model"), dict):
        missing = [one for one in ("hidden_size", "num_layers", "num_heads") if one not in changed["model"]]
        if missing and changed.get("init_from"):
            raise UserError(
                f"the model config lacks {', '.join(missing)}: a run with init_from has the model config of "
                f"{changed['init_from']}, so leave out {', '.join(sorted(n for n in names if n.startswith('model')))}"
            )
        if missing:
            raise UserError(
                f"the model config lacks {', '.join(missing)}, and the recipe {name!r} has none of its own: {MODEL_CONFIG_HINT}"
            )
    _fill_vocab(changed, data, names)
    typed = {tuple(name.split(".")): text for name, text in given.items()}
    recipe: Recipe = config_io.from_dict(Recipe, changed, config_io.SourceLocation((), lines, typed))
    if not recipe.data.path and {("data",), ("data", "path")} & typed.keys():
        raise UserError("data.path=[] names no file: name files or directories, or set data.corpus=NAME")
    recipe = config_io.with_models(recipe, catalog.model_path)
    check_recipe(recipe)
    return recipe


def load_resolved(directory: Path) -> ResolvedRecipe:
    """Load the resolved recipe of a run directory.

    Raises:
        UserError: The directory has no recipe.yaml, or a setting in it is open.
    """
    data, lines = config_io.read_yaml(directory / "recipe.yaml")
    resolved: ResolvedRecipe = config_io.from_dict(ResolvedRecipe, data, config_io.SourceLocation((), lines))
    return resolved


def check_recipe(recipe: Recipe, ranks: int = 1) -> None:
    """Raise a UserError if the sections of a recipe do not fit each other; the message suggests a change.

    It is called when a recipe is loaded, and again when the start model, the records and this machine have filled in what was
    open. What depends on a model config that is still open is checked then.

    Args:
        recipe: The recipe.
        ranks: Number of ranks that train it.
    """
    objective, config, batch = recipe.objective, recipe.model, recipe.batch
    check_peft(recipe.peft, recipe.init_from)
    check_extension(recipe)
    if config is not None:
        check_pattern(objective, config, recipe.examples, fixed=bool(recipe.init_from))
    check_fields(objective, recipe.examples, config)
    if config is not None:
        accumulate = batch.gradient_accumulation_steps
        check_batching(objective, config, pack=batch.packed_length, accumulate=accumulate, ranks=ranks)
        check_memory(config, recipe.examples, batch.packed_length)


def check_extension(recipe: Recipe) -> None:
    """Raise a UserError if a recipe adds tokens to a tokenizer and has no start model, or does not train their embeddings."""
    tokens = f"tokenizer.extend={recipe.tokenizer.extend}"
    if not recipe.tokenizer.extend:
        return
    if not recipe.init_from or recipe.tokenizer.path or recipe.init_embeddings_from:
        raise UserError(
            f"{tokens} adds tokens to the tokenizer of init_from: set init_from=MODEL, without tokenizer.path and "
            "init_embeddings_from"
        )
    if not isinstance(recipe.peft, FullFinetuning):
        raise UserError(f"{tokens} adds rows to the token embeddings, which only peft=full trains: set peft=full")
