"""Perplexity and bits per byte of text.

Likelihood of text under causal, masked and encoder-decoder models, per token and per byte.

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

Perplexity and bits per byte of the text in files, scored as the model was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from firth.corpora.input_files import ReadStats
from firth.corpora.readers import documents
from firth.data import attention_fields
from firth.data.collate import collate
from firth.evaluate import metrics
from firth.generate.decoding_batch import inference_mode
from firth.generate.scoring import scoring_mode
from firth.model.model import LM
from firth.objectives.objective import token_loss
from firth.pretrained.load_save import metadata_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab, replace_lone_surrogates
from firth.types import IGNORE, LOGGER, NEVER, Batch, Example, UserError

if TYPE_CHECKING:
    from firth.evaluate.task import EvaluatedModel, Progress
    from firth.tokenizer.tokenizer import Tokenizer


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


BLOCK_TOKENS = 2048
"""Scored tokens of a block of whole pieces; the interval is bootstrapped over blocks."""

MASKED_LIMIT = 16384
"""Default number of tokens scored by a masked model, which needs a row of its own for each."""


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


READ_NOTES = {
    "bad_utf8": "byte sequences were not UTF-8 and were read as U+FFFD", "nul": "NUL characters were left out",
    "too_long": "records were too long to be read and were left out", "empty": "documents had no text",
}  # fmt: skip
"""Field of the read statistics -> end of a warning after the count."""


def likelihood(
    evaluated: EvaluatedModel,
    paths: Sequence[str],
    limit: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Return perplexity and bits per byte of the documents in files, with an interval where there are enough blocks.

    Args:
        evaluated: The model.
        paths: Files or directories of text.
        limit: Most tokens to score, in pieces spread evenly over the text; the result has their "share".
        progress: Called with the share done, 0 to 1.

    Raises:
        UserError: The model has no LM head, or the files hold no text.
    """
    model, tokenizer = evaluated.model, evaluated.tokenizer
    if not model.has_lm_head:
        raise UserError(f"{evaluated.directory}: this model has no LM head, so it cannot score the likelihood of text")
    mode = scoring_mode(model.config)
    with_bos = mode == "causal" and not model.config.attention.prefix_lm  # texts of a prefix LM have no special tokens
    bos, every = leading_bos(evaluated.model_directory, tokenizer) if with_bos else (None, False)
    context = evaluated.context
    counts = ReadStats()
    whole = [tokenize(tokenizer, d.text) for d in documents(paths, counts=counts)]
    for name, n in counts.rows().items():
        if name in READ_NOTES:
            LOGGER.warning(f"{', '.join(paths)}: {n:,} {READ_NOTES[name]}")
    longest = {"causal": 8 * context, "masked": context - 2, "halves": 2 * context - 2}[mode]
    split = [piece for document in whole for piece in (pieces(document, longest) if mode != "causal" else [document])]
    total = sum(len(d.tokens) for d in split)
    limit = MASKED_LIMIT if limit is None and mode == "masked" else limit
    chosen = split if limit is None else spread(split, limit)
    if not total:
        raise UserError(f"{', '.join(paths)}: there is no text to score")

    def build_examples(document: TokenizedDocument) -> Iterator[Example]:
        if mode == "causal":
            return strided(document, context, bos, every, model.config.attention.prefix_lm)
        if mode == "masked":
            return one_at_a_time(document, context, tokenizer.vocab, model.config.embedding.mask)
        return halves(document, context, tokenizer.vocab.with_decoder_start(model.config.encoder.decoder_start_token))

    num_tokens = sum(len(d.tokens) for d in chosen)
    done, results, left = 0, [], limit
    for block in blocks(chosen):
        examples = (example for document in block for example in build_examples(document))
        results.append(score(model, examples if left is None else at_most(examples, left)))
        left = None if left is None else left - results[-1].tokens
        done += sum(len(d.tokens) for d in block)
        progress(done / num_tokens)
        if left is not None and left <= 0:
            break
    return summary(results) | {
        "mode": mode,
        "context": context,
        "documents": len(whole),
        "share": (num_tokens if limit is None else sum(result.tokens for result in results)) / total,
        "bos": bos is not None,
    }


def at_most(examples: Iterable[Example], count: int) -> Iterator[Example]:
    """Yield examples with `count` labels in total; further labels are set to IGNORE.

    >>> three = {"tokens": np.array([4, 5, 6]), "labels": np.array([5, 6, 7])}
    >>> [example["labels"].tolist() for example in at_most([three, three, three], 4)]
    [[5, 6, 7], [5, -100, -100]]
    """
    for example in examples:
        if count <= 0:
            return
        labeled = np.flatnonzero(example["labels"] != IGNORE)
        labels = example["labels"].copy()
        labels[labeled[count:]] = IGNORE
        yield example | {"labels": labels}
        count -= len(labeled)


def blocks(documents: Sequence[TokenizedDocument]) -> Iterator[list[TokenizedDocument]]:
    """Group consecutive documents into blocks of at least BLOCK_TOKENS tokens."""
    block: list[TokenizedDocument] = []
    for document in documents:
        block.append(document)
        if sum(len(d.tokens) for d in block) >= BLOCK_TOKENS:
            yield block
            block = []
    if block:
        yield block


def spread(documents: Sequence[TokenizedDocument], limit: int) -> list[TokenizedDocument]:
    """Return evenly spaced documents of about `limit` tokens in total, at least one document.

    >>> ten = [TokenizedDocument(np.array([i, i]), np.array([1, 1])) for i in range(10)]
    >>> [int(d.tokens[0]) for d in spread(ten, limit=8)]
    [1, 3, 6, 8]
    """
    total = sum(len(d.tokens) for d in documents)
    if total <= limit:
        return list(documents)
    count = max(1, round(len(documents) * limit / total))
    return [documents[(2 * i + 1) * len(documents) // (2 * count)] for i in range(count)]


def summary(results: Sequence[Likelihood]) -> dict[str, Any]:
    """Return the metrics over all blocks."""
    total = sum(results, Likelihood())
    if not total.tokens:
        raise UserError(
            "the text is too short to score: a model without bos does not score the first token of a document"
        )
    out: dict[str, Any] = {
        "perplexity": total.perplexity,
        "bits_per_byte": total.bits_per_byte if total.size else float("nan"),
        "nll": total.nll,
        "tokens": total.tokens,
        "bytes": total.size,
    }
    if len(results) >= 8:
        nll, size = [r.nll for r in results], [r.size for r in results]
        out["bits_per_byte_interval"] = metrics.bootstrap(_ratio, nll, size)
    return out


def _ratio(nll: np.ndarray, size: np.ndarray) -> float:
    return metrics.bits_per_byte(float(nll.sum()), int(size.sum()))
