"""Agreement of annotators: Cohen's kappa equals scikit-learn's, Fleiss' kappa the example of its paper."""

from __future__ import annotations

import numpy as np
import pytest

from firth.evaluate.ratings import cohen_kappa, fleiss_kappa

metrics = pytest.importorskip("sklearn.metrics", reason="the oracle; installed with the test extra")

DIAGNOSES = """
0 0 0 6 0  0 3 0 0 3  0 1 4 0 1  0 0 0 0 6  0 3 0 3 0  2 0 4 0 0  0 0 4 0 2  2 0 3 1 0  2 0 0 4 0  0 0 0 0 6
1 0 0 5 0  1 1 0 4 0  0 3 3 0 0  1 0 0 5 0  0 2 0 3 1  0 0 5 0 1  3 0 0 1 2  5 1 0 0 0  0 2 0 4 0  1 0 2 0 3
0 0 0 0 6  0 1 0 5 0  0 2 0 1 3  2 0 0 4 0  1 0 0 4 1  0 5 0 1 0  4 0 0 0 2  0 2 0 4 0  1 0 5 0 0  0 0 0 0 6
"""
"""Diagnoses of 30 patients by six psychiatrists, in five categories (Fleiss 1971, table 1)."""


@pytest.mark.parametrize("categories", [2, 3, 7])
@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0])
def test_cohens_kappa_equals_that_of_scikit_learn(categories: int, noise: float) -> None:
    rng = np.random.default_rng(categories)
    first = rng.integers(categories, size=200)
    second = np.where(rng.random(200) < noise, rng.integers(categories, size=200), first)
    ours = cohen_kappa(first.tolist(), second.tolist())
    assert ours == pytest.approx(metrics.cohen_kappa_score(first, second), abs=1e-12)


def test_fleiss_kappa_of_the_paper() -> None:
    """The paper gives the totals of the categories, a mean agreement of 0.555, 0.220 by chance, and kappa 0.430."""
    counts = np.array(DIAGNOSES.split(), int).reshape(30, 5)
    assert counts.sum(0).tolist() == [26, 26, 30, 55, 43]
    assert round(fleiss_kappa(counts), 3) == 0.430


def test_fleiss_kappa_of_two_equals_scotts_pi() -> None:
    """For two annotators it is Cohen's kappa of the table and its transpose, whose margins are equal."""
    rng = np.random.default_rng(0)
    first = rng.integers(3, size=100)
    second = np.where(rng.random(100) < 0.5, rng.integers(3, size=100), first)
    counts = np.eye(3)[first] + np.eye(3)[second]
    both = metrics.cohen_kappa_score([*first, *second], [*second, *first])
    assert fleiss_kappa(counts) == pytest.approx(both, abs=1e-12)


def test_undefined_kappas() -> None:
    assert np.isnan(cohen_kappa(["a", "a"], ["a", "a"])) and np.isnan(fleiss_kappa(np.array([[2, 0], [2, 0]])))
    for counts in ([], [[1, 0]], [[2, 0], [2, 1]]):
        with pytest.raises(ValueError, match="same number of annotators"):
            fleiss_kappa(np.array(counts))
    with pytest.raises(ValueError, match="same items"):
        cohen_kappa(["a"], [])
