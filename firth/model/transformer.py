"""A stack of blocks: embeddings in, hidden states out; who sees whom, and where each token stands, is settled once for all.

Only some states may be wanted (a class is read off one token of a text, masked LM asks a few of its tokens). Then the last
block makes keys and values of all tokens, and everything else at those that are wanted: an exact saving of nearly a block.

>>> import torch
>>> from firth.model.config import encoder_config
>>> trunk, tokens = TransformerStack(encoder_config(vocab_size=9, hidden_size=64, num_layers=1), 1, cross=False, both_ways=True), torch.tensor([[3, 4, 5]])
>>> x, fields = torch.randn(1, 3, 64), {"tokens": tokens, "positions": torch.arange(3)[None]}
>>> trunk(x, fields, needed=torch.tensor([[True, False, False]])).abs().sum(-1).gt(0).tolist()
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
from firth.model.block import AttentionContext, Block, Linear, PositionSubset
from firth.model.config import ModelConfig
from firth.model.fused import Dropout
from firth.model.linformer import Linformer
from firth.model.norm import make_norm
from firth.model.parameter_count import BIASED
from firth.model.positions import RelativeBias, rope_angles, rotation
from firth.model.relative_distance import DistanceIndex, distance_index
from firth.model.row_fields import RowMemory, with_memory
from firth.types import NEVER, Batch

FEW = 8
"""Up to so many rows that grow by a token, queries and keys are quicker turned by a matrix each."""
MAX_SUBSET_SHARE = 0.75
"""Up to this share of a row it pays to run the last block for the wanted tokens alone."""


def subset_positions(wanted: Tensor) -> Tensor | None:
    """At which tokens (B, W) of each row the last block is run, given the wanted (B, T) bool; None: at all of them, for
    some row wants most of its own.

    As many of each row as the one that wants the most: behind its own wanted ones come others, each once, which do no harm.
    """
    most = max(1, int(wanted.sum(-1).amax()))
    if most > MAX_SUBSET_SHARE * wanted.shape[-1]:
        return None
    return wanted.byte().argsort(dim=-1, descending=True, stable=True)[:, :most]


class TransformerStack(nn.Module):
    """A stack of blocks, what it does to the embeddings before them and the norm after them.

    `blocks` are those that have weights of their own; `layers` says in which order they are passed. recompute: keep of a
    block nothing but what entered it, and run it again on the way back (Chen 2016): less memory, a third more work.
    through: what passes a block's input through it where gradients are wanted (`firth.model.compilation`).
    """

    gradient_checkpointing = False
    through: Callable[..., Tensor] | None = None

    def __init__(self, config: ModelConfig, depth: int, cross: bool, both_ways: bool):
        super().__init__()
        self.config = config
        self.embed_norm = make_norm(config, config.embedding_dim) if config.embedding_norm else nn.Identity()
        self.project = (
            Linear(config.embedding_size, config.hidden_size, bias=config.bias) if config.embedding_size else None
        )
        self.depth = depth
        self.blocks = nn.ModuleList(Block(config, layer, cross) for layer in range(config.num_layer_groups or depth))
        self.norm = make_norm(config) if config.norm_placement == "pre" else nn.Identity()
        self.relative = RelativeBias(config, both_ways) if config.position in BIASED else None
        self.linformer = Linformer(config) if config.linformer_k else None
        self.drop = Dropout(config.dropout) if config.dropout else nn.Identity()

    def layers(self) -> list[Block]:
        """The block of each layer, first to last; a shared one comes several times."""
        own: list[Block] = list(self.blocks)  # type: ignore[arg-type]
        return [own[layer * len(own) // self.depth] for layer in range(self.depth)]

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
        """x: embeddings (B, T, table width); fields: (B, T) each; memory (B, S, width) with the source's fields.

        kept: takes what went in and what each block handed on, the last one behind the norm. wanted (B, T) bool: states
        that are read; others may be zeros then, if the shape narrows.
        """
        x = self.enter(x)
        if not self.blocks:  # word vectors: nobody sees anybody, and there is nothing to lower
            hidden_states = [] if hidden_states is None else hidden_states
            hidden_states.append(x)
            return self.norm(x)
        context = self.context(fields, cache, row_memory)
        across: AttentionContext | None = None
        layers = self.layers()
        crossed: Sequence[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        if source is not None:
            across = AttentionContext(self.crossing(fields, source, cache))
            if memory is not None:
                made = [block.crossing(memory) for block in layers]
                if cache is not None:
                    cache.cross, cache.source = made, source
            elif cache is not None:
                made = cache.cross
            crossed = made
        last = None
        if (
            needed is not None
            and self.config.supports_subset
            and (cache is None or not cache.length)
            and hidden_states is None
        ):
            index = subset_positions(needed)
            last = None if index is None else replace(self.context(fields, None, row_memory, index), cache=cache)
        learning = cache is None and torch.is_grad_enabled()
        again = self.gradient_checkpointing and learning
        for layer, (block, crossing) in enumerate(zip(layers, crossed, strict=True)):
            here = context if last is None or layer < len(layers) - 1 else last
            here = here if here.slots is None else replace(here, slots=here.slots.of(layer))
            if row_memory is not None and row_memory.pairs:
                here = replace(here, prefix_kv=row_memory.pairs[layer])
            earlier = row_memory.states[layer] if row_memory is not None and row_memory.states else None
            if hidden_states is not None:
                hidden_states.append(x)
            through = block if self.through is None or not learning else partial(self.through, block)
            if again:
                x = checkpoint(through, x, here, across, crossing, earlier, use_reentrant=False)
            else:
                x = through(x, here, across, crossing, earlier)
        if cache is not None:
            cache.advance(
                fields["tokens"].shape[1] + (0 if row_memory is None else row_memory.fields["key_time"].shape[1])
            )
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x if last is None or last.subset is None else last.subset.scatter(x, fields["tokens"].shape[1])

    def enter(self, x: Tensor) -> Tensor:
        """Embeddings (B, T, table width) as the first block takes them: (B, T, width)."""
        x = self.drop(self.embed_norm(x))
        return x if self.project is None else self.project(x)

    def block_inputs(self, x: Tensor, fields: Batch) -> list[Tensor]:
        """The states (B, T, width) that enter each block; the last block itself need not be run."""
        context, out = self.context(fields, None), [self.enter(x)]
        for block in self.layers()[:-1]:
            out.append(block(out[-1], context))
        return out

    def context(
        self, fields: Batch, cache: KVCache | None, past: RowMemory | None = None, index: Tensor | None = None
    ) -> AttentionContext:
        """What the blocks share: who sees whom among these tokens and those before them, and where each stands.

        index (B, W): the tokens that ask, where not all do.
        """
        positions = fields["positions"]
        angles = rope_angles(positions, self.config) if self.config.position == "rotary" else None
        if cache is not None and cache.decoding_mask is not None:
            # Noting takes time, of which a token has little: only for those who ask where the earlier ones stand.
            asked = self.relative is not None or self.config.position == "xlnet"
            known = {
                n: cache.append_field(n, v) for n, v in fields.items() if asked and n in ("positions", "token_type_ids")
            }
            bias = None if self.relative is None else self.relative(positions, known["positions"])
            # One product a layer in place of seven calls, as long as the calls are what costs.
            turned = None if angles is None or cache.rows > FEW else rotation(*angles)
            angles = angles if turned is None else None
            return AttentionContext(cache.next_mask(), angles, turned, bias, cache, self.apart(fields, known))
        zeros = torch.zeros_like(fields["tokens"], dtype=torch.int32)
        looks, appears = fields.get("query_time", zeros), fields.get("key_time", zeros)
        document = fields.get("document_ids")
        keys = {"key_time": appears, "positions": positions}
        keys |= {name: fields[name] for name in ("document_ids", "token_type_ids", "key_expiry") if name in fields}
        if past is not None:
            keys = {name: with_memory(past.fields, name, value) for name, value in keys.items()}
        if cache is not None:
            keys = {name: cache.append_field(name, value) for name, value in keys.items()}
        narrow, flex, asking = None, self.flex, fields
        if index is not None:
            asking = {
                n: v.expand(len(index), -1).gather(1, index)
                for n, v in fields.items()
                if n in ("positions", "token_type_ids")
            }
            narrow, flex = (
                PositionSubset(index, None if angles is None else rope_angles(asking["positions"], self.config)),
                False,
            )
            looks, document = looks.gather(1, index), None if document is None else document.gather(1, index)
        mask = AttentionMask.from_times(
            looks, keys["key_time"], document, keys.get("document_ids"), flex, keys.get("key_expiry")
        )
        if self.linformer is not None:
            slots = self.linformer.at(positions.shape[-1], mask)
            return AttentionContext(slots.mask, angles, slots=slots)
        if mask.num_keys:
            keys = {name: value[..., : mask.num_keys] for name, value in keys.items()}
        bias = None if self.relative is None else self.relative(asking["positions"], keys["positions"])
        return AttentionContext(mask, angles, None, bias, cache, self.apart(asking, keys), subset=narrow)

    def apart(self, fields: Batch, keys: Batch) -> DistanceIndex | None:
        """How far apart queries and keys stand, for blocks that ask (XLNet's)."""
        if self.config.position != "xlnet":
            return None
        index, table = distance_index(fields["positions"], keys["positions"], self.config.hidden_size)
        told = "token_type_ids" in fields and self.config.type_vocab_size
        return DistanceIndex(
            index, table, fields["token_type_ids"][:, :, None] != keys["token_type_ids"][:, None, :] if told else None
        )

    def crossing(self, fields: Batch, source: Batch, cache: KVCache | None) -> AttentionMask:
        """Which tokens of the source these tokens see: all of their document's. Lowered once where a row is written."""
        writing = cache is not None and cache.decoding_mask is not None
        if cache is not None and writing and cache.cross_mask is not None:
            return cache.cross_mask
        whenever = torch.full_like(fields["tokens"], NEVER - 1, dtype=torch.int32)
        mask = AttentionMask.from_times(
            whenever, source["key_time"], fields.get("document_ids"), source.get("document_ids"), self.flex
        )
        if cache is not None and writing:
            cache.cross_mask = mask
        return mask

    @property
    def flex(self) -> bool | None:
        """Whether to make block masks, which can carry neither a bias nor dropout. None: where they pay."""
        biased = self.relative is not None or self.config.position == "xlnet"
        return False if biased or (self.training and self.config.dropout) else None
