"""The models of a server, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from firth.runs.loaded_model import Model
from firth.serve.engine_thread import EngineThread
from firth.serve.errors import ApiError


@dataclass(frozen=True)
class ModelRegistry:
    """The models of a server and the thread that runs them.

    Args:
        models: Name -> model; the first is the default.
        thread: The thread.
    """

    models: Mapping[str, Model]
    thread: EngineThread = field(default_factory=EngineThread)

    def get(self, name: str | None) -> tuple[str, Model]:
        """Return the name and the model of a request; the first model if it names none.

        Raises:
            ApiError: There is no such model.
        """
        name = next(iter(self.models)) if name is None else name
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"there is no model {name[:100]!r}: this server has {known}", param="model", code="model_not_found"
            )
        return name, self.models[name]
