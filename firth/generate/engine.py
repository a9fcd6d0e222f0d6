"""Inference with a trained model: generation, scoring and multiple choice.

`Engine` runs one model with one tokenizer. `generate` prefills the prompts of a batch together, then decodes one token per
row and step with a KV cache. Once a quarter of the rows has finished, further prompts take their places, so that no prompt
waits for the longest answer of a batch (continuous batching). `stream` yields text as it is decoded. `score` is the sum of
log p(completion | prompt), and `choose` the most likely of several options. Evaluation and alignment use these methods.

    engine = Engine(model, tokenizer)
    [answer] = engine.generate([tokenizer.encode("To be, or not")], Sampling(temperature=0, max_new_tokens=8))
    answer.text          # " to be, that is the"
    answer.finish        # "length"

Decoders and encoder-decoders have the same interface: the prompt of an encoder-decoder goes to its encoder, and its decoder
starts with `ModelConfig.encoder.decoder_start_token` (T5: pad; BART: eos). A prefix language model
(`ModelConfig.attention.prefix_lm`) reads the whole prompt bidirectionally, as in training. A prompt longer than the context
(`model.max_positions`) is an error, and an answer that reaches the end of the context finishes there ("context"); there is
no sliding window. Ids that the tokenizer does not have are never generated or scored, however large the embedding table is
(`LM.restrict_vocab`).

`StreamingOutput` is the text of a row during decoding, and `Completion` the finished one. A character can span several
tokens, so the text of the first tokens is not always a prefix of the whole text. A stop string can start in one token and
end in another, so the last characters may turn out not to be part of the answer. `StreamingOutput.final_text` is the part
that later tokens cannot change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from firth.generate.decoding_batch import DecodingBatch, inference_mode, rectangle
from firth.generate.quantized import quantize
from firth.generate.sampling import Sampling
from firth.generate.scoring import ScoredPair, score_pairs
from firth.model.model import LM
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

ADMISSION = 4
"""Waiting prompts are admitted once one in so many rows is free: each admission copies the keys and values of all rows."""

Finish = Literal["stop", "length", "context"]
REPLACEMENT = "\ufffd"
"""The replacement character, which a tokenizer decodes incomplete UTF-8 to."""


@dataclass(frozen=True)
class Completion:
    """Generated tokens and text.

    Args:
        tokens: (n,) int32, including the stop token.
        logprobs: (n,) float32, the log-probability of each token under the model (temperature 1, no filter).
        text: The text, without the stop string.
        finish: "stop" (a stop token or string), "length" (max_new_tokens) or "context" (the context is full).
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    text: str
    finish: Finish


class IncrementalDecoder:
    """Decodes a continuation together with the end of its prompt, since tokenizers trim the first space of a text.

    A character that is incomplete at the end of the prompt belongs to the continuation, which completes it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray) -> None:
        self.tokenizer = tokenizer
        self.tokens = [int(t) for t in prompt[-8:]]
        self.skip = len(tokenizer.decode(self.tokens).rstrip(REPLACEMENT)) if self.tokens else 0

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens add to the prompt."""
        return self.tokenizer.decode([*self.tokens, *tokens])[self.skip :]


class StreamingOutput:
    """Tokens and text of one row during decoding, and whether it has finished.

    Args:
        tokenizer: Decodes the tokens.
        prompt: (n,) token ids that the answer continues.
        sampling: Holds the stop strings and the most new tokens.
        stops: Token ids that end the answer.
        room: Most tokens that fit into the context.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, sampling: Sampling, stops: frozenset[int], room: int):
        self.stop, self.stops, self.room = sampling.stop_strings, stops, room
        self.limit = min(room, sampling.max_new_tokens)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Finish | None = None
        self.decoder = IncrementalDecoder(tokenizer, prompt)
        self.cut: int | None = None

    def append(self, token: int, logprob: float) -> None:
        """Add a token and update `finish`."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.stop:
            text = self._decoded()
            matches = [at for at in (text.find(s) for s in self.stop) if at >= 0]
            self.cut = min(matches) if matches else None
        if token in self.stops or self.cut is not None:
            self.finish = "stop"
        elif len(self.tokens) == self.limit:
            self.finish = "context" if self.limit == self.room else "length"

    def _decoded(self) -> str:
        return self.decoder.text(self.tokens)

    @property
    def text(self) -> str:
        """The text so far, up to a stop string."""
        return self._decoded()[: self.cut]

    @property
    def final_text(self) -> str:
        """The text that later tokens cannot change: without an incomplete character or the start of a stop string."""
        text = self.text
        if self.finish is not None:
            return text
        text = text.rstrip(REPLACEMENT)
        overlap = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return text[: len(text) - overlap]

    def done(self) -> Completion:
        """Return the finished answer."""
        assert self.finish is not None
        tokens, logprobs = np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32)
        return Completion(tokens, logprobs, self.text, self.finish)


def _append(answers: Sequence[StreamingOutput], rows: DecodingBatch) -> None:
    """Decode one token of every row and append it to the answers that have not finished."""
    for answer, token, logprob in zip(answers, *rows.step(), strict=True):
        if answer.finish is None:
            answer.append(token, logprob)


class Engine:
    """Generation and scoring with one model and one tokenizer.

    Args:
        model: A model with an LM head.
        tokenizer: Its tokenizer.
        stops: Token ids that end an answer; by default the tokenizer's.
        batch_size: Most rows in a batch.
        weights: Weight format, "fp32", "bf16", "int8" or "int8-dynamic" (`firth.generate.quantized`); by default unchanged.
    """

    def __init__(
        self, model: LM, tokenizer: Tokenizer, stops: Sequence[int] | None = None, batch_size: int = 64,
        weights: str | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.batch_size = (
            model if weights is None else quantize(model, weights),
            tokenizer,
            batch_size,
        )
        vocab = tokenizer.vocab
        self.model.restrict_vocab(vocab)
        self.stops = frozenset(int(i) for i in (chat.stops(tokenizer) if stops is None else stops))
        self.vocab = vocab.with_decoder_start(model.config.encoder.decoder_start_token)
        self.start = self.vocab.start if model.config.encoder.num_layers else None
        self.device = model.tokens.weight.device

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Continue each prompt. Equal prompts of a batch are read once: several samples of one prompt share its prefill.

        Args:
            prompts: Token ids (n,) each.
            sampling: How tokens are drawn.
            progress: Called with the number of finished prompts after each batch.
            seeds: Seed of each prompt; by default `sampling.seed + i` for prompt i.

        Returns:
            One completion per prompt, in order.

        Raises:
            UserError: A prompt is empty or longer than the model's context.
        """
        chosen = [sampling.seed + i if seeds is None else seeds[i] for i in range(len(prompts))]
        return [answer.done() for answer in self._decode(prompts, sampling, chosen, progress=progress)]

    def posterior(self, texts: Sequence[np.ndarray]) -> Tensor:
        """Return the posterior means (texts, units) of a variational autoencoder. Each text ends with its stop token."""
        source = rectangle(texts, self.device, causal=False)
        with inference_mode(self.model):
            return self.model.posterior({f"source_{name}": field for name, field in source.items()})[0]

    def decode(self, latents: Tensor, sampling: Sampling) -> list[Completion]:
        """Decode latents (texts, units) of a variational autoencoder."""
        prompts = [np.zeros(1, np.int64)] * len(latents)
        seeds = [sampling.seed + i for i in range(len(latents))]
        return [answer.done() for answer in self._decode(prompts, sampling, seeds, latents)]

    def stream(self, prompt: np.ndarray, sampling: Sampling) -> Iterator[str]:
        """Continue one prompt and yield the text in pieces, which join to the text of `generate`."""
        [answer] = self._answers([prompt], sampling)
        with inference_mode(self.model):
            rows = DecodingBatch(self.model, [prompt], self.start, sampling, [sampling.seed])
        yielded = 0
        while answer.finish is None:
            with inference_mode(self.model):
                [token], [logprob] = rows.step()
            answer.append(token, logprob)
            text = answer.final_text
            if len(text) > yielded:
                yield text[yielded:]
                yielded = len(text)

    def room(self, prompt: np.ndarray) -> int:
        """Return the most tokens that can be generated after a prompt (n,); 0 if it is longer than the context.

        The answer of an encoder-decoder can fill the whole context.
        """
        context = self.model.context
        if len(prompt) > context:
            return 0
        # The last generated token is never an input, so there is room for one more than the context leaves.
        return context - (len(prompt) if self.start is None else 1) + 1

    def _answers(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> list[StreamingOutput]:
        answers = []
        for i, prompt in enumerate(prompts):
            self._check_length(f"prompt {i}", len(prompt), len(prompt))
            context = prompt if self.start is None else prompt[:0]
            answers.append(StreamingOutput(self.tokenizer, context, sampling, self.stops, self.room(prompt)))
        return answers

    def _decode(
        self, prompts: Sequence[np.ndarray], sampling: Sampling, seeds: Sequence[int], latents: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[StreamingOutput]:  # fmt: skip
        answers = self._answers(prompts, sampling)
        # Prompts of similar length are prefilled together, for less padding; a row does not depend on the others.
        waiting = (
            sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if latents is None else [*range(len(prompts))]
        )
        size = self.batch_size if latents is None else len(prompts)
        rows: DecodingBatch | None = None
        in_batch: list[StreamingOutput] = []  # the answer of each row of the batch, finished or not
        finished = 0
        with inference_mode(self.model):
            while waiting or in_batch:
                unfinished = [i for i, answer in enumerate(in_batch) if answer.finish is None]
                if progress is not None and len(unfinished) < len(in_batch):
                    progress(finished + len(in_batch) - len(unfinished))
                free = size - len(unfinished)
                admits = bool(waiting) and free * ADMISSION >= size
                if admits or 2 * len(unfinished) <= len(in_batch):
                    finished += len(in_batch) - len(unfinished)
                    in_batch = [in_batch[i] for i in unfinished]
                    rows = rows if unfinished else None
                    if rows is not None and not admits:
                        rows.keep(unfinished)
                if admits:
                    admitted, waiting = waiting[:free], waiting[free:]
                    new = [answers[i] for i in admitted]
                    batch = DecodingBatch(
                        self.model, [prompts[i] for i in admitted], self.start, sampling, [seeds[i] for i in admitted], latents
                    )  # fmt: skip
                    _append(new, batch)
                    if rows is None:
                        rows = batch
                    else:
                        rows.join(unfinished, batch)
                    in_batch += new
                elif rows is not None:
                    _append(in_batch, rows)
        return answers

    def score(self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> list[float]:
        """Return log p(completion | prompt) of each pair, summed over the completion's tokens, in nats.

        A masked model gives the pseudo-log-likelihood (`firth.generate.scoring`).
        """
        pairs = [ScoredPair(p, c) for p, c in zip(prompts, completions, strict=True)]
        scores = dict(score_pairs(self.model, self.vocab, pairs))
        return [scores[i].total for i in range(len(pairs))]

    def options(self, prompt: np.ndarray, options: Sequence[np.ndarray]) -> list[float]:
        """Return log p(option | prompt) of each option; the prompt is read once."""
        return self.score([prompt] * len(options), options)

    def choose(self, prompt: np.ndarray, options: Sequence[np.ndarray]) -> int:
        """Return the index of the most likely option; of equals, the first."""
        return int(np.argmax(self.options(prompt, options)))

    def _check_length(self, what: str, prompt: int, length: int) -> None:
        """Raise a UserError if the prompt is empty or the input of `length` tokens is longer than the context."""
        context = self.model.context
        if not prompt:
            raise UserError(f"{what} has an empty prompt: give at least one token")
        if length > context:
            raise UserError(
                f"{what} has {length} tokens and this model reads at most {context}: shorten it, "
                "or use a model with a longer model.max_positions"
            )
