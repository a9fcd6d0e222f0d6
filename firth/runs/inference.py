"""A trained run, used from the command line: continue, fill, talk, measure."""

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
from firth.data.layout import InfillPrompt
from firth.evaluate.heads import head_of
from firth.evaluate.metrics import perplexity
from firth.evaluate.predict import check_output_path
from firth.evaluate.prediction_inputs import InputSchema, read_inputs
from firth.evaluate.task import EvaluatedModel, Say, load_evaluated_model
from firth.evaluate.text_perplexity import scoring_mode
from firth.generate import infill, word_vectors
from firth.generate.embeddings import embed
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
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
from firth.runs.measure import measure
from firth.runs.recipe import load
from firth.tokenizer import chat
from firth.tokenizer.inspection import readable
from firth.tokenizer.tokenizer import Tokenizer
from firth.train import precision
from firth.types import UserError


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its tokenizer, ready to write. objective: what it was trained with, None where that is not known."""

    model: LM
    tokenizer: Tokenizer
    engine: Engine
    objective: Objective | None = None

    def stream_text(self, text: str, sampling: Sampling) -> Iterator[str]:
        """The continuation of a text, a piece at a time. A decoder reads it behind the token that begins a document."""
        return self.engine.stream(encode_prompt(self.tokenizer, text, self.model), sampling)

    def continue_text(self, texts: Sequence[str], sampling: Sampling) -> list[str]:
        """The continuations of several texts."""
        prompts = [encode_prompt(self.tokenizer, text, self.model) for text in texts]
        return [c.text for c in self.engine.generate(prompts, sampling)]

    def supports(self, text: str) -> bool:
        """Whether the model can do what a text asks of it: only some fill gaps, and only some have a latent."""
        if MASK in text:
            return self.can_fill
        return self.model.config.latent_size > 0 or not (TO in text or PRIOR in text)

    @property
    def can_fill(self) -> bool:
        """Whether the model fills gaps: by a mask, by writing what is missing, or from both ends."""
        return "lm" in self.model.heads and (
            not generates_left_to_right(self.model.config) or self._show_gaps([NOTHING] * 2) is not None
        )

    def sample(self, text: str, sampling: Sampling) -> str:
        """What the model makes of a text: it fills the gaps in it, continues it, or names the words that are near."""
        if MASK in text:
            return self.fill_gaps(text, 5)
        if PRIOR in text:
            return "\n".join(self.prior(5, sampling))
        if TO in text:
            first, _, second = text.partition(TO)
            return "\n".join(self.between(first, second, 5, sampling))
        if self.model.has_lm_head:
            return self.continue_text([text], sampling)[0]
        # A recipe's words need not stand in a user's text: that is no reason to end a run.
        return self.near(text, 8) if word_vectors.ids_of(self.tokenizer, text) else "(no word of this text)"

    def near(self, word: str, top: int) -> str:
        """The words whose vectors are nearest to that of a word, in one line."""
        found = word_vectors.nearest(self.model, self.tokenizer, word, top)
        return "   ".join(f"{readable(piece)} {likeness:.2f}" for piece, likeness in found)

    def fill_gaps(self, text: str, top: int) -> str:
        """Return what the model puts in place of each <mask>: candidates, one line for each gap; or the whole text anew, from a
        model that writes that (BART).

        Raises:
            UserError: There is no gap in the text, or the model fills none.
        """
        roles, config = self.tokenizer.vocab.roles, self.model.config
        own = self.tokenizer.token(roles["mask"]) if "mask" in roles else MASK
        text = text.replace(own, MASK)
        if MASK not in text:
            raise UserError(f"there is nothing to fill: write {MASK} where a token is missing")
        if not self.can_fill:
            raise UserError("this model fills no gaps")
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
        return "\n".join(
            "   ".join(f"{readable(c.piece) or '(nothing)'} {c.probability:.2f}" for c in gap)
            or "(the model wrote nothing for this gap)"
            for gap in gaps
        )

    def _show_gaps(self, pieces: Sequence[np.ndarray]) -> InfillPrompt | None:
        """How a model that writes is shown a text with gaps. One of others is taken for BART if it starts its answers as BART does
        and has a mask, else for what its tokenizer has: T5's sentinels, or BART's mask."""
        vocab = self.tokenizer.vocab
        if self.objective is not None:
            return self.objective.build_infill(pieces, vocab)
        if not self.model.config.num_encoder_layers or self.model.config.latent_size:
            return None
        if "mask" in vocab.roles and (self.model.config.decoder_start_token == "eos" or len(vocab.sentinels) < 2):
            return Denoising().build_infill(pieces, vocab)
        return SpanCorruption().build_infill(pieces, vocab) if len(vocab.sentinels) > 1 else None

    def between(self, first: str, second: str, count: int, sampling: Sampling) -> list[str]:
        """Return `count` texts on the straight line between the latents of two texts, their own two included."""
        ends = [encode_prompt(self.tokenizer, end.strip(), self.model) for end in (first, second)]
        start, stop = self.engine.posterior(ends)
        share = torch.linspace(0, 1, count, device=start.device)[:, None]
        return [written.text for written in self.engine.decode(start * (1 - share) + stop * share, sampling)]

    def prior(self, count: int, sampling: Sampling) -> list[str]:
        """Return `count` texts whose latents are drawn from the prior."""
        chance = np.random.default_rng(sampling.seed).standard_normal(
            (count, self.model.config.latent_size), np.float32
        )
        latents = torch.from_numpy(chance).to(self.engine.device)
        return [written.text for written in self.engine.decode(latents, sampling)]


NOTHING = np.zeros(0, np.int32)
MASK = "<mask>"
"""How a user writes a gap, whatever the tokenizer calls it."""
TO, PRIOR = "<to>", "<prior>"
"""How a recipe's sample asks a variational autoencoder for the texts between two, or for texts from the prior."""


def encode_prompt(tokenizer: Tokenizer, text: str, model: LM) -> np.ndarray:
    """A text as the model met it in training: [bos] text for a decoder, text [eos] for an encoder-decoder's source, the bare
    text for a prefix language model (but [bos] where there is none, for something must be read).

    A stranger's tokenizer says whether it puts bos there (GPT-2's has one and does not).
    """
    ids = tokenizer.encode(text)
    roles = tokenizer.vocab.roles
    if model.config.num_encoder_layers:
        return np.append(ids, roles["eos"]).astype(np.int32) if "eos" in roles else ids
    begins = "bos" in roles and tokenizer.bos is not False and not (model.config.prefix_lm and len(ids))
    return np.concatenate(([roles["bos"]], ids)).astype(np.int32) if begins else ids


def generates_left_to_right(config: ModelConfig) -> bool:
    """Whether a model of this shape writes from left to right, so that it can go on from a text."""
    return config.latent_size > 0 or scoring_mode(config) != "masked"


def open_run(directory: Path, weights: str | None = None, say: Say = lambda _: None) -> LoadedModel:
    """Return `open_model` of a directory; UserError where its model cannot write."""
    opened = open_model(directory, weights, say)
    if not opened.model.has_lm_head:
        raise UserError(
            f"{directory}: no vocabulary head reads this model's states, so it cannot write; {_instead(directory, opened)}"
        )
    return opened


def open_model(directory: Path, weights: str | None = None, say: Say = lambda _: None) -> LoadedModel:
    """Return the model of a run or model directory, whatever it serves, with the objective of its run.

    Args:
        directory: A run or model directory, or a GGUF file.
        weights: What the weights are held in (`Engine`); None: as they are stored; "auto": in bf16 where they are stored in
            fp32 and this machine trains in bf16, for the same reason.
        say: Reports what "auto" chooses.
    """
    evaluated = load_evaluated_model(directory)
    if weights == "auto":
        stored = evaluated.model.tokens.weight
        quick = stored.dtype == torch.float32 and precision.choose("auto", stored.device) == "bf16"
        weights = "bf16" if quick else None
        if quick:
            say("weights are held in bf16, which is quicker here: --weights fp32 writes in full precision")
    engine = Engine(evaluated.model, evaluated.tokenizer, weights=weights)
    return LoadedModel(engine.model, evaluated.tokenizer, engine, objective_in(directory))


def _instead(directory: Path, opened: LoadedModel) -> str:
    """Which command serves a model, for one that was asked for something else."""
    model = opened.model
    if head_of(dict(model.heads)):
        return f"use `firth predict {directory} FILE`"
    if "reward" in model.heads:
        return f"use `firth evaluate {directory} FILE`"
    if _drafter(opened).can_fill:
        return f"use `firth fill {directory} 'a {MASK} text'`"
    if model.has_lm_head:
        return f"use `firth generate {directory} 'a text'`"
    return (
        f"use `firth vectors {directory} WORD`"
        if not model.config.num_layers
        else f"use `firth embed {directory} FILE`"
    )


def _drafter(opened: LoadedModel) -> LoadedModel:
    """The model whose vocabulary head knows the tokens: of ELECTRA the generator, of others the model itself."""
    if opened.objective is None:
        return opened
    model = opened.objective.lm_model(opened.model)
    return opened if model is opened.model else replace(opened, model=model, engine=Engine(model, opened.tokenizer))


def nearest_words(directory: Path, words: Sequence[str], top: int, out: Path | None) -> list[str]:
    """The neighbours of each word, a line each; and all vectors into a file that gensim reads, if one is named."""
    evaluated = load_evaluated_model(directory)
    opened = LoadedModel(evaluated.model, evaluated.tokenizer, Engine(evaluated.model, evaluated.tokenizer))
    lines = [f"{word}: {opened.near(word, top)}" for word in words]
    if out is not None:
        count, width = word_vectors.write(evaluated.model, evaluated.tokenizer, out)
        lines.append(f"{out}: {count:,} vectors of {width} numbers, in word2vec's text format")
    return lines


def embed_file(
    directory: Path, file: str, stdin: BinaryIO, out: Path, *, field: str, unit: bool, length: int, form: str = "auto",
    say: Say = lambda _: None,
) -> str:  # fmt: skip
    """Write a vector for each text of a file, of records or lines, or of standard input (-), in their order; tell what was
    written. A text that says nothing has the vector of an empty one. say: told what was cut, mended or doubtful."""
    check_output_path(out)
    if length < 0:
        raise UserError(
            f"--length {length}: give the most tokens of a text, or 0 for what the model was trained to read"
        )
    with tempfile.TemporaryDirectory() as folder:
        wanted = InputSchema(field, lambda line: {field: line}, lambda record: [record.get(field)])
        got = read_inputs(file, stdin, form, wanted, Path(folder))
        for remark in got.notes:
            say(remark)
        with got.user_locations():
            there = readers.records([str(got.path)]) if any(got.has_text) else iter(())
            said = (readers.text_field(record, field, place) for place, record in there)
            texts = [next(said) if told else "" for told in got.has_text]
    evaluated = load_evaluated_model(directory)
    found, cut = embed(evaluated.model, evaluated.tokenizer, texts, length=length or _longest(evaluated), unit=unit)
    if cut:
        say(f"{got.name}: {many(len(cut), 'text')} longer than is read, cut at the end; the first is row {cut[0] + 1}")
    with new_file(out) as partial, partial.open("wb") as bytes_:
        if out.suffix == ".npy":
            np.save(bytes_, found)
        else:
            for row, vector in zip(got.rows, found.tolist(), strict=True):
                bytes_.write((json.dumps(row | {"embedding": vector}) + "\n").encode())
    return f"{out}: {many(len(found), 'vector')} of {found.shape[1]} numbers"


def _longest(evaluated: EvaluatedModel) -> int:
    """Tokens that a model was trained to read: what sentence-transformers' own file says, else the run, else the shape."""
    file = evaluated.model_directory / "sentence_bert_config.json"
    told = read_json(file)
    return int(told.get("max_seq_length") or evaluated.context)


def open_engine(directory: Path, weights: str | None = None, say: Say = lambda _: None) -> LoadedModel:
    """A model that was trained to write from left to right; UserError with the command that serves another."""
    opened = open_run(directory, weights, say)
    if not generates_left_to_right(opened.model.config):
        raise UserError(
            f"{directory}: this model reads a text from both sides, so it does not go on from it; {_instead(directory, opened)}"
        )
    return opened


def objective_in(directory: Path) -> Objective | None:
    """The objective that a run was trained with; None where neither its recipe nor its model's firth.json says it.

    A model directory keeps the names alone, so the objectives have their default settings there.
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
    """The names of the objectives that a run was trained with; none where they are not known."""
    objective = objective_in(directory)
    return [] if objective is None else [name_of(type(one)) for one in objective.components()]


def fill_text(directory: Path, text: str, top: int) -> str:
    """What a model puts in place of each <mask> of a text (`Opened.fill_gaps`); UserError with the command that serves a model
    that fills none."""
    opened = open_model(directory)
    drafter = _drafter(opened)
    if not drafter.can_fill:
        left = "reads from left to right, so it " if opened.model.config.causal else ""
        raise UserError(f"{directory}: this model {left}fills no gaps; {_instead(directory, opened)}")
    return drafter.fill_gaps(text, top)


def generate_texts(
    directory: Path, text: str, ends: tuple[str, str] | None, count: int, sampling: Sampling, weights: str | None = None,
    say: Say = lambda _: None,
) -> Iterator[str]:  # fmt: skip
    """Write, a piece at a time: on from a text; or `count` texts of a variational autoencoder, a line each, from its prior
    where the text is empty, or between the latents of two texts (`ends`).

    Raises:
        UserError: The model does not write, or is given two ends and has no latent.
    """
    opened = open_engine(directory, weights, say)
    if not opened.model.config.latent_size:
        if ends is not None:
            raise UserError(
                f"{directory}: this model has no latent, so nothing lies between two texts: train one with `firth train vae`"
            )
        return opened.stream_text(text, sampling)
    if ends is not None:
        return iter(["\n".join(opened.between(*ends, count, sampling))])
    return opened.stream_text(text, sampling) if text else iter(["\n".join(opened.prior(count, sampling))])


class PromptTooLongError(UserError):
    """A line of a chat that leaves no room for an answer; the chat itself can go on."""


@dataclass
class Conversation:
    """A chat with a run: every turn sees the turns before it, as far as the context goes.

    Attributes:
        run: A run or model directory, or a GGUF file.
        sampling: How answers are written. The oldest exchanges (a user's turn and its answer) are dropped until
            `sampling.max_new` tokens fit.
        weights: What the weights are held in (`open_model`).
        say: Reports what is chosen where weights are "auto".
        system: A system turn before the first line; it is never dropped.
        capped: Lower `sampling.max_new` to half the context where it is more.
        messages: The system turn and the exchanges that are still in sight.
        dropped: How many exchanges have been dropped.
    """

    run: Path
    sampling: Sampling
    weights: str | None = None
    system: str = ""
    capped: bool = False
    say: Say = lambda _: None
    messages: list[chat.Message] = field(default_factory=list)
    dropped: int = 0

    def __post_init__(self) -> None:
        self.opened = open_engine(self.run, self.weights, self.say)
        context = self.opened.model.context
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
        """Answer a line, a piece at a time.

        Args:
            line: What the user writes.

        Raises:
            PromptTooLongError: The line alone leaves no room for `sampling.max_new` tokens. The conversation is as it was before.
            UserError: The tokenizer's chat template refuses the dialogue.
        """
        turn = {"role": "user", "content": line}
        kept, dropped = list(self.messages), 0
        first = sum(message["role"] == "system" for message in kept)
        while True:
            prompt, _ = chat.encode(self.opened.tokenizer, [*kept, turn], open=True)
            if self.opened.engine.room(prompt) >= self.sampling.max_new_tokens:
                break
            if len(kept) == first:
                raise PromptTooLongError(
                    f"this line makes a prompt of {len(prompt)} tokens, which leaves no room for an answer of "
                    f"{self.sampling.max_new_tokens} in a context of {self.opened.model.context}: shorten it, or ask for fewer "
                    "--max-new-tokens"
                )
            del kept[first : first + 2]
            dropped += 1
        pieces = []
        for piece in self.opened.engine.stream(prompt, self.sampling):
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
    say: Say = lambda _: None,
) -> str:
    """Measure a run on files, or on the text that it held out itself; readable lines, or one JSON object. say: told
    what was cut, mended or left out."""
    if limit is not None and not paths and task != "glue":
        raise UserError(
            f"--limit {limit} limits what is read of files, and without files the run's own last measurement is shown: "
            f"name files, or leave out --limit"
        )
    found = (
        measure(directory, list(paths), task=task, limit=limit, say=say)
        if paths or task == "glue"
        else held_out_measures(directory)
    )
    if as_json:
        return json.dumps(found)
    return "\n".join(f"{name:<24} {_readable(value)}" for name, value in found.items())


def held_out_measures(directory: Path) -> dict[str, Any]:
    """What a run's row on held-out text says of the step that was exported, which may not be the last; UserError where it
    held none out."""
    metrics = directory / "metrics.jsonl"
    rows = read_rows(metrics, {"split": str, "step": int}, "remove the line", cut=True)
    held = [row for row in rows if row["split"] == "valid"]
    if not held:
        raise UserError(
            f"{directory}: this run has no held-out measurements; name files: firth evaluate {directory} FILES"
        )
    exported = read_done(directory).get("exported_step", held[-1]["step"])  # a run that goes on, or of an older version
    row = next((row for row in held if row["step"] == exported), None)
    if row is None:
        raise UserError(
            f"{metrics}: the row of step {exported:,}, whose model was exported, is missing: name files to measure it again: "
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
