"""Likelihood of text under causal, masked and encoder-decoder models, per token and per byte; and the cloze score.

Each model family has a function that turns a document into examples that score every token once (`strided`,
`one_at_a_time`, `halves`); `score` runs the model and sums.

    document = tokenize(tokenizer, "To be, or not to be")        # ids, and the bytes of text of each
    result = score(model, strided(document, context=1024))   # Likelihood(nll=..., tokens=..., size=...)
    result.perplexity, result.bits_per_byte

Bits per byte divides by the UTF-8 bytes of exactly the scored tokens, so it compares models with different tokenizers;
perplexity does not. The score of a masked model is a pseudo-likelihood (each token given all others), that of an
encoder-decoder is of second halves given first halves: compare only models of one kind. Where an embedding table is larger
than the tokenizer, probabilities sum to 1 over the tokenizer's ids (`LM.restrict_vocab`); transformers includes the other
ids, whose share is close to 0 in a trained model.

The cloze score is of one hidden token of a text (the cloze test, Taylor 1953). Each objective hides the token in its own way
(`Objective.hide`), for the same tokens of the same texts: a masked model reads both sides of the gap, a causal model only what
precedes it, an encoder-decoder writes after a sentinel. The score measures a model under the context that its objective provides;
an objective without token prediction has none.

    questions = cloze_items(store, vocab, count=512)
    cloze_score(model, MLM(), questions, vocab)          {"accuracy": 0.31, "bits": 5.2}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from firth.data import attention_fields
from firth.data.collate import collate
from firth.data.token_store import TokenStore
from firth.data.windows import ChunksConfig, Documents
from firth.evaluate import metrics
from firth.generate.decoding_batch import inference_mode
from firth.model.model import LM
from firth.objectives.objective import Objective, num_correct, supervised, token_loss
from firth.pretrained.load_save import metadata_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab, replace_lone_surrogates
from firth.types import IGNORE, NEVER, Batch, Example, UserError


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """Tokens of a document.

    Args:
        tokens: Ids (n,) without special tokens.
        sizes: UTF-8 bytes of text of each token (n,).
    """

    tokens: np.ndarray
    sizes: np.ndarray


def tokenize(tokenizer: Tokenizer, text: str) -> TokenizedDocument:
    """Tokenize a text. The sizes add up to the bytes of the text, whatever the tokenizer normalizes, drops or splits.

    A byte belongs to the first token that ends at or after it: a dropped blank to the next token, the bytes of a character
    split over several tokens to the first of them, bytes after the last token to the last.
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
    """Likelihood of scored tokens; results of parts of a text can be added.

    Args:
        nll: Negative log-likelihood in nats.
        tokens: Number of scored tokens.
        size: UTF-8 bytes of the scored tokens.
    """

    nll: float = 0.0
    tokens: int = 0
    size: int = 0

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.nll + other.nll, self.tokens + other.tokens, self.size + other.size)

    @property
    def perplexity(self) -> float:
        """exp of the mean nats per scored token."""
        return metrics.perplexity(self.nll, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the text of the scored tokens."""
        return metrics.bits_per_byte(self.nll, self.size)


def strided(
    document: TokenizedDocument, context: int, bos: int | None = None, every: bool = True, prefix_lm: bool = False
) -> Iterator[Example]:
    """Yield windows for a causal model that overlap by half and score each token once.

    Every token after the first window is scored with at least half a context before it.

    Args:
        document: The document.
        context: Inputs of a window.
        bos: Token before the document. Without it the first token of the document is not scored, since nothing precedes
            it, and its bytes are not counted.
        every: Whether every window starts with bos.
        prefix_lm: Whether the tokens of a window before its first scored token are read bidirectionally, like the prompt
            of a prefix language model.

    >>> five = TokenizedDocument(np.array([5, 6, 7, 8, 9]), np.array([1, 1, 1, 1, 1]))
    >>> [(x["tokens"].tolist(), x["labels"].tolist()) for x in strided(five, context=2)]
    [([5, 6], [6, 7]), ([6, 7], [-100, 8]), ([7, 8], [-100, 9])]
    >>> [(x["tokens"].tolist(), x["labels"].tolist()) for x in strided(five, context=4, bos=1)]
    [([1, 5, 6, 7], [5, 6, 7, 8]), ([1, 6, 7, 8], [-100, -100, -100, 9])]
    """
    if context < 2:
        raise UserError(f"a context of {context} leaves no token to condition on: use at least 2")
    tokens, sizes = document.tokens, document.sizes
    if bos is not None:
        tokens, sizes = np.concatenate(([bos], tokens)), np.concatenate(([0], sizes))
    total, scored = len(tokens) - 1, 0  # prediction k is tokens[k + 1] given tokens[: k + 1]
    while scored < total:
        stop = min(total, scored + (context // 2 if scored else context))
        start = max(0, stop - context)
        inputs, labels = tokens[start:stop].copy(), tokens[start + 1 : stop + 1].copy()
        labels[: scored - start] = IGNORE
        if bos is not None and every:
            inputs[0] = bos
        order = attention_fields.causal_after_prompt(len(inputs), scored - start + 1 if prefix_lm else 1)
        yield {"tokens": inputs, "labels": labels, "sizes": sizes[start + 1 : stop + 1]} | order
        scored = stop


def one_at_a_time(document: TokenizedDocument, context: int, vocab: Vocab, query: bool = False) -> Iterator[Example]:
    """Yield an example per token for a masked model: the token masked, all others visible (Salazar 2020, section 2).

    n tokens cost n rows of the length of their piece.

    Args:
        document: The document; one longer than the context is split into even pieces.
        context: Most tokens of a row, special tokens included.
        vocab: The vocabulary.
        query: Whether the mask is a query that no position attends to, as in a model with a mask embedding (XLNet).

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
            inputs, labels = framed.copy(), np.full(len(framed), IGNORE)
            inputs[at], labels[at] = vocab.mask, framed[at]
            key_time = np.where(inputs == vocab.mask, NEVER, 0) if query else zeros
            yield {"tokens": inputs, "labels": labels, "sizes": sizes, "query_time": zeros, "key_time": key_time}


def halves(document: TokenizedDocument, context: int, vocab: Vocab) -> Iterator[Example]:
    """Yield examples for an encoder-decoder: the second half of each piece given the first, which ends with eos.

    >>> vocab = Vocab(size=9, roles={"pad": 0, "eos": 2}, special=np.arange(9) < 4)
    >>> four = TokenizedDocument(np.array([5, 6, 7, 8]), np.array([1, 1, 1, 1]))
    >>> [x] = halves(four, 8, vocab)
    >>> x["source_tokens"].tolist(), x["tokens"].tolist(), x["labels"].tolist()
    ([5, 6, 2], [0, 7], [7, 8])
    """
    for piece in pieces(document, 2 * context - 2):
        middle = len(piece.tokens) // 2
        source = np.concatenate((piece.tokens[:middle], [vocab.eos]))
        example = attention_fields.seq2seq(source, piece.tokens[middle:], start=vocab.start)
        yield example | {"sizes": piece.sizes[middle:]}


def pieces(document: TokenizedDocument, max_tokens: int) -> Iterator[TokenizedDocument]:
    """Split a document into the fewest pieces of at most `max_tokens` tokens, whose lengths differ by at most one."""
    if max_tokens < 1:
        raise UserError("the context is too short for a token between special tokens: use at least 4")
    count = -(-len(document.tokens) // max_tokens)
    cuts = [len(document.tokens) * i // max(1, count) for i in range(count + 1)]
    for start, stop in pairwise(cuts):
        yield TokenizedDocument(document.tokens[start:stop], document.sizes[start:stop])


def score(model: LM, examples: Iterable[Example], max_tokens: int = 8192) -> Likelihood:
    """Sum -log p over the labels of examples, without dropout, in batches of at most `max_tokens` padded tokens."""
    device = model.tokens.weight.device
    total = Likelihood()
    with inference_mode(model):
        for group in groups(examples, max_tokens):
            batch: Batch = {name: field.to(device) for name, field in collate(group).items()}
            scored = batch["labels"] != IGNORE
            nll = token_loss(model, model(batch), batch["labels"])
            total += Likelihood(float(nll), int(scored.sum()), int(batch["sizes"][scored].sum()))
    return total


def groups(examples: Iterable[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Group consecutive examples into batches of at most `max_tokens` tokens after padding to the longest of them."""
    group: list[Example] = []
    widest = 0
    for example in examples:
        width = example["tokens"].size + len(example.get("source_tokens", ()))
        if group and max(widest, width) * (len(group) + 1) > max_tokens:
            yield group
            group, widest = [], 0
        group.append(example)
        widest = max(widest, width)
    if group:
        yield group


def leading_bos(directory: Path, tokenizer: Tokenizer) -> tuple[int | None, bool]:
    """Return the bos token that a causal model was trained with before a text, and whether every row starts with it.

    A tokenizer that adds bos (`add_bos_token`, or in tokenizer.json itself, as Llama's and Gemma's) starts every row
    with it. Runs of firth have bos only before a document, and windows that start anywhere.

    Args:
        directory: The model directory.
        tokenizer: Its tokenizer.

    Returns:
        The id, or None for no bos; whether every row starts with it.
    """
    bos = tokenizer.vocab.roles.get("bos")
    file, ours = directory / "tokenizer_config.json", directory / "firth.json"
    add_bos = json.loads(file.read_text("utf-8")).get("add_bos_token") if file.exists() else tokenizer.bos
    if bos is None or add_bos is False:
        return None, False
    if not add_bos and ours.exists() and "recipe" in metadata_of(directory):
        return bos, False
    if add_bos or tokenizer.engine.encode("a", add_special_tokens=True).ids[:1] == [bos]:
        return bos, True
    return (bos, False) if ours.exists() else (None, False)


@dataclass(frozen=True, eq=False)
class ClozeItem:
    """One text with a token to hide.

    Args:
        tokens: Ids (n,) without special tokens.
        at: Index of the hidden token.
    """

    tokens: np.ndarray
    at: int

    @property
    def pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """The text before and after the hidden token."""
        return self.tokens[: self.at], self.tokens[self.at + 1 :]

    @property
    def answer(self) -> int:
        """The hidden token."""
        return int(self.tokens[self.at])


def cloze_items(store: TokenStore, vocab: Vocab, count: int, length: int = 64, seed: int = 0) -> list[ClozeItem]:
    """Return texts spread evenly over a store, each with a hidden token from its middle half.

    Texts of fewer than eight tokens and positions of special tokens are left out.

    Args:
        store: The tokenized text.
        vocab: Its vocabulary.
        count: Most cloze_items.
        length: Most tokens of a text.
        seed: Seed of the hidden positions.
    """
    chunks = Documents(ChunksConfig(max_length=length, add_special_tokens=False), store, vocab)
    rng = np.random.default_rng(seed)
    found = []
    for i in np.unique(np.linspace(0, len(chunks) - 1, count).round().astype(int)) if len(chunks) else ():
        tokens = np.array(chunks[int(i)]["tokens"])
        at = int(rng.integers(len(tokens) // 4, max(1, 3 * len(tokens) // 4)))
        if len(tokens) >= 8 and not vocab.special[tokens[at]]:
            found.append(ClozeItem(tokens, at))
    return found


def most_frequent_baseline(store: TokenStore, questions: Sequence[ClozeItem]) -> float:
    """Return the accuracy of always predicting the most frequent token of a store."""
    most_frequent = int(np.bincount(store.tokens).argmax())
    return float(np.mean([item.tokens[item.at] == most_frequent for item in questions])) if questions else 0.0


def cloze_score(model: LM, objective: Objective, questions: Sequence[ClozeItem], vocab: Vocab) -> dict[str, float]:
    """Score the predictions of hidden tokens.

    Args:
        model: The model.
        objective: The objective that it was trained with.
        questions: The texts and their hidden tokens.
        vocab: The vocabulary of the model.

    Returns:
        accuracy: Share of cloze_items whose token has the highest probability. bits: Mean -log2 of its probability.
        Empty where the objective predicts no token, or there is no item.
    """
    vocab = vocab.with_decoder_start(model.config.encoder.decoder_start_token)
    hidden = [objective.hide(item.pieces, vocab, item.answer) for item in questions]
    examples = [example for example in hidden if example is not None]
    if not examples:
        return {}
    device = model.tokens.weight.device
    correct = nats = 0.0
    with inference_mode(model):
        for group in groups(examples, max_tokens=8192):
            batch = {name: field.to(device) for name, field in collate(group).items()}
            states, labels = supervised(objective.forward(model, batch)["hidden"], batch["labels"])
            logits = model.heads["lm"](states).float()  # (N, V)
            correct += float(num_correct(logits, labels))
            nats += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"accuracy": correct / len(examples), "bits": nats / len(examples) / math.log(2)}
