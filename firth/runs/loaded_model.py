"""A trained model with its tokenizer: what the commands and the Python API generate, score, fill, embed and predict with."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firth.evaluate.heads import head_of
from firth.evaluate.predict import predict_slices, predict_with, prediction_task
from firth.evaluate.task import EvaluatedModel, load_evaluated_model
from firth.generate import embeddings
from firth.generate.attention_maps import AttentionMap, Text, attention_maps
from firth.generate.engine import Engine
from firth.generate.fill import (
    Candidate,
    InfillPrompt,
    mask_slices,
    rewrite_slices,
    span_slices,
    split_gaps,
    two_way_slices,
)
from firth.generate.sampling import Sampling
from firth.generate.scoring import scoring_mode
from firth.generate.slices import Slices, finish
from firth.io.json_files import read_json
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.objectives import OBJECTIVES, find
from firth.objectives.objective import Objective, reads_dialogues
from firth.objectives.seq2seq import Denoising, SpanCorruption
from firth.pretrained.load_save import metadata_of
from firth.runs.evaluation import measure_with
from firth.runs.recipe import load
from firth.tokenizer import chat
from firth.tokenizer.inspection import readable
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.device import choose_precision
from firth.types import LOGGER, UserError

Rows = Sequence[Mapping[str, Any]]


class Model:
    """A model with its tokenizer.

    Attributes:
        evaluated: The model with its directory, as it is evaluated.
        objective: The objective that it was trained with; None if unknown.
        tokenizer: The tokenizer.
        config: The model config.
    """

    def __init__(
        self, evaluated: EvaluatedModel, objective: Objective | None = None, weights: str | None = None
    ) -> None:
        self.evaluated, self.objective, self._weights = evaluated, objective, weights
        self.tokenizer = evaluated.tokenizer
        self.config = evaluated.model.config

    @staticmethod
    def of(model: LM, tokenizer: Tokenizer, objective: Objective | None = None) -> Model:
        """Return a model in memory, which has no directory."""
        return Model(EvaluatedModel(model, tokenizer, Path(), Path()), objective)

    @cached_property
    def engine(self) -> Engine:
        """The engine that generates with the model."""
        return Engine(self.evaluated.model, self.tokenizer, weights=self._weights)

    @property
    def model(self) -> LM:
        """The network, with the weights that it generates with."""
        return self.engine.model

    def generate(self, prompts: Sequence[str], **sampling: Any) -> list[str]:
        """Return the continuation of each prompt.

        Args:
            prompts: The texts.
            **sampling: Fields of `firth.generate.sampling.Sampling`: max_new_tokens, temperature, top_k, top_p, seed, ...

        Raises:
            UserError: The model has no LM head, or a prompt is longer than its context.
        """
        return self.require_lm_head().continue_text(_texts(prompts), Sampling(**sampling))

    def chat(self, conversations: Sequence[Sequence[chat.Message]], **sampling: Any) -> list[str]:
        """Return the next answer of each conversation, as `firth chat` does.

        Args:
            conversations: Lists of messages, {"role": "user", "content": "..."}, rendered with the model's chat template.
            **sampling: As in `generate`.

        Raises:
            UserError: The model has no LM head or chat template, or a conversation is longer than its context.
        """
        engine = self.require_lm_head().engine
        prompts = [chat.encode(self.tokenizer, messages, open=True)[0] for messages in conversations]
        return [completion.text for completion in engine.generate(prompts, Sampling(**sampling))]

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Return log p(completion | prompt) of each pair in nats, summed over the completion's tokens."""
        loaded = self.require_lm_head()
        read = [encode_prompt(self.tokenizer, text, loaded.model) for text in _texts(prompts)]
        return loaded.engine.score(read, [self.tokenizer.encode(text) for text in _texts(completions)])

    def choose(self, prompt: str, options: Sequence[str]) -> int:
        """Return the index of the option with the highest log-probability after the prompt."""
        loaded = self.require_lm_head()
        read = encode_prompt(self.tokenizer, prompt, loaded.model)
        return loaded.engine.choose(read, [self.tokenizer.encode(text) for text in _texts(options)])

    def fill(self, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
        """Return the most likely fillings and their probabilities for each <mask> in a text, best first.

        Raises:
            UserError: The text has no <mask>, or the model cannot fill masks one by one.
        """
        found = self.with_lm_head().candidates(text, top)
        if isinstance(found, str):
            raise UserError("this model rewrites the whole text and does not fill single masks: use generate")
        return [[(one.piece, one.probability) for one in gap] for gap in found]

    def embed(self, texts: Sequence[str], *, normalize: bool = False) -> np.ndarray:
        """Return one embedding per text: (n, hidden_size), float32. Longer texts are truncated to the trained length."""
        length = trained_length(self.evaluated)
        return embeddings.embed(self.evaluated.model, self.tokenizer, _texts(texts), length=length, unit=normalize)[0]

    def attention(self, text: str, answer: str | None = None) -> list[AttentionMap]:
        """Return the attention weights of a text, by layer and head.

        Args:
            text: The text; of an encoder-decoder that of the encoder.
            answer: The text of the decoder of an encoder-decoder; by default what the model writes, at most MAX_ANSWER_TOKENS.

        Raises:
            UserError: The model has no attention, or the text is too long.
        """
        return finish(self.attention_slices(text, answer))

    def attention_slices(self, text: str, answer: str | None = None) -> Slices[list[AttentionMap]]:
        """Return the attention weights of a text as `attention` does; each token of a written answer is a slice."""
        encoders = self.config.encoder.num_layers > 0
        reads = self._shown(
            self._encode_both_ways(text) if self._reads_both_ways else encode_prompt(self.tokenizer, text, self.model)
        )
        if not encoders:
            return attention_maps(self.model, reads)
        if answer is None and self.model.has_lm_head:
            greedy = Sampling(temperature=0, max_new_tokens=MAX_ANSWER_TOKENS)
            [written] = yield from self.engine.generate_slices([reads.tokens], greedy)
            target = written.tokens
        else:
            target = self.tokenizer.encode(answer or "")
        return attention_maps(self.model, self._shown(np.append([self.engine.vocab.start], target)), reads)

    @property
    def _reads_both_ways(self) -> bool:
        """Whether the model is an encoder, whose texts have [CLS] and [SEP] if the tokenizer has them."""
        config = self.config
        return not (config.causal or config.attention.prefix_lm or config.encoder.num_layers)

    def _encode_both_ways(self, text: str) -> np.ndarray:
        """Return the token ids of a text as an encoder reads it."""
        vocab, ids = self.tokenizer.vocab, self.tokenizer.encode(text)
        return vocab.add_special_tokens(ids) if {"cls", "sep"} <= vocab.roles.keys() else np.append(ids, vocab.eos)

    def _shown(self, ids: np.ndarray) -> Text:
        """Return token ids with what is shown of each."""
        byte_level = self.tokenizer.is_byte_level
        return Text(ids, [readable(self.tokenizer.token(int(i)), byte_level) for i in ids])

    def predict(self, rows: Rows | Sequence[str]) -> list[dict[str, Any]]:
        """Return one row of predictions per record, from the model's task head: the label and its probability, ...

        Args:
            rows: Records with the fields of the training data, or texts.

        Raises:
            UserError: The model has no task head, or a record does not fit the task.
        """
        return list(predict_with(self.evaluated, "-", io.BytesIO(self._lines(rows)), form="jsonl"))

    def predict_slices(self, rows: Rows | Sequence[str], max_tokens: int) -> Slices[list[dict[str, Any]]]:
        """Return predictions of a task head as `predict` does, in slices of at most `max_tokens` tokens or one row of a record."""
        return predict_slices(self.evaluated, self._lines(rows), max_tokens)

    def _lines(self, rows: Rows | Sequence[str]) -> bytes:
        """Return records as JSON lines; a text becomes a record."""
        schema = prediction_task(self.evaluated).input_schema
        assert schema is not None
        record = schema(self.evaluated).line
        lines = [json.dumps(record(row) if isinstance(row, str) else row, ensure_ascii=False) for row in rows]
        return "".join(f"{line}\n" for line in lines).encode()

    def evaluate(self, paths: Sequence[str], *, task: str | None = None, limit: int | None = None) -> dict[str, Any]:
        """Return metrics by name on files, as `firth evaluate` does.

        Args:
            paths: Text or records.
            task: A task of `firth evaluate`; None for the model's own.
            limit: The most tokens (text) or records.
        """
        return measure_with(self.evaluated, _texts(paths), task=task, limit=limit)

    def stream_text(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Yield the continuation of a text piece by piece. A decoder's prompt starts with the [bos] token."""
        return self.engine.stream(encode_prompt(self.tokenizer, text, self.model), sampling)

    def continue_text(self, texts: Sequence[str], sampling: Sampling) -> list[str]:
        """Return the continuations of several texts."""
        prompts = [encode_prompt(self.tokenizer, text, self.model) for text in texts]
        return [c.text for c in self.engine.generate(prompts, sampling)]

    def require_lm_head(self) -> Model:
        """Return this model; UserError with the command that suits it if it has no LM head."""
        if not self.evaluated.model.has_lm_head:
            raise UserError(
                f"{self.evaluated.directory}: this model has no LM head, so it cannot generate text; {self.suitable_command}"
            )
        return self

    def with_lm_head(self) -> Model:
        """Return the model with a trained LM head: the generator of ELECTRA, otherwise the model itself."""
        model = self.model.language_model
        return self if model is self.model else Model.of(model, self.tokenizer, self.objective)

    @property
    def suitable_command(self) -> str:
        """The command that suits the model."""
        model, directory = self.model, self.evaluated.directory
        if head_of(dict(model.heads)):
            return f"use `firth predict {directory} FILE`"
        if "reward" in model.heads:
            return f"use `firth evaluate {directory} FILE`"
        if self.with_lm_head().can_fill:
            return f"use `firth fill {directory} 'a {MASK} text'`"
        if model.has_lm_head:
            return f"use `firth generate {directory} 'a text'`"
        return (
            f"use `firth vectors {directory} WORD`"
            if not model.config.num_layers
            else f"use `firth embed {directory} FILE`"
        )

    @property
    def next_command(self) -> tuple[str, str, str] | None:
        """The command to run next with the model: its name, what it does, and an argument; None if no command suits it."""
        model = self.model
        if head_of(dict(model.heads)):
            return "predict", "Predict labels for your own records", "my-records.jsonl"
        if self.objective is not None and reads_dialogues(self.objective) and model.has_lm_head:
            return "chat", "Chat with the model", ""
        if self.with_lm_head().can_fill:
            return "fill", "Fill a masked position", f'"To be, or not to {MASK}."'
        return ("generate", "Generate text", '"Once"') if model.has_lm_head else None

    def supports(self, text: str) -> bool:
        """Return whether the model can process a sample prompt: masks need infilling, <to> and <prior> need a latent."""
        if MASK in text:
            return self.can_fill
        return self.model.config.encoder.latent_size > 0 or not (TO in text or PRIOR in text)

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
        return self.nearest(text, 8) if embeddings.ids_of(self.tokenizer, text) else "(no word of this text)"

    def nearest(self, word: str, top: int) -> str:
        """Return the words with the nearest vectors to that of a word, in one line."""
        found = embeddings.nearest(self.model, self.tokenizer, word, top)
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
        found = self.candidates(text, top)
        if isinstance(found, str):
            return found
        byte_level = self.fills_tokens and self.tokenizer.is_byte_level
        return "\n".join(
            "   ".join(f"{readable(one.piece, byte_level) or '(nothing)'} {one.probability:.2f}" for one in gap)
            or "(the model wrote nothing for this mask)"
            for gap in found
        )

    @property
    def fills_tokens(self) -> bool:
        """Whether a candidate for a <mask> is one token; else it is a text."""
        return not generates_left_to_right(self.config) or self.config.rnn.separate_directions

    def candidates(self, text: str, top: int) -> list[list[Candidate]] | str:
        """Return the candidates for each <mask>, or the whole text of a model that rewrites it (BART).

        Raises:
            UserError: The text has no <mask>, or the model cannot fill masks.
        """
        return finish(self.candidate_slices(text, top))

    def candidate_slices(self, text: str, top: int) -> Slices[list[list[Candidate]] | str]:
        """Return candidates as `candidates` does, in slices of a forward pass."""
        roles, config = self.tokenizer.vocab.roles, self.config
        own = self.tokenizer.token(roles["mask"]) if "mask" in roles else MASK
        text = text.replace(own, MASK)
        if MASK not in text:
            raise UserError(f"there is nothing to fill: write {MASK} where a token is missing")
        if not self.can_fill:
            raise UserError("this model cannot fill masks")
        if not generates_left_to_right(config) and not config.rnn.separate_directions:
            return (yield from mask_slices(self.model, self.tokenizer, text.replace(MASK, own), top))
        if config.rnn.separate_directions:
            return (yield from two_way_slices(self.engine, split_gaps(self.tokenizer, text, MASK), top))
        shown = self._show_gaps(split_gaps(self.tokenizer, text, MASK))
        assert shown is not None
        if len(shown.marks):
            return (yield from span_slices(self.engine, shown, top))
        answer = yield from rewrite_slices(self.engine, shown)
        return answer.text

    def _show_gaps(self, pieces: Sequence[np.ndarray]) -> InfillPrompt | None:
        """Return the prompt with which a generative model fills masks; None if it cannot.

        Without a known objective, a model that starts its answers as BART does and has a mask token is taken for BART; otherwise
        the tokenizer decides: T5's sentinels, or BART's mask.
        """
        vocab = self.tokenizer.vocab
        objective = self.objective or self._likely_objective()
        hidden = None if objective is None else objective.hide(pieces, vocab)
        return None if hidden is None else InfillPrompt.of(hidden["tokens"], vocab)

    def _likely_objective(self) -> Objective | None:
        """Return the objective that an encoder-decoder of unknown origin was trained with; None if there is no sign of one."""
        vocab = self.tokenizer.vocab
        if not self.config.encoder.num_layers or self.config.encoder.latent_size:
            return None
        if "mask" in vocab.roles and (self.config.encoder.decoder_start_token == "eos" or len(vocab.sentinels) < 2):
            return Denoising()
        return SpanCorruption() if len(vocab.sentinels) > 1 else None

    def interpolate(self, first: str, second: str, count: int, sampling: Sampling) -> list[str]:
        """Return `count` texts decoded from a linear interpolation of the latents of two texts, endpoints included."""
        ends = [encode_prompt(self.tokenizer, end.strip(), self.model) for end in (first, second)]
        start, stop = self.engine.posterior(ends)
        share = torch.linspace(0, 1, count, device=start.device)[:, None]
        return [written.text for written in self.engine.decode(start * (1 - share) + stop * share, sampling)]

    def sample_prior(self, count: int, sampling: Sampling) -> list[str]:
        """Return `count` texts whose latents are sampled from the prior."""
        noise = np.random.default_rng(sampling.seed).standard_normal(
            (count, self.model.config.encoder.latent_size), np.float32
        )
        latents = torch.from_numpy(noise).to(self.engine.device)
        return [written.text for written in self.engine.decode(latents, sampling)]


NOTHING = np.zeros(0, np.int32)
MAX_ANSWER_TOKENS = 64
"""Most tokens that an encoder-decoder writes where attention is shown."""
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
    if model.config.encoder.num_layers:
        return np.append(ids, roles["eos"]).astype(np.int32) if "eos" in roles else ids
    add_bos = "bos" in roles and tokenizer.bos is not False and not (model.config.attention.prefix_lm and len(ids))
    return np.concatenate(([roles["bos"]], ids)).astype(np.int32) if add_bos else ids


def generates_left_to_right(config: ModelConfig) -> bool:
    """Return whether a model can continue a text from left to right."""
    return config.encoder.latent_size > 0 or scoring_mode(config) != "masked"


def open_model(directory: Path, weights: str | None = None) -> Model:
    """Load a model of any kind, with the objective of its run.

    Args:
        directory: A run or model directory, or a GGUF file.
        weights: Dtype of the weights in memory (`Engine`); None keeps the stored one; "auto" takes bf16 for fp32 weights where
            this machine also trains in bf16.
    """
    evaluated = load_evaluated_model(directory)
    if weights == "auto":
        weights = fast_weights(evaluated.model)
    return Model(evaluated, objective_in(directory), weights)


def fast_weights(model: LM) -> str | None:
    """Return "bf16", and log it once, for a model with fp32 weights where this machine also trains in bf16; else None."""
    stored = model.tokens.weight
    if stored.dtype != torch.float32 or choose_precision("auto", stored.device) != "bf16":
        return None
    _warn_of_bf16()
    return "bf16"


@cache
def _warn_of_bf16() -> None:
    LOGGER.warning("weights are held in bf16, which is faster here: use --weights fp32 for full precision")


def trained_length(evaluated: EvaluatedModel) -> int:
    """Return the most tokens that a model was trained on: from sentence-transformers' config, or else its context."""
    settings = read_json(evaluated.model_directory / "sentence_bert_config.json")
    return int(settings.get("max_seq_length") or evaluated.context)


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


def _texts(texts: Sequence[str]) -> list[str]:
    """Return a list of texts; UserError for a single string, which would be read letter by letter."""
    if isinstance(texts, str):
        raise UserError(f"a list of texts is needed, not one text: [{texts[:20]!r}]")
    return list(texts)
