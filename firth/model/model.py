"""The model: token ids -> hidden states. What an objective adds (heads, ELECTRA's generator) is in `heads`.

The batch fields are `tokens`, `positions`, `token_type_ids`, `query_time`, `key_time`, `key_expiry` and `document_ids`; an
encoder-decoder reads the same with the prefix `source_`, a model with memory also with `memory_`. The last axis is tokens,
the others are free. The model knows no objective.

>>> import torch
>>> from firth.model.config import decoder_config
>>> model = LM(decoder_config(vocab_size=50, hidden_size=64, num_layers=1), {})
>>> model({"tokens": torch.tensor([[3, 4, 5], [6, 7, 8]])}).shape
torch.Size([2, 3, 64])

`compile_blocks` applies torch.compile to the blocks of a model in training (`compile=true`). A block is compiled once for
all layers of its kind; the whole model would take longer, and break the graph where attention masks are computed.
Evaluation and generation are not compiled: their lengths change with every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
import torch.compiler.config
import torch.nn.functional as F
from torch import Tensor, nn

from firth.model.attention import prefixed_fields
from firth.model.block import Block, initialize
from firth.model.config import ModelConfig
from firth.model.config_groups import LEARNED_POSITIONS, SINUSOIDAL_POSITIONS
from firth.model.forward_context import NO_CONTEXT, EncoderOutput, ForwardContext, RowMemory
from firth.model.kv_cache import DecodingCache, KVCache, RecurrentCache
from firth.model.positions import sinusoidal
from firth.model.prefix import PrefixEncoder, PromptEmbedding
from firth.model.recurrent import RecurrentStack
from firth.model.shard_tensors import is_sharded
from firth.model.transformer import TransformerStack
from firth.model.variants import CharacterCNN, Latent
from firth.types import ALWAYS, NEVER, Batch, UserError, host_copy, on_both, with_host_copy

if TYPE_CHECKING:
    from firth.model.block import AttentionContext
    from firth.tokenizer.vocab import Vocab


class LM(nn.Module):
    """A language model: embeddings, layers and the heads of its objectives.

    Args:
        config: The architecture.
        heads: Name -> module; "lm" is the LM head, tied to the token embedding with `config.tie_embeddings`.
    """

    def __init__(self, config: ModelConfig, heads: Mapping[str, nn.Module]):
        super().__init__()
        self.config = config
        learned = config.position.type in LEARNED_POSITIONS
        self.tokens: nn.Embedding | CharacterCNN
        self.tokens = (
            CharacterCNN(config)
            if config.embedding.characters.max_length
            else nn.Embedding(config.vocab_size, config.embedding_dim)
        )
        self.places = nn.Embedding(config.max_positions, config.embedding_dim) if learned else None
        self.source_places = (
            nn.Embedding(config.max_positions, config.embedding_dim) if learned and config.encoder.num_layers else None
        )
        added = (
            config.embedding.type_vocab_size and config.position.type != "xlnet"
        )  # XLNet has relative token types in its blocks
        self.token_types = nn.Embedding(config.embedding.type_vocab_size, config.embedding_dim) if added else None
        self.query = (
            nn.Parameter(torch.randn(config.embedding_dim) * (config.init.std or 0.02))
            if config.embedding.mask
            else None
        )
        self.encoder = (
            TransformerStack(config, config.encoder.num_layers, cross=False, bidirectional=True)
            if config.encoder.num_layers
            else None
        )
        self.stack: TransformerStack | RecurrentStack
        if config.rnn.type:
            self.stack = RecurrentStack(config)
        else:
            self.stack = TransformerStack(
                config, config.num_layers, cross=config.encoder.num_layers > 0, bidirectional=not config.causal
            )
        self.latent = Latent(config) if config.encoder.latent_size else None
        for child in self.children():
            initialize(child, config)
        for table in (*self.embedding_tables().values(), self.source_places):
            if table is not None:
                nn.init.normal_(table.weight, std=config.init.std or (0.02 if config.tie_embeddings else 1.0))
        self.heads = nn.ModuleDict(dict(heads))
        self.tie()

    def tie(self) -> None:
        """Make shared weights one Parameter: a tied LM head, and the embedding tables of submodels."""
        if self.config.tie_embeddings and "lm" in self.heads:
            self.heads["lm"].weight = self.tokens.weight
        for model in self.submodels():
            model.tie_to(self)

    def submodels(self) -> list[LM]:
        """Return the heads that are models themselves: ELECTRA's generator, PPO's critic."""
        return [head for head in self.heads.values() if isinstance(head, LM)]

    def tie_to(self, host: LM) -> None:
        """Share weights with the model `host` that this one is a head of."""
        self.tie()

    def shared_parameters(self) -> dict[str, str]:
        """Return the second names of shared parameters -> the first name, under which they are saved."""
        first: dict[int, str] = {}
        every = self.named_parameters(remove_duplicate=False)
        return {name: first[id(p)] for name, p in every if first.setdefault(id(p), name) != name}

    def stacks(self) -> list[TransformerStack]:
        """Return the transformer stacks: the encoder's, then the model's own."""
        return [stack for stack in (self.encoder, self.stack) if isinstance(stack, TransformerStack)]

    def embedding_tables(self) -> dict[str, nn.Embedding | None]:
        """Return the token, position and token type embeddings; None for one that the model has not."""
        tokens = None if self.config.embedding.characters.max_length else self.tokens
        return {"tokens": tokens, "places": self.places, "token_types": self.token_types}  # type: ignore[dict-item]

    def set_token_characters(self, pieces: Sequence[str]) -> None:
        """Set the text of each token id in a model with a character CNN; others ignore it."""
        if self.config.embedding.characters.max_length:
            self.tokens.set_token_characters(pieces)  # type: ignore[operator]

    def restrict_vocab(self, vocab: Vocab) -> None:
        """Give ids that the tokenizer does not have probability 0 in every LM head of this model.

        An embedding is often larger than its tokenizer (padded to a multiple of 64), and token ids may have gaps. Such ids
        are never sampled, and the probabilities of the others add up to 1. Called wherever a model meets its tokenizer
        (`Engine`, `load_evaluated_model`, a run).
        """
        ids = vocab.absent(self.config.vocab_size)
        absent = torch.from_numpy(ids).to(self.tokens.weight.device) if len(ids) else None
        if "lm" in self.heads:
            self.heads["lm"].restrict_vocab(absent)  # type: ignore[operator]
        for model in self.submodels():
            model.restrict_vocab(vocab)

    def whole(self) -> AbstractContextManager[None]:
        """Return a context in which this process holds all weights: for use by a single rank of a sharded model.

        All ranks enter it together. Sharded training replaces this method (`firth.training.sharding`).
        """
        return nullcontext()

    @property
    def has_lm_head(self) -> bool:
        """Whether the LM head reads whole hidden states; that of a BiLM reads the two halves in turn."""
        return "lm" in self.heads and bool(self.heads["lm"].config.hidden_size == self.config.hidden_size)  # type: ignore[union-attr]

    @property
    def language_model(self) -> LM:
        """The model whose LM head predicts the text: this one, or one among its heads (ELECTRA's generator)."""
        if "lm" not in self.heads:
            for head in self.heads.values():
                if isinstance(head, LM) and "lm" in head.heads:
                    return head
        return self

    @property
    def prefix(self) -> PrefixEncoder | None:
        """The trained keys and values before every text (prefix tuning), or None."""
        return self.heads["prefix"] if "prefix" in self.heads else None  # type: ignore[return-value]  # noqa: SIM401

    @property
    def prompt(self) -> PromptEmbedding | None:
        """The trained vectors before every text (prompt tuning), or None."""
        return self.heads["prompt"] if "prompt" in self.heads else None  # type: ignore[return-value]  # noqa: SIM401

    def num_virtual_tokens(self, source: bool = False) -> int:
        """Return the number of trained positions before every text, or before every `source` text of the encoder."""
        prefix, prompt = self.prefix, self.prompt
        in_prefix = 0 if prefix is None or source else prefix.tokens
        return in_prefix + (prompt.tokens if prompt is not None and source == (self.encoder is not None) else 0)

    @property
    def context(self) -> int:
        """Longest text in tokens: `max_positions` less the trained positions before it."""
        return self.config.max_positions - max(self.num_virtual_tokens(), self.num_virtual_tokens(source=True))

    def embed(self, fields: Batch, source: bool = False, prompt: Tensor | None = None) -> Tensor:
        """Return the sum of token, position and token type embeddings, (B, T, embedding_dim).

        Args:
            fields: Batch fields, (B, T) each.
            source: Whether the fields are the encoder's.
            prompt: (N, embedding_dim), in place of the token embeddings of the first N positions of each row.

        Raises:
            UserError: A row is longer than the learned positions.
        """
        places = self.source_places if source else self.places
        x: Tensor = self.tokens(fields["tokens"])
        if self.config.embedding.scale != 1:
            x = x * self.config.embedding.scale
        if prompt is not None:
            x = torch.cat((prompt.to(x.dtype).expand(len(x), -1, -1), x[:, len(prompt) :]), 1)
        if self.query is not None and "key_time" in fields:
            # A position that nobody attends to is a query (or padding): its own token must not leak into its prediction.
            x = torch.where((fields["key_time"] == NEVER)[..., None], self.query.to(x.dtype), x)
        positions = fields["positions"]
        if places is not None:
            # amax waits for the device: it is read only for rows that may be too long (packed, or with appended queries).
            reach = self.config.max_positions - self.num_virtual_tokens(source)
            if positions.shape[-1] > reach and int(positions.amax()) >= self.config.max_positions:
                raise UserError(
                    f"a row of {int(positions.amax()) + 1} tokens is longer than model.max_positions={self.config.max_positions}, "
                    "the number of positions this model has learned: shorten the rows or train with more positions"
                )
            x = x + places(positions)
        if self.config.position.type in SINUSOIDAL_POSITIONS:
            encoding = sinusoidal(positions, self.config.embedding_dim, self.config.position.type == "sinusoidal")
            x = x + encoding.to(x.dtype)
        if self.token_types is not None:
            types = fields.get("token_type_ids")
            x = x + (self.token_types.weight[0] if types is None else self.token_types(types))
        return x

    def forward(self, batch: Batch, context: ForwardContext = NO_CONTEXT) -> Tensor:
        """Return the hidden states of `tokens`, (..., T, hidden_size): encoder, embeddings, layers.

        Args:
            batch: Fields (..., T); with a cache, those of the new tokens only.
            context: Further inputs.
        """
        fields, prompt = prefixed_fields(batch, "", context.past_length, self.num_virtual_tokens()), None
        if not context.past_length:  # later tokens find the prompt in the cache
            fields, prompt = self._prepend_prompt(fields)
        prompt_length = fields["tokens"].shape[-1] - batch["tokens"].shape[-1]
        context = self._complete(context, batch, prompt_length)
        x = self.embed(fields, prompt=prompt)  # (B, prompt_length + T, embedding_dim)
        hidden: Tensor = self.stack(x, fields, context)
        return hidden[:, prompt_length:].unflatten(0, batch["tokens"].shape[:-1])

    def _complete(self, context: ForwardContext, batch: Batch, prompt_length: int) -> ForwardContext:
        """Return the context with what the caller leaves to the model, as the layers read it."""
        output, memory, needed = context.encoder_output, context.row_memory, context.needed_positions
        in_cache = context.cache is not None and bool(context.cache.encoder_kv)
        if output is None and self.encoder is not None and not in_cache:
            output = self.encoder_output(batch)
        if memory is None:  # the trained prefix, unless the cache has it, or the states of a memory
            prefix = None if context.past_length else self.prefix
            memory = self.row_memory(batch) if prefix is None else prefix.row_memory()
        if needed is not None:
            padded, *copy = (
                F.pad(x.flatten(0, -2), (prompt_length, 0))  # (B, prompt_length + T)
                for x in dict.fromkeys((needed, host_copy(needed)))
            )
            needed = with_host_copy(padded, copy[0]) if copy else padded
        return replace(context, encoder_output=output, row_memory=memory, needed_positions=needed)

    def encoder_output(self, batch: Batch) -> EncoderOutput:
        """Return what the decoder attends to by default: the states of the source, or the mean of its latent."""
        return self._run_encoder(batch) if self.latent is None else self.latent_output(self.posterior(batch)[0])

    def _run_encoder(self, batch: Batch) -> EncoderOutput:
        """Return the encoder's states (B, N + S, hidden_size) of N prompt and S source tokens."""
        if self.encoder is None:
            raise UserError("this model has no encoder: model.encoder.num_layers is 0")
        fields = prefixed_fields(batch, "source_", ahead=self.num_virtual_tokens(source=True))
        fields, prompt = self._prepend_prompt(fields, source=True)
        states = self.encoder(self.embed(fields, True, prompt), fields)
        zeros = on_both(lambda x: torch.zeros_like(x, dtype=torch.int32), fields["tokens"])
        return EncoderOutput(
            states, {"key_time": zeros} | {n: fields[n] for n in ("key_time", "document_ids") if n in fields}
        )

    def _prepend_prompt(self, fields: Batch, source: bool = False) -> tuple[Batch, Tensor | None]:
        """Return the fields with those of the N trained prompt tokens before them, and their vectors (N, embedding_dim).

        The prompt is the encoder's if there is one. Without one before these fields, they are returned as they are.
        """
        if self.prompt is None or source == (self.encoder is None):
            return fields, None
        vectors, fields = self.prompt.prepend(fields, causal=self.config.causal and not source)
        return fields, vectors

    def encode(self, batch: Batch) -> Tensor:
        """Return the encoder's hidden states of the source: (..., S, hidden_size)."""
        states, tokens = self._run_encoder(batch).hidden_states, batch["source_tokens"]
        own = states[:, states.shape[1] - tokens.shape[-1] :]  # without the prompt
        return own.unflatten(0, tokens.shape[:-1])

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of each source's latent, two of (..., latent_size)."""
        if self.latent is None:
            raise UserError("this model has no latent: model.encoder.latent_size is 0")
        fields = prefixed_fields(batch, "source_")
        mean, log_variance = self.latent.read(self.encode(batch).flatten(0, -3), fields.get("key_time"))
        lead = batch["source_tokens"].shape[:-1]
        return mean.unflatten(0, lead), log_variance.unflatten(0, lead)

    def latent_output(self, latent: Tensor) -> EncoderOutput:
        """Return what the decoder of a VAE attends to, given a latent (..., latent_size)."""
        if self.latent is None:
            raise UserError("this model has no latent: model.encoder.latent_size is 0")
        vectors = self.latent.write(latent.flatten(0, -2))  # (B, LATENT_VECTORS, hidden_size)
        return EncoderOutput(vectors, {"key_time": vectors.new_zeros(vectors.shape[:2], dtype=torch.int32)})

    def all_hidden_states(self, batch: Batch) -> Tensor:
        """Return the input of the layers and the output of each: (num_layers + 1, ..., T, hidden_size)."""
        states: list[Tensor] = []
        self(batch, ForwardContext(hidden_states=states))
        tokens = batch["tokens"]
        own = [x[:, x.shape[1] - tokens.shape[-1] :] for x in states]  # without the prompt
        return torch.stack(own).unflatten(1, tokens.shape[:-1])

    @torch.no_grad()
    def row_memory(self, batch: Batch) -> RowMemory | None:
        """Return the states of the tokens before the rows, without gradient (Dai 2019, section 3.2), or None.

        `memory_tokens` (..., M) end where their row begins: positions -M to -1, without padding. Every token of the row
        in the same document (0 by default) attends to all of them. Transformer-XL keeps the states of the previous step,
        so that steps depend on each other, and L blocks reach back L memories. Here a row is a pure function of its
        example: rows can be shuffled, and a run resumes from a step number. The price is a forward pass of all blocks but
        the last over M tokens, and that nothing before those is attended to.

        Raises:
            UserError: The positions of the model do not extend before a row.
        """
        if "memory_tokens" not in batch or not batch["memory_tokens"].shape[-1]:
            return None
        if self.config.position.type != "xlnet":
            raise UserError(
                f"the batch has memory_tokens, and model.position={self.config.position.type!r} does not extend before a row: "
                "set model.position=xlnet"
            )
        fields = prefixed_fields(batch, "memory_")
        tokens = fields["tokens"]
        real = fields.get("key_time", torch.zeros_like(tokens)) != NEVER
        slots = torch.arange(tokens.shape[-1], device=tokens.device)
        fields["positions"] = slots - real.sum(-1, keepdim=True)
        # A causal model reads its memory from left to right too.
        times = slots.expand_as(tokens) if self.config.causal else torch.zeros_like(tokens)
        read = fields | {"query_time": times.int(), "key_time": torch.where(real, times, NEVER).int()}
        states: list[Tensor] = self.stack.block_inputs(self.embed(read), read)  # type: ignore[operator]
        return RowMemory(fields | {"key_time": torch.where(real, ALWAYS, NEVER).int()}, states)

    def make_cache(self, rows: int, capacity: int) -> KVCache:
        """Return an empty cache for reading texts.

        Args:
            rows: Batch size.
            capacity: Most tokens of a row.

        Raises:
            UserError: The model cannot decode token by token.
        """
        if self.config.attention.linformer.k:
            raise UserError("a Linformer reads whole rows and cannot write token by token: use a decoder")
        if self.config.rnn.type:
            return RecurrentCache(rows)
        return KVCache(rows, capacity + self.num_virtual_tokens())

    def make_decoding_cache(self, max_rows: int) -> DecodingCache:
        """Return an empty cache for decoding at most so many rows."""
        return RecurrentCache() if self.config.rnn.type else DecodingCache(max_rows, self.num_virtual_tokens())


class Critic(LM):
    """A model that is a head of another in training only: PPO's estimate of values. It is not exported."""


class TiedSubmodel(LM):
    """A model that is a head of another and shares its embeddings: ELECTRA's generator (Clark 2020, section 3.2).

    It can also be saved and run on its own.
    """

    def tie_to(self, host: LM) -> None:
        """Use the embedding tables of `host`.

        Raises:
            UserError: The tables differ in size.
        """
        for name, table in host.embedding_tables().items():
            own = self.embedding_tables()[name]
            if own is None or table is None:
                if own is not table:
                    raise UserError(f"a submodel and its host model must both have an embedding of {name}, or neither")
                continue
            if own.weight.shape != table.weight.shape:
                sizes = f"{list(own.weight.shape)} and {list(table.weight.shape)}"
                raise UserError(
                    f"a submodel cannot share the embedding of {name} of its host model: the tables are {sizes}"
                )
            own.weight = table.weight
        self.tie()


MAX_RECOMPILES = 32
"""Most versions of a block: the first may have no norm, the last may run at a subset, and row lengths differ."""


def _pass(block: Block, x: Tensor, attention: AttentionContext, cross: AttentionContext | None) -> Tensor:
    return block(x, attention, cross)


@cache
def _compiled() -> Callable[..., Tensor]:
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, MAX_RECOMPILES)
    return torch.compile(_pass)


@cache
def _compiled_forward() -> Callable[..., Tensor]:
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, MAX_RECOMPILES)
    return torch.compile(Block.forward)


def _pass_sharded(block: Block, x: Tensor, attention: AttentionContext, cross: AttentionContext | None) -> Tensor:
    """Run a block whose weights are gathered by hooks: the hooks run as they are, and what they surround is compiled."""
    block.forward = partial(_compiled_forward(), block)  # type: ignore[method-assign]
    try:
        return block(x, attention, cross)
    finally:
        del block.forward


def _try(device: torch.device) -> None:
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # of many private types
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"torch.compile does not work here ({reason}): set compile=false") from error


def compile_blocks(model: LM) -> None:
    """Compile every block of every transformer stack when it is first trained.

    Raises:
        UserError: There is nothing to compile, or torch.compile fails (no compiler, no Python headers).
    """
    stacks = [module for module in model.modules() if isinstance(module, TransformerStack) and module.blocks]
    if not stacks:
        raise UserError("compile=true compiles transformer blocks, and this model has none: set compile=false")
    _try(next(model.parameters()).device)
    for stack in stacks:
        sharded = any(is_sharded(p) for p in stack.blocks.parameters())
        stack.block_runner = _pass_sharded if sharded else _compiled()
