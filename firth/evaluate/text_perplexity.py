"""Likelihood of the text in files: documents in, one result out, read as the model was trained to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from firth.corpora.read_stats import ReadStats
from firth.corpora.readers import documents
from firth.evaluate import metrics
from firth.evaluate.perplexity import Likelihood, TokenizedDocument, halves, one_at_a_time, pieces, read, score, strided
from firth.model.config import ModelConfig
from firth.pretrained.load_save import metadata_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import IGNORE, Example, UserError

if TYPE_CHECKING:
    from firth.evaluate.task import EvaluatedModel, Progress, Say

ScoringMode = Literal["causal", "masked", "halves"]

BLOCK = 2048
"""Asked tokens scored together; the interval is over blocks of whole pieces."""

MASKED_LIMIT = 16384
"""Tokens that a masked model is asked unless told otherwise: each costs a row of its own."""


def reads_of(config: ModelConfig) -> ScoringMode:
    """As its objective had it read, which a run writes into its shape: an encoder-decoder reads halves, what is causal reads
    so; of the others those read masked whose head transforms first, as BERT's line does, which have a vector of their own
    for what they are asked, as XLNet, or which read from both ends. UserError for a model that gives a text no likelihood."""
    if config.latent_size:
        raise UserError(
            "a variational autoencoder only bounds the likelihood of a text: its ELBO is among its run's held-out measures "
            "(`firth evaluate RUN` without files)"
        )
    if config.num_encoder_layers:
        return "halves"
    masked = config.lm_head == "transform" or config.mask_embedding or config.rnn_type
    return "masked" if masked and not (config.causal or config.prefix_lm) else "causal"


def leading(directory: Path, tokenizer: Tokenizer) -> tuple[int | None, bool]:
    """(bos, whether at the head of every row): what a causal model was trained to read before a text; None for nothing.

    A tokenizer that frames its texts (`add_bos_token`, or in tokenizer.json itself, as Llama's and Gemma's) begins
    every row so. firth's own runs read [bos] where a document begins, and windows that begin anywhere.
    """
    bos = tokenizer.vocab.roles.get("bos")
    file, ours = directory / "tokenizer_config.json", directory / "firth.json"
    said = json.loads(file.read_text("utf-8")).get("add_bos_token") if file.exists() else tokenizer.bos
    if bos is None or said is False:
        return None, False
    if not said and ours.exists() and "recipe" in metadata_of(directory):
        return bos, False
    if said or tokenizer.engine.encode("a", add_special_tokens=True).ids[:1] == [bos]:
        return bos, True
    return (bos, False) if ours.exists() else (None, False)


MENDED = {
    "bad_utf8": "places were not UTF-8 and were read as U+FFFD", "nul": "NUL characters were left out",
    "too_long": "records were too long to be read and were left out", "empty": "documents had no text",
}  # fmt: skip
"""What is counted of a text -> the end of a sentence that says how many."""


def likelihood(
    evaluated: EvaluatedModel, paths: Sequence[str], limit: int | None, progress: Progress, say: Say = lambda _: None
) -> dict[str, Any]:
    """Perplexity and bits per byte of the files' documents, with an interval where there are enough blocks.

    With a limit, no more tokens are asked, in pieces evenly spread over the text; "share" says how much of it that is. say: told what was
    mended or left out of the files.
    """
    model, tokenizer = evaluated.model, evaluated.tokenizer
    if not model.has_lm_head:
        raise UserError(
            f"{evaluated.directory}: no vocabulary head reads this model's states, so no text is likely or unlikely to it"
        )
    reads = reads_of(model.config)
    opens = reads == "causal" and not model.config.prefix_lm  # whose texts are bare
    bos, every = leading(evaluated.model_directory, tokenizer) if opens else (None, False)
    context = evaluated.context
    counts = ReadStats()
    whole = [read(tokenizer, d.text) for d in documents(paths, counts=counts)]
    for name, n in counts.rows().items():
        if name in MENDED:
            say(f"{', '.join(paths)}: {n:,} {MENDED[name]}")
    room = {"causal": 8 * context, "masked": context - 2, "halves": 2 * context - 2}[reads]
    cut = [piece for document in whole for piece in (pieces(document, room) if reads != "causal" else [document])]
    total = sum(len(d.tokens) for d in cut)
    limit = MASKED_LIMIT if limit is None and reads == "masked" else limit
    chosen = cut if limit is None else spread(cut, limit)
    if not total:
        raise UserError(f"{', '.join(paths)}: there is no text to score")

    def show(document: TokenizedDocument) -> Iterator[Example]:
        if reads == "causal":
            return strided(document, context, bos, every, model.config.prefix_lm)
        if reads == "masked":
            return one_at_a_time(document, context, tokenizer.vocab, model.config.mask_embedding)
        return halves(document, context, tokenizer.vocab.with_decoder_start(model.config.decoder_start_token))

    asked = sum(len(d.tokens) for d in chosen)
    done, results, left = 0, [], limit
    for block in blocks(chosen):
        examples = (example for document in block for example in show(document))
        results.append(score(model, examples if left is None else at_most(examples, left)))
        left = None if left is None else left - results[-1].tokens
        done += sum(len(d.tokens) for d in block)
        progress(done / asked)
        if left is not None and left <= 0:
            break
    return summary(results) | {
        "reads": reads,
        "context": context,
        "documents": len(whole),
        "share": (asked if limit is None else sum(result.tokens for result in results)) / total,
        "bos": bos is not None,
    }


def at_most(examples: Iterable[Example], count: int) -> Iterator[Example]:
    """Return the examples until `count` tokens are asked; what the last one asks beyond that is not asked.

    >>> three = {"tokens": np.array([4, 5, 6]), "labels": np.array([5, 6, 7])}
    >>> [example["labels"].tolist() for example in at_most([three, three, three], 4)]
    [[5, 6, 7], [5, -100, -100]]
    """
    for example in examples:
        if count <= 0:
            return
        asked = np.flatnonzero(example["labels"] != IGNORE)
        labels = example["labels"].copy()
        labels[asked[count:]] = IGNORE
        yield example | {"labels": labels}
        count -= len(asked)


def blocks(documents: Sequence[TokenizedDocument]) -> Iterator[list[TokenizedDocument]]:
    """Consecutive documents, as many as hold BLOCK tokens."""
    block: list[TokenizedDocument] = []
    for document in documents:
        block.append(document)
        if sum(len(d.tokens) for d in block) >= BLOCK:
            yield block
            block = []
    if block:
        yield block


def spread(documents: Sequence[TokenizedDocument], limit: int) -> list[TokenizedDocument]:
    """Documents evenly spaced over all of them that hold about `limit` tokens, at least one.

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
    """The numbers of all blocks together."""
    total = sum(results, Likelihood())
    if not total.tokens:
        raise UserError(
            "the text is too short to score: a model without bos is not asked the first token of a document"
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
