"""Fine-tuning methods: the `peft` section of a recipe, which chooses the weights to train.

    full      all weights (the default)
    head      the task head alone, on the last layer (`peft=head`)
    frozen    the task head on a learned mixture of all layers (Peters 2018, ELMo)
    lora      low-rank updates of chosen matrices (Hu 2021), and new heads
    prefix    keys and values before every text (Li & Liang 2021), and new heads
    prompt    embeddings before every text (Lester 2021), and new heads

    firth train classification init_from=runs/bert data.path=labeled.jsonl peft=lora
    firth train sft init_from=runs/gpt data.path=dialogues.jsonl peft.kind=lora peft.rank=16 peft.target_modules='[blocks.*]'

lora, prefix and prompt also write `adapter/` in peft's format to the run directory. `model/` holds the merged LoRA weights, or
the prefix or prompt as a head of the model, which transformers alone cannot load: use peft and `adapter/`.

Prefixes and prompts begin with tokens of a text (Li & Liang 2021, section 7.4; Lester 2021, section 3.2).

>>> from firth.model.config import decoder_config
>>> model = LM(decoder_config(vocab_size=9, hidden_size=64, num_layers=1), {})
>>> torch.equal(prompt_of(model, [3, 4]).table.weight, model.tokens.weight[3:5])
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Interval

from firth.evaluate.tokenizer_match import check_adapter
from firth.fields import PositiveFloat, ShareBelowOne, TokenCount, Validated, path_field
from firth.io.atomic import new_directory
from firth.model.config import ModelConfig
from firth.model.forward_context import ForwardContext
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS, PrefixEncoder, PromptEmbedding, check_prefix_supported
from firth.objectives.objective import Objective, components
from firth.objectives.token_tasks import LayerMixture
from firth.peft import adapter_files, lora
from firth.pretrained.load_save import added_heads
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError


class PeftConfig(Validated, section="peft"):
    """Base class of the fine-tuning methods.

    Attributes:
        needs_base: Whether it needs a pretrained model.
        packable: Whether it supports packed rows.
    """

    needs_base: ClassVar[bool] = True
    packable: ClassVar[bool] = True

    def configure_objective(self, objective: Objective) -> Objective:
        """Return the objective for a model with this method."""
        return objective

    def check_model(self, model: LM, base: LM | None) -> None:
        """Raise a UserError if the model does not support this method.

        Args:
            model: The model to train, with empty weights and without the base's prefix or prompt.
            base: The model that the run starts from.
        """

    def virtual_positions(self, base: LM | None) -> tuple[int, int]:
        """Return the number of virtual tokens before every text, and before every input of an encoder."""
        return (base.num_virtual_tokens(), base.num_virtual_tokens(source=True)) if base is not None else (0, 0)

    def apply(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        """Add the trainable weights to the model and freeze the others.

        Args:
            model: The model.
            added: The heads that the base model does not have.
            tokenizer: The tokenizer.
            seed: Seed of the initialization.
        """

    def export(
        self,
        model: LM,
        directory: Path,
        base: Path,
        added: Sequence[str],
        tokenizer: Tokenizer,
        facts: Mapping[str, Any],
    ) -> str:
        """Write the trained adapter, if any, and merge or keep it in the model.

        Args:
            model: The trained model; a LoRA is merged into it.
            directory: The directory to write.
            base: The directory of the base model.
            added: The heads that the base model does not have.
            tokenizer: The tokenizer, saved with the adapter.
            facts: The training metadata.

        Returns:
            A sentence for the user; empty if there is no adapter.
        """
        return ""


@dataclass(frozen=True)
class FullFinetuning(PeftConfig):
    """Train all weights."""

    needs_base: ClassVar[bool] = False


@dataclass(frozen=True)
class HeadOnly(PeftConfig):
    """Train only the heads of the objective, without a backward pass through the transformer stack."""

    def apply(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        heads = _heads(model)
        if not heads:
            raise UserError(
                "peft=head trains the heads of the objective, and the only one is an LM head that is tied to the token "
                "embeddings: take peft=lora or peft=prompt"
            )
        lora.freeze(model, heads)


def _heads(model: LM) -> list[str]:
    """Return the heads that can be trained alone: no prefix or prompt, and no LM head tied to the token embeddings."""
    return [
        name for name in model.heads if name not in PREFIX_HEADS and (name != "lm" or not model.config.tie_embeddings)
    ]


@dataclass(frozen=True)
class FrozenFeatures(HeadOnly):
    """Train the heads on a mixture of all layers, with one learned weight per layer and a scale."""

    def configure_objective(self, objective: Objective) -> Objective:
        return add_layer_mixture(objective)

    def check_model(self, model: LM, base: LM | None) -> None:
        # Generation and scoring feed the LM head with the last layer, not with the mixture that it was trained on.
        if "lm" in model.heads:
            raise UserError(
                "peft=frozen trains a head on a mixture of all layers, which an LM head does not read during generation: "
                "take peft=lora, or an objective with a head of its own, such as classification"
            )


def add_layer_mixture(objective: Objective, frozen: bool = True) -> Objective:
    """Return the objective on a mixture of all layers. frozen: Whether the layers are frozen (`LayerMixture.frozen`)."""
    mixed = any(isinstance(one, LayerMixture) for one in components(objective))
    return objective if mixed else LayerMixture(frozen=frozen) + objective


class AdapterConfig(PeftConfig):
    """Base class of the methods whose weights are saved as an adapter.

    Attributes:
        part: Name of the head that holds the adapter; empty for LoRA.
        init_from: An adapter to continue training.
    """

    part: ClassVar[str] = ""

    init_from: str

    def check_model(self, model: LM, base: LM | None) -> None:
        existing = sorted(PREFIX_HEADS & {*base.heads}) if base is not None and self.part else []
        if existing and (existing != [self.part] or not self.init_from):
            hint = "continue it with peft.init_from=RUN too, or " if existing == [self.part] else ""
            raise UserError(
                f"peft={self.part} adds a {self.part}, and the model of init_from has a {existing[0]} already: {hint}"
                "start from its own base model"
            )

    def add(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        """Add a new adapter to the model."""
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
            self.add(model, added, tokenizer, seed)
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
            summary = adapter_files.write(model, place, base, added, facts=facts, tokenizer=tokenizer.digest)
            tokenizer.save(place)
        lora.merge_and_unload(model)
        return summary


@dataclass(frozen=True)
class LoRA(AdapterConfig):
    """Configuration of LoRA.

    Args:
        rank: Rank of the updates.
        alpha: Numerator of the scaling (`firth.peft.lora.LoraConfig`).
        use_rslora: Whether the scaling is alpha / sqrt(rank) instead of alpha / rank.
        dropout: Dropout before the updates.
        target_modules: Suffixes of module names, as in `q`, `attention.*`, `blocks.*` (all linear maps of all blocks, also
            `all-linear`), `tokens`, `heads.lm`.
        init_from: An adapter to continue training.
    """

    rank: Annotated[int, Interval(ge=1, le=65536)] = 8
    alpha: PositiveFloat = 16.0
    use_rslora: bool = False
    dropout: ShareBelowOne = 0.0
    target_modules: tuple[str, ...] = ("attention.q", "attention.v")
    init_from: str = path_field("model", "")

    @property
    def lora_config(self) -> lora.LoraConfig:
        """The configuration of each LoRA layer."""
        return lora.LoraConfig(self.rank, self.alpha, self.use_rslora, self.dropout)

    def check_model(self, model: LM, base: LM | None) -> None:
        if base is not None and not self.init_from:
            for place in lora.chosen(model, self.target_modules, exclude=added_heads(model, base), merges=True):
                lora.check_rank(model, place, self.lora_config)

    def add(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        lora.add(model, self.target_modules, self.lora_config, exclude=[*added, *PREFIX_HEADS])


@dataclass(frozen=True)
class PrefixTuning(AdapterConfig):
    """Configuration of prefix tuning.

    Args:
        num_virtual_tokens: Prefix positions before every text.
        encoder_hidden_size: Units of the MLP that reparameterizes the prefix during training; 0 for none.
        init_text: Text to initialize the prefix from; empty uses random tokens.
        init_from: A prefix to continue training.
    """

    part: ClassVar[str] = "prefix"

    num_virtual_tokens: TokenCount = 16
    encoder_hidden_size: Annotated[int, Interval(ge=0, lt=1 << 20)] = 0
    init_text: str = ""
    init_from: str = path_field("model", "")

    def check_model(self, model: LM, base: LM | None) -> None:
        super().check_model(model, base)
        check_prefix_supported(model.config, self.part)
        _check_num_virtual_tokens(model.config, self.num_virtual_tokens, self.part)

    def virtual_positions(self, base: LM | None) -> tuple[int, int]:
        return _num_virtual_tokens(self.init_from, self.num_virtual_tokens), 0

    def add(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        model.heads["prefix"] = prefix_of(
            model, _initial_ids(tokenizer, self.init_text, self.num_virtual_tokens, seed), self.encoder_hidden_size
        )


@dataclass(frozen=True)
class PromptTuning(AdapterConfig):
    """Configuration of prompt tuning.

    Rows are not packed: each text of a row would need its own prompt, and every row as many prompts as the fullest one.

    Args:
        num_virtual_tokens: Prompt embeddings before every text.
        init: "tokens" initializes them with token embeddings, "random" at random.
        init_text: The text for "tokens"; empty uses random tokens.
        init_from: A prompt to continue training.
    """

    part: ClassVar[str] = "prompt"
    packable: ClassVar[bool] = False

    num_virtual_tokens: TokenCount = 16
    init: Literal["tokens", "random"] = "tokens"
    init_text: str = ""
    init_from: str = path_field("model", "")

    def check_model(self, model: LM, base: LM | None) -> None:
        super().check_model(model, base)
        check_prefix_supported(model.config, self.part)
        _check_num_virtual_tokens(model.config, self.num_virtual_tokens, self.part)

    def virtual_positions(self, base: LM | None) -> tuple[int, int]:
        count = _num_virtual_tokens(self.init_from, self.num_virtual_tokens)
        return (0, count) if base is not None and base.encoder is not None else (count, 0)

    def add(self, model: LM, added: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        prompt = prompt_of(model, _initial_ids(tokenizer, self.init_text, self.num_virtual_tokens, seed))
        if self.init == "random":
            prompt.table.reset_parameters()
            prompt.table.weight.data *= model.tokens.weight.data.std()
        model.heads["prompt"] = prompt


def _adapter_of(start: str) -> Path:
    """Return the adapter directory of a run, or the path itself if it is no run directory."""
    place = Path(start)
    return place / "adapter" if (place / "adapter").is_dir() else place


def _num_virtual_tokens(start: str, tokens: int) -> int:
    """Return the number of virtual tokens of the adapter to continue, or of a new one."""
    return adapter_files.virtual_tokens(_adapter_of(start)) if start else tokens


def _check_num_virtual_tokens(config: ModelConfig, tokens: int, what: str) -> None:
    if not 0 < tokens < config.max_positions:
        raise UserError(
            f"peft.num_virtual_tokens={tokens}: a {what} takes at least 1 of the {config.max_positions} positions, and not all"
        )


def _initial_ids(tokenizer: Tokenizer, text: str, count: int, seed: int) -> list[int]:
    """Return `count` token ids: of a text, repeated, or random ones that are not special."""
    if text:
        ids = [int(i) for i in tokenizer.encode(text)]
        if not ids:
            raise UserError(f"peft.init_text={text!r} has no tokens: give words, or leave it out for random tokens")
        return (ids * (count // len(ids) + 1))[:count]
    ordinary = np.flatnonzero(~tokenizer.vocab.special)
    return [int(i) for i in np.random.default_rng(seed).choice(ordinary, count)]


PEFT_METHODS: dict[str, type[PeftConfig]] = {
    "full": FullFinetuning, "head": HeadOnly, "frozen": FrozenFeatures, "lora": LoRA, "prefix": PrefixTuning, "prompt": PromptTuning,
}  # fmt: skip
"""Name in a recipe -> class."""


def check_peft(adapt: PeftConfig, start: str) -> None:
    """Raise a UserError if the method needs a pretrained model and there is none."""
    if adapt.needs_base and not start:
        name = next(name for name, kind in PEFT_METHODS.items() if kind is type(adapt))
        raise UserError(f"peft={name} needs a pretrained model: set init_from=RUN, or peft=full")


def prefix_of(model: LM, ids: Sequence[int], hidden: int = 0) -> PrefixEncoder:
    """Return a prefix initialized with the keys and values that the model computes for some tokens.

    Args:
        model: The model.
        ids: Token ids; their number is the length of the prefix.
        hidden: Hidden size of an MLP that the prefix is trained through; the prefix is then initialized at random.
    """
    config = model.config
    check_prefix_supported(config, "prefix")
    prefix = PrefixEncoder(len(ids), config.num_layers, config.num_kv_heads, config.head_dim, hidden)
    if not hidden:
        with torch.no_grad():
            cache, training = model.make_cache(1, len(ids)), model.training
            tokens = torch.tensor(list(ids), device=model.tokens.weight.device)[None]
            time = torch.arange(len(ids), device=tokens.device)[None] * config.causal
            source = {"source_tokens": tokens} if config.encoder.num_layers else {}
            fields = {"tokens": tokens, "query_time": time, "key_time": time} | source
            model.eval()(fields, ForwardContext(cache))
            model.train(training)
            pairs = torch.stack([torch.stack((k[0], v[0])) for k, v in zip(cache.keys, cache.values, strict=True)])
            prefix.table.weight.copy_(pairs.permute(3, 0, 1, 2, 4).flatten(1))
    return prefix


def prompt_of(model: LM, ids: Sequence[int]) -> PromptEmbedding:
    """Return a prompt initialized with the embeddings of some tokens (Lester 2021, section 3.2)."""
    check_prefix_supported(model.config, "prompt")
    prompt = PromptEmbedding(len(ids), model.config.embedding_dim)
    with torch.no_grad():
        prompt.table.weight.copy_(model.tokens(torch.tensor(list(ids), device=model.tokens.weight.device)))
    return prompt
