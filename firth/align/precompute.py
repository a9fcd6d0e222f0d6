"""Precompute the outputs of a frozen model, and add them to the examples as fields.

A reference model (DPO) or a teacher needs no gradient, so its outputs are computed once before training, and the model is
released.

    pairs = precompute(pairs, reference_model, build_comparison, ref_logprobs)      # firth.objectives.preferences
    pairs[0]["reference"]                                                           # array([-31.2, -40.7], dtype=float32)

With a directory, the numbers are memory-mapped files that are filled by index: after an interruption the same call resumes, and
once complete it only opens them. They are stored under a fingerprint of the model, its precision and its input for every
example, so the numbers of another model or text are never reused; `fields` must always be the same for one directory.

The kinds of examples that need such outputs are here too: pairs and unpaired answers (KTO) with the log-probabilities of a
reference model, and texts with the probabilities of a teacher. `docs/reference/data-formats.md` lists the record formats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from firth.data.collate import collate
from firth.data.conversations import unpaired
from firth.data.dialogues import PreferencesConfig, first_prompt
from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig, WrappingConfig
from firth.data.records import Record, Records, RecordsConfig
from firth.data.semi_supervised import PartiallyLabeledConfig
from firth.data.source import Source, WrappedSource
from firth.fields import TokenCount, path_field
from firth.generate.decoding_batch import inference_mode
from firth.io.integrity import read_record, write_record
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.objectives.preferences import KTO, build_comparison, build_mismatched, ref_logprobs
from firth.objectives.semi_supervised import teacher_probabilities, unlabeled_example
from firth.tokenizer import chat
from firth.types import Batch, Example, UserError

BuildComparison = Callable[[Example], Example]
Fields = Callable[[LM, Batch], Mapping[str, Tensor]]
BATCHES_PER_SAVE = 16
"""Batches between two saves. Within a chunk, rows of similar length are batched together."""


class PrecomputedSource(WrappedSource):
    """A source with additional fields: name -> array whose first axis is the example."""

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
    """Run a model on every example once and store its outputs; memory holds a few batches and the outputs.

    The passes run in the precision of the caller's autocast context, which should be that of the training that uses the outputs.

    Args:
        source: The examples.
        model: The frozen model.
        build: Builds the model input of an example, without randomness.
        fields: (model, batch) -> name -> (B, ...) outputs, of one shape for all examples.
        batch_size: Examples per batch.
        directory: Directory to store the outputs in; None: keep them in memory.
        progress: Receives the number of finished examples.

    Returns:
        The source with the outputs as fields.
    """
    store = _Store(directory, len(source), fingerprint(source, model, build) if directory else "")
    while store.done < len(source):
        stop = min(store.done + batch_size * BATCHES_PER_SAVE, len(source))
        index = np.arange(store.done, stop)
        inputs = [build(source[int(i)]) for i in index]
        order = np.argsort([-e["tokens"].shape[-1] for e in inputs], kind="stable")
        for first in range(0, len(order), batch_size):
            at = order[first : first + batch_size]
            device = model.tokens.weight.device
            batch = {name: field.to(device) for name, field in collate([inputs[i] for i in at]).items()}
            with inference_mode(model):
                store.write(index[at], {name: x.cpu().numpy() for name, x in fields(model, batch).items()})
        store.mark_done(stop)
        if progress is not None:
            progress(stop)
    return PrecomputedSource(source, store.arrays)


def fingerprint(source: Source, model: LM, build: BuildComparison) -> str:
    """Return a hash of the model's weights, restricted ids and current precision, and of its input for every example."""
    device = model.tokens.weight.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest = hashlib.blake2b(f"{device} {cast}".encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    for name, ids in model.named_buffers():
        if name.endswith(".absent"):
            digest.update(name.encode() + ids.cpu().numpy().tobytes())
    digest.update(str(len(source)).encode())
    for i in range(len(source)):
        for name, value in sorted(build(source[i]).items()):
            array = np.asarray(value)
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


class _Store:
    """Arrays filled by index, in memory or in `directory/<fingerprint>/<name>.npy` with a progress record."""

    def __init__(self, directory: Path | None, count: int, key: str) -> None:
        self.path = directory / key if directory else None
        self.count, self.done = count, 0
        self.arrays: dict[str, np.ndarray] = {}
        if self.path is not None and (self.path / "done.json").exists():
            advice = f"delete {self.path}, and it is computed again"
            record = read_record(self.path / "done.json", {"done": int, "fields": list, "digest": str}, advice)
            self.done = record["done"]
            try:
                self.arrays = {name: np.load(self.path / f"{name}.npy", mmap_mode="r+") for name in record["fields"]}
            except (ValueError, OSError) as error:
                raise UserError(f"{self.path}: its arrays cannot be read ({error}): {advice}") from None

    def write(self, index: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            if name not in self.arrays:
                self.arrays[name] = self._new(name, (self.count, *value.shape[1:]), value.dtype)
            self.arrays[name][index] = value

    def _new(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if self.path is None:
            return np.zeros(shape, dtype)
        self.path.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(self.path / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)

    def mark_done(self, done: int) -> None:
        """Record that all examples before `done` are written, after they are on disk."""
        self.done = done
        if self.path is None:
            return
        for array in self.arrays.values():
            array.flush()  # type: ignore[attr-defined]
        write_record(self.path / "done.json", {"done": done, "fields": sorted(self.arrays)})


@dataclass(frozen=True)
class RefLogprobsConfig(WrappingConfig):
    """Preferences with the log-probabilities of both answers under the reference model (`init_from`), for DPO."""

    base_fields: ClassVar[frozenset[str]] = frozenset({"reference"})

    base: ExamplesConfig = PreferencesConfig()

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        return with_ref_logprobs(self.base.build(data, objective), data, build_comparison)


def with_ref_logprobs(plain: DatasetSplits, data: BuildContext, build: BuildComparison) -> DatasetSplits:
    """Return the examples with the log-probabilities of the rows that `build` makes, under the model that the run starts from."""
    model = data.frozen_start("the model that training starts from, which is also the reference")

    def known(source: Source, part: str) -> Source:
        return precompute(source, model, build, ref_logprobs, directory=data.directory / "reference" / part)

    with data.autocast():
        train = known(plain.train, "train")
        validation = None if plain.validation is None else known(plain.validation, "valid")
    return replace(plain, train=train, validation=validation)


@dataclass(frozen=True)
class PseudoLabeledConfig(PartiallyLabeledConfig):
    """Partially labeled records with the class probabilities of a teacher for each text.

    Args:
        teacher: The run of a classifier that was trained on the labeled records alone.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"taught"})
    required_fields: ClassVar[frozenset[str]] = frozenset({"label"})

    teacher: str = path_field("model", "")

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        what = "the run of `firth train classification` on the labeled records, which gives the pseudo-labels"
        hint = "train the teacher and this run from the same start, or with the same tokenizer.path"
        model = data.frozen_model(self.teacher, "examples.teacher", what, hint)
        plain = super().build(data, objective)
        vocab = data.tokenizer.vocab

        def show(example: Example) -> Example:
            return unlabeled_example(objective, example, vocab)

        with data.autocast():
            known = precompute(plain.train, model, show, teacher_probabilities, directory=data.directory / "taught")
        return replace(plain, train=known)


@dataclass(frozen=True)
class UnpairedPreferencesConfig(RecordsConfig):
    """Records with a prompt, an answer, and a label that says whether it is desirable, for KTO.

    Stored are {"tokens", "mask", "desirable" (1,)}, the mask True on the last answer and its stop token only. Each is shown with the
    answer to another prompt (`MismatchedAnswers`), and with the log-probabilities of both under the reference model (`init_from`). A
    record is left out as unanswered if `max_length` leaves no room for its answer.
    """

    base_fields: ClassVar[frozenset[str]] = KTO.inputs
    required_fields: ClassVar[frozenset[str]] = frozenset({"desirable"})
    columns: ClassVar[Mapping[str, type]] = {"tokens": np.int32, "mask": np.bool_, "desirable": np.bool_}

    max_length: TokenCount = 256

    def group(self, record: Record) -> str:
        prompt, answer, _ = unpaired(record)
        return first_prompt([*prompt, *answer])

    def tokenizer_texts_of(self, record: Record) -> list[str]:
        prompt, answer, _ = unpaired(record)
        return [message["content"] for message in (*prompt, *answer)]

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        prompt, answer, desirable = unpaired(record)
        tokens, mask = chat.encode(records.tokenizer, [*prompt, *answer])
        mask &= np.arange(len(tokens)) >= len(chat.encode(records.tokenizer, prompt)[0])
        tokens, mask = records.fit(tokens, self.max_length), mask[: self.max_length]
        return {"tokens": tokens, "mask": mask, "desirable": np.array([desirable])} if mask.any() else None

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        plain = super().build(data, objective)
        held = MismatchedAnswers(plain.validation, self.max_length) if plain.validation is not None else None
        paired = replace(plain, train=MismatchedAnswers(plain.train, self.max_length), validation=held)
        return with_ref_logprobs(paired, data, build_mismatched)


class MismatchedAnswers(WrappedSource):
    """A source that adds to each example the answer to another prompt, after its own: "mismatched_tokens", "mismatched_mask".

    The log-ratios of these rows estimate the KL of KTO. Each answer is the mismatched one of one example. It is the answer to
    another prompt for all examples, unless one prompt has more than half of them.

    Args:
        source: Examples with "tokens" and "mask".
        length: Maximum number of tokens of a row; a longer one is truncated at the end.
    """

    def __init__(self, source: Source, length: int) -> None:
        super().__init__(source)
        self.length = length
        # In the order of their prompts, an answer that is as far away as the largest group is large has another prompt.
        order = np.argsort(source.group_ids, kind="stable")
        largest = int(np.unique(source.group_ids, return_counts=True)[1].max())
        self._partner = np.empty_like(order)
        self._partner[order] = np.roll(order, -max(1, min(largest, len(order) // 2)))

    def __getitem__(self, index: int) -> Example:
        own, other = self.source[index], self.source[int(self._partner[index])]
        prompt = own["tokens"][: np.flatnonzero(own["mask"])[0]]
        at = np.flatnonzero(other["mask"])[0]
        tokens = np.concatenate((prompt, other["tokens"][at:]))[: self.length]
        mask = np.concatenate((np.zeros(len(prompt), bool), other["mask"][at:]))[: self.length]
        return own | {"mismatched_tokens": tokens, "mismatched_mask": mask}
