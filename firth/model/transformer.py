"""Transformer stack: embeddings -> hidden states.

    x = project_embeddings(x)                                  norm, dropout and projection of the embeddings
    self_attention_contexts, cross_attention_contexts          masks and positions, computed once for all layers
    for each layer: x = block(x, its contexts)
    x = norm(x)

An objective may need some states only (classification one per text, masked LM those of its masked tokens). The last block
then computes keys and values of all tokens and everything else at the needed positions: an exact saving of nearly a block.

>>> import torch
>>> from firth.model.config import encoder_config
>>> config = encoder_config(vocab_size=9, hidden_size=64, num_layers=1)
>>> stack = TransformerStack(config, 1, cross=False, bidirectional=True)
>>> x, fields = torch.randn(1, 3, 64), {"tokens": torch.tensor([[3, 4, 5]]), "positions": torch.arange(3)[None]}
>>> needed = ForwardContext(needed_positions=torch.tensor([[True, False, False]]))
>>> stack(x, fields, needed).abs().sum(-1).gt(0).tolist()
[[True, False, False]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from firth.model.attention import AttentionMask, with_memory
from firth.model.block import AttentionContext, Block, Linear, PositionSubset, make_norm
from firth.model.config import ModelConfig
from firth.model.config_groups import BIAS_POSITIONS
from firth.model.forward_context import NO_CONTEXT, ForwardContext, RowMemory
from firth.model.fused import Dropout
from firth.model.kv_cache import DecodingCache
from firth.model.positions import DistanceIndex, RelativeBias, distance_index, rope_angles, rotation
from firth.model.variants import Linformer
from firth.types import NEVER, Batch, host_copy, on_both, with_host_copy

MAX_ROTATION_ROWS = 8
"""Rows of a decoding batch up to which rotary positions are faster as one matrix product."""
MAX_SUBSET_SHARE = 0.75
"""Share of a row's positions up to which running the last block for the needed ones alone is faster."""


def subset_positions(needed: Tensor) -> Tensor | None:
    """Return the positions at which the last block is run.

    Args:
        needed: (B, T) bool.

    Returns:
        (B, W) indices, W being the most needed positions of any row; other rows are filled up with further positions,
        each once. None: all positions, since some row needs more than MAX_SUBSET_SHARE of them.
    """
    here = host_copy(needed)
    most = max(1, int(here.sum(-1).amax()))
    if most > MAX_SUBSET_SHARE * needed.shape[-1]:
        return None
    index, *copy = (
        x.byte().argsort(dim=-1, descending=True, stable=True)[:, :most]
        for x in (needed, here)[: 1 if here is needed else 2]
    )
    return with_host_copy(index, copy[0]) if copy else index


def _zero_times(fields: Batch) -> Tensor:
    """Return the times of tokens that see each other: (B, T) int32."""
    tokens = fields["tokens"]
    zeros = torch.zeros_like(tokens, dtype=torch.int32)
    copies = [copy for x in fields.values() if (copy := host_copy(x)) is not x]
    if copies:
        return with_host_copy(zeros, copies[0].new_zeros(tokens.shape, dtype=torch.int32))
    return zeros if zeros.device.type == "cpu" else with_host_copy(zeros, torch.zeros(tokens.shape, dtype=torch.int32))


def _gathered(values: Tensor, index: Tensor) -> Tensor:
    """Return the values (B, T) at positions (B, W)."""
    found, here, at = values.gather(1, index), host_copy(values), host_copy(index)
    return found if here is values or at is index else with_host_copy(found, here.gather(1, at))


class TransformerStack(nn.Module):
    """A stack of blocks with the norm and projection of the embeddings before them and the norm after them.

    Args:
        config: The architecture.
        depth: Number of layers.
        cross: Whether blocks have cross-attention.
        bidirectional: Whether relative biases tell keys after a query from those before it.

    Attributes:
        blocks: The blocks with weights of their own; `layers` gives the block of each layer.
        gradient_checkpointing: Keep only the input of each block and run it again in the backward pass (Chen 2016):
            less memory, a third more work.
        block_runner: Runs a block where gradients are needed, in place of calling it (`firth.model.model`).
    """

    gradient_checkpointing = False
    block_runner: Callable[..., Tensor] | None = None

    def __init__(self, config: ModelConfig, depth: int, cross: bool, bidirectional: bool):
        super().__init__()
        self.config = config
        self.embed_norm = make_norm(config, config.embedding_dim) if config.norm.embedding else nn.Identity()
        self.project = (
            Linear(config.embedding.size, config.hidden_size, bias=config.bias) if config.embedding.size else None
        )
        self.depth = depth
        self.blocks = nn.ModuleList(Block(config, layer, cross) for layer in range(config.num_layer_groups or depth))
        self.norm = make_norm(config) if config.norm.placement == "pre" else nn.Identity()
        self.relative = RelativeBias(config, bidirectional) if config.position.type in BIAS_POSITIONS else None
        self.linformer = Linformer(config) if config.attention.linformer.k else None
        self.drop = Dropout(config.dropout) if config.dropout else nn.Identity()

    def layers(self) -> list[Block]:
        """Return the block of each layer, first to last; a shared block occurs several times."""
        blocks: list[Block] = list(self.blocks)  # type: ignore[arg-type]
        return [blocks[layer * len(blocks) // self.depth] for layer in range(self.depth)]

    def forward(self, x: Tensor, fields: Batch, context: ForwardContext = NO_CONTEXT) -> Tensor:
        """Return hidden states (B, T, hidden_size).

        Args:
            x: Embeddings (B, T, embedding_dim).
            fields: Batch fields, (B, T) each.
            context: Further inputs; its `needed_positions` are (B, T).
        """
        x = self.project_embeddings(x)
        attention = self.self_attention_contexts(fields, context)
        cross_attention = self.cross_attention_contexts(fields, context)
        training = context.cache is None and torch.is_grad_enabled()
        for block, own, cross in zip(self.layers(), attention, cross_attention, strict=True):
            context.collect(x)
            x = self._run_block(block, x, own, cross, training)
        x = self.norm(x)
        context.collect(x)
        if context.cache is not None:
            context.cache.advance(fields["tokens"].shape[1] + context.memory_length)
        subset = attention[-1].subset if attention else None
        return x if subset is None else subset.scatter(x, fields["tokens"].shape[1])

    def _run_block(
        self, block: Block, x: Tensor, attention: AttentionContext, cross: AttentionContext | None, training: bool
    ) -> Tensor:
        """Return the output of one layer; in training as `block_runner` and `gradient_checkpointing` say."""
        run = partial(self.block_runner, block) if training and self.block_runner is not None else block
        if training and self.gradient_checkpointing:
            return checkpoint(run, x, attention, cross, use_reentrant=False)
        return run(x, attention, cross)

    def project_embeddings(self, x: Tensor) -> Tensor:
        """Return embeddings (B, T, embedding_dim) as the first block takes them, (B, T, hidden_size)."""
        x = self.drop(self.embed_norm(x))
        return x if self.project is None else self.project(x)

    def block_inputs(self, x: Tensor, fields: Batch) -> list[Tensor]:
        """Return the input (B, T, hidden_size) of each block; the last block is not run."""
        out = [self.project_embeddings(x)]
        for block, attention in zip(self.layers()[:-1], self.self_attention_contexts(fields), strict=False):
            out.append(block(out[-1], attention))
        return out

    def self_attention_contexts(self, fields: Batch, context: ForwardContext = NO_CONTEXT) -> list[AttentionContext]:
        """Return the context of self-attention of each layer; mask and positions are computed once.

        A subset of queries is the last layer's: layers before it need the states of all positions.
        """
        if not self.blocks:  # word vectors: no attention, so no mask
            return []
        if isinstance(context.cache, DecodingCache):
            return [self._next_token_context(fields, context.cache)] * self.depth
        contexts = [self._attention_context(fields, context)] * self.depth
        index = self._needed_subset(context)
        if index is not None:
            without_cache = replace(context, cache=None)  # which has these fields already
            contexts[-1] = replace(self._attention_context(fields, without_cache, index), cache=context.cache)
        return [self._of_layer(layer, each, context.row_memory) for layer, each in enumerate(contexts)]

    def _of_layer(self, layer: int, shared: AttentionContext, memory: RowMemory | None) -> AttentionContext:
        """Return the context of one layer: the shared one with the slots, prefix and memory of the layer."""
        if shared.slots is not None:
            return replace(shared, slots=shared.slots.of(layer))
        if memory is None:
            return shared
        return replace(
            shared,
            prefix_kv=memory.pairs[layer] if memory.pairs else None,
            memory_states=memory.states[layer] if memory.states else None,
        )

    def _needed_subset(self, context: ForwardContext) -> Tensor | None:
        """Return the positions (B, W) at which the last layer is run; None: all."""
        if context.needed_positions is None or context.past_length or context.hidden_states is not None:
            return None
        return subset_positions(context.needed_positions) if self.config.supports_subset else None

    def _next_token_context(self, fields: Batch, cache: DecodingCache) -> AttentionContext:
        """Return the context of all layers for one new token of each row."""
        positions = fields["positions"]
        bias = None if self.relative is None else self.relative(positions, cache.key_positions())
        rope = self._rope(positions)
        # For few rows the calls are the cost: one product a layer in place of seven calls.
        matrix = None if rope is None or cache.rows > MAX_ROTATION_ROWS else rotation(*rope)
        rope = rope if matrix is None else None
        distances = self.distances({"positions": positions}, {"positions": cache.key_positions()})
        return AttentionContext(cache.next_mask(), rope, matrix, bias, cache, distances)

    def _attention_context(
        self, fields: Batch, context: ForwardContext, index: Tensor | None = None
    ) -> AttentionContext:
        """Return what the contexts of all layers share: attention mask, rotary angles, relative positions.

        Args:
            fields: Batch fields of the rows, (B, T) each; those of the keys are appended to the cache.
            context: The cache and the memory before the rows.
            index: (B, W), the positions of the queries; None: all.
        """
        rope = self._rope(fields["positions"])
        keys, queries = self._key_fields(fields, context), fields
        query_time, document = fields.get("query_time", _zero_times(fields)), fields.get("document_ids")
        subset, flex = None, self.flex
        if index is not None:
            names = [name for name in ("positions", "token_type_ids") if name in fields]
            queries = {name: fields[name].expand(len(index), -1).gather(1, index) for name in names}
            query_time, document = (
                _gathered(query_time, index),
                None if document is None else _gathered(document, index),
            )
            subset, flex = PositionSubset(index, None if rope is None else self._rope(queries["positions"])), False
        mask = AttentionMask.from_times(
            query_time, keys["key_time"], document, keys.get("document_ids"), flex, keys.get("key_expiry")
        )
        if self.linformer is not None:
            slots = self.linformer.at(fields["positions"].shape[-1], mask)
            return AttentionContext(slots.mask, rope, slots=slots)
        if mask.num_keys:
            keys = {name: value[..., : mask.num_keys] for name, value in keys.items()}
        bias = None if self.relative is None else self.relative(queries["positions"], keys["positions"])
        distances = self.distances(queries, keys)
        return AttentionContext(mask, rope, None, bias, context.cache, distances, subset=subset)

    def _key_fields(self, fields: Batch, context: ForwardContext) -> Batch:
        """Return the fields of all keys, (B or 1, past + M + T) each: those in the cache, in the memory, in the rows."""
        keys = {"key_time": fields.get("key_time", _zero_times(fields)), "positions": fields["positions"]}
        keys |= {name: fields[name] for name in ("document_ids", "token_type_ids", "key_expiry") if name in fields}
        memory, cache = context.row_memory, context.cache
        if memory is not None:
            keys = {name: with_memory(memory.fields, name, value) for name, value in keys.items()}
        if cache is not None:
            keys = {name: cache.append_field(name, value) for name, value in keys.items()}
        return keys

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return rotary cosines and sines at positions (B or 1, T), or None for other position encodings."""
        return rope_angles(positions, self.config) if self.config.position.type == "rotary" else None

    def distances(self, fields: Batch, keys: Batch) -> DistanceIndex | None:
        """Return the distances between queries and keys for XLNet's positions, else None."""
        if self.config.position.type != "xlnet":
            return None
        index, table = distance_index(fields["positions"], keys["positions"], self.config.hidden_size)
        typed = "token_type_ids" in fields and self.config.embedding.type_vocab_size
        return DistanceIndex(
            index, table, fields["token_type_ids"][:, :, None] != keys["token_type_ids"][:, None, :] if typed else None
        )

    def cross_attention_contexts(self, fields: Batch, context: ForwardContext) -> Sequence[AttentionContext | None]:
        """Return the context of cross-attention of each layer; None without an encoder.

        The cache keeps the keys and values of the encoder's states, which are computed once.
        """
        cache, output = context.cache, context.encoder_output
        if output is not None:
            pairs, keys = [b.encoder_kv(output.hidden_states) for b in self.layers()], output.fields
            if cache is not None:
                cache.encoder_kv, cache.encoder_fields = pairs, keys
        elif isinstance(cache, DecodingCache) and cache.encoder_kv:
            mask = cache.source_mask()
            return [AttentionContext(mask, encoder_kv=pair) for pair in cache.source_kv()]
        elif cache is not None and cache.encoder_kv:
            pairs, keys = cache.encoder_kv, cache.encoder_fields
        else:
            return [None] * self.depth
        always = on_both(lambda x: torch.full_like(x, NEVER - 1, dtype=torch.int32), fields["tokens"])
        documents = fields.get("document_ids"), keys.get("document_ids")
        mask = AttentionMask.from_times(always, keys["key_time"], *documents, self.flex)
        return [AttentionContext(mask, encoder_kv=pair) for pair in pairs]

    @property
    def flex(self) -> bool | None:
        """Whether to use FlexAttention, which supports neither a bias nor dropout; None: where it is faster."""
        biased = self.relative is not None or self.config.position.type == "xlnet"
        return False if biased or (self.training and self.config.dropout) else None
