"""Task metrics against the libraries that define them: scikit-learn, SciPy, conlleval, seqeval, SQuAD, sacrebleu."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, precision_recall_fscore_support

from firth.data.labels import names, to_bio2
from firth.evaluate import evaluate, metrics
from firth.evaluate.heads import MAX_ANSWER_TOKENS, best_span
from firth.evaluate.predict import predict
from firth.model.config import encoder_decoder_config
from firth.model.model import LM
from firth.objectives.classification import classification_head
from firth.pretrained.load_save import save_model
from firth.types import UserError
from tests.support.tiny_corpus import tokenizer


def test_correlations_and_f1_equal_scipy_and_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 50).astype(float), rng.normal(size=50).round(1)
    assert metrics.pearson(a, b) == pytest.approx(pearsonr(a, b).statistic, abs=1e-12)
    assert metrics.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert metrics.pearson([1, 1], [2, 3]) == 0
    gold, predicted = rng.integers(0, 2, 60), rng.integers(0, 2, 60)
    assert metrics.f1(gold == 1, predicted == 1) == pytest.approx(f1_score(gold, predicted))
    gold, predicted = rng.integers(0, 4, 80), rng.integers(0, 5, 80)
    theirs = precision_recall_fscore_support(gold, predicted, labels=range(5), zero_division=0)
    ours = metrics.per_class(gold, predicted, range(5))
    for i, row in enumerate(ours):
        assert [row["precision"], row["recall"], row["f1"], row["examples"]] == pytest.approx([t[i] for t in theirs])


def conlleval(tags: list[str]) -> list[tuple[str, int, int]]:
    """Return the entities of tags by startOfChunk and endOfChunk of the Perl script."""
    found, start, before, kind_before = [], 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        ends = (before, mark) in {("B", "B"), ("B", "O"), ("I", "B"), ("I", "O"), ("E", "E"), ("E", "I"), ("E", "O")}
        ends |= (before, mark) in {("B", "S"), ("I", "S"), ("E", "B"), ("E", "S")}
        ends |= before != "O" and kind_before != kind
        ends |= before == "S"
        begins = (before, mark) in {("B", "B"), ("I", "B"), ("O", "B"), ("O", "I"), ("E", "E"), ("E", "I"), ("O", "E")}
        begins |= mark != "O" and (kind_before != kind or mark == "S" or before == "S" or mark == "B")
        if i and before != "O" and ends:
            found.append((kind_before, start, i))
        if begins:
            start = i
        before, kind_before = mark, kind
    return found


HARD = [
    ["I-PER", "I-PER", "O", "B-PER", "I-LOC", "I-LOC"],
    ["B-PER", "B-PER", "I-PER", "I-ORG", "O", "I-ORG"],
    ["O", "E-PER", "I-PER", "S-LOC", "S-LOC", "I-LOC", "B-ORG", "E-ORG", "I-ORG"],
    ["B-MISC"], ["O"], [],
]  # fmt: skip


def test_entities_equal_conlleval() -> None:
    rng = np.random.default_rng(0)
    kinds = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "S-PER", "E-LOC"]
    for tags in [*HARD, *([kinds[i] for i in rng.integers(0, 8, 12)] for _ in range(300))]:
        assert names(tags) == conlleval(tags), tags
        plain = [tag for tag in tags if tag[0] in "OBI"]
        assert names(to_bio2(plain)) == names(plain)


def test_entity_metrics_equal_seqeval() -> None:
    seqeval = pytest.importorskip("seqeval.metrics", reason="the oracle, where it is installed")
    rng = np.random.default_rng(1)
    kinds = ["O", "O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    draw = [[[kinds[i] for i in rng.integers(0, 7, 15)] for _ in range(100)] for _ in range(2)]
    gold, predicted = (HARD[:2] + draw[0]), (HARD[1::-1] + draw[1])
    counted = np.array([metrics.entity_counts(a, b) for a, b in zip(gold, predicted, strict=True)]).T
    ours = metrics.entity_scores(*counted)
    assert ours["f1"] == pytest.approx(seqeval.f1_score(gold, predicted))
    assert ours["precision"] == pytest.approx(seqeval.precision_score(gold, predicted))
    assert ours["recall"] == pytest.approx(seqeval.recall_score(gold, predicted))
    theirs = seqeval.classification_report(gold, predicted, output_dict=True)
    for row in metrics.by_kind(list(zip(gold, predicted, strict=True))):
        assert (row["f1"], row["examples"]) == pytest.approx(
            (theirs[row["class"]]["f1-score"], theirs[row["class"]]["support"])
        )


def test_entity_f1_by_hand() -> None:
    """Two gold entities, one found, and one false positive: precision and recall of a half."""
    gold, predicted = ["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "I-PER", "B-ORG", "O"]
    counted = np.array([metrics.entity_counts(gold, predicted)]).T
    assert metrics.entity_scores(*counted) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}


@pytest.mark.parametrize(("golds", "answer", "exact", "f1"), [
    (["the Broncos", "Denver Broncos"], "Denver Broncos!", 1.0, 1.0),
    (["a cat"], "The  CAT", 1.0, 1.0),
    (["Denver Broncos"], "Broncos", 0.0, 2 / 3),
    (["1901", "in the year 1901"], "in 1901", 0.0, 0.8),
    (["the the end"], "end end", 0.0, 2 / 3),
    ([], "", 1.0, 1.0),
    ([], "something", 0.0, 0.0),
    (["something"], "", 0.0, 0.0),
])  # fmt: skip
def test_squad_metrics(golds: list[str], answer: str, exact: float, f1: float) -> None:
    """Lower case, no articles or punctuation; bags of words; the best gold answer; no gold answer is the empty text."""
    assert metrics.squad(golds, answer) == pytest.approx((exact, f1))


def test_the_best_span_is_the_best_of_all_allowed_spans() -> None:
    rng = np.random.default_rng(0)
    for n in (5, 60):
        scores = rng.normal(size=(n, 2))
        offsets = np.stack([np.arange(n) * 2, np.arange(n) * 2 + 1], -1)
        offsets[: n // 4] = -1
        found = best_span(scores, offsets, 0)
        every = {
            (a, b): scores[a, 0] + scores[b, 1]
            for a in range(n) for b in range(a, min(n, a + MAX_ANSWER_TOKENS)) if min(a, b) >= n // 4
        }  # fmt: skip
        a, b = max(every, key=lambda ends: every[ends])
        assert (found.start, found.end) == (offsets[a, 0], offsets[b, 1])
        assert found.score == pytest.approx(every[a, b])
        share = np.exp(scores - scores.max(0)) / np.exp(scores - scores.max(0)).sum(0)
        assert found.probability == pytest.approx(share[a, 0] * share[b, 1])
        assert found.no_answer_score == scores[0].sum()
    assert best_span(np.zeros((3, 2)), np.full((3, 2), -1), 0).score == -np.inf


REFERENCES = ["the cat sat on the mat today", "she walks home in the rain", "it is so"]
TEXTS = ["the cat is on the mat today", "she walked home in rain", "so it is, it is"]


def test_bleu_equals_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the oracle, where it is installed")
    assert metrics.bleu(*metrics.bleu_counts(REFERENCES, TEXTS)) == pytest.approx(
        sacrebleu.corpus_bleu(TEXTS, [REFERENCES]).score
    )
    assert metrics.chrf(REFERENCES, REFERENCES) == pytest.approx(100)


def test_rouge_equals_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="the oracle, where it is installed")
    found = metrics.rouge_scores(REFERENCES, TEXTS)
    theirs = scorer.RougeScorer(["rouge2"], use_stemmer=True)
    assert found[1].tolist() == [theirs.score(a, b)["rouge2"].fmeasure for a, b in zip(REFERENCES, TEXTS, strict=True)]


def test_a_missing_library_is_named() -> None:
    with pytest.raises(UserError, match="which is not installed: pip install no-such-library"):
        metrics.library("no_such_library", "no-such-library")


def test_the_glue_score() -> None:
    found = {name: dict.fromkeys(numbers, 0.8) for name, numbers in evaluate.GLUE_METRICS.items()}
    assert evaluate.glue_score(found) == pytest.approx(80)
    assert evaluate.glue_score(found | {"mnli": {"accuracy": 0.8, "accuracy_mismatched": 0.6}}) == pytest.approx(
        80 - 10 / 9
    )
    with pytest.raises(UserError, match="no task 'ax'"):
        evaluate.glue_score({"ax": {"accuracy": 1.0}})
    with pytest.raises(UserError, match="cola is scored by matthews"):
        evaluate.glue_score({"cola": {"accuracy": 1.0}})


def test_foreign_classifiers_with_other_readouts_are_refused(tmp_path: Path) -> None:
    """XLNet's, T5's and BART's classifiers read a position that firth does not support; firth's own predict."""
    vocab_tokenizer = tokenizer()
    config = encoder_decoder_config(vocab_tokenizer.vocab.size, 32, 1, num_heads=2, max_positions=32)
    model = LM(config, {"classes": classification_head(32, 2)})
    for name, metadata in (("theirs", {}), ("ours", {"recipe": "0"})):
        save_model(model, vocab_tokenizer, tmp_path / name, {"classes": ["bad", "good"], **metadata})
    assert next(predict(tmp_path / "ours", "-", io.BytesIO(b"a fine text\n")))["label"] in ("bad", "good")
    with pytest.raises(
        UserError, match="classifier was not trained by firth and reads its label from a position after the text"
    ):
        next(predict(tmp_path / "theirs", "-", io.BytesIO(b"a fine text\n")))
