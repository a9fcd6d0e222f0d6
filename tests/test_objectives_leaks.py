"""What is asked is hidden: of every objective's view, for every way of hiding.

A token is changed in the example, and the view drawn again from the same random numbers. Whatever is asked for that token
must find nothing moved of all that it can see: not the tokens, not where the holes are, not what can be seen. What it can
see is followed through as many layers as there may be, over what the seen tokens see. Where a token is shown on purpose
(MLM's tenth, a damaged text that still holds it) that is counted, and is as often as it should be at most.

What is asked of a whole text (its class, its score) stands in a field of the example: another answer there moves nothing
but the answer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from test_objectives_views import CASES, VOCAB, bare, framed, labelled, partly, some_text, tagged

from firth import objectives
from firth.data import layout
from firth.data.collate import Batches
from firth.data.source import Source
from firth.objectives.bilm import BiLM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.contrastive import Contrastive
from firth.objectives.dpo import DPO
from firth.objectives.layer_mixture import LayerMixture
from firth.objectives.masked_lm import MLM
from firth.objectives.mpnet import MPNet
from firth.objectives.multi_annotator import MultiAnnotator
from firth.objectives.multiple_choice import MultipleChoice
from firth.objectives.next_sentence import NSP
from firth.objectives.objective import Objective, Sum, TokenObjective
from firth.objectives.ppo import PER_TOKEN, PPO
from firth.objectives.reinforce import Reinforce
from firth.objectives.replaced_tokens import RTD
from firth.objectives.reward_model import Ranking
from firth.objectives.semi_supervised import Consistency, PseudoLabels
from firth.objectives.sft import SFT, Seq2SeqSFT
from firth.objectives.token_classification import TokenClassification
from firth.objectives.vae import VAE
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Example

FIRST = int(VOCAB.ordinary[0])


def dialogue(rng: np.random.Generator) -> Example:
    n = int(rng.integers(6, 30))
    mask = np.arange(n) >= n // 2
    return {"tokens": some_text(rng, n), "mask": mask} | {name: rng.random(n).astype(np.float32) for name in PER_TOKEN}


def paired(rng: np.random.Generator) -> Example:
    return {"source": some_text(rng, 12), "target": some_text(rng, int(rng.integers(3, 20)))}


def compared(rng: np.random.Generator) -> Example:
    rows: Example = {"reference": rng.random(2)}
    for name in ("chosen", "rejected"):
        n = int(rng.integers(6, 14))
        rows |= {f"{name}_tokens": some_text(rng, n), f"{name}_mask": np.arange(n) >= 4}
    return rows


def ranked(rng: np.random.Generator) -> Example:
    answers = [some_text(rng, 5 + i) for i in range(3)]
    return {"answers": answers, "masks": [np.arange(len(a)) > 2 for a in answers], "rank": rng.permutation(3)}


def voted(rng: np.random.Generator) -> Example:
    return labelled(rng) | {"votes": rng.integers(0, 3, 4)}


def question(rng: np.random.Generator) -> Example:
    options = [layout.pair(some_text(rng, 4), some_text(rng, int(rng.integers(2, 6))), VOCAB) for _ in range(3)]
    return {"options": options, "label": int(rng.integers(3))}


def related(rng: np.random.Generator) -> Example:
    return layout.pair(some_text(rng, 6), some_text(rng, 5), VOCAB) | {"label": int(rng.integers(2))}


ALL_DOCUMENTS: dict[str, tuple[Objective, Callable[[np.random.Generator], Example]]] = CASES | {
    "mlm in n-grams": (MLM(noise="ngrams"), framed),
    "mlm in spans": (MLM(noise="geometric"), framed),
    "bilm": (BiLM(), bare),
    "vae": (VAE(latent_size=3, word_dropout=0.3), bare),
    "sft": (SFT(), dialogue),
    "text to text": (Seq2SeqSFT(), paired),
    "reinforce": (Reinforce(), dialogue),
    "ppo": (PPO(), dialogue),
    "dpo": (DPO(), compared),
    "ranking": (Ranking(num_answers=4), ranked),
    "weak": (MultiAnnotator(class_names=("a", "b", "c")), voted),
    "multiple choice": (MultipleChoice(), question),
    "mixed + tagging": (LayerMixture() + TokenClassification(class_names=("a", "b", "c")), tagged),
    "contrastive, labelled": (Contrastive(), related),
    "rtd in spans": (RTD(noise="geometric"), framed),
    "mpnet by words": (MPNet(noise="words"), framed),
    "consistency in spans": (Consistency(class_names=("a", "b", "c"), noise="spans"), partly),
}  # fmt: skip
NOTHING_IS_HIDDEN = {
    "word2vec": "each word is read by itself, and its neighbours are the answer: no state sees another token",
    "infonce": "the text is its own answer, read twice and whole",
    "reward": "both answers are read whole, each in a row of its own, and the better one always comes first",
    "penalty": "it asks nothing of a text; with MLM it is among the cases",
}
"""Objectives that are not among the cases, and why they need not be."""
TEXTS = ("tokens", "first", "second", "other", "source", "target", "chosen_tokens", "rejected_tokens")
"""Fields of an example that hold tokens which are asked for."""
ASKED = ("labels", "boundary", "next", "previous")
"""Fields of a view that hold tokens where they are asked for."""
ANSWERS = ("sure", "clean", "votes", "similar", "alike", "compared", "starts", "ends", "choice", "rank", "preferred")
"""Fields of a view that no trunk reads as a text to be judged, beside those that are named as targets and measures. (`clean`:
what a consistency's target is made from.)"""
OPEN = {"denoise by permutation", "denoise by rotation", "vae"}
"""What hides no token from its encoder: only the order, or nothing (an autoencoder)."""


class One(Source):
    """A source of one example."""

    def __init__(self, example: Example) -> None:
        self.example = example

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        return self.example


def drawn(objective: Objective, example: Example, seed: int) -> Example:
    """The view as a run draws it."""
    [shown] = Batches(One(example), objective, VOCAB, batch_size=1, seed=seed).shown(np.array([3]), np.array([0]))
    return shown


def distinct(example: Example, rng: np.random.Generator) -> Example:
    """The example with no token twice, so that each can be told apart; control tokens stay."""
    fresh = rng.permutation(VOCAB.ordinary)
    out = dict(example)
    for name in TEXTS:
        if name in out:
            text = np.array(out[name])
            at = np.flatnonzero(text >= FIRST)
            text[at], fresh = fresh[: len(at)], fresh[len(at) :]
            out[name] = text
    return out


def stand_in(token: int, example: Example) -> int | None:
    """Another token that the example has not, and that words, sentences, names and numbers are no different for."""
    assert VOCAB.spelling is not None
    spelled = VOCAB.spelling[token]
    there = np.concatenate([np.ravel(example[name]) for name in TEXTS if name in example])
    like = [t for t in VOCAB.ordinary.tolist() if VOCAB.spelling[t] == spelled and t not in there]
    return like[0] if like else None


def changed(example: Example, token: int, other: int) -> Example:
    return example | {n: np.where(example[n] == token, other, example[n]) for n in TEXTS if n in example}


def reached(shown: Example, term: str) -> np.ndarray:
    """Whether what stands at j can come to be known at i: (rows, T, T), through any number of layers."""
    tokens = np.atleast_2d(shown["tokens"])
    rows, n = tokens.shape
    if (
        term in ("next", "previous") and "query_time" not in shown and "previous" in shown
    ):  # two readers who do not meet
        ahead = np.tri(n, dtype=bool)
        return (ahead if term == "next" else ahead.T)[None]

    def field(name: str, fill: int) -> np.ndarray:
        return np.broadcast_to(np.atleast_2d(shown.get(name, np.full(n, fill))), (rows, n))

    looks, document = field("query_time", 0)[:, :, None], field("document_ids", 0)
    sees = (field("key_time", 0)[:, None] <= looks) & (looks < field("key_expiry", NEVER)[:, None])
    sees &= document[:, None] == document[:, :, None]
    sees |= np.eye(n, dtype=bool)  # its own place it reads, seen by others or not
    for _ in range(n.bit_length()):
        sees = (sees.astype(np.float32) @ sees.astype(np.float32)) > 0
    return sees


@dataclass
class Count:
    """asked: tokens that were asked for. shown: of those, the ones that stood where the asking place sees. hidden: those that
    could be changed and were seen nowhere."""

    asked: int = 0
    shown: int = 0
    hidden: int = 0


def refuse_leaks(objective: Objective, example: Example, seed: int, count: Count, source_is_text: bool = False) -> None:
    """AssertionError if another hidden token would have been noticed. Adds to `count`."""
    shown = drawn(objective, example, seed)
    answers = {*objective.labels.values(), *objective.metrics.values(), *ANSWERS, *ASKED}
    source = {name for name in shown if name.startswith("source_")}
    row = sorted(n for n in shown.keys() - answers - source if np.shape(shown[n])[-1:] == shown["tokens"].shape[-1:])
    rest = shown.keys() - answers - source - set(row)
    texts = [n for n in row if n in ("tokens", "gaps")]
    mine = {t for name in TEXTS if name in example for t in np.ravel(example[name]).tolist() if t >= FIRST}
    for term in set(ASKED) & shown.keys():
        sees = reached(shown, term)
        for r, p in np.argwhere(np.atleast_2d(shown[term]) != IGNORE):
            token = int(np.atleast_2d(shown[term])[r, p])
            if token not in mine:
                continue
            count.asked += 1
            if any(token in np.atleast_2d(shown[n])[r, sees[r, p]] for n in texts):
                count.shown += 1
                continue
            other = stand_in(token, example)
            if other is None:
                continue
            again = drawn(objective, changed(example, token, other), seed)
            assert again.keys() == shown.keys()
            assert np.shape(again[term]) == np.shape(shown[term])
            assert np.atleast_2d(again[term])[r, p] == other, "what is asked for, and nothing else, is another token"
            assert np.array_equal(reached(again, term)[r, p], sees[r, p])
            for name in row:
                was, now = (
                    np.atleast_2d(view[name])[r % len(np.atleast_2d(view[name])), sees[r, p]] for view in (shown, again)
                )
                assert np.array_equal(was, now), f"{name} tells of a token that is hidden"
            assert all(np.array_equal(shown[n], again[n]) for n in rest)
            if not source_is_text and "source_tokens" in shown and token not in shown["source_tokens"]:
                assert all(np.array_equal(shown[n], again[n]) for n in source), "the source tells of a hidden token"
            count.hidden += token not in shown.get("source_tokens", ())


def searched(objective: Objective, source: Callable[[np.random.Generator], Example]) -> Count:
    count = Count()
    for seed in range(16):
        rng = np.random.default_rng(seed)
        refuse_leaks(objective, distinct(source(rng), rng), seed, count, source_is_text=isinstance(objective, VAE))
    return count


def addends(objective: Objective) -> Iterator[Objective]:
    if isinstance(objective, Sum):
        yield from (*addends(objective.first), *addends(objective.second))
    else:
        yield objective


def share_shown(name: str, objective: Objective) -> float:
    """At most so much of what is asked for may be seen: a tenth of what MLM asks for is shown as it is, and some tokens
    come back by chance; a damaged text in the same row holds most of what it was."""
    if name == "denoise in one row":
        return 1.0
    return 0.25 if any(isinstance(one, MLM | MPNet) for one in addends(objective)) else 0.0


TOKENS = [
    n for n, (o, source) in ALL_DOCUMENTS.items()
    if {*ASKED} & o.build_example(source(np.random.default_rng(0)), VOCAB, np.random.default_rng(0)).keys()
]  # fmt: skip
"""The cases that ask for tokens."""


@pytest.mark.parametrize("name", TOKENS)
def test_another_hidden_token_moves_nothing_that_is_seen(name: str) -> None:
    objective, source = ALL_DOCUMENTS[name]
    count = searched(objective, source)
    assert count.asked > 20
    assert count.shown <= share_shown(name, objective) * count.asked
    assert (count.hidden > 10) != (name in OPEN)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "label": lambda label: label if label == IGNORE else 1 - label if label < 2 else 0,
    "taught": lambda taught: np.roll(taught, 1),
    "votes": lambda votes: (votes + 1) % 3,
    "score": lambda score: score + 1.0,
    "tags": lambda tags: np.where(tags == IGNORE, IGNORE, (tags + 1) % 3),
    "start": lambda start: start and start - 1 if start >= 0 else start,
    "end": lambda end: end + 1 if end >= 0 else end,
    "rank": lambda rank: rank[::-1],
}
"""Answers that stand in an example -> others."""
WHOLE = [n for n, (_, source) in ALL_DOCUMENTS.items() if CHANGES.keys() & source(np.random.default_rng(0)).keys()]


@pytest.mark.parametrize("name", WHOLE)
def test_another_answer_moves_nothing_but_the_answer(name: str) -> None:
    objective, source = ALL_DOCUMENTS[name]
    answers = {*objective.labels.values(), *objective.metrics.values(), *ANSWERS}
    moved = 0
    for seed in range(30):
        example = source(np.random.default_rng(seed))
        if "end" in example and example["end"] + 1 >= len(example["tokens"]):
            continue
        other = example | {n: change(example[n]) for n, change in CHANGES.items() if n in example}
        shown, again = (drawn(objective, one, seed) for one in (example, other))
        for field in shown.keys() - answers:
            assert np.array_equal(shown[field], again[field]), f"{field} tells the answer"
        moved += any(not np.array_equal(shown[field], again[field]) for field in shown.keys() & answers)
    assert moved > 10


@pytest.mark.parametrize("noise", ["iid", "spans"])
def test_a_text_that_is_to_be_read_alike_does_not_tell_what_was_masked(noise: Any) -> None:
    """Consistency: the learner's text, where the teacher's is whole."""
    objective, hidden = Consistency(class_names=("a", "b", "c"), noise=noise, mlm_probability=0.3), 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        example = distinct(partly(rng), rng) | {"label": IGNORE}
        shown = drawn(objective, example, seed)
        for token in example["tokens"][shown["tokens"] == VOCAB.mask].tolist():
            other = stand_in(token, example)
            if other is not None:
                again = drawn(objective, changed(example, token, other), seed)
                assert np.array_equal(again["tokens"], shown["tokens"])
                assert other in again["clean"]
                hidden += 1
    assert hidden > 50


def test_the_segment_that_is_not_shown_moves_nothing() -> None:
    """NSP: what would have followed, where a stranger does, and the stranger where it does not."""
    strangers = 0
    for seed in range(40):
        example = ALL_DOCUMENTS["nsp + mlm"][1](np.random.default_rng(seed))
        shown = drawn(NSP() + MLM(), example, seed)
        stranger = int(shown["next"][0])
        unseen = "second" if stranger else "other"
        again = drawn(NSP() + MLM(), example | {unseen: example[unseen][::-1]}, seed)
        assert all(np.array_equal(shown[name], again[name]) for name in shown)
        strangers += stranger
    assert 5 < strangers < 35


class Telling(MLM):
    """The masks lie where all tokens say, the hidden ones too, as ours once did."""

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return super().build_example(example, vocab, np.random.default_rng(zlib.crc32(example["tokens"].tobytes())))


class Ahead(CausalLM):
    """The moments of a text, of which one is off by one."""

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        seen = super().build_example(example, vocab, rng)
        return seen | {"query_time": seen["query_time"] + (np.arange(len(seen["query_time"])) == 2)}


class Told(TokenObjective):
    """A source that is as long as the answer's greatest token says."""

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        source = np.full(3 + int(example["tokens"][-1]) % 2, vocab.mask)
        return layout.seq2seq(source, example["tokens"], vocab.pad)


def test_leaks_are_found() -> None:
    with pytest.raises(AssertionError):
        searched(Telling(), framed)
    with pytest.raises(AssertionError, match="the source tells of a hidden token"):
        searched(Told(), bare)
    assert searched(Ahead(), bare).shown, "a token that is seen where it is asked for is counted, and none may be"


def test_every_objective_is_here_or_hides_nothing() -> None:
    here = {type(one) for objective, _ in ALL_DOCUMENTS.values() for one in addends(objective)}
    for name in objectives.OBJECTIVES:
        assert (objectives.find(name) in here) or name in NOTHING_IS_HIDDEN, name
    asked = {type(one) for n in {*TOKENS, *WHOLE} for one in addends(ALL_DOCUMENTS[n][0])}
    assert here - asked == set(), "each case is in a test"
    assert PseudoLabels in asked
