"""Products of 8-bit integers: the formula, exactly, with every set of instructions that this machine has."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.generate.native_kernels import few_rows
from firth.generate.quantized import (
    GROUP,
    MAX_ACTIVATION,
    MAX_WEIGHT,
    Int8Embedding,
    Int8Linear,
    dequantize,
    quantize_groups,
    round_activations,
)
from firth.model import native

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason="no C compiler is found")

VARIANTS = {
    "this machine": (),
    "AVX-512 with VNNI": ("avx512_vnni", "avx512bw"),
    "AVX-512 without VNNI": ("avx512f", "avx512bw"),
    "AVX-VNNI": ("avx_vnni",),
    "AVX2": ("avx2", "fma"),
    "no vectors": ("sse2",),
}
"""Set of instructions -> what /proc/cpuinfo must list."""

OPTIONS = {
    "this machine": native.TUNINGS[0],
    "AVX-512 with VNNI": ("-march=cascadelake", "-mprefer-vector-width=512"),
    "AVX-512 without VNNI": ("-march=skylake-avx512", "-mprefer-vector-width=512"),
    "AVX-VNNI": ("-march=x86-64-v3", "-mavxvnni"),
    "AVX2": ("-march=x86-64-v3",),
    "no vectors": ("-march=x86-64",),
}

SHAPES = [(1, 5, 3), (2, 64, 16), (3, 70, 33), (4, 128, 32), (7, 576, 49), (16, 200, 100)]
"""Rows, inputs, outputs: whole and broken groups, panels and blocks of rows."""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    return {}


def compiled(variant: str, libraries: dict[str, ctypes.CDLL], directory: Path) -> ctypes.CDLL:
    """Return decode.c compiled with the options of a variant; skip the test if this machine cannot run it."""
    listing = Path("/proc/cpuinfo")
    flags = set(listing.read_text().split()) if listing.exists() else set()
    if not flags.issuperset(VARIANTS[variant]):
        pytest.skip(f"this machine has no {variant}")
    if variant not in libraries:
        compiler = shutil.which(os.environ.get("CC") or "cc")
        assert compiler is not None
        output = directory / f"{variant.replace(' ', '-')}.so"
        command = [compiler, *native.FLAGS, *OPTIONS[variant], "-o", str(output), str(native.SOURCES[1]), "-lm"]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(output))
        library.few_rows.argtypes = native.ARGUMENTS["few_rows"]
        libraries[variant] = library
    return libraries[variant]


def formula(x: np.ndarray, weight: np.ndarray, steps: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the sum over groups, in order and in fp32, of the exact integer product of a group times both scales.

    Args:
        x: (rows, in) int64, integers of the activations.
        weight: (out, in) int64, integers of the weights.
        steps: (out, groups) float32, scales that are powers of two.
        scales: (rows, groups) float32, likewise.
    """
    total = np.zeros((len(x), len(weight)), np.float32)
    for g in range(steps.shape[1]):
        part = slice(g * GROUP, (g + 1) * GROUP)
        exact = (x[:, part] @ weight[:, part].T).astype(np.float32)
        total = total + exact * (scales[:, g, None] * steps[None, :, g])
    return total


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_set_of_instructions_computes_the_formula(
    variant: str, libraries: dict[str, ctypes.CDLL], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with the largest integers too: scales are powers of two, so that only sums of groups are rounded."""
    library = compiled(variant, libraries, tmp_path)
    monkeypatch.setattr(native, "library", lambda: library)
    for rows, inputs, outputs in SHAPES:
        rng = np.random.default_rng(inputs)
        groups = -(-inputs // GROUP)
        weight = rng.integers(-MAX_WEIGHT, MAX_WEIGHT + 1, (outputs, inputs))
        x = rng.integers(-MAX_ACTIVATION, MAX_ACTIVATION + 1, (rows, inputs))
        weight[0], x[0] = MAX_WEIGHT, -MAX_ACTIVATION
        weight[:, ::GROUP], x[:, ::GROUP] = MAX_WEIGHT, MAX_ACTIVATION  # so that the scales are those below
        steps = np.exp2(rng.integers(-9, -3, (outputs, groups))).astype(np.float32)
        scales = np.exp2(rng.integers(-20, -9, (rows, groups))).astype(np.float32)
        values = torch.from_numpy(weight * steps.repeat(GROUP, 1)[:, :inputs]).float()
        numbers = torch.from_numpy(x * scales.repeat(GROUP, 1)[:, :inputs]).float()
        panels, kept = quantize_groups(values)
        assert torch.equal(dequantize(panels, kept, outputs, inputs), values)
        assert torch.equal(round_activations(numbers), numbers)
        bias = torch.from_numpy(rng.integers(-4, 4, outputs)).float()
        want = torch.from_numpy(formula(x, weight, steps, scales))
        assert torch.equal(few_rows(numbers, panels, kept, None, outputs), want)
        assert torch.equal(few_rows(numbers, panels, kept, bias, outputs), want + bias)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_products_equal_those_of_torch(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(outputs, inputs) * torch.rand(outputs, 1), torch.randn(outputs)
    x = torch.randn(rows, inputs) * torch.rand(rows, 1) * 30
    x[0], weight[0] = 0, 0
    layer = Int8Linear.of(weight, bias)
    got, want = layer.multiply(x, "native"), layer.multiply(x, "torch")
    # A number within a rounding error of the middle between two integers may round to either.
    assert (got - want).norm() <= 2e-5 * want.norm()
    assert torch.equal(got[0], bias)
    x[-1, -1] = float("nan")
    for way in ("native", "torch"):
        assert layer.multiply(x, way).isnan().all(1).tolist() == [False] * (rows - 1) + [True]
    x[-1, -1] = float("inf")
    assert not layer.multiply(x, "native")[-1].isfinite().any()


def test_the_error_is_at_most_half_a_step() -> None:
    """Of each weight times the inputs, and of each input times the weights; a bf16 scale is off by 2^-9 of the integer 127."""
    torch.manual_seed(0)
    weight, x = torch.randn(48, 200), torch.randn(9, 200) * 30
    got, exact = Int8Linear.of(weight, None).multiply(x, "native"), x.double() @ weight.double().T
    weight_steps, x_steps = weight.abs().amax() / MAX_WEIGHT, x.abs().amax() / MAX_ACTIVATION
    bound = 0.76 * weight_steps * x.abs().sum(-1, keepdim=True) + 0.51 * x_steps * weight.abs().sum(-1)
    assert ((got - exact).abs() <= bound).all()
    assert (got - exact).norm() > 1e-4 * exact.norm(), "nothing was rounded"


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    """A row with numbers a thousand times as large changes no bit of the others."""
    torch.manual_seed(0)
    x, layer = torch.randn(19, 100), Int8Linear.of(torch.randn(50, 100), None)
    x[7] *= 1000
    whole = layer.multiply(x, "native")
    for count in (1, 2, 3, 4, 5, 8, 11):
        assert torch.equal(layer.multiply(x[:count].contiguous(), "native"), whole[:count])


def test_results_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, layer, found = torch.randn(6, 100), Int8Linear.of(torch.randn(500, 100), None), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        found.append(layer.multiply(x, "native"))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_an_embedding_returns_the_rows_of_the_matrix() -> None:
    weight = torch.randn(37, 70)
    panels, steps = quantize_groups(weight)
    ids = torch.tensor([[0, 36, 5], [16, 15, 5]])
    rows = Int8Embedding(panels, steps, (37, 70))(ids)
    assert torch.equal(rows, dequantize(panels, steps, 37, 70)[ids])
    assert (rows - weight[ids]).abs().max() < 0.02


@pytest.mark.parametrize("way", ["native", "torch"])
def test_activations_near_zero_are_zeros(way: str) -> None:
    """The inverse of their scale would be infinite, and its product with a zero of the same group NaN."""
    layer, x = Int8Linear.of(torch.randn(20, 128), None), torch.zeros(2, 128)
    x[:, 3], x[1, 100] = 1e-36, 1.0
    small, other = layer.multiply(x, way)
    assert not small.any()
    assert torch.allclose(other, dequantize(layer.weight, layer.steps, 20, 128)[:, 100])


@pytest.mark.parametrize("way", ["native", "torch"])
@pytest.mark.parametrize("odd", [float("inf"), -float("inf"), float("nan")])
def test_activations_that_are_not_finite_stay_visible(way: str, odd: float) -> None:
    x = torch.ones(3, 128)
    x[1, 70:72] = odd
    found = Int8Linear.of(torch.randn(20, 128), None).multiply(x, way)
    assert found.isnan().all(1).tolist() == [False, True, False]


def test_there_may_be_no_rows() -> None:
    layer, table = (
        Int8Linear.of(torch.randn(20, 128), None),
        Int8Embedding(*quantize_groups(torch.randn(9, 80)), (9, 80)),
    )
    assert layer(torch.zeros(0, 3, 128)).shape == (0, 3, 20)
    assert table(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 80)
