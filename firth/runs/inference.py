"""Load a trained model and generate, fill masks, chat, embed or evaluate, as the command line does."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from firth.corpora import readers
from firth.corpora.read_stats import many
from firth.data.attention_fields import InfillPrompt
from firth.evaluate.heads import head_of
from firth.evaluate.metrics import perplexity
from firth.evaluate.predict import check_output_path
from firth.evaluate.prediction_inputs import InputSchema, read_inputs
from firth.evaluate.task import EvaluatedModel, load_evaluated_model
from firth.generate import infill, word_vectors
from firth.generate.embeddings import embed
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.generate.scoring import scoring_mode
from firth.io.atomic import new_file
from firth.io.integrity import read_done
from firth.io.json_files import read_json, read_rows
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.objectives import OBJECTIVES, find, name_of
from firth.objectives.denoise import Denoising
from firth.objectives.objective import Objective
from firth.objectives.span_corruption import SpanCorruption
from firth.pretrained.load_save import metadata_of
from firth.runs.evaluate_files import measure
from firth.runs.recipe import load
from firth.tokenizer import chat
from firth.tokenizer.inspection import readable
from firth.tokenizer.tokenizer import Tokenizer
from firth.training import precision
from firth.types import LOGGER, LogLine, UserError


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its tokenizer and generation engine.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        engine: The engine that generates with the model.
        objective: The objective that it was trained with; None if unknown.
    """

    model: LM
    tokenizer: Tokenizer
    engine: Engine
    objective: Objective | None = None

    def stream_text(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Yield the continuation of a text piece by piece. A decoder's prompt starts with the [bos] token."""
        return self.engine.stream(encode_prompt(self.tokenizer, text, self.model), sampling)

    def continue_text(self, texts: Sequence[str], sampling: Sampling) -> list[str]:
        """Return the continuations of several texts."""
        prompts = [encode_prompt(self.tokenizer, text, self.model) for text in texts]
        return [c.text for c in self.engine.generate(prompts, sampling)]

    def supports(self, text: str) -> bool:
        """Return whether the model can process a sample prompt: masks need infilling, <to> and <prior> need a latent."""
        if MASK in text:
            return self.can_fill
        return self.model.config.latent_size > 0 or not (TO in text or PRIOR in text)

    @property
    def can_fill(self) -> bool:
        """Whether the model can fill masks: by prediction, by generation, or from two directions."""
        return "lm" in self.model.heads and (
            not generates_left_to_right(self.model.config) or self._show_gaps([NOTHING] * 2) is not None
        )

    def sample(self, text: str, sampling: Sampling) -> str:
        """Return a sample: fill the masks of a text, interpolate, continue the text, or list the nearest words."""
        if MASK in text:
            return self.fill_gaps(text, 5)
        if PRIOR in text:
            return "\n".join(self.sample_prior(5, sampling))
        if TO in text:
            first, _, second = text.partition(TO)
            return "\n".join(self.interpolate(first, second, 5, sampling))
        if self.model.has_lm_head:
            return self.continue_text([text], sampling)[0]
        # The vocabulary of a user's text may lack the words of a recipe, which must not end a run.
        return self.nearest(text, 8) if word_vectors.ids_of(self.tokenizer, text) else "(no word of this text)"

    def nearest(self, word: str, top: int) -> str:
        """Return the words with the nearest vectors to that of a word, in one line."""
        found = word_vectors.nearest(self.model, self.tokenizer, word, top)
        return "   ".join(
            f"{readable(piece, self.tokenizer.is_byte_level)} {likeness:.2f}" for piece, likeness in found
        )

    def fill_gaps(self, text: str, top: int) -> str:
        """Return the candidates for each <mask>, one line per mask; from BART, the whole text rewritten.

        Args:
            text: A text with one or more <mask>.
            top: Number of candidates.

        Raises:
            UserError: The text has no <mask>, or the model cannot fill masks.
        """
        roles, config = self.tokenizer.vocab.roles, self.model.config
        own = self.tokenizer.token(roles["mask"]) if "mask" in roles else MASK
        text = text.replace(own, MASK)
        if MASK not in text:
            raise UserError(f"there is nothing to fill: write {MASK} where a token is missing")
        if not self.can_fill:
            raise UserError("this model cannot fill masks")
        byte_level = self.tokenizer.is_byte_level
        if not generates_left_to_right(config) and not config.separate_directions:
            gaps = self.engine.fill(text.replace(MASK, own), top)
        elif config.separate_directions:
            gaps = infill.fill_two_way(self.engine, infill.split_gaps(self.tokenizer, text, MASK), top)
        else:
            shown = self._show_gaps(infill.split_gaps(self.tokenizer, text, MASK))
            assert shown is not None
            if not len(shown.marks):
                return infill.rewrite(self.engine, shown).text
            gaps = infill.fill_spans(self.engine, shown, top)
            byte_level = False  # spans are decoded texts
        return "\n".join(
            "   ".join(f"{readable(c.piece, byte_level) or '(nothing)'} {c.probability:.2f}" for c in gap)
            or "(the model wrote nothing for this mask)"
            for gap in gaps
        )

    def _show_gaps(self, pieces: Sequence[np.ndarray]) -> InfillPrompt | None:
        """Return the prompt with which a generative model fills masks; None if it cannot.

        Without a known objective, a model that starts its answers as BART does and has a mask token is taken for BART; otherwise
        the tokenizer decides: T5's sentinels, or BART's mask.
        """
        vocab = self.tokenizer.vocab
        if self.objective is not None:
            return self.objective.build_infill(pieces, vocab)
        if not self.model.config.num_encoder_layers or self.model.config.latent_size:
            return None
        if "mask" in vocab.roles and (self.model.config.decoder_start_token == "eos" or len(vocab.sentinels) < 2):
            return Denoising().build_infill(pieces, vocab)
        return SpanCorruption().build_infill(pieces, vocab) if len(vocab.sentinels) > 1 else None

    def interpolate(self, first: str, second: str, count: int, sampling: Sampling) -> list[str]:
        """Return `count` texts decoded from a linear interpolation of the latents of two texts, endpoints included."""
        ends = [encode_prompt(self.tokenizer, end.strip(), self.model) for end in (first, second)]
        start, stop = self.engine.posterior(ends)
        share = torch.linspace(0, 1, count, device=start.device)[:, None]
        return [written.text for written in self.engine.decode(start * (1 - share) + stop * share, sampling)]

    def sample_prior(self, count: int, sampling: Sampling) -> list[str]:
        """Return `count` texts whose latents are sampled from the prior."""
        noise = np.random.default_rng(sampling.seed).standard_normal((count, self.model.config.latent_size), np.float32)
        latents = torch.from_numpy(noise).to(self.engine.device)
        return [written.text for written in self.engine.decode(latents, sampling)]


NOTHING = np.zeros(0, np.int32)
MASK = "<mask>"
"""The mask token in a user's text, independent of the tokenizer's."""
TO, PRIOR = "<to>", "<prior>"
"""Marks in sample prompts for a variational autoencoder: interpolate between two texts, or sample from the prior."""


def encode_prompt(tokenizer: Tokenizer, text: str, model: LM) -> np.ndarray:
    """Return the token ids of a prompt, as in training: (n,).

    [bos] text for a decoder, text [eos] for an encoder-decoder, and the text alone for a prefix language model (or [bos] if it
    is empty). The tokenizers of other libraries define whether they add [bos] (GPT-2's has one and does not add it).
    """
    ids = tokenizer.encode(text)
    roles = tokenizer.vocab.roles
    if model.config.num_encoder_layers:
        return np.append(ids, roles["eos"]).astype(np.int32) if "eos" in roles else ids
    add_bos = "bos" in roles and tokenizer.bos is not False and not (model.config.prefix_lm and len(ids))
    return np.concatenate(([roles["bos"]], ids)).astype(np.int32) if add_bos else ids


def generates_left_to_right(config: ModelConfig) -> bool:
    """Return whether a model can continue a text from left to right."""
    return config.latent_size > 0 or scoring_mode(config) != "masked"


def open_run(directory: Path, weights: str | None = None, log: LogLine = LOGGER.warning) -> LoadedModel:
    """Return `open_model` of a directory; UserError if its model has no LM head."""
    loaded = open_model(directory, weights, log)
    if not loaded.model.has_lm_head:
        raise UserError(
            f"{directory}: this model has no LM head, so it cannot generate text; {_suitable_command(directory, loaded)}"
        )
    return loaded


def open_model(directory: Path, weights: str | None = None, log: LogLine = LOGGER.warning) -> LoadedModel:
    """Load a model of any kind, with the objective of its run.

    Args:
        directory: A run or model directory, or a GGUF file.
        weights: Dtype of the weights in memory (`Engine`); None keeps the stored one; "auto" takes bf16 for fp32 weights where
            this machine also trains in bf16.
        log: Receives a message on what "auto" chooses.
    """
    evaluated = load_evaluated_model(directory)
    if weights == "auto":
        stored = evaluated.model.tokens.weight
        quick = stored.dtype == torch.float32 and precision.choose("auto", stored.device) == "bf16"
        weights = "bf16" if quick else None
        if quick:
            log("weights are held in bf16, which is faster here: use --weights fp32 for full precision")
    engine = Engine(evaluated.model, evaluated.tokenizer, weights=weights)
    return LoadedModel(engine.model, evaluated.tokenizer, engine, objective_in(directory))


def _suitable_command(directory: Path, loaded: LoadedModel) -> str:
    """Return the command that suits a model."""
    model = loaded.model
    if head_of(dict(model.heads)):
        return f"use `firth predict {directory} FILE`"
    if "reward" in model.heads:
        return f"use `firth evaluate {directory} FILE`"
    if _with_lm_model(loaded).can_fill:
        return f"use `firth fill {directory} 'a {MASK} text'`"
    if model.has_lm_head:
        return f"use `firth generate {directory} 'a text'`"
    return (
        f"use `firth vectors {directory} WORD`"
        if not model.config.num_layers
        else f"use `firth embed {directory} FILE`"
    )


def _with_lm_model(loaded: LoadedModel) -> LoadedModel:
    """Return the model with a trained LM head: the generator of ELECTRA, otherwise the model itself."""
    if loaded.objective is None:
        return loaded
    model = loaded.objective.lm_model(loaded.model)
    return loaded if model is loaded.model else replace(loaded, model=model, engine=Engine(model, loaded.tokenizer))


def nearest_words(directory: Path, words: Sequence[str], top: int, out: Path | None) -> list[str]:
    """Return the nearest neighbors of each word, one line each, and write all vectors in word2vec's format to `out`, if given."""
    evaluated = load_evaluated_model(directory)
    loaded = LoadedModel(evaluated.model, evaluated.tokenizer, Engine(evaluated.model, evaluated.tokenizer))
    lines = [f"{word}: {loaded.nearest(word, top)}" for word in words]
    if out is not None:
        count, width = word_vectors.write(evaluated.model, evaluated.tokenizer, out)
        lines.append(f"{out}: {count:,} vectors of {width} numbers, in word2vec's text format")
    return lines


def embed_file(
    directory: Path, file: str, stdin: BinaryIO, out: Path, *, field: str, unit: bool, length: int, form: str = "auto",
    log: LogLine = LOGGER.warning,
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
        log: Receives remarks on what was truncated, repaired or doubtful.
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
            log(remark)
        with got.user_locations():
            records = readers.records([str(got.path)]) if any(got.has_text) else iter(())
            given = (readers.text_field(record, field, place) for place, record in records)
            texts = [next(given) if has_text else "" for has_text in got.has_text]
    evaluated = load_evaluated_model(directory)
    found, cut = embed(
        evaluated.model, evaluated.tokenizer, texts, length=length or trained_length(evaluated), unit=unit
    )
    if cut:
        log(
            f"{got.name}: {many(len(cut), 'text')} longer than the limit, truncated at the end; the first is row {cut[0] + 1}"
        )
    with new_file(out) as partial, partial.open("wb") as bytes_:
        if out.suffix == ".npy":
            np.save(bytes_, found)
        else:
            for row, vector in zip(got.rows, found.tolist(), strict=True):
                bytes_.write((json.dumps(row | {"embedding": vector}) + "\n").encode())
    return f"{out}: {many(len(found), 'vector')} of {found.shape[1]} numbers"


def trained_length(evaluated: EvaluatedModel) -> int:
    """Return the most tokens that a model was trained on: from sentence-transformers' config, or else its context."""
    settings = read_json(evaluated.model_directory / "sentence_bert_config.json")
    return int(settings.get("max_seq_length") or evaluated.context)


def open_engine(directory: Path, weights: str | None = None, log: LogLine = LOGGER.warning) -> LoadedModel:
    """Load a model that generates from left to right; for another one, raise a UserError with the command that suits it."""
    loaded = open_run(directory, weights, log)
    if not generates_left_to_right(loaded.model.config):
        raise UserError(
            f"{directory}: this model is bidirectional, so it cannot continue a text; {_suitable_command(directory, loaded)}"
        )
    return loaded


def objective_in(directory: Path) -> Objective | None:
    """Return the training objective of a run or model directory; None if neither recipe.yaml nor firth.json names it.

    A model directory has only the names, so its objectives have default settings.
    """
    path = directory / "recipe.yaml"
    if path.is_file():
        return load(str(path)).objective
    names = metadata_of(directory / "model" if (directory / "model").is_dir() else directory).get("objective")
    if not isinstance(names, list) or not names or not all(name in OBJECTIVES for name in names):
        return None
    total: Objective = find(names[0])()
    for name in names[1:]:
        total = total + find(name)()
    return total


def objective_of(directory: Path) -> list[str]:
    """Return the names of the training objectives of a run; [] if unknown."""
    objective = objective_in(directory)
    return [] if objective is None else [name_of(type(one)) for one in objective.components()]


def fill_text(directory: Path, text: str, top: int) -> str:
    """Return what a model puts in place of each <mask> of a text (`LoadedModel.fill_gaps`).

    Raises:
        UserError: The model cannot fill masks; the message names the command that suits it.
    """
    loaded = open_model(directory)
    lm = _with_lm_model(loaded)
    if not lm.can_fill:
        causal = "is causal, so it " if loaded.model.config.causal else ""
        raise UserError(f"{directory}: this model {causal}cannot fill masks; {_suitable_command(directory, loaded)}")
    return lm.fill_gaps(text, top)


def generate_texts(
    directory: Path, text: str, ends: tuple[str, str] | None, count: int, sampling: Sampling, weights: str | None = None,
    log: LogLine = LOGGER.warning,
) -> Iterator[str]:  # fmt: skip
    """Yield generated text piece by piece.

    Args:
        directory: A run or model directory, or a GGUF file.
        text: The prompt; empty samples `count` texts from the prior of a variational autoencoder, one line each.
        ends: Two texts to interpolate between, with `count` texts, for a variational autoencoder.
        count: Number of texts from the prior or the interpolation.
        sampling: The sampling settings.
        weights: Dtype of the weights in memory (`open_model`).
        log: Receives a message on what "auto" chooses.

    Raises:
        UserError: The model does not generate, or `ends` is given and it has no latent.
    """
    loaded = open_engine(directory, weights, log)
    if not loaded.model.config.latent_size:
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
        log: Receives a message on what "auto" weights choose.
        messages: The system turn and the exchanges that have not been dropped.
        dropped: Number of dropped exchanges.
    """

    run: Path
    sampling: Sampling
    weights: str | None = None
    system: str = ""
    capped: bool = False
    log: LogLine = LOGGER.warning
    messages: list[chat.Message] = field(default_factory=list)
    dropped: int = 0

    def __post_init__(self) -> None:
        self.loaded = open_engine(self.run, self.weights, self.log)
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
    log: LogLine = LOGGER.warning,
) -> str:
    """Evaluate a run on files, or return its last evaluation on held-out text.

    Args:
        directory: A run or model directory.
        paths: Files to evaluate on; none for the run's own held-out text.
        task: The task (`firth.runs.evaluate_files.measure`).
        limit: The most tokens or records to evaluate.
        as_json: Whether to return a JSON object instead of readable lines.
        log: Receives remarks on what was truncated, repaired or dropped.
    """
    if limit is not None and not paths and task != "glue":
        raise UserError(
            f"--limit {limit} applies to files, and without files the run's own last evaluation is shown: "
            f"name files, or leave out --limit"
        )
    found = (
        measure(directory, list(paths), task=task, limit=limit, log=log)
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
