"""The order of a run: every epoch is a uniform permutation, mixtures keep their proportions, and resuming needs one number."""

from __future__ import annotations

import numpy as np
import pytest

from firth.data.shuffle import ExampleRNG, epoch_permutation
from firth.data.source import MixtureSource
from firth.types import UserError
from tests.support.tiny_corpus import Counting


@pytest.mark.parametrize("n", [1, 2, 3, 7, 255, 256, 257, 1000, 65537])
def test_every_epoch_is_a_permutation(n: int) -> None:
    epoch, index = epoch_permutation(n, 3, np.arange(3 * n))
    for e in range(3):
        assert (epoch[e * n : (e + 1) * n] == e).all()
        assert np.array_equal(np.sort(index[e * n : (e + 1) * n]), np.arange(n))


def test_epochs_and_seeds_differ() -> None:
    n = 1000
    drawn = [epoch_permutation(n, seed, np.arange(n) + e * n)[1] for seed in (0, 1) for e in (0, 1)]
    for i in range(4):
        for j in range(i):
            # Two random permutations agree in one place on average.
            assert (drawn[i] == drawn[j]).sum() < 10


def test_any_range_of_positions_gives_the_same_order() -> None:
    whole = epoch_permutation(97, 5, np.arange(400))
    for start in (0, 1, 96, 97, 300):
        part = epoch_permutation(97, 5, np.arange(start, start + 50))
        assert np.array_equal(part[0], whole[0][start : start + 50])
        assert np.array_equal(part[1], whole[1][start : start + 50])


def test_permutations_are_uniform() -> None:
    """All 24 permutations of four examples are equally likely (chi-square, 23 degrees of freedom, p = 1e-4 at 55)."""
    epochs = 24_000
    drawn = epoch_permutation(4, 0, np.arange(4 * epochs))[1].reshape(epochs, 4)
    count = np.unique(drawn @ np.array([64, 16, 4, 1]), return_counts=True)[1]
    assert len(count) == 24
    assert ((count - 1000) ** 2 / 1000).sum() < 55


def test_positions_and_successors_are_uniform() -> None:
    """Over many epochs, positions and successors of an example are uniform."""
    n, epochs = 20, 8000
    drawn = epoch_permutation(n, 1, np.arange(n * epochs))[1].reshape(epochs, n)
    place = np.stack([np.bincount(drawn[:, k], minlength=n) for k in range(n)])
    assert ((place - epochs / n) ** 2 / (epochs / n)).sum() < 480  # 361 degrees of freedom, p = 2e-5
    pairs = np.bincount((drawn[:, :-1] * n + drawn[:, 1:]).ravel(), minlength=n * n).reshape(n, n)
    expected = epochs / n
    others = pairs[~np.eye(n, dtype=bool)]
    assert ((others - expected) ** 2 / expected).sum() < 480


def test_draws_are_a_function_of_seed_epoch_and_index() -> None:
    draws, again = ExampleRNG(7, "view"), ExampleRNG(7, "view")
    first = draws.at(2, 9).random(5)
    draws.at(0, 1).integers(10, size=3)  # leaves half a word in the generator's buffer
    assert np.array_equal(first, draws.at(2, 9).random(5))
    assert np.array_equal(first, again.at(2, 9).random(5))
    seen = {ExampleRNG(s, "view").at(e, i).random() for s in range(5) for e in range(5) for i in range(5)}
    assert len(seen) == 125


def test_draws_are_uniform_across_examples() -> None:
    draws = ExampleRNG(0, "view")
    first = np.array([draws.at(e, i).random() for e in range(10) for i in range(1000)])
    assert abs(first.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / 100
    assert np.abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.04


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (5, 3, 1, 1, 1, 1), (0.123456789, 3.3, 1e-4), (1, 1, 1)])
def test_a_mixture_keeps_its_proportions(weights: tuple[float, ...]) -> None:
    sources = [Counting(n) for n in (5, 50, 500, 11, 3, 2)[: len(weights)]]
    mixture = MixtureSource(sources, weights)
    _, index = mixture.order(0, np.arange(70_000))
    which = np.searchsorted(mixture._starts, index, side="right") - 1
    share = np.array(mixture.quotas) / sum(mixture.quotas)
    assert np.abs(share - np.array(weights) / sum(weights)).max() < 1 / 65536 + 1e-12
    for i, s in enumerate(share):
        off = (which == i).cumsum() - s * np.arange(1, 70_001)
        assert np.abs(off).max() < 1


def test_each_source_of_a_mixture_has_its_own_epochs() -> None:
    mixture = MixtureSource([Counting(5), Counting(40)], [0.5, 0.5])
    epoch, index = mixture.order(3, np.arange(80))
    small, large = index < 5, index >= 5
    assert np.bincount(index[small]).tolist() == [8] * 5
    assert np.bincount(index[large] - 5).tolist() == [1] * 40
    assert epoch[small].tolist() == np.repeat(np.arange(8), 5).tolist()
    for e in range(8):
        assert sorted(index[small][epoch[small] == e].tolist()) == list(range(5))


def test_mixtures_nest_and_depend_on_the_position_only() -> None:
    inner = MixtureSource([Counting(3), Counting(7)], [1, 2])
    outer = MixtureSource([inner, Counting(4)], [3, 1])
    epoch, index = outer.order(0, np.arange(100))
    later = outer.order(0, np.arange(60, 100))
    assert np.array_equal(later[0], epoch[60:])
    assert np.array_equal(later[1], index[60:])
    assert outer[12]["tokens"][0] == 3  # 3 + 7 of the inner, then the third of the other
    assert len(outer) == 14


def test_a_mixture_rejects_invalid_weights() -> None:
    with pytest.raises(UserError, match="one weight per source"):
        MixtureSource([Counting(3)], [1, 2])
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="positive"):
            MixtureSource([Counting(3), Counting(3)], [1, bad])


def test_two_uses_of_one_seed_are_independent() -> None:
    views, pairs = ExampleRNG(0, "view"), ExampleRNG(0, "pairs")
    drawn = np.array([(views.at(0, i).random(), pairs.at(0, i).random()) for i in range(4000)])
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.08
