"""How probable a text is to a model: for causal, masked and encoder-decoder models alike, per token and per byte.

Scoring is the training sentence again, show, run, score: each family has a way to *show* a document so that every
token is asked once (`strided`, `one_at_a_time`, `halves`), and `score` runs and sums.

    document = read(tokenizer, "To be, or not to be")        # ids, and the bytes of text that each stands for
    result = score(model, strided(document, context=1024))   # Likelihood(nll=..., tokens=..., size=...)
    result.perplexity, result.bits_per_byte

Bits per byte divides by the UTF-8 bytes of exactly the tokens that were asked, so it compares models with other
tokenizers; perplexity does not. A masked model's figure is a pseudo-likelihood (each token given all the others),
and an encoder-decoder's is of second halves given first halves: compare like with like. Probabilities add up to 1 over the
tokenizer's ids alone, where a table is wider (`LM.restrict`); transformers leaves the others their share, which is next to
nothing in a trained model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from firth.data import layout
from firth.data.collate import collate
from firth.evaluate import metrics
from firth.generate.decoding import attention_pattern_of
from firth.model.model import LM
from firth.objectives.objective import token_loss
from firth.tokenizer.normalize import replace_lone_surrogates
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Batch, Example, UserError

if TYPE_CHECKING:
    from firth.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """tokens: (n,) ids without any special token. sizes: (n,) the UTF-8 bytes of the text that each stands for."""

    tokens: np.ndarray
    sizes: np.ndarray


def read(tokenizer: Tokenizer, text: str) -> TokenizedDocument:
    """The document of a text. Its sizes add up to the text's bytes, whatever the tokenizer folds, drops or splits.

    A byte belongs to the first token that reaches it: a blank that the tokenizer drops to the next token, the bytes
    of a character that is spread over several tokens to the first of them, what no token reaches to the last.
    """
    text = replace_lone_surrogates(text)
    ids, spans = tokenizer.spans(text)
    tokens = ids.astype(np.int64)
    if not len(tokens):
        return TokenizedDocument(tokens, np.zeros(0, np.int64))
    letters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    lengths = 1 + (letters >= 0x80).astype(np.int64) + (letters >= 0x800) + (letters >= 0x10000)
    before = np.concatenate(([0], np.cumsum(lengths)))
    ends = np.maximum.accumulate(before[spans[:, 1]])
    ends[-1] = before[-1]
    return TokenizedDocument(tokens, np.diff(ends, prepend=0))


@dataclass(frozen=True)
class Likelihood:
    """What was asked and how improbable it was. nll: nats. size: UTF-8 bytes. Results of parts add up."""

    nll: float = 0.0
    tokens: int = 0
    size: int = 0

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.nll + other.nll, self.tokens + other.tokens, self.size + other.size)

    @property
    def perplexity(self) -> float:
        """exp of the mean nats per asked token."""
        return metrics.perplexity(self.nll, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the asked tokens' text."""
        return metrics.bits_per_byte(self.nll, self.size)


def strided(
    document: TokenizedDocument, context: int, bos: int | None = None, every: bool = True, prefix_lm: bool = False
) -> Iterator[Example]:
    """For causal models: windows of `context` inputs that overlap by half, each token asked once.

    Every token but those of the first window is asked with at least half a context before it. bos: what the model was
    trained to read before a document, and if `every`, at the head of every row; without one the document's first
    token is not asked, since nothing precedes it (and its bytes are not counted). prefix_lm: what stands in a window
    before the first token that is asked is read both ways, as a prefix language model's prompt is.

    >>> five = TokenizedDocument(np.array([5, 6, 7, 8, 9]), np.array([1, 1, 1, 1, 1]))
    >>> [(x["tokens"].tolist(), x["labels"].tolist()) for x in strided(five, context=2)]
    [([5, 6], [6, 7]), ([6, 7], [-100, 8]), ([7, 8], [-100, 9])]
    >>> [(x["tokens"].tolist(), x["labels"].tolist()) for x in strided(five, context=4, bos=1)]
    [([1, 5, 6, 7], [5, 6, 7, 8]), ([1, 6, 7, 8], [-100, -100, -100, 9])]
    """
    if context < 2:
        raise UserError(f"a context of {context} leaves nothing to condition on: use at least 2")
    tokens, sizes = document.tokens, document.sizes
    if bos is not None:
        tokens, sizes = np.concatenate(([bos], tokens)), np.concatenate(([0], sizes))
    total, asked = len(tokens) - 1, 0  # prediction k is tokens[k + 1] from what stands at or before k
    while asked < total:
        stop = min(total, asked + (context // 2 if asked else context))
        start = max(0, stop - context)
        shown, labels = tokens[start:stop].copy(), tokens[start + 1 : stop + 1].copy()
        labels[: asked - start] = IGNORE
        if bos is not None and every:
            shown[0] = bos
        order = layout.causal_after_prompt(len(shown), asked - start + 1 if prefix_lm else 1)
        yield {"tokens": shown, "labels": labels, "sizes": sizes[start + 1 : stop + 1]} | order
        asked = stop


def one_at_a_time(document: TokenizedDocument, context: int, vocab: Vocab, query: bool = False) -> Iterator[Example]:
    """For masked models: each token masked alone and asked, given all the others (Salazar 2020, section 2).

    query: the mask asks and is seen by nobody, which is what a model was trained on that has a vector for it (XLNet).
    A document longer than the context is cut into even pieces. n tokens cost n rows of their piece's length.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2, "mask": 3}, special=np.arange(9) < 4)
    >>> two = TokenizedDocument(np.array([5, 6]), np.array([1, 1]))
    >>> [(x["tokens"].tolist(), x["labels"].tolist()) for x in one_at_a_time(two, 8, vocab)]
    [([1, 3, 6, 2], [-100, 5, -100, -100]), ([1, 5, 3, 2], [-100, -100, 6, -100])]
    """
    for piece in pieces(document, context - 2):
        framed = vocab.add_special_tokens(piece.tokens)
        sizes = np.concatenate(([0], piece.sizes, [0]))
        zeros = np.zeros(len(framed), np.int32)
        for at in range(1, len(framed) - 1):
            shown, labels = framed.copy(), np.full(len(framed), IGNORE)
            shown[at], labels[at] = vocab.mask, framed[at]
            appears = np.where(shown == vocab.mask, NEVER, 0) if query else zeros
            yield {"tokens": shown, "labels": labels, "sizes": sizes, "query_time": zeros, "key_time": appears}


def halves(document: TokenizedDocument, context: int, vocab: Vocab) -> Iterator[Example]:
    """For encoder-decoders: the second half of each piece given the first, which ends with eos as in training.

    >>> vocab = Vocab(size=9, roles={"pad": 0, "eos": 2}, special=np.arange(9) < 4)
    >>> four = TokenizedDocument(np.array([5, 6, 7, 8]), np.array([1, 1, 1, 1]))
    >>> [x] = halves(four, 8, vocab)
    >>> x["source_tokens"].tolist(), x["tokens"].tolist(), x["labels"].tolist()
    ([5, 6, 2], [0, 7], [7, 8])
    """
    for piece in pieces(document, 2 * context - 2):
        cut = len(piece.tokens) // 2
        source = np.concatenate((piece.tokens[:cut], [vocab.eos]))
        shown = layout.seq2seq(source, piece.tokens[cut:], start=vocab.start)
        yield shown | {"sizes": piece.sizes[cut:]}


def pieces(document: TokenizedDocument, most: int) -> Iterator[TokenizedDocument]:
    """The document in as few pieces of at most `most` tokens as will do, of equal length to within one."""
    if most < 1:
        raise UserError("the context is too short to hold a token between its frame: use at least 4")
    count = -(-len(document.tokens) // most)
    cuts = [len(document.tokens) * i // max(1, count) for i in range(count + 1)]
    for start, stop in pairwise(cuts):
        yield TokenizedDocument(document.tokens[start:stop], document.sizes[start:stop])


def score(model: LM, examples: Iterable[Example], room: int = 8192) -> Likelihood:
    """Sum of -log p over what the examples ask, in batches of at most `room` padded tokens. Dropout is off."""
    device = model.tokens.weight.device
    total = Likelihood()
    with attention_pattern_of(model):
        for group in groups(examples, room):
            batch: Batch = {name: field.to(device) for name, field in collate(group).items()}
            asked = batch["labels"] != IGNORE
            nll = token_loss(model, model(batch), batch["labels"])
            total += Likelihood(float(nll), int(asked.sum()), int(batch["sizes"][asked].sum()))
    return total


def groups(examples: Iterable[Example], room: int) -> Iterator[list[Example]]:
    """Consecutive examples, as many as fit into `room` tokens once padded to the longest of them."""
    group: list[Example] = []
    widest = 0
    for example in examples:
        width = example["tokens"].size + len(example.get("source_tokens", ()))
        if group and max(widest, width) * (len(group) + 1) > room:
            yield group
            group, widest = [], 0
        group.append(example)
        widest = max(widest, width)
    if group:
        yield group
