"""Load a trained model and generate, fill masks, chat, embed or evaluate, as the command line does."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from firth.corpora import readers
from firth.corpora.input_files import many
from firth.evaluate.metrics import perplexity
from firth.evaluate.predict import check_output_path
from firth.evaluate.prediction_inputs import InputSchema, read_inputs
from firth.evaluate.task import load_evaluated_model
from firth.generate import embeddings
from firth.generate.embeddings import embed
from firth.generate.sampling import Sampling
from firth.io.atomic import new_file
from firth.io.integrity import read_done
from firth.io.json_files import read_rows
from firth.runs.evaluation import measure
from firth.runs.loaded_model import Model, generates_left_to_right, open_model, trained_length
from firth.tokenizer import chat
from firth.types import LOGGER, UserError


def open_run(directory: Path, weights: str | None = None) -> Model:
    """Return `open_model` of a directory; UserError if its model has no LM head."""
    return open_model(directory, weights).require_lm_head()


def nearest_words(directory: Path, words: Sequence[str], top: int, out: Path | None) -> list[str]:
    """Return the nearest neighbors of each word, one line each, and write all vectors in word2vec's format to `out`, if given."""
    evaluated = load_evaluated_model(directory)
    loaded = Model(evaluated)
    lines = [f"{word}: {loaded.nearest(word, top)}" for word in words]
    if out is not None:
        count, width = embeddings.write(evaluated.model, evaluated.tokenizer, out)
        lines.append(f"{out}: {count:,} vectors of {width} numbers, in word2vec's text format")
    return lines


def embed_file(
    directory: Path, file: str, stdin: BinaryIO, out: Path, *, field: str, unit: bool, length: int, form: str = "auto",
) -> str:  # fmt: skip
    """Write one embedding per text, in input order, and return a summary.

    Args:
        directory: A run or model directory.
        file: A file of records or lines, or "-" for standard input. A missing text is embedded as an empty text.
        stdin: Standard input.
        out: The file to write: .npy, or else JSONL.
        field: The field of a record that holds the text.
        unit: Whether to normalize the embeddings to length 1.
        length: The most tokens of a text; 0 for the model's own limit.
        form: Input format (`firth.evaluate.prediction_inputs`).
    """
    check_output_path(out)
    if length < 0:
        raise UserError(
            f"--length {length}: give the most tokens of a text, or 0 for what the model was trained to read"
        )
    with tempfile.TemporaryDirectory() as folder:
        wanted = InputSchema(field, lambda line: {field: line}, lambda record: [record.get(field)])
        got = read_inputs(file, stdin, form, wanted, Path(folder))
        for remark in got.notes:
            LOGGER.warning(remark)
        with got.user_locations():
            records = readers.records([str(got.path)]) if any(got.has_text) else iter(())
            given = (readers.text_field(record, field, place) for place, record in records)
            texts = [next(given) if has_text else "" for has_text in got.has_text]
    evaluated = load_evaluated_model(directory)
    found, cut = embed(
        evaluated.model, evaluated.tokenizer, texts, length=length or trained_length(evaluated), unit=unit
    )
    if cut:
        LOGGER.warning(
            f"{got.name}: {many(len(cut), 'text')} longer than the limit, truncated at the end; the first is row {cut[0] + 1}"
        )
    with new_file(out) as partial, partial.open("wb") as bytes_:
        if out.suffix == ".npy":
            np.save(bytes_, found)
        else:
            for row, vector in zip(got.rows, found.tolist(), strict=True):
                bytes_.write((json.dumps(row | {"embedding": vector}) + "\n").encode())
    return f"{out}: {many(len(found), 'vector')} of {found.shape[1]} numbers"


def open_engine(directory: Path, weights: str | None = None) -> Model:
    """Load a model that generates from left to right; for another one, raise a UserError with the command that suits it."""
    loaded = open_run(directory, weights)
    if not generates_left_to_right(loaded.model.config):
        raise UserError(
            f"{directory}: this model is bidirectional, so it cannot continue a text; {loaded.suitable_command}"
        )
    return loaded


def fill_text(directory: Path, text: str, top: int) -> str:
    """Return what a model puts in place of each <mask> of a text (`Model.fill_gaps`).

    Raises:
        UserError: The model cannot fill masks; the message names the command that suits it.
    """
    loaded = open_model(directory)
    lm = loaded.with_lm_head()
    if not lm.can_fill:
        causal = "is causal, so it " if loaded.model.config.causal else ""
        raise UserError(f"{directory}: this model {causal}cannot fill masks; {loaded.suitable_command}")
    return lm.fill_gaps(text, top)


def generate_texts(
    directory: Path, text: str, ends: tuple[str, str] | None, count: int, sampling: Sampling, weights: str | None = None,
) -> Iterator[str]:  # fmt: skip
    """Yield generated text piece by piece.

    Args:
        directory: A run or model directory, or a GGUF file.
        text: The prompt; empty samples `count` texts from the prior of a variational autoencoder, one line each.
        ends: Two texts to interpolate between, with `count` texts, for a variational autoencoder.
        count: Number of texts from the prior or the interpolation.
        sampling: The sampling settings.
        weights: Dtype of the weights in memory (`open_model`).

    Raises:
        UserError: The model does not generate, or `ends` is given and it has no latent.
    """
    loaded = open_engine(directory, weights)
    if not loaded.model.config.encoder.latent_size:
        if ends is not None:
            raise UserError(
                f"{directory}: this model has no latent, so it cannot interpolate between texts: train one with `firth train vae`"
            )
        return loaded.stream_text(text, sampling)
    if ends is not None:
        return iter(["\n".join(loaded.interpolate(*ends, count, sampling))])
    return loaded.stream_text(text, sampling) if text else iter(["\n".join(loaded.sample_prior(count, sampling))])


class PromptTooLongError(UserError):
    """A line of a chat that leaves no room for an answer; the chat itself can go on."""


@dataclass
class Conversation:
    """A chat with a model, with as many earlier turns as fit into the context.

    Args:
        run: A run or model directory, or a GGUF file.
        sampling: The sampling settings. The oldest exchanges (a user's turn and its answer) are dropped until
            `sampling.max_new_tokens` fit.
        weights: Dtype of the weights in memory (`open_model`).
        system: A system turn before the first line; it is never dropped.
        capped: Whether to limit `sampling.max_new_tokens` to half the context.
        messages: The system turn and the exchanges that have not been dropped.
        dropped: Number of dropped exchanges.
    """

    run: Path
    sampling: Sampling
    weights: str | None = None
    system: str = ""
    capped: bool = False
    messages: list[chat.Message] = field(default_factory=list)
    dropped: int = 0

    def __post_init__(self) -> None:
        self.loaded = open_engine(self.run, self.weights)
        context = self.loaded.model.context
        if self.capped:
            self.sampling = replace(
                self.sampling, max_new_tokens=max(1, min(self.sampling.max_new_tokens, context // 2))
            )
        if self.sampling.max_new_tokens >= context:
            raise UserError(
                f"an answer of {self.sampling.max_new_tokens} tokens leaves no room for a question in this model's context of "
                f"{context}: choose fewer with --max-new-tokens"
            )
        if self.system:
            self.messages.insert(0, {"role": "system", "content": self.system})

    def answer(self, line: str) -> Iterator[str]:
        """Yield the answer to a user's line piece by piece.

        Raises:
            PromptTooLongError: The line leaves no room for `sampling.max_new_tokens`. The conversation is unchanged.
            UserError: The tokenizer's chat template rejects the dialogue.
        """
        turn = {"role": "user", "content": line}
        kept, dropped = list(self.messages), 0
        first = sum(message["role"] == "system" for message in kept)
        while True:
            prompt, _ = chat.encode(self.loaded.tokenizer, [*kept, turn], open=True)
            if self.loaded.engine.room(prompt) >= self.sampling.max_new_tokens:
                break
            if len(kept) == first:
                raise PromptTooLongError(
                    f"this line makes a prompt of {len(prompt)} tokens, which leaves no room for an answer of "
                    f"{self.sampling.max_new_tokens} in a context of {self.loaded.model.context}: shorten it, or ask for fewer "
                    "--max-new-tokens"
                )
            del kept[first : first + 2]
            dropped += 1
        pieces = []
        for piece in self.loaded.engine.stream(prompt, self.sampling):
            pieces.append(piece)
            yield piece
        self.dropped += dropped
        self.messages = [*kept, turn, {"role": "assistant", "content": "".join(pieces)}]


def evaluate_run(
    directory: Path,
    paths: Sequence[str],
    *,
    task: str | None,
    limit: int | None,
    as_json: bool,
) -> str:
    """Evaluate a run on files, or return its last evaluation on held-out text.

    Args:
        directory: A run or model directory.
        paths: Files to evaluate on; none for the run's own held-out text.
        task: The task (`firth.runs.evaluation.measure`).
        limit: The most tokens or records to evaluate.
        as_json: Whether to return a JSON object instead of readable lines.
    """
    if limit is not None and not paths and task != "glue":
        raise UserError(
            f"--limit {limit} applies to files, and without files the run's own last evaluation is shown: "
            f"name files, or leave out --limit"
        )
    found = (
        measure(directory, list(paths), task=task, limit=limit)
        if paths or task == "glue"
        else held_out_measures(directory)
    )
    if as_json:
        return json.dumps(found)
    return "\n".join(f"{name:<24} {_readable(value)}" for name, value in found.items())


def held_out_measures(directory: Path) -> dict[str, Any]:
    """Return the held-out metrics of the exported step, which may not be the last one.

    Raises:
        UserError: The run has no held-out metrics, or the row of the exported step is missing.
    """
    metrics = directory / "metrics.jsonl"
    rows = read_rows(metrics, {"split": str, "step": int}, "remove the line", cut=True)
    held = [row for row in rows if row["split"] == "valid"]
    if not held:
        raise UserError(f"{directory}: this run has no held-out metrics; name files: firth evaluate {directory} FILES")
    exported = read_done(directory).get(
        "exported_step", held[-1]["step"]
    )  # missing in unfinished runs and older versions
    row = next((row for row in held if row["step"] == exported), None)
    if row is None:
        raise UserError(
            f"{metrics}: the row of step {exported:,}, whose model was exported, is missing: name files to evaluate it again: "
            f"firth evaluate {directory} FILES"
        )
    found = {k: v for k, v in row.items() if k not in ("split", "seconds")}
    if row is not held[-1]:
        found = {"exported_step": found.pop("step"), "last_step": held[-1]["step"]} | found
    if isinstance(found.get("loss"), float) and "bits_per_byte" in found:
        found["perplexity"] = perplexity(found["loss"], 1)
    return found


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(_readable(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
