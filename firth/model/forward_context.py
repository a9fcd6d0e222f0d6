"""The optional inputs of a forward pass (`firth.model.model.LM.forward`), in one value.

>>> import torch
>>> from firth.model.config import decoder_config
>>> from firth.model.model import LM
>>> model, states = LM(decoder_config(vocab_size=9, hidden_size=64, num_layers=2), {}), []
>>> hidden = model({"tokens": torch.tensor([[3, 4, 5]])}, ForwardContext(hidden_states=states))
>>> len(states), torch.equal(states[-1], hidden)
(3, True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from firth.model.kv_cache import KVCache
from firth.types import Batch


@dataclass(frozen=True)
class EncoderOutput:
    """What a decoder cross-attends to.

    Args:
        hidden_states: States of the source, (B, S, hidden_size).
        fields: Their `key_time` and, in packed rows, `document_ids`, (B, S) each.
    """

    hidden_states: Tensor
    fields: Batch


@dataclass(frozen=True)
class RowMemory:
    """Positions before each row: a memory (`states`) or a trained prefix (`pairs`).

    Args:
        fields: Batch fields of these positions, (B or 1, M) each.
        states: The input (B, M, hidden_size) of each block.
        pairs: Keys and values (KV, M, D) of each block.
    """

    fields: Batch
    states: Sequence[Tensor] = ()
    pairs: Sequence[tuple[Tensor, Tensor]] = ()


@dataclass(frozen=True)
class ForwardContext:
    """Optional inputs of `LM.forward`, which completes them and passes them on to its layers.

    Args:
        cache: Keys and values of earlier tokens (transformers: `past_key_values`); the batch then has the fields of the new
            tokens only, and the pass adds theirs. A recurrent model keeps its states here.
        encoder_output: What the decoder cross-attends to. None: what the cache has of it, else the encoder runs on the
            `source_` fields of the batch.
        row_memory: Positions before each row. None: the trained prefix, or the states of the `memory_` fields of the batch.
        needed_positions: (..., T) bool, the hidden states that will be read; others may be zeros. None: all.
        hidden_states: Receives the input of the layers and the output of each, (B, T, hidden_size), the last one after the
            final norm (transformers: `output_hidden_states`); with a trained prompt, its positions too.
    """

    cache: KVCache | None = None
    encoder_output: EncoderOutput | None = None
    row_memory: RowMemory | None = None
    needed_positions: Tensor | None = None
    hidden_states: list[Tensor] | None = None

    @property
    def past_length(self) -> int:
        """The number of positions in the cache."""
        return 0 if self.cache is None else self.cache.length

    @property
    def memory_length(self) -> int:
        """The number of positions before each row that are not in the cache yet."""
        return 0 if self.row_memory is None else self.row_memory.fields["key_time"].shape[-1]

    def collect(self, states: Tensor) -> None:
        """Append the states (B, T, hidden_size) of a layer to `hidden_states`, if they are collected."""
        if self.hidden_states is not None:
            self.hidden_states.append(states)


NO_CONTEXT = ForwardContext()
"""A pass over whole rows, without any optional input."""
