"""How much of a pretrained model a run trains: the `adapt` of a recipe.

    full      everything (the default)
    head      the task's head alone, on the last layer (`peft=head`)
    frozen    the same on a learnt mixture of all layers (Peters 2018, ELMo)
    lora      thin products added to chosen matrices (Hu 2021), and the heads that the start has not
    prefix    keys and values before every text (Li & Liang 2021), and those heads
    prompt    vectors before every text (Lester 2021), and those heads

    firth train classification init_from=runs/bert data.path=labelled.jsonl peft=lora
    firth train sft init_from=runs/gpt data.path=dialogues.jsonl peft.kind=lora peft.rank=16 peft.target_modules='[blocks.*]'

The last three leave `adapter/` in the run directory, in peft's format, beside `model/`, which holds a LoRA's weights merged,
and a prefix or a prompt as a part of the model (which transformers alone does not read: it takes peft and `adapter/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from firth.evaluate.tokenizer_match import check_adapter
from firth.io.atomic import new_directory
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS, check_prefix_supported
from firth.objectives.layer_mixture import LayerMixture
from firth.objectives.objective import Objective
from firth.peft import adapter_files, lora
from firth.peft.init import prefix_of, prompt_of
from firth.pretrained.load_save import added_heads
from firth.runs.config_io import path_field
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError
from firth.validated import PositiveFloat, Range, Ranged, ShareBelowOne, TokenCount


class PeftConfig(Ranged, section="peft"):
    """How much is trained. needs: whether it needs a model to begin from. packs: whether it suits rows of several texts."""

    needs_base: ClassVar[bool] = True
    packable: ClassVar[bool] = True

    def configure_objective(self, objective: Objective) -> Objective:
        """The objective as it reads a model that is adapted so."""
        return objective

    def check_model(self, model: LM, base: LM | None) -> None:
        """Raise a UserError for a model that cannot be adapted so.

        Args:
            model: The model that is trained, without its weights and without what its base has before every text.
            base: The model that it begins from.
        """

    def virtual_positions(self, base: LM | None) -> tuple[int, int]:
        """Return how many trained positions are before every text, and before every source of an encoder."""
        return (base.num_virtual_tokens(), base.num_virtual_tokens(source=True)) if base is not None else (0, 0)

    def apply(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        """Put on the model what is trained, and freeze the rest. added: the parts that its start had not."""

    def export(
        self,
        model: LM,
        directory: Path,
        base: Path,
        added: Sequence[str],
        tokenizer: Tokenizer,
        facts: Mapping[str, Any],
    ) -> str:
        """Write the adapter that was trained, if there is one, and leave a plain model; one sentence for the user."""
        return ""


@dataclass(frozen=True)
class FullFinetuning(PeftConfig):
    """Everything is trained."""

    needs_base: ClassVar[bool] = False


@dataclass(frozen=True)
class HeadOnly(PeftConfig):
    """The parts of the objective alone are trained; the trunk is not run back through."""

    def apply(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        parts = _heads(model)
        if not parts:
            raise UserError(
                "peft=head trains the parts that the objective adds, and here that is only a vocabulary head which is one "
                "with the table of tokens: take peft=lora or peft=prompt"
            )
        lora.freeze(model, parts)


def _heads(model: LM) -> list[str]:
    """The parts that a head alone can be: neither one with the table of tokens nor before every text."""
    return [
        name for name in model.heads if name not in PREFIX_HEADS and (name != "lm" or not model.config.tie_embeddings)
    ]


@dataclass(frozen=True)
class FrozenFeatures(HeadOnly):
    """The objective's parts on a mixture of all layers: one weight for each of them and a scale are learnt with them."""

    def configure_objective(self, objective: Objective) -> Objective:
        return add_layer_mixture(objective)

    def check_model(self, model: LM, base: LM | None) -> None:
        # Whoever writes or scores with a vocabulary head reads the last layer, not the mixture that it was trained on.
        if "lm" in model.heads:
            raise UserError(
                "peft=frozen trains a head on a mixture of all layers, which a vocabulary head does not read when it writes: "
                "take peft=lora, or an objective with a head of its own, such as classification"
            )


def add_layer_mixture(objective: Objective, frozen: bool = True) -> Objective:
    """Return the objective on a mixture of all layers. frozen: whether the layers stay as they are (`Mixed.frozen`)."""
    mixed = any(isinstance(one, LayerMixture) for one in objective.components())
    return objective if mixed else LayerMixture(frozen=frozen) + objective


class AdapterConfig(PeftConfig):
    """What lies beside the weights and can be kept apart from them. part: the model's part that it is, if it is one. start: an
    adapter to go on from."""

    part: ClassVar[str] = ""

    init_from: str

    def check_model(self, model: LM, base: LM | None) -> None:
        there = sorted(PREFIX_HEADS & {*base.heads}) if base is not None and self.part else []
        if there and (there != [self.part] or not self.init_from):
            onward = "go on from it with peft.init_from=RUN too, or " if there == [self.part] else ""
            raise UserError(
                f"peft={self.part} puts a {self.part} before every text, where the start has a {there[0]} already: {onward}"
                "begin from the start's own base"
            )

    def put(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        """Put a new adapter on the model."""
        raise NotImplementedError(type(self).__name__)

    def apply(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        if self.init_from:
            place = _adapter_of(self.init_from)
            check_adapter(tokenizer, place)
            kind = adapter_files.read(model, place)
            if PEFT_METHODS[kind] is not type(self):
                raise UserError(
                    f"peft.init_from={self.init_from} holds an adapter of kind {kind}: set peft.kind={kind}"
                )
            lora.check_not_shared(model, lora.adapted(model))
        else:
            self.put(model, added, tokenizer, seed)
        lora.freeze(model, [*added, *[self.part] * bool(self.part)])

    def export(
        self,
        model: LM,
        directory: Path,
        base: Path,
        added: Sequence[str],
        tokenizer: Tokenizer,
        facts: Mapping[str, Any],
    ) -> str:
        if model.prefix is not None:
            model.heads["prefix"] = model.prefix.without_mlp()
        with new_directory(directory) as place:
            said = adapter_files.write(model, place, base, added, facts=facts, tokenizer=tokenizer.digest)
            tokenizer.save(place)
        lora.merge_and_unload(model)
        return said


@dataclass(frozen=True)
class LoRA(AdapterConfig):
    """rank, alpha, stabilised, dropout: `firth.peft.lora.LoraConfig`. targets: ends of names, as in `q`, `attention.*`, `blocks.*`
    (all maps of all blocks, also `all-linear`), `tokens`, `heads.lm`."""

    rank: Annotated[int, Range(ge=1, le=65536)] = 8
    alpha: PositiveFloat = 16.0
    use_rslora: bool = False
    dropout: ShareBelowOne = 0.0
    target_modules: tuple[str, ...] = ("attention.q", "attention.v")
    init_from: str = path_field("model", "")

    @property
    def lora_config(self) -> lora.LoraConfig:
        """How each adapter is made."""
        return lora.LoraConfig(self.rank, self.alpha, self.use_rslora, self.dropout)

    def check_model(self, model: LM, base: LM | None) -> None:
        if base is not None and not self.init_from:
            for place in lora.chosen(model, self.target_modules, exclude=added_heads(model, base), merges=True):
                lora.check_rank(model, place, self.lora_config)

    def put(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        lora.add(model, self.target_modules, self.lora_config, exclude=[*added, *PREFIX_HEADS])


@dataclass(frozen=True)
class PrefixTuning(AdapterConfig):
    """tokens: how many stand before every text. hidden: units of the MLP that they are trained through (0: none). text:
    what they begin as; drawn tokens where it is empty."""

    part: ClassVar[str] = "prefix"

    num_virtual_tokens: TokenCount = 16
    encoder_hidden_size: Annotated[int, Range(ge=0, lt=1 << 20)] = 0
    init_text: str = ""
    init_from: str = path_field("model", "")

    def check_model(self, model: LM, base: LM | None) -> None:
        super().check_model(model, base)
        check_prefix_supported(model.config, self.part)
        _refuse_room(model.config, self.num_virtual_tokens, self.part)

    def virtual_positions(self, base: LM | None) -> tuple[int, int]:
        return _positions(self.init_from, self.num_virtual_tokens), 0

    def put(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        model.heads["prefix"] = prefix_of(
            model, _begin(tokenizer, self.init_text, self.num_virtual_tokens, seed), self.encoder_hidden_size
        )


@dataclass(frozen=True)
class PromptTuning(AdapterConfig):
    """tokens: how many stand before every text. begin: as the vectors of `text`, or of drawn tokens where it is empty; or
    at random. Each text of a packed row would need its own, and every row as many as the fullest: they are sorted instead."""

    part: ClassVar[str] = "prompt"
    packable: ClassVar[bool] = False

    num_virtual_tokens: TokenCount = 16
    init: Literal["tokens", "random"] = "tokens"
    init_text: str = ""
    init_from: str = path_field("model", "")

    def check_model(self, model: LM, base: LM | None) -> None:
        super().check_model(model, base)
        check_prefix_supported(model.config, self.part)
        _refuse_room(model.config, self.num_virtual_tokens, self.part)

    def virtual_positions(self, base: LM | None) -> tuple[int, int]:
        count = _positions(self.init_from, self.num_virtual_tokens)
        return (0, count) if base is not None and base.encoder is not None else (count, 0)

    def put(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        prompt = prompt_of(model, _begin(tokenizer, self.init_text, self.num_virtual_tokens, seed))
        if self.init == "random":
            prompt.table.reset_parameters()
            prompt.table.weight.data *= model.tokens.weight.data.std()
        model.heads["prompt"] = prompt


def _adapter_of(start: str) -> Path:
    """The directory of an adapter: that of a run, or one of its own."""
    place = Path(start)
    return place / "adapter" if (place / "adapter").is_dir() else place


def _positions(start: str, tokens: int) -> int:
    """The trained positions of an adapter to go on from, or of a new one."""
    return adapter_files.virtual_tokens(_adapter_of(start)) if start else tokens


def _refuse_room(config: ModelConfig, tokens: int, what: str) -> None:
    if not 0 < tokens < config.max_positions:
        raise UserError(
            f"peft.num_virtual_tokens={tokens}: a {what} takes at least 1 of the {config.max_positions} positions, and not all"
        )


def _begin(tokenizer: Tokenizer, text: str, count: int, seed: int) -> list[int]:
    """So many ids: of a text, again and again, or drawn from the vocabulary's ordinary tokens."""
    if text:
        ids = [int(i) for i in tokenizer.encode(text)]
        if not ids:
            raise UserError(
                f"peft.init_text={text!r} has no tokens to begin with: give words, or leave it out for drawn tokens"
            )
        return (ids * (count // len(ids) + 1))[:count]
    ordinary = np.flatnonzero(~tokenizer.vocab.special)
    return [int(i) for i in np.random.default_rng(seed).choice(ordinary, count)]


PEFT_METHODS: dict[str, type[PeftConfig]] = {
    "full": FullFinetuning, "head": HeadOnly, "frozen": FrozenFeatures, "lora": LoRA, "prefix": PrefixTuning, "prompt": PromptTuning,
}  # fmt: skip
"""Name in a recipe -> class."""


def check_peft(adapt: PeftConfig, start: str) -> None:
    """Raise a UserError if there is nothing to adapt."""
    if adapt.needs_base and not start:
        name = next(name for name, kind in PEFT_METHODS.items() if kind is type(adapt))
        raise UserError(
            f"peft={name} trains a little beside a model that is there: say which with init_from=RUN, or peft=full"
        )
