"""Keys and values of prompts by their token ids, within a number of bytes, for prompts that begin in the same way.

Tokens of a causal decoder have the same keys and values whatever follows them. A prompt is stored in blocks of BLOCK tokens;
prompts with a common beginning share its blocks. The least recently used block goes first; a block is used whenever a
longer prefix is, so no block outlives the one before it.

>>> cache = PrefixCache(max_bytes=1 << 20)
>>> cache.length(np.arange(40)), cache.bytes
(0, 0)
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from firth.model.kv_cache import KVCache

BLOCK = 16
"""Tokens of a block: only whole blocks are shared."""


@dataclass(frozen=True)
class _Block:
    """Keys and values (2, layers, KV, slots, D) of BLOCK tokens; the first block of a prompt has the trained positions too."""

    id: int
    pairs: Tensor


class PrefixCache:
    """Keys and values of prompts.

    Args:
        max_bytes: Most bytes of all blocks; 0: nothing is stored.
        trained: Trained positions before each text (`LM.num_virtual_tokens`).

    Attributes:
        bytes: Bytes of all blocks.
    """

    def __init__(self, max_bytes: int, trained: int = 0):
        self.max_bytes, self.trained, self.bytes = max_bytes, trained, 0
        # (id of the block before, token ids) -> block, the least recently used first
        self._blocks: OrderedDict[tuple[int, bytes], _Block] = OrderedDict()
        self._next_id = 1

    def length(self, prompt: np.ndarray) -> int:
        """Return the tokens of the longest known prefix of a prompt (n,) that leaves a token to read."""
        return BLOCK * len(self._path(prompt, (len(prompt) - 1) // BLOCK))

    def find(self, prompt: np.ndarray) -> Tensor:
        """Return keys and values (2, layers, KV, slots, D) of that prefix, with those of the trained positions."""
        return torch.cat([block.pairs for block in self._path(prompt, (len(prompt) - 1) // BLOCK)], 3)

    def store(self, prompt: np.ndarray, cache: KVCache, row: int) -> None:
        """Store the whole blocks of a prompt (n,), as many as there is room for.

        Args:
            prompt: Token ids (n,).
            cache: Holds the prompt; it ends in the last slot in use.
            row: The row of the prompt.
        """
        count = len(prompt) // BLOCK
        if not self.max_bytes or not count:
            return
        known = self._path(prompt, count)
        parent, own = (known[-1].id if known else 0), sum(block.pairs.nbytes for block in known)
        start = cache.length - len(prompt)
        for i in range(len(known), count):
            slots = torch.arange(start + i * BLOCK, start + (i + 1) * BLOCK, device=cache.keys[0].device)
            if not i and self.trained:
                slots = torch.cat((torch.arange(self.trained, device=slots.device), slots))
            pairs = torch.stack([torch.stack([x[row][:, slots] for x in side]) for side in (cache.keys, cache.values)])
            own += pairs.nbytes
            if own > self.max_bytes:
                break
            while self.bytes + pairs.nbytes > self.max_bytes:
                self.bytes -= self._blocks.popitem(last=False)[1].pairs.nbytes
            self._blocks[parent, _key(prompt, i)] = _Block(self._next_id, pairs)
            self.bytes += pairs.nbytes
            parent, self._next_id = self._next_id, self._next_id + 1
        self._path(prompt, count)

    def _path(self, prompt: np.ndarray, most: int) -> list[_Block]:
        """Return the known blocks at the start of a prompt, at most so many, and mark them as used."""
        found, used, parent = [], [], 0
        for i in range(most):
            key = parent, _key(prompt, i)
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
            used.append(key)
            parent = block.id
        for key in reversed(used):
            self._blocks.move_to_end(key)
        return found


def _key(prompt: np.ndarray, block: int) -> bytes:
    """Return the token ids of a block as bytes."""
    return np.asarray(prompt[block * BLOCK : (block + 1) * BLOCK], np.int64).tobytes()
