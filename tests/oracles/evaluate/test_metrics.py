"""Metrics against scikit-learn and SciPy, and against values computed by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as oracle
from sklearn.calibration import calibration_curve

from firth.evaluate import metrics
from firth.types import UserError


def labels(seed, n=200, classes=4):
    """Return gold labels and predictions better than chance, with rare classes, one of them never predicted."""
    rng = np.random.default_rng(seed)
    gold = rng.choice(classes, n, p=[0.55, 0.3, 0.1, 0.05][:classes])
    predicted = np.where(rng.random(n) < 0.5, gold, rng.integers(classes - 1, size=n))
    return gold, predicted


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scikit_learn(seed):
    gold, predicted = labels(seed)
    assert metrics.accuracy(gold, predicted) == pytest.approx(oracle.accuracy_score(gold, predicted))
    assert metrics.macro_f1(gold, predicted) == pytest.approx(oracle.f1_score(gold, predicted, average="macro"))
    assert metrics.matthews(gold, predicted) == pytest.approx(oracle.matthews_corrcoef(gold, predicted))
    assert (metrics.confusion(gold, predicted) == oracle.confusion_matrix(gold, predicted)).all()
    assert metrics.macro_f1(gold, predicted) != pytest.approx(oracle.f1_score(gold, predicted, average="micro"))


@pytest.mark.parametrize("decimals", [1, 6])
def test_roc_auc_agrees_with_scikit_learn(decimals):
    """With one decimal half of the scores are tied with one of the other class."""
    rng = np.random.default_rng(decimals)
    positive = rng.random(300) < 0.2
    scores = np.round(rng.normal(size=300) + positive, decimals)
    assert metrics.roc_auc(positive, scores) == pytest.approx(oracle.roc_auc_score(positive, scores), abs=1e-12)
    assert metrics.roc_auc(positive, -scores) == pytest.approx(1 - metrics.roc_auc(positive, scores), abs=1e-12)
    assert metrics.roc_auc(np.zeros(300, bool), scores) == 0.5


def test_labels_may_be_words():
    gold, predicted = ["verse", "prose", "verse", "verse"], ["verse", "verse", "verse", "song"]
    assert metrics.accuracy(gold, predicted) == 0.5
    assert metrics.macro_f1(gold, predicted) == pytest.approx(
        oracle.f1_score(gold, predicted, average="macro", zero_division=0)
    )


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_calibration_error_agrees_with_scikit_learn(sharpness):
    """The probabilities are calibrated for a sharpness of 1, too timid below and too certain above."""
    rng = np.random.default_rng(0)
    margin = rng.normal(size=4000) * 2
    correct = rng.random(4000) < 1 / (1 + np.exp(-margin))
    probability = 1 / (1 + np.exp(-sharpness * margin))
    found = metrics.calibration_error(probability, correct)
    shares, means = calibration_curve(correct, probability, n_bins=10)
    counts = np.histogram(probability, np.linspace(0, 1, 11))[0]
    assert found == pytest.approx((np.abs(shares - means) * counts[counts > 0]).sum() / 4000, abs=1e-9)
    assert (found < 0.02) == (sharpness == 1.0)


@pytest.mark.parametrize(("gold", "predicted"), [([0, 1, 0, 1], [1, 1, 1, 1]), ([2, 2, 2], [2, 2, 2])])
def test_matthews_where_one_side_is_constant(gold, predicted):
    assert metrics.matthews(gold, predicted) == 0.0 == oracle.matthews_corrcoef(gold, predicted)


@pytest.mark.slow
def test_bootstrap_agrees_with_scipy_and_has_its_coverage():
    values = np.random.default_rng(0).normal(size=80)
    ours = metrics.bootstrap(np.mean, values, draws=4000, seed=0)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.02)
    covered = 0
    for seed in range(200):
        sample = np.random.default_rng(seed).random(60) < 0.7
        low, high = metrics.bootstrap(np.mean, sample, draws=200, seed=seed)
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 199  # 95% of 200 is 190; five standard deviations is 15


def test_bootstrap_resamples_columns_together():
    gold = np.arange(50)
    assert metrics.bootstrap(metrics.accuracy, gold, gold) == (1.0, 1.0)


def test_bits_and_perplexity():
    assert metrics.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert metrics.bits_per_byte(3 * math.log(2), 12) == pytest.approx(0.25)
    assert metrics.perplexity(1e6, 10) == math.inf


def test_exact_match_normalizes_as_squad_does():
    gold = ["the Denver Broncos", "1,000", "an A-frame", "Theatre"]
    predicted = ["Denver Broncos!", "1000", "Aframe", "the atre"]
    assert metrics.exact_match(gold, predicted) == 0.75


def test_empty_and_unequal_columns_are_errors():
    with pytest.raises(UserError, match="holds no item"):
        metrics.accuracy([], [])
    with pytest.raises(ValueError, match="different lengths"):
        metrics.accuracy([1], [1, 2])
