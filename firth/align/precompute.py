"""Frozen models are data: read a source once with a model and keep what it says as fields of the examples.

A reference model (DPO) or a teacher gets no gradient, so nothing is gained by carrying it through training: its numbers
are written down beside the examples, and the model is let go.

    pairs = annotate(pairs, reference_model, comparison, reference)      # firth.objectives.dpo
    pairs[0]["reference"]                                                # array([-31.2, -40.7], dtype=float32)

With a directory the numbers are memory-mapped files that grow by index: interrupted, the same call goes on where it
was, and finished, it only opens them. They are kept under a fingerprint of the model, of its precision and of what it is
shown of every example, so numbers of another model or another text are never taken for these; `fields` is always the same
for one directory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from firth.data.collate import collate
from firth.data.source import Source, WrappedSource
from firth.generate.decoding import attention_pattern_of
from firth.io.integrity import read_record, write_record
from firth.model.model import LM
from firth.types import Batch, Example, UserError

BuildComparison = Callable[[Example], Example]
Fields = Callable[[LM, Batch], Mapping[str, Tensor]]
CHUNK = 16
"""Batches between two saves; within a chunk, rows of like length are read together."""


class PrecomputedSource(WrappedSource):
    """A source with further fields: name -> array whose first axis is the example."""

    def __init__(self, source: Source, fields: Mapping[str, np.ndarray]) -> None:
        super().__init__(source)
        self.fields = dict(fields)

    def __getitem__(self, index: int) -> Example:
        return self.source[index] | {name: np.asarray(values[index]) for name, values in self.fields.items()}


def precompute(
    source: Source,
    model: LM,
    build: BuildComparison,
    fields: Fields,
    *,
    batch_size: int = 16,
    directory: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> PrecomputedSource:
    """Read every example once, in batches of `rows`; memory holds a few batches and the numbers themselves.

    The passes run in the precision of the caller's autocast context: enter that of the training which compares its own
    numbers with these.

    show: example -> what the model reads (a view without chance). fields: (model, batch) -> name -> (B, ...) numbers,
    of one shape for all examples. directory: where to keep them; none keeps them in memory. progress is told how many
    examples are done.
    """
    store = _Store(directory, len(source), fingerprint(source, model, build) if directory else "")
    while store.done < len(source):
        stop = min(store.done + batch_size * CHUNK, len(source))
        index = np.arange(store.done, stop)
        shown = [build(source[int(i)]) for i in index]
        order = np.argsort([-e["tokens"].shape[-1] for e in shown], kind="stable")
        for first in range(0, len(order), batch_size):
            at = order[first : first + batch_size]
            device = model.tokens.weight.device
            batch = {name: field.to(device) for name, field in collate([shown[i] for i in at]).items()}
            with attention_pattern_of(model):
                store.write(index[at], {name: x.cpu().numpy() for name, x in fields(model, batch).items()})
        store.reach(stop)
        if progress is not None:
            progress(stop)
    return PrecomputedSource(source, store.arrays)


def fingerprint(source: Source, model: LM, show: BuildComparison) -> str:
    """A hash of every weight of the model, of the precision that it runs in here and of all that it is shown."""
    device = model.tokens.weight.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest = hashlib.blake2b(f"{device} {cast}".encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    digest.update(str(len(source)).encode())
    for i in range(len(source)):
        for name, value in sorted(show(source[i]).items()):
            array = np.asarray(value)
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


class _Store:
    """Arrays that grow by index, in memory or in `directory/<fingerprint>/<name>.npy` beside a note of how far."""

    def __init__(self, directory: Path | None, count: int, key: str) -> None:
        self.place = directory / key if directory else None
        self.count, self.done = count, 0
        self.arrays: dict[str, np.ndarray] = {}
        if self.place is not None and (self.place / "done.json").exists():
            cure = f"delete {self.place}, and it is computed again"
            note = read_record(self.place / "done.json", {"done": int, "fields": list, "digest": str}, cure)
            self.done = note["done"]
            try:
                self.arrays = {name: np.load(self.place / f"{name}.npy", mmap_mode="r+") for name in note["fields"]}
            except (ValueError, OSError) as error:
                raise UserError(f"{self.place}: its arrays cannot be read ({error}): {cure}") from None

    def write(self, index: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            if name not in self.arrays:
                self.arrays[name] = self._new(name, (self.count, *value.shape[1:]), value.dtype)
            self.arrays[name][index] = value

    def _new(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if self.place is None:
            return np.zeros(shape, dtype)
        self.place.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(self.place / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)

    def reach(self, done: int) -> None:
        """All examples before `done` are written: say so, after they are on disk."""
        self.done = done
        if self.place is None:
            return
        for array in self.arrays.values():
            array.flush()  # type: ignore[attr-defined]
        write_record(self.place / "done.json", {"done": done, "fields": sorted(self.arrays)})
