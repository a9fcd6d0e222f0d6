"""The most likely token and the log-sum-exp of the compiled kernel are those of torch in double precision."""

import pytest
import torch

from firth.generate.native_kernels import summarize
from firth.model import native

WAYS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="no C compiler is found")),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("vocab", [1, 7, 4096, 4097, 49152])
def test_it_equals_torch_in_double_precision(vocab: int, way: str) -> None:
    torch.manual_seed(vocab)
    logits = torch.randn(5, vocab) * 8
    logits[1] = -3.0
    logits[2, 1:] = float("-inf")
    logits[3, : vocab // 2] = float("-inf")
    best, normalizer = summarize(logits, way)
    assert best.tolist() == logits.argmax(-1).tolist()
    assert torch.allclose(normalizer.double(), logits.double().logsumexp(-1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_nan_propagates(way: str) -> None:
    logits = torch.zeros(3, 5000)
    logits[1, 4500] = float("nan")
    logits[2] = float("nan")
    assert summarize(logits, way)[1].isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_row_has_the_same_bits_in_any_batch(way: str) -> None:
    logits = torch.randn(7, 10000)
    whole = summarize(logits, way)[1]
    for row in range(7):
        assert torch.equal(summarize(logits[row : row + 1], way)[1], whole[row : row + 1])
