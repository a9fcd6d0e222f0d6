"""torch.compile of the blocks of a model in training (`compile=true`).

A block is compiled once for all layers of its kind; the whole model would take longer, and break the graph where attention
masks are computed. Evaluation and generation are not compiled: their lengths change with every call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.compiler.config
from torch import Tensor

from firth.model.transformer import TransformerStack
from firth.types import UserError

if TYPE_CHECKING:
    from firth.model.block import AttentionContext, Block
    from firth.model.model import LM


MAX_RECOMPILES = 32
"""Most versions of a block: the first may have no norm, the last may run at a subset, and row lengths differ."""


def _pass(block: Block, x: Tensor, attention: AttentionContext, cross: AttentionContext | None) -> Tensor:
    return block(x, attention, cross)


@cache
def _compiled() -> Callable[..., Tensor]:
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, MAX_RECOMPILES)
    return torch.compile(_pass)


def _try(device: torch.device) -> None:
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # of many private types
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"torch.compile does not work here ({reason}): set compile=false") from error


def compile_blocks(model: LM) -> None:
    """Compile every block of every transformer stack when it is first trained.

    Raises:
        UserError: There is nothing to compile, or torch.compile fails (no compiler, no Python headers).
    """
    stacks = [module for module in model.modules() if isinstance(module, TransformerStack) and module.blocks]
    if not stacks:
        raise UserError("compile=true compiles transformer blocks, and this model has none: set compile=false")
    _try(next(model.parameters()).device)
    for stack in stacks:
        stack.block_runner = _compiled()
