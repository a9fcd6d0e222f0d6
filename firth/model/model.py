"""Tokens in, hidden states out: the one model. What an objective adds (heads, a generator) lives in `parts`.

The model reads `tokens`, `positions`, `segments`, `query_time`, `key_time`, `key_expiry` and `document`, for an encoder-decoder
the same with `source_` before them, and for one with memory with `memory_`; it knows no objective. The last axis is
tokens, the others are free.

>>> import torch
>>> from firth.model.config import decoder_config
>>> model = LM(decoder_config(vocab_size=50, hidden_size=64, num_layers=1), {})
>>> model({"tokens": torch.tensor([[3, 4, 5], [6, 7, 8]])}).shape
torch.Size([2, 3, 64])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.model.attention import KVCache
from firth.model.block import initialize
from firth.model.characters import CharacterCNN
from firth.model.config import ModelConfig
from firth.model.latent import Latent
from firth.model.parameter_count import LEARNED, SINUSOIDAL
from firth.model.positions import sinusoidal
from firth.model.prefix import PrefixEncoder, PromptEmbedding
from firth.model.recurrent import RecurrentCache, RecurrentStack
from firth.model.row_fields import RowMemory, prefixed_fields
from firth.model.transformer import TransformerStack
from firth.types import ALWAYS, NEVER, Batch, UserError

if TYPE_CHECKING:
    from firth.tokenizer.vocab import Vocab


class LM(nn.Module):
    """A language model without its head. parts: name -> module; parts["lm"] is tied to the embedding if the shape says so."""

    def __init__(self, config: ModelConfig, parts: Mapping[str, nn.Module]):
        super().__init__()
        self.config = config
        learned = config.position in LEARNED
        self.tokens: nn.Embedding | CharacterCNN
        self.tokens = (
            CharacterCNN(config) if config.max_characters else nn.Embedding(config.vocab_size, config.embedding_dim)
        )
        self.places = nn.Embedding(config.max_positions, config.embedding_dim) if learned else None
        self.source_places = (
            nn.Embedding(config.max_positions, config.embedding_dim) if learned and config.num_encoder_layers else None
        )
        added = config.type_vocab_size and config.position != "xlnet"  # which tells segments apart in its blocks
        self.token_types = nn.Embedding(config.type_vocab_size, config.embedding_dim) if added else None
        self.query = (
            nn.Parameter(torch.randn(config.embedding_dim) * (config.init_std or 0.02))
            if config.mask_embedding
            else None
        )
        self.encoder = (
            TransformerStack(config, config.num_encoder_layers, cross=False, both_ways=True)
            if config.num_encoder_layers
            else None
        )
        self.stack: TransformerStack | RecurrentStack
        if config.rnn_type:
            self.stack = RecurrentStack(config)
        else:
            self.stack = TransformerStack(
                config, config.num_layers, cross=config.num_encoder_layers > 0, both_ways=not config.causal
            )
        self.latent = Latent(config) if config.latent_size else None
        for child in self.children():
            initialize(child, config)
        for table in (*self.embedding_tables().values(), self.source_places):
            if table is not None:
                nn.init.normal_(table.weight, std=config.init_std or (0.02 if config.tie_embeddings else 1.0))
        self.heads = nn.ModuleDict(dict(parts))
        self.tie()

    def tie(self) -> None:
        """Make one Parameter, with one gradient, of what is shared: the head's matrix if tied, and the tables of guests."""
        if self.config.tie_embeddings and "lm" in self.heads:
            self.heads["lm"].weight = self.tokens.weight
        for part in self.heads.values():
            if isinstance(part, LM):
                part.join(self)

    def join(self, host: LM) -> None:
        """Be a part of another model; what that means for what they share."""
        self.tie()

    def shared_parameters(self) -> dict[str, str]:
        """Names of tensors that are others by a second name -> the first name, under which they are saved."""
        first: dict[int, str] = {}
        every = self.named_parameters(remove_duplicate=False)
        return {name: first[id(p)] for name, p in every if first.setdefault(id(p), name) != name}

    def stacks(self) -> list[TransformerStack]:
        """The stacks of blocks that it has: an encoder's, its own."""
        return [stack for stack in (self.encoder, self.stack) if isinstance(stack, TransformerStack)]

    def embedding_tables(self) -> dict[str, nn.Embedding | None]:
        """What tokens, positions and segments are looked up in; tokens that are spelled are not looked up."""
        tokens = None if self.config.max_characters else self.tokens
        return {"tokens": tokens, "places": self.places, "token_types": self.token_types}  # type: ignore[dict-item]

    def set_token_characters(self, pieces: Sequence[str]) -> None:
        """Tell how each token is written, to a model that reads that; one with a table of tokens has no need of it."""
        if self.config.max_characters:
            self.tokens.set_token_characters(pieces)  # type: ignore[operator]

    def restrict_vocab(self, vocab: Vocab) -> None:
        """Give no probability to ids that a tokenizer does not have, wherever a vocabulary head of this model is read.

        A table is often wider than its tokenizer (padded to a multiple of 64), and a tokenizer's numbering may have holes.
        Such ids are never drawn nor chosen, and the probabilities of the others add up to 1. Every place where a model and
        its tokenizer meet calls this (`Engine`, `open_subject`, a run).
        """
        ids = vocab.absent(self.config.vocab_size)
        absent = torch.from_numpy(ids).to(self.tokens.weight.device) if len(ids) else None
        for name, part in self.heads.items():
            if name == "lm":
                part.restrict_vocab(absent)  # type: ignore[operator]
            elif isinstance(part, LM):
                part.restrict_vocab(vocab)

    @property
    def has_lm_head(self) -> bool:
        """Whether a vocabulary head reads its states; that of a BiLM reads one half of them after the other."""
        return "lm" in self.heads and bool(self.heads["lm"].config.hidden_size == self.config.hidden_size)  # type: ignore[union-attr]

    @property
    def prefix(self) -> PrefixEncoder | None:
        """The trained keys and values that stand before every text, if there are any."""
        return self.heads["prefix"] if "prefix" in self.heads else None  # type: ignore[return-value]  # noqa: SIM401

    @property
    def prompt(self) -> PromptEmbedding | None:
        """The trained vectors that stand before every text, if there are any."""
        return self.heads["prompt"] if "prompt" in self.heads else None  # type: ignore[return-value]  # noqa: SIM401

    def num_virtual_tokens(self, source: bool = False) -> int:
        """How many trained positions stand before every text of the trunk, or of the encoder, and move it on."""
        prefix, prompt = self.prefix, self.prompt
        read = 0 if prefix is None or source else prefix.tokens
        return read + (prompt.tokens if prompt is not None and source == (self.encoder is not None) else 0)

    @property
    def context(self) -> int:
        """The longest text that is read."""
        return self.config.max_positions - max(self.num_virtual_tokens(), self.num_virtual_tokens(source=True))

    def embed(self, fields: Batch, source: bool = False, front: Tensor | None = None) -> Tensor:
        """Token, position and segment vectors added up: fields (B, T) -> (B, T, table width). source: for the encoder.

        front (N, table width): the vectors that the first N tokens of each row have in place of the table's.
        """
        places = self.source_places if source else self.places
        x: Tensor = self.tokens(fields["tokens"])
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if front is not None:
            x = torch.cat((front.to(x.dtype).expand(len(x), -1, -1), x[:, len(front) :]), 1)
        if self.query is not None and "key_time" in fields:
            # Whom nobody can see asks and tells nothing (or is padding): so no token can leak into its own query.
            x = torch.where((fields["key_time"] == NEVER)[..., None], self.query.to(x.dtype), x)
        positions = fields["positions"]
        if places is not None:
            # Packed rows and appended queries are longer than any text in them: only then is it worth to look (and wait).
            reach = self.config.max_positions - self.num_virtual_tokens(source)
            if positions.shape[-1] > reach and int(positions.amax()) >= self.config.max_positions:
                raise UserError(
                    f"a row of {int(positions.amax()) + 1} tokens is longer than model.max_positions={self.config.max_positions}, "
                    "the number of positions this model has learned: cut the rows or train with a longer context"
                )
            x = x + places(positions)
        if self.config.position in SINUSOIDAL:
            waves = sinusoidal(positions, self.config.embedding_dim, self.config.position == "sinusoidal")
            x = x + waves.to(x.dtype)
        if self.token_types is not None:
            given = fields.get("token_type_ids")
            x = x + (self.token_types.weight[0] if given is None else self.token_types(given))
        return x

    def encode(self, batch: Batch) -> Tensor:
        """The encoder's memory of the source: (..., S, width)."""
        if self.encoder is None:
            raise UserError("this model has no encoder: model.num_encoder_layers is 0")
        memory, _ = self._remembered(batch)
        own = memory[:, memory.shape[1] - batch["source_tokens"].shape[-1] :]
        return own.unflatten(0, batch["source_tokens"].shape[:-1])

    def _remembered(self, batch: Batch) -> tuple[Tensor, Batch]:
        """The encoder's memory (B, N + S, width) of the source behind its prompt, and what is known of its tokens."""
        assert self.encoder is not None
        fields = prefixed_fields(batch, "source_", ahead=self.num_virtual_tokens(source=True))
        front = None
        if self.prompt is not None:
            front, fields = self.prompt.before(fields, causal=False)
        return self.encoder(self.embed(fields, True, front), fields), fields

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent of each source: two of (..., latent)."""
        if self.latent is None:
            raise UserError("this model has no latent: model.latent_size is 0")
        fields = prefixed_fields(batch, "source_")
        mean, log_variance = self.latent.read(self.encode(batch).flatten(0, -3), fields.get("key_time"))
        lead = batch["source_tokens"].shape[:-1]
        return mean.unflatten(0, lead), log_variance.unflatten(0, lead)

    def forward(
        self,
        batch: Batch,
        cache: KVCache | None = None,
        hidden_states: list[Tensor] | None = None,
        latent: Tensor | None = None,
        needed: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of `tokens`: (..., T, width). With a cache, `tokens` are the new ones only.

        kept: takes the states of all layers, (B, T, width) each (see `layers`). latent (..., units): what the decoder is
        told in place of the source; the posterior's mean where it is not given. wanted (..., T) bool: the states that
        will be read; what no one wants need not be made, and may be zeros.
        """
        begins = cache is None or not cache.length
        fields = prefixed_fields(batch, "", 0 if cache is None else cache.length, self.num_virtual_tokens())
        length, front = fields["tokens"].shape[-1], None
        if self.prompt is not None and self.encoder is None and begins:
            front, fields = self.prompt.before(fields, self.config.causal)
        memory, source = None, None
        if self.encoder is not None and cache is not None and cache.source:
            source = cache.source
        elif self.latent is not None:
            memory = self.latent.write((self.posterior(batch)[0] if latent is None else latent).flatten(0, -2))
            source = {"key_time": memory.new_zeros(memory.shape[:2], dtype=torch.int32)}
        elif self.encoder is not None:
            memory, whole = self._remembered(batch)
            nothing = torch.zeros_like(whole["tokens"], dtype=torch.int32)
            source = {"key_time": nothing} | {n: whole[n] for n in ("key_time", "document_ids") if n in whole}
        past = self.row_memory(batch)
        if self.prefix is not None and begins:
            past = self.prefix.past()
        x = self.embed(fields, front=front)
        if self.config.rnn_type:
            hidden = self.stack(x, fields, cache, hidden_states)
        else:
            if needed is not None:
                needed = F.pad(needed.flatten(0, -2), (x.shape[1] - length, 0))
            hidden = self.stack(x, fields, cache, memory, source, past, hidden_states, needed)
        if front is not None:
            hidden = hidden[:, -length:]
            if hidden_states is not None:
                hidden_states[:] = [states[:, -length:] for states in hidden_states]
        return hidden.unflatten(0, batch["tokens"].shape[:-1])

    def all_hidden_states(self, batch: Batch) -> Tensor:
        """What went into the trunk and what each of its layers handed on: (depth + 1, ..., T, width)."""
        kept: list[Tensor] = []
        self(batch, None, kept)
        return torch.stack(kept).unflatten(1, batch["tokens"].shape[:-1])

    @torch.no_grad()
    def row_memory(self, batch: Batch) -> RowMemory | None:
        """Read the tokens that stand before the rows, without gradient (Dai 2019, section 3.2); None where there are none.

        `memory_tokens` (..., M) end where their row begins: positions -M to -1, padding aside. Every token of the row
        that is of their document (0, unless told) sees all of them. Transformer-XL keeps the states of the step before,
        so a step depends on the one before it, and with L blocks a state can know of L memories further back. Here a row is
        a pure function of its example: it may be shuffled, and a run resumes from a number. The price is one forward pass
        of the blocks but the last over M tokens, and that nothing further back than M is known.
        """
        if "memory_tokens" not in batch or not batch["memory_tokens"].shape[-1]:
            return None
        if self.config.position != "xlnet":
            raise UserError(
                f"the batch has tokens before its rows, and position {self.config.position!r} has no place for them"
            )
        fields = prefixed_fields(batch, "memory_")
        tokens = fields["tokens"]
        there = fields.get("key_time", torch.zeros_like(tokens)) != NEVER
        slots = torch.arange(tokens.shape[-1], device=tokens.device)
        fields["positions"] = slots - there.sum(-1, keepdim=True)
        # Read as the model reads any text: a causal one from left to right.
        looks = slots.expand_as(tokens) if self.config.causal else torch.zeros_like(tokens)
        read = fields | {"query_time": looks.int(), "key_time": torch.where(there, looks, NEVER).int()}
        states: list[Tensor] = self.stack.block_inputs(self.embed(read), read)  # type: ignore[operator]
        return RowMemory(fields | {"key_time": torch.where(there, ALWAYS, NEVER).int()}, states)

    def make_cache(self, rows: int, capacity: int) -> KVCache:
        """Room for `capacity` tokens of each of `rows` rows. UserError for a model that cannot write token by token."""
        if self.config.linformer_k:
            raise UserError("a Linformer reads whole rows, and cannot write token by token: take a decoder for that")
        return (
            RecurrentCache(rows, capacity)
            if self.config.rnn_type
            else KVCache(rows, capacity + self.num_virtual_tokens())
        )


class TiedSubmodel(LM):
    """A model among the parts of another that reads with its host's tables: ELECTRA's generator (Clark 2020, section 3.2).

    Alone it is a whole model, which can be saved and run. Its tables are as wide as its host's.
    """

    def join(self, host: LM) -> None:
        """Read with the host's tables from here on. UserError if they are not as large."""
        for name, table in host.embedding_tables().items():
            own = self.embedding_tables()[name]
            if own is None or table is None:
                if own is not table:
                    raise UserError(f"a guest and its host must both have {name}, or neither")
                continue
            if own.weight.shape != table.weight.shape:
                sizes = f"{list(own.weight.shape)} and {list(table.weight.shape)}"
                raise UserError(f"a guest cannot read with its host's {name}: the tables are {sizes}")
            own.weight = table.weight
        self.tie()
