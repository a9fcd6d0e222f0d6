"""No leaks: what an objective predicts is hidden from the model, for every objective and every way of hiding.

A token is changed in the example, and the training example built again with the same random numbers. At a position that
predicts this token nothing may change of all that it can see: not the tokens, not where the gaps are, not the attention
mask. Visibility is followed through any number of layers, over what the visible tokens see. Where a token is shown on
purpose (a tenth of MLM's, a corrupted text that still holds it) it is counted, and at most the expected share may be.

The label of a whole text (its class, its score) is a field of the example: another label changes only the label fields.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from firth import objectives
from firth.data import attention_fields
from firth.data.collate import Batches, counted_fields
from firth.data.source import Source
from firth.objectives.causal_lm import BiLM, CausalLM
from firth.objectives.classification import MultipleChoice
from firth.objectives.contrastive import Contrastive
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective, Sum, TokenObjective
from firth.objectives.permuted_lm import MPNet
from firth.objectives.policy_gradient import GRPO, PER_TOKEN, PPO, RLOO, Reinforce
from firth.objectives.preferences import DPO, KTO, ORPO, SimPO
from firth.objectives.replaced_tokens import RTD
from firth.objectives.reward_model import Ranking
from firth.objectives.semi_supervised import Consistency, MultiAnnotator, PseudoLabels
from firth.objectives.sentence_pairs import NSP
from firth.objectives.sft import SFT, Seq2SeqSFT
from firth.objectives.token_tasks import LayerMixture, TokenClassification
from firth.objectives.vae import VAE
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Example
from tests.support.objective_cases import (
    CASES,
    VOCAB,
    labeled,
    partially_labeled,
    plain_text,
    some_text,
    special_tokens_text,
    tagged,
)

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


def labeled_answer(rng: np.random.Generator) -> Example:
    rows: Example = {"reference": rng.random(2), "desirable": rng.random(1) < 0.5}
    for prefix in ("", "mismatched_"):
        n = int(rng.integers(6, 14))
        rows |= {f"{prefix}tokens": some_text(rng, n), f"{prefix}mask": np.arange(n) >= 4}
    return rows


def ranked(rng: np.random.Generator) -> Example:
    answers = [some_text(rng, 5 + i) for i in range(3)]
    return {"answers": answers, "masks": [np.arange(len(a)) > 2 for a in answers], "rank": rng.permutation(3)}


def annotated(rng: np.random.Generator) -> Example:
    return labeled(rng) | {"votes": rng.integers(0, 3, 4)}


def question(rng: np.random.Generator) -> Example:
    options = [
        attention_fields.pair(some_text(rng, 4), some_text(rng, int(rng.integers(2, 6))), VOCAB) for _ in range(3)
    ]
    return {"options": options, "label": int(rng.integers(3))}


def similar_pair(rng: np.random.Generator) -> Example:
    return attention_fields.pair(some_text(rng, 6), some_text(rng, 5), VOCAB) | {"label": int(rng.integers(2))}


ALL_CASES: dict[str, tuple[Objective, Callable[[np.random.Generator], Example]]] = CASES | {
    "mlm in n-grams": (MLM(noise="ngrams"), special_tokens_text),
    "mlm in spans": (MLM(noise="geometric"), special_tokens_text),
    "bilm": (BiLM(), plain_text),
    "vae": (VAE(latent_size=3, word_dropout=0.3), plain_text),
    "sft": (SFT(), dialogue),
    "seq2seq": (Seq2SeqSFT(), paired),
    "reinforce": (Reinforce(), dialogue),
    "ppo": (PPO(), dialogue),
    "grpo": (GRPO(), dialogue),
    "rloo": (RLOO(), dialogue),
    "dpo": (DPO(), compared),
    "simpo": (SimPO(), compared),
    "orpo": (ORPO(), compared),
    "kto": (KTO(), labeled_answer),
    "ranking": (Ranking(num_answers=4), ranked),
    "multi annotator": (MultiAnnotator(class_names=("a", "b", "c")), annotated),
    "multiple choice": (MultipleChoice(), question),
    "layer mixture + tagging": (LayerMixture() + TokenClassification(class_names=("a", "b", "c")), tagged),
    "contrastive, labeled": (Contrastive(pairs="labeled"), similar_pair),
    "rtd in spans": (RTD(noise="geometric"), special_tokens_text),
    "mpnet by words": (MPNet(noise="words"), special_tokens_text),
    "consistency in spans": (Consistency(class_names=("a", "b", "c"), noise="spans"), partially_labeled),
}  # fmt: skip
NOTHING_IS_HIDDEN = {
    "word2vec": "each word is encoded by itself and predicts its neighbors: no state sees another token",
    "infonce": "a text is its own positive, encoded twice and in full",
    "reward_model": "both answers are shown in full, each in a row of its own, and the better one always comes first",
    "weight_penalty": "it predicts nothing; with MLM it is among the cases",
}
"""Objectives that are not among the cases -> the reason."""
TOKEN_FIELDS = (
    "tokens",
    "first",
    "second",
    "other",
    "source",
    "target",
    "chosen_tokens",
    "rejected_tokens",
    "mismatched_tokens",
)
"""Fields of an example that hold tokens to predict."""
TOKEN_LABELS = ("labels", "boundary", "next", "previous")
"""Fields of a training example that hold token labels."""
HIDDEN_FIELDS = (
    "sure",
    "clean",
    "votes",
    "similar",
    "alike",
    "compared",
    "starts",
    "ends",
    "choice",
    "rank",
    "preferred",
)
"""Fields of a training example that are not model inputs, besides those named in labels and metrics. (`clean` is the input of
a consistency target.)"""
NOT_HIDDEN = {"denoising by permutation", "denoising by rotation", "vae"}
"""Cases that hide no token from the encoder: only the order, or nothing (an autoencoder)."""


class One(Source):
    """A source of one example."""

    def __init__(self, example: Example) -> None:
        self.example = example

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        return self.example


def build_example(objective: Objective, example: Example, seed: int) -> Example:
    """Build the training example as a run does."""
    [shown] = Batches(One(example), objective, VOCAB, batch_size=1, seed=seed).shown(np.array([3]), np.array([0]))
    return shown


def with_distinct_tokens(example: Example, rng: np.random.Generator) -> Example:
    """Return the example with no ordinary token twice, so that each can be identified."""
    fresh = rng.permutation(VOCAB.ordinary)
    out = dict(example)
    for name in TOKEN_FIELDS:
        if name in out:
            text = np.array(out[name])
            at = np.flatnonzero(text >= FIRST)
            text[at], fresh = fresh[: len(at)], fresh[len(at) :]
            out[name] = text
    return out


def substitute(token: int, example: Example) -> int | None:
    """Return a token missing from the example with the same spelling, so that words and sentences stay the same."""
    assert VOCAB.spelling is not None
    spelled = VOCAB.spelling[token]
    present = np.concatenate([np.ravel(example[name]) for name in TOKEN_FIELDS if name in example])
    like = [t for t in VOCAB.ordinary.tolist() if VOCAB.spelling[t] == spelled and t not in present]
    return like[0] if like else None


def with_token(example: Example, token: int, other: int) -> Example:
    return example | {n: np.where(example[n] == token, other, example[n]) for n in TOKEN_FIELDS if n in example}


def visibility(shown: Example, term: str) -> np.ndarray:
    """Return whether position i can depend on position j, through any number of layers: (rows, T, T)."""
    tokens = np.atleast_2d(shown["tokens"])
    rows, n = tokens.shape
    if term in ("next", "previous") and "query_time" not in shown and "previous" in shown:  # two separate directions
        ahead = np.tri(n, dtype=bool)
        return (ahead if term == "next" else ahead.T)[None]

    def field(name: str, fill: int) -> np.ndarray:
        return np.broadcast_to(np.atleast_2d(shown.get(name, np.full(n, fill))), (rows, n))

    query_time, document = field("query_time", 0)[:, :, None], field("document_ids", 0)
    sees = (field("key_time", 0)[:, None] <= query_time) & (query_time < field("key_expiry", NEVER)[:, None])
    sees &= document[:, None] == document[:, :, None]
    sees |= np.eye(n, dtype=bool)  # a position always sees itself
    for _ in range(n.bit_length()):
        sees = (sees.astype(np.float32) @ sees.astype(np.float32)) > 0
    return sees


@dataclass
class Count:
    """Counts of predicted tokens.

    Args:
        supervised: Tokens with a label.
        shown: Those visible where they are predicted.
        hidden: Those that could be changed and were visible nowhere.
    """

    supervised: int = 0
    shown: int = 0
    hidden: int = 0


def check_no_leaks(
    objective: Objective, example: Example, seed: int, count: Count, source_is_text: bool = False
) -> None:
    """Raise an AssertionError if changing a hidden token changes what is visible. Adds to `count`."""
    shown = build_example(objective, example, seed)
    hidden_fields = {*counted_fields(objective).values(), *HIDDEN_FIELDS, *TOKEN_LABELS}
    source = {name for name in shown if name.startswith("source_")}
    row = sorted(
        n for n in shown.keys() - hidden_fields - source if np.shape(shown[n])[-1:] == shown["tokens"].shape[-1:]
    )
    rest = shown.keys() - hidden_fields - source - set(row)
    texts = [n for n in row if n in ("tokens", "gaps")]
    own_tokens = {t for name in TOKEN_FIELDS if name in example for t in np.ravel(example[name]).tolist() if t >= FIRST}
    for term in set(TOKEN_LABELS) & shown.keys():
        sees = visibility(shown, term)
        for r, p in np.argwhere(np.atleast_2d(shown[term]) != IGNORE):
            token = int(np.atleast_2d(shown[term])[r, p])
            if token not in own_tokens:
                continue
            count.supervised += 1
            if any(token in np.atleast_2d(shown[n])[r, sees[r, p]] for n in texts):
                count.shown += 1
                continue
            other = substitute(token, example)
            if other is None:
                continue
            again = build_example(objective, with_token(example, token, other), seed)
            assert again.keys() == shown.keys()
            assert np.shape(again[term]) == np.shape(shown[term])
            assert np.atleast_2d(again[term])[r, p] == other, "only the label changes to the other token"
            assert np.array_equal(visibility(again, term)[r, p], sees[r, p])
            for name in row:
                was, now = (
                    np.atleast_2d(built[name])[r % len(np.atleast_2d(built[name])), sees[r, p]]
                    for built in (shown, again)
                )
                assert np.array_equal(was, now), f"{name} depends on a hidden token"
            assert all(np.array_equal(shown[n], again[n]) for n in rest)
            if not source_is_text and "source_tokens" in shown and token not in shown["source_tokens"]:
                assert all(np.array_equal(shown[n], again[n]) for n in source), "the source depends on a hidden token"
            count.hidden += token not in shown.get("source_tokens", ())


def count_leaks(objective: Objective, source: Callable[[np.random.Generator], Example]) -> Count:
    count = Count()
    for seed in range(16):
        rng = np.random.default_rng(seed)
        check_no_leaks(
            objective, with_distinct_tokens(source(rng), rng), seed, count, source_is_text=isinstance(objective, VAE)
        )
    return count


def components(objective: Objective) -> Iterator[Objective]:
    if isinstance(objective, Sum):
        yield from (*components(objective.first), *components(objective.second))
    else:
        yield objective


def max_shown_share(name: str, objective: Objective) -> float:
    """Return the largest share of labels that may be visible: a tenth of MLM's are shown unchanged and some tokens recur by
    chance; a corrupted text in the same row holds most of the original."""
    if name == "denoising in one row":
        return 1.0
    return 0.25 if any(isinstance(one, MLM | MPNet) for one in components(objective)) else 0.0


TOKEN_CASES = [
    n for n, (o, source) in ALL_CASES.items()
    if {*TOKEN_LABELS} & o.build_example(source(np.random.default_rng(0)), VOCAB, np.random.default_rng(0)).keys()
]  # fmt: skip
"""The cases that predict tokens."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKEN_CASES)
def test_hidden_tokens_change_nothing_visible(name: str) -> None:
    objective, source = ALL_CASES[name]
    count = count_leaks(objective, source)
    assert count.supervised > 20
    assert count.shown <= max_shown_share(name, objective) * count.supervised
    assert (count.hidden > 10) != (name in NOT_HIDDEN)


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
"""Label field of an example -> a function that changes the label."""
LABELED = [n for n, (_, source) in ALL_CASES.items() if CHANGES.keys() & source(np.random.default_rng(0)).keys()]


@pytest.mark.parametrize("name", LABELED)
def test_labels_change_only_label_fields(name: str) -> None:
    objective, source = ALL_CASES[name]
    hidden_fields = {*counted_fields(objective).values(), *HIDDEN_FIELDS}
    moved = 0
    for seed in range(30):
        example = source(np.random.default_rng(seed))
        if "end" in example and example["end"] + 1 >= len(example["tokens"]):
            continue
        other = example | {n: change(example[n]) for n, change in CHANGES.items() if n in example}
        shown, again = (build_example(objective, one, seed) for one in (example, other))
        for field in shown.keys() - hidden_fields:
            assert np.array_equal(shown[field], again[field]), f"{field} depends on the label"
        moved += any(not np.array_equal(shown[field], again[field]) for field in shown.keys() & hidden_fields)
    assert moved > 10


@pytest.mark.parametrize("noise", ["iid", "spans"])
def test_consistency_hides_the_masked_tokens(noise: Any) -> None:
    """The masked copy does not depend on the masked tokens, though the clean copy holds them."""
    objective, hidden = Consistency(class_names=("a", "b", "c"), noise=noise, mlm_probability=0.3), 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        example = with_distinct_tokens(partially_labeled(rng), rng) | {"label": IGNORE}
        shown = build_example(objective, example, seed)
        for token in example["tokens"][shown["tokens"] == VOCAB.mask].tolist():
            other = substitute(token, example)
            if other is not None:
                again = build_example(objective, with_token(example, token, other), seed)
                assert np.array_equal(again["tokens"], shown["tokens"])
                assert other in again["clean"]
                hidden += 1
    assert hidden > 50


def test_the_unused_segment_changes_nothing() -> None:
    """NSP: the true continuation where a random segment is shown, and the random segment where it is not."""
    num_random = 0
    for seed in range(40):
        example = ALL_CASES["nsp + mlm"][1](np.random.default_rng(seed))
        shown = build_example(NSP() + MLM(), example, seed)
        is_random = int(shown["next"][0])
        unseen = "second" if is_random else "other"
        again = build_example(NSP() + MLM(), example | {unseen: example[unseen][::-1]}, seed)
        assert all(np.array_equal(shown[name], again[name]) for name in shown)
        num_random += is_random
    assert 5 < num_random < 35


class LeakyMasks(MLM):
    """MLM whose masks depend on all tokens, the masked ones too (a former bug)."""

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return super().build_example(example, vocab, np.random.default_rng(zlib.crc32(example["tokens"].tobytes())))


class LeakyCausalMask(CausalLM):
    """Causal LM with one query time off by one."""

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        seen = super().build_example(example, vocab, rng)
        return seen | {"query_time": seen["query_time"] + (np.arange(len(seen["query_time"])) == 2)}


class LeakySource(TokenObjective):
    """A source whose length depends on the last token of the target."""

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        source = np.full(3 + int(example["tokens"][-1]) % 2, vocab.mask)
        return attention_fields.seq2seq(source, example["tokens"], vocab.pad)


def test_leaks_are_found() -> None:
    with pytest.raises(AssertionError):
        count_leaks(LeakyMasks(), special_tokens_text)
    with pytest.raises(AssertionError, match="the source depends on a hidden token"):
        count_leaks(LeakySource(), plain_text)
    assert count_leaks(LeakyCausalMask(), plain_text).shown, "tokens visible where they are predicted are counted"


def test_every_objective_is_a_case_or_hides_nothing() -> None:
    here = {type(one) for objective, _ in ALL_CASES.values() for one in components(objective)}
    for name in objectives.OBJECTIVES:
        assert (objectives.find(name) in here) or name in NOTHING_IS_HIDDEN, name
    tested = {type(one) for n in {*TOKEN_CASES, *LABELED} for one in components(ALL_CASES[n][0])}
    assert here - tested == set(), "each case is in a test"
    assert PseudoLabels in tested
