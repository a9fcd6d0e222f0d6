"""torch.compile, where a recipe asks for it: of a model's blocks, and only where gradients are wanted.

A block is compiled once for all layers of its kind; the whole model would take longer, and break where a batch's visibility
is lowered. Evaluation and generation stay as they are: their lengths change with every call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.compiler.config
from torch import Tensor

from firth.model.transformer import TransformerStack
from firth.types import UserError

if TYPE_CHECKING:
    from firth.model.block import Block
    from firth.model.model import LM


MAX_RECOMPILES = 32
"""Most versions of a block that are compiled: a first one has no norm, a last one may be narrow, and widths of rows differ."""


def _pass(block: Block, *read: Any) -> Tensor:
    return block(*read)


@cache
def _compiled() -> Callable[..., Tensor]:
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, MAX_RECOMPILES)
    return torch.compile(_pass)


def _try(device: torch.device) -> None:
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # of many private kinds
        said = str(error).strip().partition("\n")[0]
        raise UserError(f"torch.compile does not work here ({said}): set compile=false") from error


def compile_blocks(model: LM) -> None:
    """Let every block of every trunk be compiled when it is first trained.

    Raises UserError where there is nothing to compile, or torch cannot (no compiler, no headers of Python).
    """
    trunks = [module for module in model.modules() if isinstance(module, TransformerStack) and module.blocks]
    if not trunks:
        raise UserError("compile=true compiles blocks of attention, and this model has none: set compile=false")
    _try(next(model.parameters()).device)
    for stack in trunks:
        stack.block_runner = _compiled()
