"""Using a trained model: write a continuation, score one, choose among several, fill a gap.

`Engine` runs one model with one tokenizer. `generate` prefills the prompts of a batch together, then writes one token
per row and step against the key-value cache; a row that has finished is dropped as soon as half of the rows have.
`score` is the sum of log p(completion | prompt), `choose` the likeliest of several options, `fill` a masked model's
candidates for each mask. With `generate` and `stream`, these are the verbs that evaluation and alignment use.

    engine = Engine(model, tokenizer)
    [answer] = engine.generate([tokenizer.encode("To be, or not")], Sampling(temperature=0, max_new=8))
    answer.text          # " to be, that is the"
    answer.finish        # "length"

Decoders and encoder-decoders write alike: the prompt of an encoder-decoder goes to its encoder, and its decoder
begins at the token that `Shape.decoder_start` says (T5: pad; BART: the stop token). A model that was trained as a prefix
language model (`Shape.prefix_lm`) reads the whole prompt both ways, here as there. What a model can read is
`model.max_positions`: a longer prompt is refused, and an answer that reaches the end of the context finishes there
("context"). Nothing slides out of sight unasked. Ids that the tokenizer does not have are never written nor scored, however
wide the model's table (`LM.restrict`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from firth.generate.decoding import DecodingBatch, attention_pattern_of, rectangle, stacked
from firth.generate.fill_mask import Candidate, fill
from firth.generate.quantized import quantize
from firth.generate.sampling import Sampling
from firth.generate.streaming import Completion, StreamingOutput
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import IGNORE, NEVER, UserError


class Engine:
    """One model, one tokenizer, and the verbs.

    stops: ids that end an answer; default the tokenizer's. rows: most rows in one batch. weights: what the weights are
    held in, "fp32", "bf16", "int8" or "int8-dynamic" (`firth.generate.quantized`); default as they are.
    """

    def __init__(
        self, model: LM, tokenizer: Tokenizer, stops: Sequence[int] | None = None, batch_size: int = 64,
        weights: str | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.rows = (
            model if weights is None else quantize(model, weights),
            tokenizer,
            batch_size,
        )
        vocab = tokenizer.vocab
        self.model.restrict_vocab(vocab)
        self.stops = frozenset(int(i) for i in (chat.stops(tokenizer) if stops is None else stops))
        self.start = (
            vocab.with_decoder_start(model.config.decoder_start_token).start
            if model.config.num_encoder_layers
            else None
        )
        self.device = model.tokens.weight.device

    def generate(
        self, prompts: Sequence[np.ndarray], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """Continue each prompt. prompts: token ids (n,) each; progress is told how many prompts are done.

        Raises UserError for an empty prompt or one longer than the model's context.
        """
        done: list[Completion | None] = [None] * len(prompts)
        # Rows of like length together: less padding. A row draws from seed + its own index, wherever it is computed.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for first in range(0, len(order), self.rows):
            index = order[first : first + self.rows]
            seeds = [sampling.seed + i for i in index]
            for i, answer in zip(index, self._write([prompts[i] for i in index], sampling, seeds), strict=True):
                done[i] = answer.done()
            if progress is not None:
                progress(first + len(index))
        return [answer for answer in done if answer is not None]

    def posterior(self, texts: Sequence[np.ndarray]) -> Tensor:
        """Where a variational autoencoder puts texts: (texts, units), the means. Each text ends with its stop token."""
        source = rectangle(texts, self.device, causal=False)
        with attention_pattern_of(self.model):
            return self.model.posterior({f"source_{name}": field for name, field in source.items()})[0]

    def decode(self, latents: Tensor, sampling: Sampling) -> list[Completion]:
        """The texts that a variational autoencoder's decoder writes for latents (texts, units)."""
        nothing = [np.zeros(1, np.int64)] * len(latents)
        seeds = [sampling.seed + i for i in range(len(latents))]
        return [answer.done() for answer in self._write(nothing, sampling, seeds, latents)]

    def stream(self, prompt: np.ndarray, sampling: Sampling) -> Iterator[str]:
        """Continue one prompt, a piece of text at a time; joined, the pieces are the text of `generate`."""
        [answer] = self._answers([prompt], sampling)
        with attention_pattern_of(self.model):
            rows = DecodingBatch(self.model, [prompt], self.start, sampling, [sampling.seed])
        shown = 0
        while answer.finish is None:
            with attention_pattern_of(self.model):
                [token], [logprob] = rows.step()
            answer.append(token, logprob)
            settled = answer.final_text
            if len(settled) > shown:
                yield settled[shown:]
                shown = len(settled)

    def room(self, prompt: np.ndarray) -> int:
        """Return the most tokens that can be written after a prompt (n,); 0 where it is longer than the context.

        An encoder-decoder's answer has the whole context to itself.
        """
        context = self.model.context
        if len(prompt) > context:
            return 0
        # The last token written is never read, so there is room for one more than the context leaves.
        return context - (len(prompt) if self.start is None else 1) + 1

    def _answers(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> list[StreamingOutput]:
        answers = []
        for i, prompt in enumerate(prompts):
            self._fits(f"prompt {i}", len(prompt), len(prompt))
            shown = prompt if self.start is None else prompt[:0]
            answers.append(StreamingOutput(self.tokenizer, shown, sampling, self.stops, self.room(prompt)))
        return answers

    def _write(
        self, prompts: Sequence[np.ndarray], sampling: Sampling, seeds: Sequence[int], latents: Tensor | None = None
    ) -> list[StreamingOutput]:
        answers = self._answers(prompts, sampling)
        with attention_pattern_of(self.model):
            rows = DecodingBatch(self.model, prompts, self.start, sampling, seeds, latents)
            there = answers  # the answer of each row of the batch, finished or not
            while True:
                for answer, token, logprob in zip(there, *rows.step(), strict=True):
                    if answer.finish is None:
                        answer.append(token, logprob)
                open_rows = [i for i, answer in enumerate(there) if answer.finish is None]
                if not open_rows:
                    return answers
                if 2 * len(open_rows) <= len(there):
                    rows.keep(open_rows)
                    there = [there[i] for i in open_rows]

    def score(self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> list[float]:
        """log p(completion | prompt) of each pair, summed over the completion's tokens, in nats."""
        pairs = [(np.asarray(p), np.asarray(c)) for p, c in zip(prompts, completions, strict=True)]
        for i, (p, c) in enumerate(pairs):
            self._fits(f"pair {i}", len(p), max(len(p), len(c)) if self.start is not None else len(p) + len(c) - 1)
        scores = np.zeros(len(pairs))
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        with attention_pattern_of(self.model):
            for first in range(0, len(order), self.rows):
                index = order[first : first + self.rows]
                scores[index] = self._log_probs([pairs[i] for i in index])
        return [float(x) for x in scores]

    def options(self, prompt: np.ndarray, options: Sequence[np.ndarray]) -> list[float]:
        """log p(option | prompt) of each option, as `score` has it; a decoder reads the prompt only once."""
        if self.start is not None:
            return self.score([prompt] * len(options), options)
        read = len(prompt) + max(map(len, options)) - 1
        self._fits("the prompt with its longest option", len(prompt), read)
        with attention_pattern_of(self.model):
            cache = self.model.make_cache(1, read)
            whole = rectangle([prompt], self.device, prompts=self._both([prompt]))
            hidden = self.model(whole, cache)[:, -1:].expand(len(options), -1, -1)
            if read > len(prompt):
                cache.select(torch.zeros(len(options), dtype=torch.int64, device=self.device))
                # Of a token alone nothing is read on; a row of nothing would be no row to a recurrent model.
                batch = rectangle([o[: max(1, len(o) - 1)] for o in options], self.device)
                place = torch.arange(len(prompt), read, device=self.device)[None]
                when = {
                    name: torch.where(batch["key_time"] == NEVER, batch[name], place)
                    for name in ("query_time", "key_time")
                }
                hidden = torch.cat((hidden, self.model(batch | when | {"positions": place}, cache)), 1)
            return [float(x) for x in self._read(hidden, stacked(options, IGNORE, self.device))]

    def choose(self, prompt: np.ndarray, options: Sequence[np.ndarray]) -> int:
        """The index of the likeliest option; the first of equals."""
        return int(np.argmax(self.options(prompt, options)))

    def fill(self, text: str, k: int = 5) -> list[list[Candidate]]:
        """The k likeliest tokens for each mask written in the text: a masked model's verb (`firth.generate.fill_mask`)."""
        return fill(self.model, self.tokenizer, text, k)

    def _both(self, prompts: Sequence[np.ndarray]) -> list[int] | None:
        """How many tokens of each prompt are read both ways, if the model is one that does."""
        return [len(prompt) for prompt in prompts] if self.model.config.prefix_lm else None

    def _fits(self, what: str, prompt: int, read: int) -> None:
        """Refuse what the model cannot read."""
        context = self.model.context
        if not prompt:
            raise UserError(f"{what} has an empty prompt: begin with a token at least")
        if read > context:
            raise UserError(
                f"{what} has {read} tokens and this model reads at most {context}: shorten it, "
                "or use a model with a longer model.max_positions"
            )

    def _log_probs(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Summed log-probabilities of the second of each pair: (rows,)."""
        if self.start is None:
            rows = [np.concatenate((p, c))[:-1] for p, c in pairs]
            batch = rectangle(rows, self.device, prompts=self._both([p for p, _ in pairs]))
            labels = [np.concatenate((np.full(len(p) - 1, IGNORE), c)) for p, c in pairs]
        else:
            source = rectangle([p for p, _ in pairs], self.device, causal=False)
            batch = {f"source_{name}": field for name, field in source.items()}
            batch |= rectangle([np.concatenate(([self.start], c[:-1])) for _, c in pairs], self.device)
            labels = [c for _, c in pairs]
        return self._read(self.model(batch), stacked(labels, IGNORE, self.device))

    def _read(self, hidden: Tensor, labels: Tensor) -> np.ndarray:
        """Summed log p(labels) per row of hidden (rows, T, width): (rows,), IGNORE adding nothing."""
        head: LMHead = self.model.heads["lm"]  # type: ignore[assignment]
        at = labels != IGNORE
        out = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        out[at] = head.log_probs(hidden[at], labels[at])
        return out.sum(-1).cpu().numpy()
