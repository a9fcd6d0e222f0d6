"""Transformer stack: embeddings -> hidden states. Attention mask and positions are computed once for all blocks.

An objective may need some states only (classification one per text, masked LM those of its masked tokens). The last block
then computes keys and values of all tokens and everything else at the needed positions: an exact saving of nearly a block.

>>> import torch
>>> from firth.model.config import encoder_config
>>> config = encoder_config(vocab_size=9, hidden_size=64, num_layers=1)
>>> stack = TransformerStack(config, 1, cross=False, bidirectional=True)
>>> x, fields = torch.randn(1, 3, 64), {"tokens": torch.tensor([[3, 4, 5]]), "positions": torch.arange(3)[None]}
>>> stack(x, fields, needed=torch.tensor([[True, False, False]])).abs().sum(-1).gt(0).tolist()
[[True, False, False]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from firth.model.attention import AttentionMask, KVCache
from firth.model.batch_fields import RowMemory, with_memory
from firth.model.block import AttentionContext, Block, Linear, PositionSubset
from firth.model.config import ModelConfig
from firth.model.fused import Dropout
from firth.model.linformer import Linformer
from firth.model.norm import make_norm
from firth.model.parameter_count import BIAS_POSITIONS
from firth.model.positions import RelativeBias, rope_angles, rotation
from firth.model.relative_distance import DistanceIndex, distance_index
from firth.types import NEVER, Batch

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
    most = max(1, int(needed.sum(-1).amax()))
    if most > MAX_SUBSET_SHARE * needed.shape[-1]:
        return None
    return needed.byte().argsort(dim=-1, descending=True, stable=True)[:, :most]


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
        block_runner: Runs a block where gradients are needed, in place of calling it (`firth.model.compilation`).
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

    def forward(
        self,
        x: Tensor,
        fields: Batch,
        cache: KVCache | None = None,
        memory: Tensor | None = None,
        source: Batch | None = None,
        row_memory: RowMemory | None = None,
        hidden_states: list[Tensor] | None = None,
        needed: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states (B, T, hidden_size).

        Args:
            x: Embeddings (B, T, embedding_dim).
            fields: Batch fields, (B, T) each.
            cache: Keys and values of earlier tokens.
            memory: Encoder states (B, S, hidden_size).
            source: The batch fields of `memory`, (B, S) each.
            row_memory: States, or keys and values, before the rows.
            hidden_states: Receives the input of the blocks and the output of each, the last one after the norm.
            needed: (B, T) bool, the states that will be read; others may be zeros if the config supports subsets.
        """
        x = self.project_embeddings(x)
        if not self.blocks:  # word vectors: no attention, so no mask
            hidden_states = [] if hidden_states is None else hidden_states
            hidden_states.append(x)
            return self.norm(x)
        context = self.context(fields, cache, row_memory)
        cross: AttentionContext | None = None
        layers = self.layers()
        cross_kv: Sequence[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        if source is not None:
            cross = AttentionContext(self.cross_mask(fields, source, cache))
            if memory is not None:
                made = [block.cross_kv(memory) for block in layers]
                if cache is not None:
                    cache.cross, cache.source = made, source
            elif cache is not None:
                made = cache.cross
            cross_kv = made
        last = None
        if (
            needed is not None
            and self.config.supports_subset
            and (cache is None or not cache.length)
            and hidden_states is None
        ):
            index = subset_positions(needed)
            last = None if index is None else replace(self.context(fields, None, row_memory, index), cache=cache)
        training = cache is None and torch.is_grad_enabled()
        recompute = self.gradient_checkpointing and training
        for layer, (block, pair) in enumerate(zip(layers, cross_kv, strict=True)):
            layer_context = context if last is None or layer < len(layers) - 1 else last
            if layer_context.slots is not None:
                layer_context = replace(layer_context, slots=layer_context.slots.of(layer))
            if row_memory is not None and row_memory.pairs:
                layer_context = replace(layer_context, prefix_kv=row_memory.pairs[layer])
            earlier = row_memory.states[layer] if row_memory is not None and row_memory.states else None
            if hidden_states is not None:
                hidden_states.append(x)
            run = block if self.block_runner is None or not training else partial(self.block_runner, block)
            if recompute:
                x = checkpoint(run, x, layer_context, cross, pair, earlier, use_reentrant=False)
            else:
                x = run(x, layer_context, cross, pair, earlier)
        if cache is not None:
            cache.advance(
                fields["tokens"].shape[1] + (0 if row_memory is None else row_memory.fields["key_time"].shape[1])
            )
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x if last is None or last.subset is None else last.subset.scatter(x, fields["tokens"].shape[1])

    def project_embeddings(self, x: Tensor) -> Tensor:
        """Return embeddings (B, T, embedding_dim) as the first block takes them, (B, T, hidden_size)."""
        x = self.drop(self.embed_norm(x))
        return x if self.project is None else self.project(x)

    def block_inputs(self, x: Tensor, fields: Batch) -> list[Tensor]:
        """Return the input (B, T, hidden_size) of each block; the last block is not run."""
        context, out = self.context(fields, None), [self.project_embeddings(x)]
        for block in self.layers()[:-1]:
            out.append(block(out[-1], context))
        return out

    def context(
        self, fields: Batch, cache: KVCache | None, row_memory: RowMemory | None = None, index: Tensor | None = None
    ) -> AttentionContext:
        """Return what the blocks share: attention mask, rotary angles, relative positions.

        Args:
            fields: Batch fields of the new tokens, (B, T) each.
            cache: Of earlier tokens; the fields of these are appended to it.
            row_memory: Before the rows.
            index: (B, W), the positions of the queries; None: all.
        """
        positions = fields["positions"]
        angles = rope_angles(positions, self.config) if self.config.position.type == "rotary" else None
        if cache is not None and cache.decoding_mask is not None:
            # Storing fields takes time, which a single token has little of: only where relative positions need it.
            relative = self.relative is not None or self.config.position.type == "xlnet"
            known = {
                n: cache.append_field(n, v)
                for n, v in fields.items()
                if relative and n in ("positions", "token_type_ids")
            }
            bias = None if self.relative is None else self.relative(positions, known["positions"])
            # For few rows the calls are the cost: one product a layer in place of seven calls.
            matrix = None if angles is None or cache.rows > MAX_ROTATION_ROWS else rotation(*angles)
            angles = angles if matrix is None else None
            return AttentionContext(cache.next_mask(), angles, matrix, bias, cache, self.distances(fields, known))
        zeros = torch.zeros_like(fields["tokens"], dtype=torch.int32)
        query_time, key_time = fields.get("query_time", zeros), fields.get("key_time", zeros)
        document = fields.get("document_ids")
        keys = {"key_time": key_time, "positions": positions}
        keys |= {name: fields[name] for name in ("document_ids", "token_type_ids", "key_expiry") if name in fields}
        if row_memory is not None:
            keys = {name: with_memory(row_memory.fields, name, value) for name, value in keys.items()}
        if cache is not None:
            keys = {name: cache.append_field(name, value) for name, value in keys.items()}
        subset, flex, queries = None, self.flex, fields
        if index is not None:
            queries = {
                n: v.expand(len(index), -1).gather(1, index)
                for n, v in fields.items()
                if n in ("positions", "token_type_ids")
            }
            subset, flex = (
                PositionSubset(index, None if angles is None else rope_angles(queries["positions"], self.config)),
                False,
            )
            query_time, document = query_time.gather(1, index), None if document is None else document.gather(1, index)
        mask = AttentionMask.from_times(
            query_time, keys["key_time"], document, keys.get("document_ids"), flex, keys.get("key_expiry")
        )
        if self.linformer is not None:
            slots = self.linformer.at(positions.shape[-1], mask)
            return AttentionContext(slots.mask, angles, slots=slots)
        if mask.num_keys:
            keys = {name: value[..., : mask.num_keys] for name, value in keys.items()}
        bias = None if self.relative is None else self.relative(queries["positions"], keys["positions"])
        return AttentionContext(mask, angles, None, bias, cache, self.distances(queries, keys), subset=subset)

    def distances(self, fields: Batch, keys: Batch) -> DistanceIndex | None:
        """Return the distances between queries and keys for XLNet's positions, else None."""
        if self.config.position.type != "xlnet":
            return None
        index, table = distance_index(fields["positions"], keys["positions"], self.config.hidden_size)
        typed = "token_type_ids" in fields and self.config.embedding.type_vocab_size
        return DistanceIndex(
            index, table, fields["token_type_ids"][:, :, None] != keys["token_type_ids"][:, None, :] if typed else None
        )

    def cross_mask(self, fields: Batch, source: Batch, cache: KVCache | None) -> AttentionMask:
        """Return the cross-attention mask: each token attends to the source of its document. Cached while decoding."""
        decoding = cache is not None and cache.decoding_mask is not None
        if cache is not None and decoding and cache.cross_mask is not None:
            return cache.cross_mask
        always = torch.full_like(fields["tokens"], NEVER - 1, dtype=torch.int32)
        mask = AttentionMask.from_times(
            always, source["key_time"], fields.get("document_ids"), source.get("document_ids"), self.flex
        )
        if cache is not None and decoding:
            cache.cross_mask = mask
        return mask

    @property
    def flex(self) -> bool | None:
        """Whether to use FlexAttention, which supports neither a bias nor dropout; None: where it is faster."""
        biased = self.relative is not None or self.config.position.type == "xlnet"
        return False if biased or (self.training and self.config.dropout) else None
