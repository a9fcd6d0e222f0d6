"""Recurrent layers in the place of attention: RNN (Elman 1990), GRU (Cho 2014), LSTM (Hochreiter 1997), by torch.nn.

    causal                 one direction: a language model (Dai and Le 2015)         what lies behind is the state
    two directions         each layer reads both ways, the halves side by side       (Graves 2005)
    two directions apart   two stacks that never meet: two language models (Peters 2018, ELMo)

A document is read from an empty state, wherever in a row it lies, and padding is not read at all. To that end the texts
of a batch are laid out one to a row first (`Runs`), from their beginning, and from their end for the other direction;
a batch of whole rows is read as it lies. So packed and padded batches give the same states, and torch's own kernels
read plain rectangles.

>>> import torch
>>> from firth.model.config import recurrent_config
>>> trunk = RecurrentStack(recurrent_config(vocab_size=9, hidden_size=8, num_layers=2))
>>> x, fields = torch.randn(1, 5, 8), {"document_ids": torch.tensor([[1, 1, 2, 2, 2]])}
>>> alone = trunk(x[:, 2:], {"document_ids": torch.ones(1, 3)})
>>> torch.allclose(trunk(x, fields)[:, 2:], alone, atol=1e-6)
True

Where we differ from torch.nn.LSTM(bidirectional=True), whose numbers these are: padding, and the biases begin at zero, an
LSTM's forget gate at one (Jozefowicz 2015).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from firth.model.attention import KVCache
from firth.model.config import ModelConfig
from firth.types import NEVER, Batch, UserError


@cache
def lstm_runs_in_bf16() -> bool:
    """Return whether an LSTM runs under autocast on this CPU: oneDNN has no bf16 kernel of it without AVX-512."""
    with torch.random.fork_rng([]), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        try:
            nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
        except RuntimeError:
            return False
    return True


def run_layer(layer: nn.RNNBase, x: Any, state: Any = None) -> tuple[Any, Any]:
    """Return layer(x, state), computed in fp32 where bf16 is asked of a CPU that has no kernel for it."""
    device = layer.weight_ih_l0.device.type
    if device == "cpu" and isinstance(layer, nn.LSTM) and torch.is_autocast_enabled("cpu") and not lstm_runs_in_bf16():
        with torch.autocast("cpu", enabled=False):
            return layer(x.float(), state)
    return layer(x, state)


CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def make_cell(config: ModelConfig) -> nn.RNNBase:
    """One layer in one direction: (B, T, table width) -> (B, T, stream)."""
    projected = {"proj_size": config.direction_size} if config.intermediate_size > config.direction_size else {}
    layer = CELLS[config.rnn_type](config.embedding_dim, config.intermediate_size, batch_first=True, **projected)
    for name, p in layer.named_parameters():
        if name.startswith("bias"):
            nn.init.zeros_(p)
            if config.rnn_type == "lstm" and name.startswith("bias_ih"):
                nn.init.ones_(
                    p.data[config.intermediate_size : 2 * config.intermediate_size]
                )  # torch's order is input, forget, cell, output
    return layer


@dataclass(frozen=True)
class RowRuns:
    """Where the texts of a batch lie. at (S, L): the slot of each token among B * T, one text to a row, filled up at its
    end; None where every row is one text already. home (B, T): the way back. turn (S, L): each text from its end."""

    at: Tensor | None
    home: Tensor
    turn: Tensor
    lengths: Tensor

    @staticmethod
    def of(fields: Batch, like: Tensor, exact: bool) -> RowRuns:
        """fields: `document` and `key_time` (B, T) where the batch has them; like (B, T, ...). exact: padding at the end
        of a row matters too, because the row is read from there, or because its last state is kept."""
        rows, length = like.shape[:2]
        place = torch.arange(rows * length, device=like.device).view(rows, length)
        real = torch.ones_like(place, dtype=torch.bool)
        if "key_time" in fields:
            real = fields["key_time"] != NEVER
        begins = real.clone()
        begins[:, 1:] &= ~real[:, :-1]
        if "document_ids" in fields:
            document = fields["document_ids"]
            begins[:, 1:] |= (document[:, 1:] != document[:, :-1]) & real[:, 1:]
        if bool(begins[:, 0].all()) and int(begins.sum()) == rows and (not exact or bool(real.all())):
            turn = torch.arange(length - 1, -1, -1, device=like.device).expand(rows, length)
            return RowRuns(None, place, turn, torch.full((rows,), length))
        run = begins.flatten().cumsum(0)[real.flatten()] - 1  # of each real token
        slot = place[real]
        lengths = run.bincount()
        within = slot - slot[begins[real]][run]
        longest = int(lengths.max())
        at = torch.zeros(len(lengths), longest, dtype=torch.int64, device=like.device)
        at[run, within] = slot
        home = torch.zeros_like(place)
        home[real] = run * longest + within
        back = lengths[:, None] - 1 - torch.arange(longest, device=like.device)
        turn = torch.where(back < 0, torch.arange(longest, device=like.device), back)
        return RowRuns(at, home, turn, lengths)

    def to_runs(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (S, L, width)."""
        return x if self.at is None else x.flatten(0, 1)[self.at]

    def from_runs(self, x: Tensor) -> Tensor:
        """(S, L, width) -> (B, T, width). Where padding was, some state that is nobody's concern."""
        return x if self.at is None else x.flatten(0, 1)[self.home]

    def reverse(self, x: Tensor) -> Tensor:
        """Each text from its end: (S, L, width) -> the same."""
        if self.at is None:
            return x.flip(1)
        return x.gather(1, self.turn[..., None].expand_as(x))


class RecurrentCache(KVCache):
    """What a left-to-right recurrent model remembers of each row: the states of its layers, however long the row is."""

    def __init__(self, rows: int, capacity: int):
        super().__init__(rows, capacity)
        self.layers: dict[int, tuple[Tensor, ...]] = {}

    def start_decoding(self) -> None:
        """Nothing needs be noted: the states are all there is."""

    def select(self, rows: Tensor) -> None:
        self.rows = len(rows)
        self.layers = {i: tuple(s.index_select(1, rows) for s in held) for i, held in self.layers.items()}


class RecurrentLayer(nn.Module):
    """One recurrent layer, in one direction or two."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ahead: nn.RNNBase = make_cell(config)
        self.back: nn.RNNBase | None = None if config.causal else make_cell(config)


class RecurrentStack(nn.Module):
    """`depth` recurrent layers: the trunk of a Shape with `recurrent`. Dropout as in Zaremba 2014: on what goes into the
    first layer and on what comes out of each."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(RecurrentLayer(config) for _ in range(config.num_layers))
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def stack(self) -> list[RecurrentLayer]:
        """The layers, typed."""
        return list(self.layers)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, fields: Batch, cache: RecurrentCache | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """x: embeddings (B, T, table width) -> (B, T, width). kept: takes what went in and what each layer handed on."""
        runs = RowRuns.of(fields, x, exact=cache is not None or not self.config.causal)
        if cache is not None and len(runs.lengths) != len(x):
            raise UserError("rows that a recurrent model goes on with hold one document each: leave out `document`")
        x = runs.to_runs(self.drop(x))
        ahead, back = x, runs.reverse(x) if self.config.separate_directions else x
        whole = torch.cat((x, x), -1) if self.config.separate_directions else x
        for i, layer in enumerate(self.stack()):
            if kept is not None:
                kept.append(runs.from_runs(whole))
            forward = self._read(layer.ahead, ahead, i, runs, cache)
            if layer.back is None:
                ahead = whole = self._handed(i, forward, ahead)
                continue
            if self.config.separate_directions:
                ahead, back = self._handed(i, forward, ahead), self._handed(i, run_layer(layer.back, back)[0], back)
                whole = torch.cat((ahead, runs.reverse(back)), -1)
            else:
                backward = runs.reverse(run_layer(layer.back, runs.reverse(ahead))[0])
                ahead = whole = self._handed(i, torch.cat((forward, backward), -1), ahead)
        if cache is not None:
            cache.advance(runs.home.shape[-1])
        whole = runs.from_runs(whole)
        if kept is not None:
            kept.append(whole)
        return whole

    def _handed(self, i: int, out: Tensor, into: Tensor) -> Tensor:
        """What a layer hands on: with `skip`, what it was given too."""
        out = self.drop(out)
        return out + into if self.config.rnn_residual and i else out

    def _read(self, layer: nn.RNNBase, x: Tensor, i: int, runs: RowRuns, cache: RecurrentCache | None) -> Tensor:
        """One direction of a layer; with a cache, from the states it left behind and to those it leaves."""
        out: Tensor
        if cache is None:
            out = run_layer(layer, x)[0]
            return out
        held = cache.layers.get(i)
        given = None if held is None else held if self.config.rnn_type == "lstm" else held[0]
        if runs.at is None:
            out, state = run_layer(layer, x, given)
        else:  # the last state of each row is wanted, which is not that of its last slot
            packed, state = run_layer(layer, pack_padded_sequence(x, runs.lengths.cpu(), True, False), given)
            out = pad_packed_sequence(packed, True)[0]
        cache.layers[i] = state if self.config.rnn_type == "lstm" else (state,)
        return out
