"""What cannot be trained is refused when the recipe is read: an objective that its architecture cannot serve, or that its
segment does not feed.

>>> from firth.model.config import decoder_config
>>> from firth.objectives.masked_lm import MLM
>>> from firth.objectives.next_sentence import NSP
>>> from firth.runs.examples import ChunksConfig
>>> check_pattern(MLM(), decoder_config(vocab_size=10, hidden_size=64, num_layers=1))  # doctest: +ELLIPSIS
Traceback (most recent call last):
...
firth.types.UserError: objective mlm reads a text from both sides, which a causal decoder cannot: set model.causal=false, ...
>>> check_fields(NSP() + MLM(), ChunksConfig())
Traceback (most recent call last):
...
firth.types.UserError: objective nsp needs first, other and second in an example, and segment pieces gives tokens: take examples=segment_pairs
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from firth import objectives
from firth.doctor import memory
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.empty_weights import init_empty_weights
from firth.model.model import LM
from firth.model.parameter_count import LEARNED_POSITIONS
from firth.objectives.objective import PATTERN_DESCRIPTIONS, Objective
from firth.runs import alignment_examples, config_io, examples, labeled_examples, noisy_label_examples
from firth.runs.examples import ExamplesConfig
from firth.runs.peft_options import FullFinetuning, PeftConfig
from firth.runs.prepare import Echo
from firth.types import UserError

EXAMPLES = examples.EXAMPLES | labeled_examples.EXAMPLES | noisy_label_examples.EXAMPLES | alignment_examples.EXAMPLES
"""Name in a recipe -> class."""

RECIPE: dict[AttentionPattern, str] = {
    "causal": "gpt (a decoder)", "bidirectional": "roberta (an encoder)", "permuted": "xlnet (an encoder)",
    "prefix": "prefix_lm (attention both ways)", "seq2seq": "t5 (an encoder-decoder)",
    "bidirectional_separate": "elmo (two LSTMs)", "none": "word2vec (a table of vectors)", "latent": "vae (an encoder-decoder with a latent)",
}  # fmt: skip
"""A way of reading -> a recipe whose shape serves it."""


def check_pattern(
    objective: Objective, config: ModelConfig, examples: ExamplesConfig | None = None, fixed: bool = False
) -> None:
    """Raise a UserError that names both, and what would fit, if the shape does not honour what the objective asks.

    segment: what else would fit has to be fed by it. fixed: whether the shape is that of the weights to begin from.
    """
    name, reads = _name(objective), objective.attention_pattern()
    if reads in config.supported_patterns:
        if lacking := objective.missing_from(config):
            raise UserError(f"objective {name} cannot be trained with this shape: {lacking}")
        return
    told = "" if fixed else _settings(objective, config)
    remedy = f"set {told}" if told else f"{'start' if fixed else 'begin'} from the recipe {RECIPE[reads]}"
    others = [one for one in _served(config) if type(one) is not type(objective)]
    served = [one for one in others if examples is None or _fed(one, examples)] or others
    offered = ", ".join(sorted(_name(one) for one in served))
    raise UserError(
        f"objective {name} {PATTERN_DESCRIPTIONS[reads]}, which {config.description} cannot: {remedy}"
        + (f", or take an objective that it serves: {offered}" if offered else "")
    )


def _served(config: ModelConfig) -> Iterator[Objective]:
    """The objectives with a way of reading of their own that a shape serves."""
    for name in objectives.OBJECTIVES:
        one: Objective = objectives.find(name)()
        if (
            one.attention_pattern() in config.supported_patterns - {"any"}
            and one.standalone
            and not one.missing_from(config)
        ):
            yield one


def _settings(objective: Objective, config: ModelConfig) -> str:
    """The fewest settings by which a shape comes to serve an objective; empty where it takes another architecture."""
    wanted: dict[AttentionPattern, dict[str, bool | int]] = {
        "causal": {
            "causal": True,
            "num_encoder_layers": 0,
            "latent_size": 0,
            "linformer_k": 0,
            "separate_directions": False,
        },
        "bidirectional": {"causal": False, "num_encoder_layers": 0, "latent_size": 0},
        "permuted": {"causal": False, "num_encoder_layers": 0, "latent_size": 0, "linformer_k": 0},
        "prefix": {"causal": False, "num_encoder_layers": 0, "latent_size": 0, "linformer_k": 0},
        "seq2seq": {
            "causal": True,
            "num_encoder_layers": config.num_encoder_layers or config.num_layers,
            "latent_size": 0,
            "linformer_k": 0,
        },
        "bidirectional_separate": {"causal": False, "separate_directions": True},
    }
    told = config_io.to_dict(config)
    changes = {
        name: value for name, value in wanted.get(objective.attention_pattern(), {}).items() if told.get(name) != value
    }
    try:
        changed: ModelConfig = config_io.from_dict(ModelConfig, told | changes)
    except UserError:
        return ""
    if objective.attention_pattern() not in changed.supported_patterns or objective.missing_from(changed):
        return ""
    return _listed(f"model.{name}={str(value).lower()}" for name, value in changes.items())


def check_fields(objective: Objective, examples: ExamplesConfig, config: ModelConfig | None = None) -> None:
    """Raise a UserError if the examples lack what the objective needs, or if it asks nothing of them, or if an addend of it
    loses what another asks. What would fit has to suit the shape, if there is one."""
    fault = _fault(objective, examples)
    if not fault and config is not None and objective.required_heads:
        with init_empty_weights():
            lent = objective.heads(config)
        if lacking := objective.required_heads - lent.keys():
            names = ", ".join(objectives.name_of(type(one)) for one in objective.components())
            raise UserError(
                f"no addend of the objective [{names}] has the part {_listed(lacking)} that it reads with: add mlm"
            )
    if fault:
        raise UserError(f"{fault}: {_feeding(objective, examples, config)}")
    examples.check_objective(objective)


def _fault(objective: Objective, examples: ExamplesConfig) -> str:
    """What is wrong with an objective's food, if anything."""
    given, asked = examples.fields, frozenset[str]()
    read = frozenset[str]().union(*(one.inputs(given) for one in objective.components()))
    if examples.required_fields - read:
        told = _listed(examples.required_fields)
        return f"segment {_name_of(examples)} is for those who read {told}, and objective {_name(objective)} does not"
    for one in objective.components():
        if lacking := one.inputs(given) - given:
            told = (
                f"segment {_name_of(examples)} gives" if given == examples.fields else "what stands before it lays out"
            )
            needed = one.inputs(given) if given == examples.fields else lacking
            return f"objective {_name(one)} needs {_listed(needed)} in an example, and {told} {_listed(given) or 'nothing'}"
        own = asked | frozenset(one.labels.values())
        given = one.outputs(given)
        if lost := own - given:
            return f"objective {_name(one)} lays an example out anew, so that {_listed(lost)} of what stands before it is lost"
        if twice := asked.intersection(one.labels.values()):
            return f"objective {_name(one)} asks {_listed(twice)}, which what stands before it asks too"
        asked = own
    return "" if objective.standalone else f"objective {_name(objective)} asks nothing of a text by itself"


def _fed(objective: Objective, examples: ExamplesConfig) -> bool:
    return not _fault(objective, examples)


def _feeding(objective: Objective, examples: ExamplesConfig, config: ModelConfig | None) -> str:
    """What mends it: another segment, or an objective to add it to."""
    if fitting := _segments(objective):
        return f"take {fitting}"
    if len(objective.components()) > 1:
        return "train with one of them, or put them into another order"
    elsewhere = ""
    for name in objectives.OBJECTIVES:
        try:
            both = objectives.find(name)() + objective
        except UserError:
            continue
        if config is not None and (
            both.attention_pattern() not in config.supported_patterns or both.missing_from(config)
        ):
            continue
        told = f"write objective=[{name}, {_name(objective)}]"
        if _fed(both, examples):
            return told
        if not elsewhere and (fitting := _segments(both)):
            elsewhere = f"{told} and take {fitting}"
    return elsewhere or "no segment gives that, so it can be trained from Python alone"


def _segments(objective: Objective) -> str:
    """The segments that feed an objective and give the least besides, as one writes them."""
    fitting = {name: len(kind().fields) for name, kind in EXAMPLES.items() if _fed(objective, kind())}
    return " or ".join(f"examples={name}" for name, n in fitting.items() if n == min(fitting.values()))


def check_batching(objective: Objective, config: ModelConfig, *, pack: int, accumulate: int, ranks: int = 1) -> None:
    """Raise a UserError if a step is packed or cut up in a way that the shape or the objective cannot bear."""
    if pack and not config.packable:
        raise UserError(
            f"{config.description} reads one document a row, and batch.pack_to_length={pack} puts several there: set batch.pack_to_length=0"
        )
    if objective.needs_full_batch and accumulate * ranks > 1:
        raise UserError(
            f"objective {_name(objective)} compares all examples of a step with each other, and {ranks} ranks of "
            f"{accumulate} micro-batches would compare only their own: set batch.gradient_accumulation_steps=1 and train on one rank"
        )


def check_memory(config: ModelConfig, examples: ExamplesConfig, pack: int) -> None:
    """Raise a UserError if the shape's memory is asked of rows that have no text before them.

    (That positions must reach back before a row, `Shape` says itself.)
    """
    if config.memory_length and pack:
        raise UserError(
            f"model.memory_length={config.memory_length} needs rows of one text each, and batch.pack_to_length={pack} puts several into a row: "
            "set batch.pack_to_length=0, or model.memory_length=0"
        )
    if config.memory_length and not examples.gives_memory:
        told = ", ".join(name for name, kind in EXAMPLES.items() if kind.gives_memory)
        raise UserError(
            f"model.memory_length={config.memory_length} needs the tokens that stand before each row, which segment {_name_of(examples)} does "
            f"not give: set model.memory_length=0, or take examples={told}"
        )


def limit_lengths(
    examples: ExamplesConfig,
    usual: ExamplesConfig,
    adapt: PeftConfig,
    base: LM | None,
    config: ModelConfig,
    added: int,
    echo: Echo,
) -> ExamplesConfig:
    """Bound the rows of a segment by the positions that a model has learned, less the trained ones before every text.

    Args:
        segment: As the recipe has it.
        usual: That of the published recipe: a limit that is as there is lowered, any other is the user's own.
        adapt: What is trained.
        base: The model that the run begins from.
        shape: Its shape. Positions that are not learned bound no row.
        added: Tokens that the objective adds to a row (`Objective.added_tokens`).
        echo: Reports what is lowered.

    Raises:
        UserError: The user's own limit is too high; the error names the one that fits.
    """
    ahead = adapt.virtual_positions(base)
    own = ahead != FullFinetuning().virtual_positions(base)
    if config.position not in LEARNED_POSITIONS or (examples.drops_long_records and not own):
        return examples
    if not own:  # records are cut at the context in any case, and counted
        examples = examples.limit_to(config.max_positions)
    return _fit_rows(examples, usual, config.max_positions - added, ahead, echo, "examples")


def _fit_rows(
    examples: ExamplesConfig, usual: ExamplesConfig, room: int, ahead: tuple[int, int], echo: Echo, section: str
) -> ExamplesConfig:
    usual = usual if type(usual) is type(examples) else type(examples)()
    changed: dict[str, Any] = {}
    for name, inner in vars(examples).items():
        if isinstance(inner, ExamplesConfig):
            changed[name] = _fit_rows(inner, getattr(usual, name), room, ahead, echo, f"{section}.{name}")
    for name, limit in examples.row_limits(room - ahead[0], room - ahead[1]).items():
        value = getattr(examples, name)
        if value <= limit:
            continue
        taken = f", of which {max(ahead)} are before every text" if max(ahead) else ""
        why = f"the model has learned {room} positions for a row{taken}"
        if limit < 1 or (value != getattr(usual, name) and not examples.drops_long_records):
            cure = f"set {section}.{name}={limit}" if limit > 0 else "lower peft.num_virtual_tokens"
            raise UserError(f"{section}.{name}={value}: {why}: {cure}")
        echo(f"{section}.{name} is lowered from {value} to {limit}: {why}")
        changed[name] = limit
    return dataclasses.replace(examples, **changed) if changed else examples  # type: ignore[type-var]


def _name(objective: Objective) -> str:
    """As a recipe calls it; the addend that makes the demand, of a sum."""
    addends = objective.components()
    demanding = next((one for one in addends if one.attention_pattern() != "any"), addends[-1])
    return objectives.name_of(type(demanding))


def _name_of(examples: ExamplesConfig) -> str:
    return next((name for name, kind in EXAMPLES.items() if kind is type(examples)), type(examples).__name__)


def _listed(names: Iterable[str]) -> str:
    *most, last = sorted(names) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def check_available_memory(config: ModelConfig, optimizer: str, full: bool, device: torch.device) -> None:
    """Refuse a model that cannot be trained in the memory that is free, before any of it is taken.

    Counted are the weights, their gradients and the optimizer's state in fp32 (4 bytes each; AdamW keeps two numbers a
    weight, Muon one), and not the activations: what passes may still be too large. Of an adapted model the weights alone.

    Args:
        shape: the model.
        optimizer: its name.
        full: whether all weights are trained.
        device: where it is trained; the model is made in main memory in any case.

    Raises:
        UserError: More than is free.
    """
    count = config.num_parameters()
    each = 4 * (4 if optimizer == "adamw" else 3) if full else 4
    rooms = [("main memory", each if device.type == "cpu" else 4, memory()[1])]
    if device.type == "cuda":
        rooms.append(("the GPU's memory", each, torch.cuda.mem_get_info(device)[0]))
    for name, size, free in rooms:
        if count * size > free:
            raise UserError(
                f"the model has {count:,} parameters, which take {count * size / 1e9:,.1f} GB with gradients and optimizer, "
                f"and {free / 1e9:,.1f} GB of {name} are free: lower model.hidden_size, model.num_layers or the vocabulary"
            )
