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
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

from firth.generate.decoding_batch import inference_mode, rectangle
from firth.generate.output import Completion, StreamingOutput
from firth.generate.quantized import quantize
from firth.generate.sampling import Sampling
from firth.generate.scheduler import GenerationRequest, Scheduler
from firth.generate.scoring import ScoredPair, score_pairs
from firth.generate.slices import Slices, finish
from firth.model.model import LM
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

ADMISSION = 4
"""Waiting prompts are admitted once one in so many rows is free: reading prompts together is faster."""
ANY_LENGTH = sys.maxsize
"""Prompts are read at once, whatever their length."""


class Engine:
    """Generation and scoring with one model and one tokenizer.

    Args:
        model: A model with an LM head.
        tokenizer: Its tokenizer.
        stops: Token ids that end an answer; by default the tokenizer's.
        batch_size: Most rows in a batch.
        weights: Weight format, "fp32", "bf16" or "int8" (`firth.generate.quantized`); by default unchanged.
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
        return finish(self.generate_slices(prompts, sampling, progress, seeds))

    def generate_slices(
        self,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Slices[list[Completion]]:
        """Continue each prompt as `generate` does, and yield after each step."""
        chosen = [sampling.seed + i if seeds is None else seeds[i] for i in range(len(prompts))]
        for i, prompt in enumerate(prompts):
            self._check_length(f"prompt {i}", len(prompt), len(prompt))
        requests = [
            GenerationRequest(prompt, sampling, seed, stream=False)
            for prompt, seed in zip(prompts, chosen, strict=True)
        ]
        # Prompts of similar length are read together, for less padding.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        answers = yield from self._run([requests[i] for i in order], self.batch_size, progress)
        return [answers[place] for place in np.argsort(order)]

    def posterior(self, texts: Sequence[np.ndarray]) -> Tensor:
        """Return the posterior means (texts, units) of a variational autoencoder. Each text ends with its stop token."""
        source = rectangle(texts, self.device, causal=False)
        with inference_mode(self.model):
            return self.model.posterior({f"source_{name}": field for name, field in source.items()})[0]

    def decode(self, latents: Tensor, sampling: Sampling) -> list[Completion]:
        """Decode latents (texts, units) of a variational autoencoder."""
        start = np.zeros(1, np.int64)
        requests = [
            GenerationRequest(start, sampling, sampling.seed + i, latent=latent, stream=False)
            for i, latent in enumerate(latents)
        ]
        return finish(self._run(requests, len(requests)))

    def stream(self, prompt: np.ndarray, sampling: Sampling) -> Iterator[str]:
        """Continue one prompt and yield the text in pieces, which join to the text of `generate`."""
        scheduler = Scheduler(self, 1, ANY_LENGTH, 0)
        scheduler.submit(GenerationRequest(prompt, sampling, sampling.seed))
        while scheduler.busy:
            yield from (update.text for update in scheduler.step() if update.text)

    def room(self, prompt: np.ndarray) -> int:
        """Return the most tokens that can be generated after a prompt (n,); 0 if it is longer than the context.

        The answer of an encoder-decoder can fill the whole context.
        """
        context = self.model.context
        if len(prompt) > context:
            return 0
        # The last generated token is never an input, so there is room for one more than the context leaves.
        return context - (len(prompt) if self.start is None else 1) + 1

    def output(self, prompt: np.ndarray, sampling: Sampling) -> StreamingOutput:
        """Return the empty answer to a prompt (n,).

        Raises:
            UserError: The prompt is empty or longer than the model's context.
        """
        self._check_length("the prompt", len(prompt), len(prompt))
        context = prompt if self.start is None else prompt[:0]
        return StreamingOutput(self.tokenizer, context, sampling, self.stops, self.room(prompt))

    def _run(
        self, requests: Sequence[GenerationRequest], max_rows: int, progress: Callable[[int], None] | None = None
    ) -> Slices[list[Completion]]:
        """Return the answers to all requests, in order; yield after each step."""
        scheduler = Scheduler(self, max_rows, ANY_LENGTH, 0, min_free_rows=-(-max_rows // ADMISSION))
        place = {scheduler.submit(request): i for i, request in enumerate(requests)}
        answers: dict[int, Completion] = {}
        with inference_mode(self.model):
            while scheduler.busy:
                finished = len(answers)
                for update in scheduler.step():
                    if update.completion is not None:
                        answers[place[update.id]] = update.completion
                if progress is not None and len(answers) > finished:
                    progress(len(answers))
                yield
        return [answers[i] for i in range(len(requests))]

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
