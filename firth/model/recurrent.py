"""Recurrent layers in place of attention: RNN (Elman 1990), GRU (Cho 2014), LSTM (Hochreiter 1997), by torch.nn.

    causal                 one direction: a language model (Dai and Le 2015)
    bidirectional          each layer reads both directions and concatenates them (Graves 2005)
    separate directions    two stacks that share no state: two language models (ELMo: Peters 2018)

Each document starts from an empty state, wherever in a row it is, and padding is not read. For this the texts of a batch
are first rearranged to one per row (`RowRuns`), reversed for the second direction; a batch of one text per row is read as
it is. So packed and padded batches give the same states, and torch's kernels get plain rectangles.

>>> import torch
>>> from firth.model.config import recurrent_config
>>> stack = RecurrentStack(recurrent_config(vocab_size=9, hidden_size=8, num_layers=2))
>>> x, fields = torch.randn(1, 5, 8), {"document_ids": torch.tensor([[1, 1, 2, 2, 2]])}
>>> second = stack(x[:, 2:], {"document_ids": torch.ones(1, 3)})
>>> torch.allclose(stack(x, fields)[:, 2:], second, atol=1e-6)
True

Differences from torch.nn.LSTM(bidirectional=True), which otherwise gives the same states: padding, and initial biases of
zero, one for an LSTM's forget gate (Jozefowicz 2015).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from firth.model.config import ModelConfig
from firth.model.forward_context import NO_CONTEXT, ForwardContext
from firth.model.kv_cache import RecurrentCache
from firth.types import NEVER, Batch, UserError


@cache
def lstm_runs_in_bf16() -> bool:
    """Return whether an LSTM runs under autocast on this CPU: oneDNN has no bf16 kernel for it without AVX-512."""
    with torch.random.fork_rng([]), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        try:
            nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
        except RuntimeError:
            return False
    return True


def run_layer(layer: nn.RNNBase, x: Any, state: Any = None) -> tuple[Any, Any]:
    """Return layer(x, state), in fp32 where autocast wants bf16 on a CPU without a kernel for it."""
    device = layer.weight_ih_l0.device.type
    if device == "cpu" and layer.mode == "LSTM" and torch.is_autocast_enabled("cpu") and not lstm_runs_in_bf16():
        with torch.autocast("cpu", enabled=False):
            return layer(x.float(), state)
    return layer(x, state)


CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def make_cell(config: ModelConfig) -> nn.RNNBase:
    """Return one layer in one direction: (B, T, embedding_dim) -> (B, T, direction_size)."""
    projected = {"proj_size": config.direction_size} if config.intermediate_size > config.direction_size else {}
    layer = CELLS[config.rnn.type](config.embedding_dim, config.intermediate_size, batch_first=True, **projected)
    for name, p in layer.named_parameters():
        if name.startswith("bias"):
            nn.init.zeros_(p)
            if config.rnn.type == "lstm" and name.startswith("bias_ih"):
                nn.init.ones_(
                    p.data[config.intermediate_size : 2 * config.intermediate_size]
                )  # torch's order is input, forget, cell, output
    return layer


@dataclass(frozen=True)
class RowRuns:
    """The texts of a batch, rearranged to one per row.

    Args:
        slots: (S, L), the slot among B * T of each token of each text, right-padded; None: each row is one text already.
        inverse: (B, T), the slot among S * L of each token of the batch.
        reversal: (S, L), the index that reverses each text.
        lengths: (S,), tokens of each text.
    """

    slots: Tensor | None
    inverse: Tensor
    reversal: Tensor
    lengths: Tensor

    @staticmethod
    def of(fields: Batch, like: Tensor, exact: bool) -> RowRuns:
        """Find the texts of a batch.

        Args:
            fields: `document_ids` and `key_time` (B, T), if the batch has them.
            like: (B, T, ...), for its shape and device.
            exact: Whether padding at the end of a row matters too: the row is read from its end, or its last state is
                needed.
        """
        rows, length = like.shape[:2]
        slot_ids = torch.arange(rows * length, device=like.device).view(rows, length)
        real = torch.ones_like(slot_ids, dtype=torch.bool)
        if "key_time" in fields:
            real = fields["key_time"] != NEVER
        starts = real.clone()
        starts[:, 1:] &= ~real[:, :-1]
        if "document_ids" in fields:
            document = fields["document_ids"]
            starts[:, 1:] |= (document[:, 1:] != document[:, :-1]) & real[:, 1:]
        if bool(starts[:, 0].all()) and int(starts.sum()) == rows and (not exact or bool(real.all())):
            reversal = torch.arange(length - 1, -1, -1, device=like.device).expand(rows, length)
            return RowRuns(None, slot_ids, reversal, torch.full((rows,), length))
        run = starts.flatten().cumsum(0)[real.flatten()] - 1  # the text of each real token
        slot = slot_ids[real]
        lengths = run.bincount()
        within = slot - slot[starts[real]][run]
        longest = int(lengths.max())
        slots = torch.zeros(len(lengths), longest, dtype=torch.int64, device=like.device)
        slots[run, within] = slot
        inverse = torch.zeros_like(slot_ids)
        inverse[real] = run * longest + within
        back = lengths[:, None] - 1 - torch.arange(longest, device=like.device)
        reversal = torch.where(back < 0, torch.arange(longest, device=like.device), back)
        return RowRuns(slots, inverse, reversal, lengths)

    def to_runs(self, x: Tensor) -> Tensor:
        """Return a batch as one text per row: (B, T, width) -> (S, L, width)."""
        return x if self.slots is None else x.flatten(0, 1)[self.slots]

    def from_runs(self, x: Tensor) -> Tensor:
        """Return texts in their places in the batch: (S, L, width) -> (B, T, width); padding gets arbitrary states."""
        return x if self.slots is None else x.flatten(0, 1)[self.inverse]

    def reverse(self, x: Tensor) -> Tensor:
        """Reverse each text: (S, L, width) -> the same."""
        if self.slots is None:
            return x.flip(1)
        return x.gather(1, self.reversal[..., None].expand_as(x))


class RecurrentLayer(nn.Module):
    """One recurrent layer, in one direction or two."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ahead: nn.RNNBase = make_cell(config)
        self.back: nn.RNNBase | None = None if config.causal else make_cell(config)


class RecurrentStack(nn.Module):
    """The recurrent layers of a model with `rnn.type`.

    Dropout as in Zaremba 2014: on the input of the first layer and on the output of each.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(RecurrentLayer(config) for _ in range(config.num_layers))
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def stack(self) -> list[RecurrentLayer]:
        """Return the layers, typed."""
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, x: Tensor, fields: Batch, context: ForwardContext = NO_CONTEXT) -> Tensor:
        """Return hidden states (B, T, hidden_size).

        Args:
            x: Embeddings (B, T, embedding_dim).
            fields: Batch fields, (B, T) each.
            context: A `RecurrentCache` with the states after earlier tokens, which is updated; where states are collected.
        """
        cache: RecurrentCache | None = context.cache  # type: ignore[assignment]
        runs = RowRuns.of(fields, x, exact=cache is not None or not self.config.causal)
        if cache is not None and len(runs.lengths) != len(x):
            raise UserError("a recurrent model can only continue rows of one document each: leave out document_ids")
        x = runs.to_runs(self.drop(x))
        ahead, back = x, runs.reverse(x) if self.config.rnn.separate_directions else x
        both = torch.cat((x, x), -1) if self.config.rnn.separate_directions else x
        for i, layer in enumerate(self.stack()):
            if context.hidden_states is not None:
                context.collect(runs.from_runs(both))
            forward = self._run(layer.ahead, ahead, i, runs, cache)
            if layer.back is None:
                ahead = both = self._output(i, forward, ahead)
                continue
            if self.config.rnn.separate_directions:
                ahead, back = self._output(i, forward, ahead), self._output(i, run_layer(layer.back, back)[0], back)
                both = torch.cat((ahead, runs.reverse(back)), -1)
            else:
                backward = runs.reverse(run_layer(layer.back, runs.reverse(ahead))[0])
                ahead = both = self._output(i, torch.cat((forward, backward), -1), ahead)
        if cache is not None:
            cache.advance(runs.inverse.shape[-1])
        both = runs.from_runs(both)
        context.collect(both)
        return both

    def _output(self, i: int, out: Tensor, inputs: Tensor) -> Tensor:
        """Return the output of layer i with dropout and, from the second layer on, the residual connection."""
        out = self.drop(out)
        return out + inputs if self.config.rnn.residual and i else out

    def _run(self, layer: nn.RNNBase, x: Tensor, i: int, runs: RowRuns, cache: RecurrentCache | None) -> Tensor:
        """Run one direction of layer i; with a cache, from its stored state, which is updated."""
        out: Tensor
        if cache is None:
            out = run_layer(layer, x)[0]
            return out
        stored = cache.layers.get(i)
        initial = None if stored is None else stored if self.config.rnn.type == "lstm" else stored[0]
        if runs.slots is None:
            out, state = run_layer(layer, x, initial)
        else:  # the last state of each row is needed, which is not that of its last slot
            packed, state = run_layer(layer, pack_padded_sequence(x, runs.lengths.cpu(), True, False), initial)
            out = pad_packed_sequence(packed, True)[0]
        cache.layers[i] = state if self.config.rnn.type == "lstm" else (state,)
        return out
