"""The order of examples as a function: position k of a run -> (epoch, index). Nothing is stored, so resuming needs one number.

Every epoch is a permutation of all indices, computed by a small cipher: a Feistel network on just enough bits to hold
the indices, applied again to the few results that fall outside ("cycle walking"; Black and Rogaway 2002). A
permutation of a billion examples costs no memory, and any position costs the same to look up.

>>> epoch, index = epoch_permutation(5, seed=0, positions=np.arange(10))
>>> epoch.tolist(), sorted(index[:5].tolist()), sorted(index[5:].tolist())
([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4])

Random draws are a function too: `ExampleRNG(seed, use).at(epoch, index)` is the generator of one example in one epoch.
"""

from __future__ import annotations

import hashlib
import threading

import numpy as np

ROUNDS = 8
MIN_BITS = 8
"""With fewer bits the rounds have too few outcomes to reach every permutation evenly."""


def epoch_permutation(n: int, seed: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (epoch, index) of positions in an endless run over n examples; int64, of the shape of `positions`."""
    epoch, at = np.divmod(np.asarray(positions, np.int64), n)
    key = mix_bits(mix_bits(np.array([(seed + _STEP) & _WORD], np.uint64)) ^ epoch.astype(np.uint64))
    index = at.astype(np.uint64)
    bits = max((n - 1).bit_length(), MIN_BITS)
    index = _encrypt(index, key, bits)
    while (outside := index >= n).any():
        index[outside] = _encrypt(index[outside], key[outside], bits)
    return epoch, index.astype(np.int64)


def length_grouped_batches(sizes: np.ndarray, steps: int, seed: int, number: int) -> np.ndarray:
    """Distribute examples of similar length to each of several steps.

    The examples are sorted by size and split into steps, and the steps are shuffled, so that short ones do not come first.

    Args:
        sizes: Size of each example, (steps * batch_size,).
        steps: Number of steps.
        seed: Seed of the order of the steps.
        number: Number of such groups of steps before this one in the run.

    Returns:
        Indices into `sizes`, (steps, batch_size).

    >>> length_grouped_batches(np.array([9, 2, 8, 3]), steps=2, seed=0, number=0).tolist()
    [[2, 0], [1, 3]]
    """
    sorted_ = np.argsort(sizes, kind="stable").reshape(steps, -1)
    return sorted_[epoch_permutation(steps, seed, number * steps + np.arange(steps))[1]]


def _encrypt(x: np.ndarray, key: np.ndarray, bits: int) -> np.ndarray:
    """Permute 0..2**bits - 1 for each key: two halves (of unequal width for odd `bits`) alternately scramble each other."""
    low_bits = bits // 2
    widths = (np.uint64(low_bits), np.uint64(bits - low_bits))
    low: np.ndarray = x & _ones(widths[0])
    high: np.ndarray = x >> widths[0]
    for round_index in range(ROUNDS):
        # The half that was `high` (of width widths[1] in even rounds) scrambles the other; then they swap.
        low, high = (
            high,
            low ^ (mix_bits(high + key + np.uint64(round_index * _STEP & _WORD)) & _ones(widths[round_index % 2])),
        )
    whole: np.ndarray = (high << widths[0]) | low
    return whole


def _ones(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


_WORD = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15


def mix_bits(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of splitmix64 (Steele et al. 2014), in which every input bit affects every output bit. x: uint64 array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


class ExampleRNG(threading.local):
    """One random stream per (epoch, index) under a seed, from the counter-based Philox (Salmon et al. 2011).

    `at` moves one generator to the beginning of a stream and returns it; it is valid until the next call in the same thread. Each
    thread has its own, because validation and training examples may be built concurrently. Moving costs 1 microsecond and
    creating a generator 10, and there are up to 40,000 short examples a second.

    Args:
        seed: The seed.
        use: Purpose of the draws. Two purposes under one seed must not share a stream: when a source split its pairs with the
            same numbers by which the objective then swapped them, the place of the split gave the label away.

    >>> draws, others = ExampleRNG(0, "view"), ExampleRNG(0, "pairs")
    >>> a, b, c = draws.at(0, 7).random(), draws.at(1, 7).random(), others.at(0, 7).random()
    >>> a == draws.at(0, 7).random(), a == b, a == c
    (True, False, False)
    """

    def __init__(self, seed: int, use: str) -> None:
        use_hash = int.from_bytes(hashlib.blake2b(use.encode(), digest_size=8).digest(), "little")
        self._bits = np.random.Philox(key=np.array([(seed ^ use_hash) & _WORD, 0], np.uint64))
        self._state = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def at(self, epoch: int, index: int) -> np.random.Generator:
        """Return the stream of example `index` in `epoch`, at its beginning."""
        self._state["state"]["key"][1] = epoch
        self._state["state"]["counter"][2] = index
        self._bits.state = self._state
        return self._generator
