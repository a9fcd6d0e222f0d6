"""Sequence-to-sequence pretraining: span corruption (T5) and denoising (BART).

Span corruption: drop spans of a text and predict only what was dropped (T5, Raffel 2020, section 3.1.4).

15% of the tokens are dropped, in spans of 3 on average; each span leaves one sentinel:

    Thank you for inviting me to your party last week.
    shown    Thank you <X> me to your party <Y> week.
    target   <X> for inviting <Y> last <Z>

Both rows end with the stop token, as T5's do. The final sentinel is always present, as in the paper's figure (T5's own
code leaves it out when the text ends in a dropped span, where only the stop token follows it).

Denoising: corrupt a text and reconstruct all of it (BART, Lewis 2019, section 2.2).

The whole text is predicted, not only what was corrupted: about seven times the labels of span corruption, and the model also
learns to continue a text. The five corruptions are in `firth.data.noise`; BART itself shuffles the sentences and then
masks 30% of the tokens by infilling. Both rows end with the stop token; BART's also begin with one, ours do not.

    I came. I saw the sea. I won.
    shown    I won. I came. I _ sea.                  permutation, then infilling
    target   I came. I saw the sea. I won.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firth.data import attention_fields
from firth.data.attention_fields import Seq2SeqLayout
from firth.data.noise import NOISES, Damage, Kind, corrupt, text_units
from firth.fields import OpenShare
from firth.model.config import AttentionPattern
from firth.objectives.objective import TokenObjective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Constraints, Example, UserError


def replace_spans(tokens: np.ndarray, dropped: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (input, target): every run of `dropped` becomes one sentinel, in order.

    Args:
        tokens: The text, (n,).
        dropped: Which tokens are dropped, (n,) bool.
        sentinels: Ids of the sentinels.

    Raises:
        UserError: There are too few sentinels.


    >>> words = np.array("Thank you for inviting me to your party last week.".split())
    >>> gone = np.isin(words, ["for", "inviting", "last"])
    >>> shown, target = replace_spans(words, gone, np.array(["<X>", "<Y>", "<Z>"]))
    >>> print(*shown); print(*target)
    Thank you <X> me to your party <Y> week.
    <X> for inviting <Y> last <Z>
    """
    starts_run = dropped & ~np.append(False, dropped[:-1])
    runs = int(starts_run.sum())
    _check_sentinels(runs, sentinels)
    starts = np.flatnonzero(starts_run)
    shown = tokens.copy()
    shown[starts] = sentinels[:runs]
    shown = shown[starts_run | ~dropped]
    # The sentinel of a run goes before its first token, and one more after all of them.
    target = np.insert(tokens[dropped], np.append(dropped.cumsum()[starts] - 1, dropped.sum()), sentinels[: runs + 1])
    return shown, target


def _check_sentinels(runs: int, sentinels: np.ndarray) -> None:
    """Raise a UserError if there are more spans than sentinels to mark them with."""
    if runs >= len(sentinels):
        raise UserError(
            f"{runs} dropped spans need {runs + 1} sentinels (<extra_id_0>, ...), and the tokenizer has {len(sentinels)}: "
            f"train one with `firth tokenizer train --num-sentinels {max(100, 2 * runs)}` (or leave out tokenizer.path), or "
            "shorten the texts (examples.max_length)"
        )


@dataclass(frozen=True)
class SpanCorruption(TokenObjective):
    """Predict the spans that were dropped from {"tokens"}, a text without special tokens.

    Shown: the text with one sentinel for each dropped span. Predicted: y, each sentinel followed by its span.
    Loss: -sum over t of log p(y_t | y_<t, shown text).

    Args:
        noise_density: Share of the tokens that is dropped.
        noise: How they are selected (`firth.data.noise`).
        layout: "seq2seq" gives the text to an encoder and the target to the decoder; "prefix" puts both in one row, with
            bidirectional attention up to the end of the text.

    >>> vocab = Vocab(size=20, roles={"pad": 0, "eos": 1}, special=np.arange(20) < 5, sentinels=np.array([2, 3, 4]))
    >>> seen = SpanCorruption(noise_density=0.3).build_example({"tokens": np.arange(10, 20)}, vocab, np.random.default_rng(0))
    >>> for name in ("source_tokens", "tokens", "labels"): print(name, seen[name].tolist())
    source_tokens [10, 11, 2, 15, 16, 17, 18, 19, 1]
    tokens [0, 2, 12, 13, 14, 3]
    labels [2, 12, 13, 14, 3, 1]
    """

    noise_density: OpenShare = 0.15
    noise: Kind = "spans"
    layout: Seq2SeqLayout = "seq2seq"

    @property
    def constraints(self) -> Constraints:
        return Constraints(num_sentinels=100, text_units=text_units(self.noise))

    @property
    def attention(self) -> AttentionPattern:
        return "seq2seq" if self.layout == "seq2seq" else "prefix"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        dropped = NOISES[self.noise](tokens, vocab, self.noise_density, rng)
        source, target = (np.append(row, vocab.eos) for row in replace_spans(tokens, dropped, vocab.sentinels))
        return attention_fields.layout_of(self.layout, source, target, vocab)

    def hide(self, pieces: Sequence[np.ndarray], vocab: Vocab, answer: int | None = None) -> Example:
        """Each gap is a sentinel, as a dropped span is; the answer is predicted after it.

        >>> vocab = Vocab(size=20, roles={"eos": 1}, special=np.arange(20) < 5, sentinels=np.array([2, 3, 4]))
        >>> SpanCorruption().hide([np.array([10, 11]), np.array([12])], vocab)["tokens"].tolist()
        [10, 11, 2, 12, 1]
        """
        gaps = len(pieces) - 1
        _check_sentinels(gaps, vocab.sentinels)
        rest = [np.insert(piece, 0, mark) for mark, piece in zip(vocab.sentinels[:gaps], pieces[1:], strict=True)]
        source = np.concatenate((pieces[0], *rest, [vocab.eos])).astype(np.int32)
        if answer is None:
            return {"tokens": source}
        target = np.array([vocab.sentinels[0], answer, vocab.sentinels[1], vocab.eos])
        seen = attention_fields.layout_of(self.layout, source, target, vocab)
        return seen | {"labels": np.where(np.arange(len(seen["labels"])) == len(seen["labels"]) - 3, answer, IGNORE)}


@dataclass(frozen=True)
class Denoising(TokenObjective):
    """Reconstruct a corrupted text: {"tokens"}, without special tokens.

    Shown: the corrupted text. Predicted: the original text. Loss: -sum over t of log p(w_t | w_<t, corrupted text).

    Args:
        noises: The corruptions (`firth.data.noise`), in the order in which they are applied.
        noise_density: Share of the tokens that masking, deletion and infilling each hit.
        layout: "seq2seq" gives the corrupted text to an encoder; "prefix" puts both in one row, with bidirectional
            attention up to the end of the corrupted text.

    >>> vocab = Vocab(size=10, roles={"pad": 0, "eos": 1, "mask": 2}, special=np.arange(10) < 3,
    ...               spelling=tuple(b" a" if i != 5 else b"!" for i in range(10)))
    >>> seen = Denoising().build_example({"tokens": np.array([3, 4, 5, 6, 7, 8])}, vocab, np.random.default_rng(4))
    >>> for name in ("source_tokens", "tokens", "labels"): print(name, seen[name].tolist())
    source_tokens [6, 7, 8, 3, 2, 1]
    tokens [0, 3, 4, 5, 6, 7, 8]
    labels [3, 4, 5, 6, 7, 8, 1]
    """

    noises: tuple[Damage, ...] = ("permutation", "infilling")
    noise_density: OpenShare = 0.3
    layout: Seq2SeqLayout = "seq2seq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noises:
            raise UserError("denoising: noises is empty, so nothing is corrupted: name at least one corruption")

    @property
    def constraints(self) -> Constraints:
        units = frozenset({"sentences"} if "permutation" in self.noises else ())
        return Constraints(added_tokens=1, text_units=units)  # the stop token

    @property
    def attention(self) -> AttentionPattern:
        return "seq2seq" if self.layout == "seq2seq" else "prefix"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        corrupted = corrupt(self.noises, tokens, vocab, self.noise_density, rng)
        return attention_fields.layout_of(
            self.layout, np.append(corrupted, vocab.eos), np.append(tokens, vocab.eos), vocab
        )

    def hide(self, pieces: Sequence[np.ndarray], vocab: Vocab, answer: int | None = None) -> Example:
        """Each gap is one mask, as infilling leaves one for a span of any length; nothing where tokens are deleted. The target
        is the whole text, and the label at the position of the answer in it."""
        rest = pieces[1:]
        if self.noises != ("deletion",):
            rest = [np.insert(piece, 0, vocab.mask) for piece in rest]
        source = np.concatenate((pieces[0], *rest, [vocab.eos])).astype(np.int32)
        if answer is None:
            return {"tokens": source}
        seen = attention_fields.layout_of(self.layout, source, np.append(pieces[0], answer), vocab)
        labels = np.full(len(seen["labels"]), IGNORE)
        labels[-1] = answer
        return seen | {"labels": labels}
