"""firth: pretrain, adapt, align and evaluate language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from firth import openmp as openmp  # first import: sets the variables that OpenMP reads when torch is loaded
from firth.types import VERSION

if TYPE_CHECKING:
    from firth.api import load_model, load_recipe, train
    from firth.data.examples import ExamplesConfig
    from firth.data.source import Source
    from firth.model.config import ModelConfig
    from firth.objectives.objective import Objective
    from firth.runs.loaded_model import Model
    from firth.runs.recipe import Recipe
    from firth.runs.run import RunResult
    from firth.tokenizer.tokenizer import Tokenizer
    from firth.types import UserError

__version__ = VERSION

__all__ = [
    "ExamplesConfig",
    "Model",
    "ModelConfig",
    "Objective",
    "Recipe",
    "RunResult",
    "Source",
    "Tokenizer",
    "UserError",
    "load_model",
    "load_recipe",
    "train",
]

_MODULES = {
    "ExamplesConfig": "firth.data.examples",
    "Model": "firth.runs.loaded_model",
    "ModelConfig": "firth.model.config",
    "Objective": "firth.objectives.objective",
    "Recipe": "firth.runs.recipe",
    "RunResult": "firth.runs.run",
    "Source": "firth.data.source",
    "Tokenizer": "firth.tokenizer.tokenizer",
    "UserError": "firth.types",
    "load_model": "firth.api",
    "load_recipe": "firth.api",
    "train": "firth.api",
}


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first used, so that `import firth` stays fast."""
    if name not in _MODULES:
        raise AttributeError(f"module 'firth' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
