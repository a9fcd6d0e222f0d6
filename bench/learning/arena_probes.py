"""Six probes that ask for language, each answered by a linear classifier on the frozen states of a model.

tags           the part of speech of a word (Brown corpus, ten classes)
names          the kind of name that a word belongs to, or none (contracts)
questions      whether a sentence was a question; its final mark is removed (Brown corpus)
acceptability  whether a sentence is grammatical: minimal pairs, both sentences of a pair on one side of the split
neighbors      whether two sentences follow each other or are of different documents (Brown corpus)
sentiment      whether a sentence of a movie review is positive

A text is encoded once per model. Its features are the states of all layers, one after another: of a word, the mean over its
tokens; of a sentence, the mean over all tokens; of two sentences, the absolute difference and the product of theirs. A ridge
classifier, whose penalty is chosen by leave-one-out error among the labels alone, learns from 100 or 500 of them, drawn five
times. None of the texts is pretrained on.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from firth.corpora import catalog
from firth.corpora.prepare import sentence
from firth.generate.decoding_batch import inference_mode, rectangle
from firth.model.attention import prefixed_fields
from firth.model.model import LM
from firth.tokenizer.tokenizer import Tokenizer

LABELS, DRAWS = (100, 500), 5
NUM_TEST, NUM_POOL = 2000, 3000
"""Most test records, and most records that the labels are drawn from."""

MAX_BATCH_TOKENS = 8192
MAX_WORDS = 100
"""Words of a long sentence after these are not used: a model may not read so far."""

PENALTIES = np.logspace(0, 5, 11)
TEST_SHARE = 0.4
"""Share of the groups (documents, pairs) that are only tested on."""


@dataclass(frozen=True)
class Probe:
    """Records of a probe.

    Args:
        name: Its name.
        texts: The texts to encode, each a list of words or one string.
        items: The texts of each record: (text,), (text, word) or (text, other text), as indices.
        words: Whether the second index is a word.
        labels: The class of each record.
        groups: What each record is from; a group is either trained on or tested on.
    """

    name: str
    texts: Sequence[Sequence[str] | str]
    items: Sequence[tuple[int, ...]]
    words: bool
    labels: np.ndarray
    groups: np.ndarray

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the records that labels are drawn from, and of those that are tested."""
        groups = np.unique(self.groups)
        np.random.default_rng(0).shuffle(groups)
        tested = np.isin(self.groups, groups[: round(TEST_SHARE * len(groups))])
        return np.flatnonzero(~tested)[:NUM_POOL], np.flatnonzero(tested)[:NUM_TEST]


COARSE = {
    "nn": "noun", "np": "name", "vb": "verb", "jj": "adjective", "rb": "adverb", "at": "article", "in": "preposition", "pp": "pronoun",
    "cc": "conjunction", "cs": "conjunction", "cd": "number",
}  # fmt: skip
"""First letters of a tag of the Brown corpus -> part of speech; other words are not used."""


def _rows(corpus: str, file: str) -> list[dict[str, Any]]:
    path = catalog.fetch(corpus, lambda _: None) / file
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _brown() -> list[dict[str, Any]]:
    """Return the tagged sentences of 5 to 25 words, in a fixed random order."""
    rows = [row | {"place": i} for i, row in enumerate(_rows("brown", "tagged.jsonl")) if 5 <= len(row["tokens"]) <= 25]
    return [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]


def _balanced(found: dict[str, list[Any]], most: int) -> list[tuple[str, Any]]:
    """Return as many records of each class as the rarest has, at most `most` in all, in a random order."""
    few = min(most // len(found), *map(len, found.values()))
    rows = [(label, row) for label, some in sorted(found.items()) for row in some[:few]]
    return [rows[i] for i in np.random.default_rng(2).permutation(len(rows))]


def _of_words(name: str, found: dict[str, list[tuple[int, int]]], texts: list[list[str]], groups: list[str]) -> Probe:
    rows = _balanced(found, NUM_TEST + NUM_POOL)
    used = sorted({text for _, (text, _) in rows})
    place = {text: i for i, text in enumerate(used)}
    return Probe(
        name, [texts[i] for i in used], [(place[text], word) for _, (text, word) in rows], True,
        np.array([label for label, _ in rows]), np.array([groups[text] for _, (text, _) in rows]),
    )  # fmt: skip


def tags() -> Probe:
    rows = _brown()[:2500]
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, row in enumerate(rows):
        for j, (word, tag) in enumerate(zip(row["tokens"], row["tags"], strict=True)):
            label = COARSE.get(tag[:2])
            if label and word.isalnum():
                found[label].append((i, j))
    return _of_words("tags", found, [row["tokens"] for row in rows], [row["document"] for row in rows])


def names() -> Probe:
    rows = _rows("ner_finance", "ner_finance.jsonl")
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, row in enumerate(rows):
        for j, (word, tag) in enumerate(zip(row["tokens"], row["tags"], strict=True)):
            if word.isalnum() and j < MAX_WORDS:
                found[tag.partition("-")[2] or "none"].append((i, j))
    for some in found.values():
        np.random.default_rng(3).shuffle(some)
    few = {label: some for label, some in found.items() if len(some) >= 100}
    return _of_words("names", few, [row["tokens"][:MAX_WORDS] for row in rows], [str(i) for i in range(len(rows))])


def questions() -> Probe:
    found: dict[str, list[dict[str, Any]]] = {"question": [], "statement": []}
    for row in _brown():
        if row["tokens"][-1] in ("?", "."):
            found["question" if row["tokens"][-1] == "?" else "statement"].append(row)
    rows = _balanced(found, NUM_TEST + NUM_POOL)
    texts = [re.sub(r"\W+$", "", sentence(row["tokens"])) for _, row in rows]
    return _of_texts("questions", texts, [label for label, _ in rows], [row["document"] for _, row in rows])


def _of_texts(name: str, texts: list[str], labels: list[str], groups: list[str]) -> Probe:
    return Probe(name, texts, [(i,) for i in range(len(texts))], False, np.array(labels), np.array(groups))


def acceptability() -> Probe:
    rows = _rows("minimal_pairs", "pairs.jsonl")
    texts = [row[f"sentence_{label}"] for row in rows for label in ("good", "bad")]
    return _of_texts(
        "acceptability", texts, ["good", "bad"] * len(rows), [str(i) for i in range(len(rows)) for _ in "ab"]
    )


def neighbors() -> Probe:
    rows = _brown()
    by_place = {row["place"]: row for row in rows}
    pairs = [(row, by_place[row["place"] + 1]) for row in rows if row["place"] + 1 in by_place]
    pairs = [(a, b) for a, b in pairs if a["document"] == b["document"]][: (NUM_TEST + NUM_POOL) // 2]
    texts = [sentence(row["tokens"]) for pair in pairs for row in pair]
    documents = [a["document"] for a, _ in pairs]
    items, labels = [(2 * i, 2 * i + 1) for i in range(len(pairs))], ["neighbors"] * len(pairs)
    # A stranger is the second sentence of another pair, of a document on the same side of the split.
    split = _of_texts("", documents, documents, documents).split()
    for side in (np.isin(documents, np.array(documents)[part]) for part in split):
        own = np.flatnonzero(side)
        for i, j in zip(own, np.roll(own, 1), strict=True):
            if documents[i] != documents[j]:
                items.append((2 * i, 2 * j + 1))
                labels.append("strangers")
                documents.append(documents[i])
    order = np.random.default_rng(4).permutation(len(items))
    return Probe(
        "neighbors", texts, [items[i] for i in order], False, np.array(labels)[order], np.array(documents)[order]
    )


def sentiment() -> Probe:
    found: dict[str, list[str]] = defaultdict(list)
    rows = _rows("sentiment", "sentiment.jsonl")
    for i in np.random.default_rng(5).permutation(len(rows)):
        found[rows[i]["label"]].append(rows[i]["text"])
    both = _balanced(found, NUM_TEST + NUM_POOL)
    return _of_texts("sentiment", [text for _, text in both], [label for label, _ in both], [text for _, text in both])


PROBES: dict[str, Callable[[], Probe]] = {
    "tags": tags, "names": names, "questions": questions, "acceptability": acceptability, "neighbors": neighbors, "sentiment": sentiment,
}  # fmt: skip


def _layers(model: LM, rows: Sequence[np.ndarray]) -> torch.Tensor:
    """Return the states of all layers, (B, T, layers * hidden_size)."""
    encoder = model.encoder
    batch = rectangle(rows, model.tokens.weight.device, causal=model.config.causal and encoder is None)
    if encoder is None:
        states = list(model.all_hidden_states(batch))
    else:
        source = {f"source_{name}": field for name, field in batch.items()}
        fields = prefixed_fields(source, "source_")
        states = [*encoder.block_inputs(model.embed(fields, True), fields), model.encode(source)]
    return torch.cat(states, -1).float()


def encode(model: LM, tokenizer: Tokenizer, probe: Probe) -> np.ndarray:
    """Return the features of every record, (records, features) float32."""
    special = "cls" in tokenizer.vocab.roles and "sep" in tokenizer.vocab.roles
    rows, spans = [], []
    for text in probe.texts:
        pieces = [tokenizer.encode(text)] if isinstance(text, str) else [tokenizer.encode(f" {word}") for word in text]
        ends = np.cumsum([len(piece) for piece in pieces]) + special
        tokens = np.concatenate(pieces)[: model.context - 1 - special]
        rows.append(tokenizer.vocab.add_special_tokens(tokens) if special else np.append(tokens, tokenizer.vocab.eos))
        spans.append(np.minimum(np.concatenate([[special], ends]), len(rows[-1]) - 1))
    wanted: dict[int, list[int]] = defaultdict(list)
    if probe.words:
        for text, word in probe.items:
            wanted[text].append(word)
    vectors: dict[tuple[int, ...], np.ndarray] = {}
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    with inference_mode(model):
        while order:
            batch = order[: max(1, MAX_BATCH_TOKENS // len(rows[order[0]]))]
            states = _layers(model, [rows[i] for i in batch])
            for i, some in zip(batch, states, strict=True):
                if probe.words:
                    for word in wanted[i]:
                        start, end = spans[i][word], max(spans[i][word] + 1, spans[i][word + 1])
                        vectors[i, word] = some[start:end].mean(0).numpy()
                else:
                    vectors[i,] = some[: len(rows[i])].mean(0).numpy()
            order = order[len(batch) :]
    return _features(probe, vectors)


def _features(probe: Probe, vectors: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    if probe.words or len(probe.items[0]) == 1:
        return np.stack([vectors[item] for item in probe.items])
    pairs = [(vectors[a,], vectors[b,]) for a, b in probe.items]
    return np.stack([np.concatenate([np.abs(a - b), a * b]) for a, b in pairs])


def score(probe: Probe, features: Any, fit: Callable[[], Any]) -> dict[str, list[float]]:
    """Return the accuracy on the test records for each number of labels and each draw.

    Args:
        probe: The probe.
        features: What the classifier reads, one row per record: an array or a sparse matrix.
        fit: Returns a new classifier of scikit-learn.
    """
    pool, tested = probe.split()
    found: dict[str, list[float]] = {}
    for labels in LABELS:
        for draw in range(DRAWS):
            drawn = np.random.default_rng((draw, labels)).permutation(pool)[:labels]
            classifier = fit().fit(features[drawn], probe.labels[drawn])
            found.setdefault(str(labels), []).append(float(classifier.score(features[tested], probe.labels[tested])))
    return found


def linear() -> Any:
    """Return the classifier of all models: standardized features, ridge regression to the classes."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))


def words_baseline(probe: Probe) -> dict[str, list[float]]:
    """Return the scores of a logistic regression on what a user would count first.

    tf-idf of words and pairs of words for sentences; for two sentences the product and the absolute difference of theirs; for
    a word itself, its beginning and end, its case and its neighbors.
    """
    from scipy.sparse import hstack
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if probe.words:
        rows = [_word_features(probe.texts[text], word) for text, word in probe.items]
        features = DictVectorizer().fit_transform(rows).tocsr()
    else:
        table = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]").fit_transform(probe.texts).tocsr()
        features = table[[item[0] for item in probe.items]]
        if len(probe.items[0]) == 2:
            other = table[[item[1] for item in probe.items]]
            features = hstack([features.multiply(other), abs(features - other)]).tocsr()
    return score(probe, features, lambda: LogisticRegression(C=10, max_iter=2000))


def _word_features(words: Sequence[str] | str, at: int) -> dict[str, str]:
    word = words[at]
    return {
        "word": word.lower(), "end": word[-3:].lower(), "end2": word[-2:].lower(), "start": word[:2].lower(),
        "case": "upper" if word.isupper() else "title" if word.istitle() else "digits" if word.isdigit() else "lower",
        "before": words[at - 1].lower() if at else "<s>", "after": words[at + 1].lower() if at + 1 < len(words) else "</s>",
    }  # fmt: skip
