"""Likelihood: perplexity and bits per byte of the text in files, scored as the model was trained.

`firth.evaluate.perplexity` scores the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from firth.corpora.input_files import ReadStats
from firth.corpora.readers import documents
from firth.evaluate import metrics
from firth.evaluate.perplexity import (
    Likelihood,
    TokenizedDocument,
    halves,
    leading_bos,
    one_at_a_time,
    pieces,
    score,
    strided,
    tokenize,
)
from firth.evaluate.task import EvaluatedModel, Progress
from firth.generate.scoring import scoring_mode
from firth.types import IGNORE, LOGGER, Example, UserError

BLOCK_TOKENS = 2048
"""Scored tokens of a block of whole pieces; the interval is bootstrapped over blocks."""

MASKED_LIMIT = 16384
"""Default number of tokens scored by a masked model, which needs a row of its own for each."""


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
