"""Check that objective, model, examples and batching fit together.

Incompatible combinations are rejected when the recipe is loaded; the error names both sides and suggests a fix.

>>> from firth.model.config import decoder_config
>>> from firth.objectives.masked_lm import MLM
>>> from firth.objectives.sentence_pairs import NSP
>>> from firth.data.windows import ChunksConfig
>>> check_pattern(MLM(), decoder_config(vocab_size=10, hidden_size=64, num_layers=1))  # doctest: +ELLIPSIS
Traceback (most recent call last):
...
firth.types.UserError: objective mlm reads a text from both sides, which a causal decoder cannot: set model.causal=false, ...
>>> check_fields(NSP() + MLM(), ChunksConfig())
Traceback (most recent call last):
...
firth.types.UserError: objective nsp needs first, other and second, and examples=chunks has tokens: take examples=segment_pairs

Whether one objective can be added to another depends on which fields the first returns. That is found by building an example,
so an objective does not declare it.

>>> sorted(sample_example({"tokens", "label"}))
['label', 'tokens']
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from firth import objectives
from firth.data.collate import counted_fields
from firth.data.examples import ExamplesConfig
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.config_groups import LEARNED_POSITIONS
from firth.model.flops import num_parameters
from firth.model.model import LM
from firth.objectives.objective import PATTERN_DESCRIPTIONS, Objective, TokenObjective, components
from firth.objectives.policy_gradient import PER_TOKEN
from firth.runs import config_io
from firth.runs.examples import EXAMPLES
from firth.runs.peft_options import FullFinetuning, PeftConfig
from firth.tokenizer.vocab import ROLES, Vocab
from firth.training.device import memory, trim_freed_memory
from firth.types import IGNORE, DataStats, Example, LogLine, UserError

PATTERN_RECIPES: dict[AttentionPattern, str] = {
    "causal": "gpt (a decoder)", "bidirectional": "roberta (an encoder)", "permuted": "xlnet (an encoder)",
    "prefix": "prefix_lm (attention both ways)", "seq2seq": "t5 (an encoder-decoder)",
    "bidirectional_separate": "elmo (two LSTMs)", "none": "word2vec (a table of vectors)",
    "latent": "vae (an encoder-decoder with a latent)",
}  # fmt: skip
"""Attention pattern -> a published recipe whose model supports it."""

ONE_SIDED: frozenset[AttentionPattern] = frozenset({"causal", "permuted", "prefix", "seq2seq"})
"""Attention patterns in which some position does not see another one, so that examples need attention fields."""


def check_pattern(
    objective: Objective, config: ModelConfig, examples: ExamplesConfig | None = None, fixed: bool = False
) -> None:
    """Raise a UserError that suggests alternatives if the model does not support the objective.

    Args:
        objective: The objective.
        config: The model.
        examples: Suggested objectives must be compatible with these examples.
        fixed: Whether the model config is that of pretrained weights and cannot be changed.
    """
    name, reads = objective_name(objective), objective.attention
    if reads != "any" and reads not in PATTERN_DESCRIPTIONS:
        raise UserError(f"objective {name} has attention {reads!r}: take any, {', '.join(PATTERN_DESCRIPTIONS)}")
    if reads in config.supported_patterns:
        objective.configure(DataStats, config)
        return
    changes = "" if fixed else _settings(objective, config)
    remedy = (
        f"set {changes}"
        if changes
        else f"{'start from a model of' if fixed else 'use'} the recipe {PATTERN_RECIPES[reads]}"
    )
    others = [one for one in _served(config) if type(one) is not type(objective)]
    served = [one for one in others if examples is None or _has_inputs(one, examples)] or others
    offered = ", ".join(sorted(objective_name(one) for one in served))
    raise UserError(
        f"objective {name} {PATTERN_DESCRIPTIONS[reads]}, which {config.description} cannot: {remedy}"
        + (f", or take an objective that it serves: {offered}" if offered else "")
    )


def _served(config: ModelConfig) -> Iterator[Objective]:
    """Yield the objectives with an attention pattern of their own that a model supports."""
    for name in objectives.OBJECTIVES:
        one: Objective = objectives.find(name)()
        if one.attention != "any" and _is_standalone(one) and _supports(config, one):
            yield one


def _supports(config: ModelConfig, objective: Objective) -> bool:
    """Return whether a model can be trained with an objective."""
    try:
        objective.configure(DataStats, config)
    except UserError:
        return False
    return objective.attention in config.supported_patterns


def _is_standalone(objective: Objective) -> bool:
    """Return whether an objective has labels of its own: some component reads fields that a kind of examples has.

    A penalty reads nothing, and SBO what another component masks.
    """
    return any(
        one.inputs and any(one.inputs <= kind().fields for kind in EXAMPLES.values()) for one in components(objective)
    )


def _settings(objective: Objective, config: ModelConfig) -> str:
    """Return the fewest settings that make a model support an objective; empty if it takes another architecture."""
    wanted: dict[AttentionPattern, dict[str, bool | int]] = {
        "causal": {
            "causal": True,
            "encoder.num_layers": 0,
            "encoder.latent_size": 0,
            "attention.linformer.k": 0,
            "rnn.separate_directions": False,
        },
        "bidirectional": {"causal": False, "encoder.num_layers": 0, "encoder.latent_size": 0},
        "permuted": {"causal": False, "encoder.num_layers": 0, "encoder.latent_size": 0, "attention.linformer.k": 0},
        "prefix": {"causal": False, "encoder.num_layers": 0, "encoder.latent_size": 0, "attention.linformer.k": 0},
        "seq2seq": {
            "causal": True,
            "encoder.num_layers": config.encoder.num_layers or config.num_layers,
            "encoder.latent_size": 0,
            "attention.linformer.k": 0,
        },
        "bidirectional_separate": {"causal": False, "rnn.separate_directions": True},
    }
    current = config.flat_fields()
    settings = [
        f"{name}={str(value).lower()}"
        for name, value in wanted.get(objective.attention, {}).items()
        if current[name] != value
    ]
    try:
        changed: ModelConfig = config_io.from_dict(ModelConfig, config_io.override(config_io.to_dict(config), settings))
    except UserError:
        return ""
    if not _supports(changed, objective):
        return ""
    return _listed(f"model.{setting}" for setting in settings)


def check_fields(objective: Objective, examples: ExamplesConfig, config: ModelConfig | None = None) -> None:
    """Raise a UserError if the objective cannot be trained on the examples.

    The examples may lack a field that it needs, it may have no labels, or one component may drop the labels of another.

    Args:
        objective: The objective.
        examples: The examples.
        config: Suggested alternatives must be compatible with this model.
    """
    if fault := _fault(objective, examples):
        raise UserError(f"{fault}: {_suggestion(objective, examples, config)}")
    examples.check_objective(objective)


def _fault(objective: Objective, examples: ExamplesConfig) -> str:
    """Return what is wrong with the inputs of an objective; empty if nothing is."""
    given, labels, parts = examples.fields, frozenset[str](), components(objective)
    read = frozenset[str]().union(*(one.inputs for one in parts))
    if examples.required_fields - read:
        names = _listed(examples.required_fields)
        return f"examples={_name_of(examples)} needs an objective that reads {names}, and objective {objective_name(objective)} does not"
    example = sample_example(given)
    for one in parts:
        if lacking := one.inputs - given:
            giver = (
                f"examples={_name_of(examples)} has" if given == examples.fields else "the component before it outputs"
            )
            needed = one.inputs if given == examples.fields else lacking
            return f"objective {objective_name(one)} needs {_listed(needed)}, and {giver} {_listed(given) or 'nothing'}"
        if len(parts) == 1:
            break
        try:
            built = one.build_example(example, SAMPLE_VOCAB, np.random.default_rng(0))
        except KeyError as missing:
            return (
                f"objective {objective_name(one)} needs {missing.args[0]}, and is given {_listed(given) or 'nothing'}"
            )
        own = labels | frozenset(one.labels.values())
        # Fields of a group of rows are not those of an example: nothing can be added to a group.
        given = frozenset(name for name, x in built.items() if x is example.get(name) or np.ndim(x) < 2)
        example = built
        if lost := own - built.keys():
            return f"objective {objective_name(one)} rebuilds the example and drops {_listed(lost)}, the labels of the component before it"
        if twice := labels.intersection(one.labels.values()):
            return (
                f"objective {objective_name(one)} predicts {_listed(twice)}, which the component before it predicts too"
            )
        labels = own
    return "" if _is_standalone(objective) else f"objective {objective_name(objective)} has no labels of its own"


def _has_inputs(objective: Objective, examples: ExamplesConfig) -> bool:
    return not _fault(objective, examples)


def _suggestion(objective: Objective, examples: ExamplesConfig, config: ModelConfig | None) -> str:
    """Return a fix: other examples, or an objective to add it to."""
    if fitting := _fitting_examples(objective):
        return f"take {fitting}"
    if len(components(objective)) > 1:
        return "train with one of them, or put them into another order"
    elsewhere = ""
    for name in objectives.OBJECTIVES:
        try:
            both = objectives.find(name)() + objective
        except UserError:
            continue
        if config is not None and not _supports(config, both):
            continue
        advice = f"write objective=[{name}, {objective_name(objective)}]"
        if _has_inputs(both, examples):
            return advice
        if not elsewhere and (fitting := _fitting_examples(both)):
            elsewhere = f"{advice} and take {fitting}"
    return elsewhere or "no kind of examples has that, so it can only be trained from Python"


def _fitting_examples(objective: Objective) -> str:
    """Return the kinds of examples with the fewest fields that an objective can be trained on, as settings."""
    fitting = {name: len(kind().fields) for name, kind in EXAMPLES.items() if _has_inputs(objective, kind())}
    return " or ".join(f"examples={name}" for name, n in fitting.items() if n == min(fitting.values()))


def check_batching(objective: Objective, config: ModelConfig, *, pack: int, accumulate: int, ranks: int = 1) -> None:
    """Raise a UserError if the model or the objective does not support packing, accumulation or several ranks.

    Args:
        objective: The objective.
        config: The model.
        pack: Tokens per packed row; 0 for none.
        accumulate: Micro-batches per optimizer step.
        ranks: Number of ranks.
    """
    if pack and not config.packable:
        raise UserError(
            f"{config.description} reads one document a row, and batch.pack_to_length={pack} puts several there: set batch.pack_to_length=0"
        )
    if objective.constraints.needs_full_batch and accumulate * ranks > 1:
        raise UserError(
            f"objective {objective_name(objective)} compares all examples of a step with each other, and {ranks} ranks of "
            f"{accumulate} micro-batches would compare only their own: set batch.gradient_accumulation_steps=1 and train on one rank"
        )


def is_users(objective: Objective) -> bool:
    """Return whether an objective, or a component of a sum, is defined outside firth."""
    return any(":" in objective_name(one) for one in components(objective))


def check_built(objective: Objective, examples: Iterable[Any], vocab_size: int) -> None:
    """Raise a UserError if `build_example` of a user's objective returns what a model cannot be trained on.

    Args:
        objective: The objective.
        examples: Some examples that it has built.
        vocab_size: Number of token ids of the model.
    """
    for example in examples:
        if fault := _fault_of_built(objective, example, vocab_size):
            raise UserError(f"build_example of objective {objective_name(objective)}: {fault}")


def _fault_of_built(objective: Objective, example: Any, vocab_size: int) -> str:
    """Return what is wrong with an example that an objective has built; empty if nothing is."""
    if not isinstance(example, Mapping):  # a user's function may lack its return
        return f"it returned {example!r:.60}: return a dictionary of NumPy arrays"
    for field, value in example.items():
        if not isinstance(value, (np.ndarray, np.generic, int, float)):
            return f"the field {field!r} is a {type(value).__module__}.{type(value).__name__}: return NumPy arrays"
        if np.asarray(value).dtype.kind not in "biuf":
            return f"the field {field!r} is an array of {np.asarray(value).dtype}: return arrays of numbers"
    needed = {"tokens": "the tokens that the model sees"} | {
        field: f"the labels of {term!r}" for term, field in counted_fields(objective).items()
    }
    for field, meaning in needed.items():
        if field not in example:
            return f"there is no field {field!r}, {meaning}; it returned {_listed(example)}"
    token_labels = {f for one in components(objective) if isinstance(one, TokenObjective) for f in one.labels.values()}
    for field in ("tokens", *sorted(token_labels)):
        ids, shape = np.asarray(example[field]), np.shape(example["tokens"])
        if not shape:
            return f"the field 'tokens' is the single number {example['tokens']}: return an array, whose last axis is tokens"
        if not np.issubdtype(ids.dtype, np.integer) or ids.shape != shape:
            return f"the field {field!r} is {ids.dtype} of shape {ids.shape}: it must be whole numbers of shape {shape}"
        if (bad := ids[((ids < 0) | (ids >= vocab_size)) & ((ids != IGNORE) | (field == "tokens"))]).size:
            return f"the field {field!r} has the id {bad[0]}: the {vocab_size:,} ids of the model begin at 0"
    if objective.attention in ONE_SIDED and "query_time" not in example:
        return (
            f"attention is {objective.attention!r}, but there is no field 'query_time', so each token would see all others: "
            "add the fields of firth.data.attention_fields"
        )
    return ""


def check_memory(config: ModelConfig, examples: ExamplesConfig, pack: int) -> None:
    """Raise a UserError if the model has memory and the rows have no preceding text.

    `ModelConfig` checks that its positions support memory.
    """
    if config.attention.memory_length and pack:
        raise UserError(
            f"model.attention.memory_length={config.attention.memory_length} needs rows of one text each, "
            f"and batch.pack_to_length={pack} puts several into a row: set batch.pack_to_length=0, or model.attention.memory_length=0"
        )
    if config.attention.memory_length and not examples.gives_memory:
        names = ", ".join(name for name, kind in EXAMPLES.items() if kind.gives_memory)
        raise UserError(
            f"model.attention.memory_length={config.attention.memory_length} needs the tokens before each row, "
            f"which examples={_name_of(examples)} does not have: set model.attention.memory_length=0, or take examples={names}"
        )


def limit_lengths(
    examples: ExamplesConfig,
    usual: ExamplesConfig,
    adapt: PeftConfig,
    base: LM | None,
    config: ModelConfig,
    added: int,
    log: LogLine,
) -> ExamplesConfig:
    """Limit the rows to the learned positions of a model, less the virtual tokens of PEFT.

    Args:
        examples: The examples of the recipe.
        usual: The examples of the published recipe. A limit equal to its limit is lowered; any other was set by the user.
        adapt: The PEFT method.
        base: The model that the run starts from.
        config: Its config. Positions that are not learned do not limit a row.
        added: Tokens that the objective adds to a row (`Constraints.added_tokens`).
        log: Reports what is lowered.

    Raises:
        UserError: The user's own limit is too high; the error names the one that fits.
    """
    ahead = adapt.virtual_positions(base)
    own = ahead != FullFinetuning().virtual_positions(base)
    if config.position.type not in LEARNED_POSITIONS or (examples.drops_long_records and not own):
        return examples
    if not own:  # records are cut at the context in any case, and counted
        examples = examples.limit_to(config.max_positions)
    return _fit_rows(examples, usual, config.max_positions - added, ahead, log, "examples")


def _fit_rows(
    examples: ExamplesConfig, usual: ExamplesConfig, positions: int, ahead: tuple[int, int], log: LogLine, section: str
) -> ExamplesConfig:
    usual = usual if type(usual) is type(examples) else type(examples)()
    changed: dict[str, Any] = {}
    for name, inner in vars(examples).items():
        if isinstance(inner, ExamplesConfig):
            changed[name] = _fit_rows(inner, getattr(usual, name), positions, ahead, log, f"{section}.{name}")
    for name, limit in examples.row_limits(positions - ahead[0], positions - ahead[1]).items():
        value = getattr(examples, name)
        if value <= limit:
            continue
        taken = f", of which {max(ahead)} are before every text" if max(ahead) else ""
        why = f"the model has learned {positions} positions for a row{taken}"
        if limit < 1 or (value != getattr(usual, name) and not examples.drops_long_records):
            hint = f"set {section}.{name}={limit}" if limit > 0 else "lower peft.num_virtual_tokens"
            raise UserError(f"{section}.{name}={value}: {why}: {hint}")
        log(f"{section}.{name} is lowered from {value} to {limit}: {why}")
        changed[name] = limit
    return dataclasses.replace(examples, **changed) if changed else examples  # type: ignore[type-var]


def objective_name(objective: Objective) -> str:
    """Return the name of an objective in recipes; of a sum, of the component that requires an attention pattern."""
    parts = components(objective)
    demanding = next((one for one in parts if one.attention != "any"), parts[-1])
    return objectives.name_of(type(demanding))


def _name_of(examples: ExamplesConfig) -> str:
    return next((name for name, kind in EXAMPLES.items() if kind is type(examples)), type(examples).__name__)


def _listed(names: Iterable[str]) -> str:
    *most, last = sorted(names) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def local_processes() -> int:
    """Return the number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def available_memory(device: torch.device) -> dict[str, int]:
    """Return the free bytes of the memories that a run needs: main memory, and that of the GPU that it trains on.

    What an earlier run of this process has freed counts as free. The processes of a machine (torchrun's LOCAL_WORLD_SIZE) share
    its main memory equally.
    """
    trim_freed_memory()
    free = {"main memory": memory()[1] // local_processes()}
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free["the GPU's memory"] = torch.cuda.mem_get_info(device)[0] + kept
    return free


def check_available_memory(
    config: ModelConfig, optimizer: str, full: bool, device: torch.device, shards: int = 1, whole: bool = True
) -> None:
    """Raise a UserError if the weights of a model, their gradients and the optimizer state do not fit into the free memory.

    They have 4 bytes a number; AdamW keeps two numbers per weight, Muon one. With PEFT only the weights are counted. This
    takes no time, so it comes first; `firth.runs.step_estimate` adds the activations.

    Args:
        config: The model.
        optimizer: Name of the optimizer.
        full: Whether all weights are trained.
        device: The training device.
        shards: The ranks that share a copy of the model.
        whole: Whether each rank builds the whole model in main memory before it keeps a shard.

    Raises:
        UserError: More than is free.
    """
    count = num_parameters(config)
    each = 4 * (4 if optimizer == "adamw" else 3) if full else 4
    built = 4 if whole or shards == 1 else 0
    for name, free in available_memory(device).items():
        size = count * built if name == "main memory" and device.type == "cuda" else count * each / shards
        size = max(size, count * built) if name == "main memory" else size
        if size > free:
            shared = name == "main memory" and local_processes() > 1
            several = f" for each of {local_processes()} processes" if shared else ""
            raise UserError(
                f"the model has {count:,} parameters, which take {size / 1e9:,.1f} GB with gradients and optimizer, "
                f"and {free / 1e9:,.1f} GB of {name} are free{several}: lower model.hidden_size, model.num_layers or the vocabulary"
            )


LENGTH, FIRST_WORD, SIZE = 8, 16, 32
"""Tokens of a text, the first id that is not special, and the size of the vocabulary."""

SAMPLE_VOCAB = Vocab(
    size=SIZE, roles={role: id for id, role in enumerate(ROLES)}, special=np.arange(SIZE) < FIRST_WORD,
    sentinels=np.arange(len(ROLES), FIRST_WORD), spelling=tuple(b" a" if id % 4 else b"." for id in range(SIZE)),
)  # fmt: skip
"""A vocabulary with every special token, five sentinels or more, words, and ends of sentences."""

_TEXT = np.arange(FIRST_WORD, FIRST_WORD + LENGTH)
_MASK = np.arange(LENGTH) >= LENGTH // 2
_FIELDS: Example = {
    "tokens": _TEXT, "mask": _MASK, "token_type_ids": _MASK.astype(np.int64), "label": 1, "score": 1.0,
    "first": _TEXT[:4], "second": _TEXT[4:], "other": _TEXT[2:5], "votes": np.array([0, 1]), "taught": np.array([0.1, 0.9]),
    "tags": np.zeros(LENGTH, np.int64), "start": 2, "end": 3, "source": _TEXT, "target": _TEXT[:3],
    "kept": np.ones(SIZE), "noise": np.arange(1, SIZE + 1) / SIZE,
    "options": [{"tokens": _TEXT}, {"tokens": _TEXT[:4]}],
    "desirable": np.array([True]), "margin": np.zeros(1),
    "answers": [_TEXT, _TEXT[:6]], "masks": [_MASK, _MASK[:6]], "rank": np.array([0, 1]),
}  # fmt: skip
_FIELDS |= {
    f"{side}_{name}": _FIELDS[name] for side in ("chosen", "rejected", "mismatched") for name in ("tokens", "mask")
}
_FIELDS |= {name: np.zeros(LENGTH, np.float32) for name in PER_TOKEN}


def sample_example(fields: Collection[str]) -> Example:
    """Return a small example with some fields."""
    example = {name: value for name, value in _FIELDS.items() if name in fields}
    if "reference" in fields and "old" not in fields:  # a number for each answer, and not for each token
        example["reference"] = np.zeros(2, np.float32)
    return example
