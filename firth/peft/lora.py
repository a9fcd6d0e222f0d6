"""LoRA: a frozen matrix W learns by a product of two thin ones (Hu 2021, section 4.1).

    W x   becomes   W x + scale B A x         A: (rank, in), random; B: (out, rank), zeros: at first nothing changes

scale is alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023), with which a higher rank does not learn more slowly.
`add` puts an adapter on the matrices that are named: linear maps, tables of embeddings, the vocabulary head. Several
may lie on one model, each with a share (`use`); `merge` adds them to the weights, and `unmerge` puts back the very bits
that were there, from a copy that it kept; `fold` merges for good and leaves a plain model.

>>> from firth.model.config import decoder_config
>>> model = LM(decoder_config(vocab_size=50, hidden_size=64, num_layers=2), {})
>>> add(model, ["attention.q", "v"], LoraConfig(rank=4))
['stack.blocks.0.attention.q', 'stack.blocks.0.attention.v', 'stack.blocks.1.attention.q', 'stack.blocks.1.attention.v']
>>> freeze(model), trained(model)
(None, 2048)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.model.block import Linear
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.types import UserError


@dataclass(frozen=True)
class LoraConfig:
    """How an adapter is made. dropout: on what goes into A, of linear maps alone (as in peft)."""

    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank is {self.rank}: it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout:g}: it must lie in [0, 1)")

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoraLayer(nn.Module):
    """B A of one matrix (rows, columns). share: how much of it is added; 0 switches it off."""

    def __init__(self, like: Tensor, plan: LoraConfig):
        super().__init__()
        self.plan, self.share = plan, 1.0
        self.A = nn.Parameter(like.new_empty(plan.rank, like.shape[1]))
        self.B = nn.Parameter(like.new_zeros(like.shape[0], plan.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.drop = nn.Dropout(plan.dropout) if plan.dropout else nn.Identity()

    @property
    def scaling(self) -> float:
        return self.plan.scaling * self.share

    def delta(self) -> Tensor:
        """What is added to the matrix: (rows, columns)."""
        return (self.B @ self.A) * self.scaling


class AdaptedModule(nn.Module):
    """A module with a matrix `weight` (rows, columns) and adapters on it, in the place of the plain one.

    kept: what the weight was, while the adapters are merged into it. origin: what the plain module is.
    """

    kept: Tensor | None
    origin: type[nn.Module]

    def take(self, plain: nn.Module) -> None:
        """Stand in the place of a module: its parameters and its parts are this one's, the tied ones too."""
        for name, p in plain.named_parameters(recurse=False):
            setattr(self, name, p)
        for name, child in plain.named_children():
            setattr(self, name, child)
        self.low, self.kept, self.origin = nn.ModuleDict(), None, type(plain)
        self.train(plain.training)

    def adding(self) -> list[LoraLayer]:
        """The adapters that count now: none while they are merged."""
        if self.kept is not None:
            return []
        return [one for one in self.low.values() if one.share]  # type: ignore[misc]

    def summed(self) -> Tensor:
        """All that the adapters add to the matrix."""
        total = torch.zeros_like(self.weight)  # type: ignore[arg-type]
        for one in self.adding():
            total = total + one.delta()
        return total


class AdaptedLinear(AdaptedModule, Linear):
    """A linear map with adapters: nn.Linear's or a block's."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        for one in self.adding():
            out = out + F.linear(F.linear(one.drop(x), one.A), one.B) * one.scaling
        return out


class AdaptedEmbedding(AdaptedModule, nn.Embedding):
    """A table of embeddings with adapters."""

    def forward(self, ids: Tensor) -> Tensor:
        out = super().forward(ids)
        for one in self.adding():
            out = out + (F.embedding(ids, one.B) @ one.A) * one.scaling
        return out


class AdaptedLMHead(AdaptedModule, LMHead):
    """The vocabulary head with adapters: its losses read the whole matrix, so that is what is put together for them."""

    @property
    def matrix(self) -> Tensor:
        return self.weight + self.summed() if self.adding() else self.weight


def _linear(plain: Any) -> AdaptedModule:
    return AdaptedLinear(plain.in_features, plain.out_features, plain.bias is not None, device="meta")


def _table(plain: Any) -> AdaptedModule:
    return AdaptedEmbedding(plain.num_embeddings, plain.embedding_dim, device="meta")


def _head(plain: Any) -> AdaptedModule:
    with torch.device("meta"):
        return AdaptedLMHead(plain.config)


def _plain(found: Any, kind: type[nn.Linear]) -> nn.Module:
    return kind(found.in_features, found.out_features, found.bias is not None, device="meta")


def _plain_head(found: Any) -> nn.Module:
    with torch.device("meta"):
        return LMHead(found.config)


ADAPTED: dict[type[nn.Module], Callable[[Any], AdaptedModule]] = {
    Linear: _linear,
    nn.Linear: _linear,
    nn.Embedding: _table,
    LMHead: _head,
}
"""What can be adapted -> what stands in its place."""
PLAIN: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    Linear: lambda m: _plain(m, Linear),
    nn.Linear: lambda m: _plain(m, nn.Linear),
    nn.Embedding: lambda m: nn.Embedding(m.num_embeddings, m.embedding_dim, device="meta"),
    LMHead: _plain_head,
}
"""The way back."""


ALL_LINEAR = "all-linear"
"""The target that means every linear map of the blocks, as in peft."""


def adaptable(model: LM, but: Collection[str] = ()) -> list[str]:
    """The names of the modules that can be adapted. but: parts that are trained whole."""
    return [
        name
        for name, module in model.named_modules()
        if (type(module) in ADAPTED or isinstance(module, AdaptedModule))
        and not any(name == f"heads.{part}" or name.startswith(f"heads.{part}.") for part in but)
    ]


def chosen(model: LM, targets: Sequence[str], but: Collection[str] = (), merges: bool = False) -> list[str]:
    """The modules that targets speak of: the ends of their names, `*` and `[01]` as in file names; `all-linear` (peft's word)
    is every linear map of the blocks.

    UserError for a target that matches nothing, with what there is. merges: and for a matrix that two modules share, for the
    adapter is to be merged.
    """
    there = adaptable(model, but)
    offered = _own(model, there) if merges else there
    found: list[str] = []
    for target in targets:
        here = [name for name in there if fnmatchcase(f".{name}", f"*.{target}")]
        if target == ALL_LINEAR:
            here = [name for name in there if ".blocks." in name and isinstance(model.get_submodule(name), nn.Linear)]
        if not here:
            raise UserError(f"no matrix of this model is called {target!r}; {_listed(offered)}")
        found += here
    ordered = [name for name in there if name in found]
    if merges:
        check_not_shared(model, ordered)
    return ordered


def _own(model: LM, names: Iterable[str]) -> list[str]:
    """The modules whose matrix is no other's too."""
    shared = {name for pair in model.shared_parameters().items() for name in pair}
    return [name for name in names if f"{name}.weight" not in shared]


def _listed(names: Iterable[str]) -> str:
    """What targets can name, for a message."""
    ends = dict.fromkeys(name.partition("blocks.")[2].partition(".")[2] or name for name in names)
    return f"there is {', '.join(ends)}" if ends else "there is none"


def check_not_shared(model: LM, places: Iterable[str]) -> None:
    """Raise a UserError for a module whose matrix another module has too: merging would change both."""
    shared = model.shared_parameters()
    other = {first: name for name, first in shared.items()} | shared
    for place in places:
        if f"{place}.weight" in other:
            with_ = other[f"{place}.weight"].removesuffix(".weight")
            raise UserError(
                f"{place} shares its matrix with {with_}, which merging would change too: leave it out of the adapter's "
                f"targets; {_listed(_own(model, adaptable(model)))}"
            )


def add(
    model: LM, targets: Sequence[str], plan: LoraConfig, name: str = "default", but: Collection[str] = ()
) -> list[str]:
    """Put an adapter on every matrix that is named; returns their names. UserError where it does not fit."""
    found = chosen(model, targets, but)
    for place in found:
        put(model, place, plan, name)
    return found


def check_rank(model: LM, place: str, plan: LoraConfig) -> None:
    """Raise a UserError for a rank that is larger than a matrix."""
    module: Any = model.get_submodule(place)
    rows, columns = module.weight.shape
    if plan.rank > min(rows, columns):
        raise UserError(
            f"rank {plan.rank} is larger than the matrix {place}, which is {rows} x {columns}: lower the rank"
        )


def put(model: LM, place: str, plan: LoraConfig, name: str = "default") -> LoraLayer:
    """Put an adapter on one matrix."""
    module: Any = model.get_submodule(place)
    check_rank(model, place, plan)
    if type(module) in ADAPTED:
        adapted = ADAPTED[type(module)](module)
        adapted.take(module)
        _replace(model, place, adapted)
        module = adapted
    if name in module.low:
        raise UserError(f"there already is an adapter {name!r} on {place}: give this one another name")
    low = LoraLayer(module.weight, plan)
    module.low[name] = low
    low.train(module.training)
    return low


def _replace(model: LM, place: str, module: nn.Module) -> None:
    parent, _, last = place.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def adapted(model: LM) -> dict[str, AdaptedModule]:
    """The modules with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedModule)}


def lora_layers(model: LM, name: str = "default") -> dict[str, LoraLayer]:
    """One adapter, by the names of the modules it lies on."""
    return {place: m.low[name] for place, m in adapted(model).items() if name in m.low}  # type: ignore[misc]


def use(model: LM, shares: Mapping[str, float]) -> None:
    """Which adapters count, and how much; those not named do not. UserError for one that is not there."""
    known = {name for module in adapted(model).values() for name in module.low}
    for name in shares:
        if name not in known:
            raise UserError(
                f"there is no adapter {name!r} on this model; there is {', '.join(sorted(known)) or 'none'}"
            )
    for module in adapted(model).values():
        if module.kept is not None:
            raise UserError("the adapters are merged into the weights: unmerge them before others are chosen")
        for name, low in module.low.items():
            low.share = shares.get(name, 0.0)  # type: ignore[assignment]


@torch.no_grad()
def merge(model: LM) -> None:
    """Add what the adapters say to the weights, and keep a copy of what these were."""
    check_not_shared(model, [place for place, module in adapted(model).items() if module.adding()])
    for module in adapted(model).values():
        if module.kept is None and module.adding():
            weight: Tensor = module.weight  # type: ignore[assignment]
            change, module.kept = module.summed(), weight.detach().clone()
            weight += change


@torch.no_grad()
def unmerge(model: LM) -> None:
    """Put the weights back, bit for bit."""
    for module in adapted(model).values():
        if module.kept is not None:
            module.weight.copy_(module.kept)  # type: ignore[operator]
            module.kept = None


def merge_and_unload(model: LM) -> LM:
    """Merge for good: the model is again made of plain modules, and the adapters are gone."""
    merge(model)
    for place, module in adapted(model).items():
        plain = PLAIN[module.origin](module)
        for name, p in module.named_parameters(recurse=False):
            setattr(plain, name, p)
        for name, child in module.named_children():
            if name != "low":
                setattr(plain, name, child)
        _replace(model, place, plain.train(module.training))
    return model


def freeze(model: LM, but: Iterable[str] = ()) -> None:
    """Leave everything as it is but the adapters, and the parts that are named."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.requires_grad_(True)
    for part in but:
        model.heads[part].requires_grad_(True)


def trained(model: nn.Module) -> int:
    """How many numbers are learnt."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
