"""LoRA: a low-rank update of a frozen weight matrix W (Hu 2021, section 4.1).

    W x   becomes   W x + scale B A x         A: (rank, in), random; B: (out, rank), zeros: no change at first

scale is alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023), with which a higher rank does not train more
slowly. `add` puts an adapter on the named modules: linear layers, embeddings, the LM head. A model can have several
adapters, each with a weight (`set_adapters`). `merge` adds them to the weights and `unmerge` restores the original bits
from a copy; `merge_and_unload` merges permanently and returns plain modules.

>>> from firth.model.config import decoder_config
>>> model = LM(decoder_config(vocab_size=50, hidden_size=64, num_layers=2), {})
>>> add(model, ["attention.q", "v"], LoraConfig(rank=4))
['stack.blocks.0.attention.q', 'stack.blocks.0.attention.v', 'stack.blocks.1.attention.q', 'stack.blocks.1.attention.v']
>>> freeze(model), num_trainable_parameters(model)
(None, 2048)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.model.block import Linear
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.types import UserError


@dataclass(frozen=True)
class LoraConfig:
    """Configuration of a LoRA adapter.

    Args:
        rank: Rank of the update.
        alpha: Numerator of the scale.
        use_rslora: Whether to divide alpha by sqrt(rank) instead of rank.
        dropout: Dropout on the input of A, for linear layers only (as in peft).
    """

    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout:g} must be at least 0 and below 1")

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoraLayer(nn.Module):
    """The adapter B A of one weight matrix (rows, columns); `adapter_weight` scales it, and 0 disables it."""

    def __init__(self, weight: Tensor, config: LoraConfig):
        super().__init__()
        self.config, self.adapter_weight = config, 1.0
        self.A = nn.Parameter(weight.new_empty(config.rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], config.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    @property
    def scaling(self) -> float:
        """The factor of B A, with the adapter's weight."""
        return self.config.scaling * self.adapter_weight

    def delta(self) -> Tensor:
        """Return the update of the weight matrix: (rows, columns)."""
        return (self.B @ self.A) * self.scaling


class AdaptedModule(nn.Module):
    """A module with a weight matrix `weight` (rows, columns) and adapters.

    Attributes:
        low: The adapters by name.
        unmerged_weight: A copy of the original weight while the adapters are merged.
        original_type: Type of the wrapped module.
    """

    low: nn.ModuleDict
    unmerged_weight: Tensor | None
    original_type: type[nn.Module]

    @staticmethod
    def arguments(module: Any) -> tuple[Any, ...]:
        """Return the arguments that create a module of the sizes of `module`."""
        raise NotImplementedError

    @classmethod
    def wrap(cls, plain: nn.Module) -> AdaptedModule:
        """Return a module with the parameters and submodules of a plain one, including tied ones, and no adapters yet."""
        with torch.device("meta"):
            adapted = cls(*cls.arguments(plain))
        _share_parameters(plain, adapted)
        adapted.low, adapted.unmerged_weight, adapted.original_type = nn.ModuleDict(), None, type(plain)
        return adapted.train(plain.training)

    def unwrap(self) -> nn.Module:
        """Return a module of the original type with the parameters and submodules of this one, without its adapters."""
        with torch.device("meta"):
            plain = self.original_type(*self.arguments(self))
        _share_parameters(self, plain)
        return plain.train(self.training)

    def active_adapters(self) -> list[LoraLayer]:
        """Return the adapters to apply: those with a weight other than 0, and none while they are merged."""
        if self.unmerged_weight is not None:
            return []
        return [layer for layer in self.low.values() if layer.adapter_weight]  # type: ignore[misc]

    def total_delta(self) -> Tensor:
        """Return the sum of the adapters' updates of the weight matrix."""
        total = torch.zeros_like(self.weight)  # type: ignore[arg-type]
        for layer in self.active_adapters():
            total = total + layer.delta()
        return total


def _share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Let `target` have the parameters and submodules of `source`, except adapters."""
    for name, p in source.named_parameters(recurse=False):
        setattr(target, name, p)
    for name, child in source.named_children():
        if name != "low":
            setattr(target, name, child)


class AdaptedLinear(AdaptedModule, Linear):
    """A linear layer with adapters."""

    is_plain = False

    @staticmethod
    def arguments(module: Any) -> tuple[int, int, bool]:
        return module.in_features, module.out_features, module.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        for layer in self.active_adapters():
            out = out + F.linear(F.linear(layer.drop(x), layer.A), layer.B) * layer.scaling
        return out


class AdaptedEmbedding(AdaptedModule, nn.Embedding):
    """An embedding table with adapters."""

    @staticmethod
    def arguments(module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        out = super().forward(ids)
        for layer in self.active_adapters():
            out = out + (F.embedding(ids, layer.B) @ layer.A) * layer.scaling
        return out


class AdaptedLMHead(AdaptedModule, LMHead):
    """The LM head with adapters. Its losses read the whole matrix, so the matrix includes the update."""

    @staticmethod
    def arguments(module: Any) -> tuple[ModelConfig]:
        return (module.config,)

    @property
    def matrix(self) -> Tensor:
        return self.weight + self.total_delta() if self.active_adapters() else self.weight


ADAPTED_MODULES: dict[type[nn.Module], type[AdaptedModule]] = {
    Linear: AdaptedLinear,
    nn.Linear: AdaptedLinear,
    nn.Embedding: AdaptedEmbedding,
    LMHead: AdaptedLMHead,
}
"""Module type -> its counterpart with adapters. Modules of other types have none."""


ALL_LINEAR = "all-linear"
"""The target that selects every linear layer of the blocks, as in peft."""


def adaptable_modules(model: LM, exclude: Collection[str] = ()) -> list[str]:
    """Return the names of the modules that can have adapters. `exclude` names heads that are trained in full."""
    return [
        name
        for name, module in model.named_modules()
        if (type(module) in ADAPTED_MODULES or isinstance(module, AdaptedModule))
        and not any(name == f"heads.{head}" or name.startswith(f"heads.{head}.") for head in exclude)
    ]


def chosen(model: LM, targets: Sequence[str], exclude: Collection[str] = (), merges: bool = False) -> list[str]:
    """Return the names of the modules that targets select.

    Args:
        model: The model.
        targets: Ends of module names, with `*` and `[01]` as in file names, or `all-linear`.
        exclude: Heads that are trained in full.
        merges: Whether the adapter will be merged, which weights shared by two modules rule out.

    Raises:
        UserError: If a target matches nothing, or selects a shared weight although `merges` is set.
    """
    names = adaptable_modules(model, exclude)
    available = _without_shared(model, names) if merges else names
    found: list[str] = []
    for target in targets:
        matches = [name for name in names if fnmatchcase(f".{name}", f"*.{target}")]
        if target == ALL_LINEAR:
            matches = [
                name for name in names if ".blocks." in name and isinstance(model.get_submodule(name), nn.Linear)
            ]
        if not matches:
            raise UserError(f"no module of this model matches the target {target!r}; {_available(available)}")
        found += matches
    ordered = [name for name in names if name in found]
    if merges:
        check_not_shared(model, ordered)
    return ordered


def _without_shared(model: LM, names: Iterable[str]) -> list[str]:
    """Return the modules whose weight is not shared."""
    shared = {name for pair in model.shared_parameters().items() for name in pair}
    return [name for name in names if f"{name}.weight" not in shared]


def _available(names: Iterable[str]) -> str:
    """Return what targets can select, for a message."""
    ends = dict.fromkeys(name.partition("blocks.")[2].partition(".")[2] or name for name in names)
    return f"available targets: {', '.join(ends) or 'none'}"


def check_not_shared(model: LM, module_names: Iterable[str]) -> None:
    """Raise a UserError for a module whose weight another module shares: merging would change both."""
    shared = model.shared_parameters()
    other = {first: name for name, first in shared.items()} | shared
    for module_name in module_names:
        if f"{module_name}.weight" in other:
            with_ = other[f"{module_name}.weight"].removesuffix(".weight")
            raise UserError(
                f"{module_name} shares its weight with {with_}, which merging would change too: remove it from the adapter's "
                f"targets; {_available(_without_shared(model, adaptable_modules(model)))}"
            )


def add(
    model: LM, targets: Sequence[str], config: LoraConfig, name: str = "default", exclude: Collection[str] = ()
) -> list[str]:
    """Add an adapter to the modules that targets select.

    Args:
        model: The model, changed in place.
        targets: As in `chosen`.
        config: Configuration of the adapter.
        name: Name of the adapter.
        exclude: Heads that are trained in full.

    Returns:
        The names of the modules.

    Raises:
        UserError: If a target matches nothing or a rank is larger than a matrix.
    """
    found = chosen(model, targets, exclude)
    for module_name in found:
        add_to_module(model, module_name, config, name)
    return found


def check_rank(model: LM, module_name: str, config: LoraConfig) -> None:
    """Raise a UserError if the rank is larger than a module's weight matrix."""
    module: Any = model.get_submodule(module_name)
    rows, columns = module.weight.shape
    if config.rank > min(rows, columns):
        raise UserError(
            f"rank {config.rank} is too large for {module_name}, whose weight is {rows} x {columns}: lower the rank"
        )


def add_to_module(model: LM, module_name: str, config: LoraConfig, name: str = "default") -> LoraLayer:
    """Add an adapter to one module and return it."""
    module: Any = model.get_submodule(module_name)
    check_rank(model, module_name, config)
    if type(module) in ADAPTED_MODULES:
        module = ADAPTED_MODULES[type(module)].wrap(module)
        model.set_submodule(module_name, module)
    if name in module.low:
        raise UserError(f"{module_name} already has an adapter {name!r}: choose another name")
    layer = LoraLayer(module.weight, config)
    module.low[name] = layer
    layer.train(module.training)
    return layer


def adapted(model: LM) -> dict[str, AdaptedModule]:
    """Return the modules with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedModule)}


def lora_layers(model: LM, name: str = "default") -> dict[str, LoraLayer]:
    """Return the layers of one adapter, by module name."""
    return {module_name: m.low[name] for module_name, m in adapted(model).items() if name in m.low}  # type: ignore[misc]


def set_adapters(model: LM, weights: Mapping[str, float]) -> None:
    """Set the weights of the adapters; those not named get 0. Raise a UserError for an unknown name."""
    known = {name for module in adapted(model).values() for name in module.low}
    for name in weights:
        if name not in known:
            raise UserError(f"this model has no adapter {name!r}; its adapters: {', '.join(sorted(known)) or 'none'}")
    for module in adapted(model).values():
        if module.unmerged_weight is not None:
            raise UserError(
                "the adapters are merged into the weights: unmerge them before changing the adapter weights"
            )
        for name, layer in module.low.items():
            layer.adapter_weight = weights.get(name, 0.0)  # type: ignore[assignment]


@torch.no_grad()
def merge(model: LM) -> None:
    """Add the adapters to the weights and keep a copy of the original weights."""
    check_not_shared(model, [module_name for module_name, module in adapted(model).items() if module.active_adapters()])
    for module in adapted(model).values():
        if module.unmerged_weight is None and module.active_adapters():
            weight: Tensor = module.weight  # type: ignore[assignment]
            change, module.unmerged_weight = module.total_delta(), weight.detach().clone()
            weight += change


@torch.no_grad()
def unmerge(model: LM) -> None:
    """Restore the original weights exactly."""
    for module in adapted(model).values():
        if module.unmerged_weight is not None:
            module.weight.copy_(module.unmerged_weight)  # type: ignore[operator]
            module.unmerged_weight = None


def merge_and_unload(model: LM) -> LM:
    """Merge permanently: replace the adapted modules by plain ones and remove the adapters."""
    merge(model)
    for module_name, module in adapted(model).items():
        model.set_submodule(module_name, module.unwrap())
    return model


def freeze(model: LM, trainable_heads: Iterable[str] = ()) -> None:
    """Make only the adapters and the named heads trainable."""
    model.requires_grad_(False)
    for module in adapted(model).values():
        module.low.requires_grad_(True)
    for head in trainable_heads:
        model.heads[head].requires_grad_(True)


def num_trainable_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
