"""Each kernel is chosen by what the machine measures, once; every choice computes the same."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from firth import kernels
from firth.kernels import Kernel
from firth.model import attention, blocked, fused
from firth.model.attention import Visibility
from firth.recipes.recipe import load
from firth.recipes.run import run
from firth.train.muon import BAND, orthogonalise
from firth.types import UserError


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing chosen yet, nothing forced, an empty cache."""
    monkeypatch.delenv(kernels.FORCE, raising=False)
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.setattr(kernels, "KERNELS", dict(kernels.KERNELS))


def measured(name: str, monkeypatch: pytest.MonkeyPatch, **took: float) -> Kernel:
    """A kernel of which a measurement finds these seconds."""
    kernel = Kernel(name, dict.fromkeys(took, lambda: lambda: None))
    monkeypatch.setattr(Kernel, "measure", lambda self: dict(took))
    return kernel


@pytest.mark.parametrize(("other", "choice"), [(0.5, "other"), (0.89, "other"), (0.95, "plain"), (2.0, "plain")])
def test_another_is_chosen_where_it_is_quicker(other: float, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured("k", monkeypatch, plain=1.0, other=other).choice() == choice


def test_a_kernel_is_measured_once_per_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = measured("k", monkeypatch, plain=1.0, other=0.5)
    assert kernel.choice() == "other"
    monkeypatch.setattr(Kernel, "measure", lambda self: pytest.fail("measured again"))
    monkeypatch.setattr(kernels, "_chosen", {})
    assert kernel.choice() == "other"
    assert json.loads((tmp_path / "kernels.json").read_text())[kernels.machine()] == {"k": {"plain": 1.0, "other": 0.5}}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"MACHINE": 3}', '{"MACHINE": {"k": {"plain": -1.0}}}', "\x00\xff"])
def test_a_damaged_file_is_measured_again(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text(text.replace("MACHINE", kernels.machine()))
    assert measured("k", monkeypatch, plain=1.0, other=0.5).choice() == "other"
    assert json.loads((tmp_path / "kernels.json").read_text())[kernels.machine()]["k"]["other"] == 0.5


def test_a_cache_that_cannot_be_written_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "file" / "below"))
    assert measured("k", monkeypatch, plain=1.0, other=0.5).choice() == "other"


def test_what_does_not_run_here_is_not_chosen() -> None:
    def missing() -> kernels.Workload:
        raise RuntimeError("could not create a primitive")

    for runs, choices in (("plain", ("plain", "other")), ("other", ("plain", "other"))):
        kernel = Kernel(f"k-{runs}", {name: (lambda: lambda: None) if name == runs else missing for name in choices})
        assert kernel.measure().keys() == {runs}
        assert kernel.choice() == kernel.choice() == runs
    with pytest.raises(RuntimeError, match="primitive"):
        Kernel("k", {"plain": missing}).measure()


def test_a_choice_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = measured("k", monkeypatch, plain=1.0, other=0.5)
    for text, choice in (("k=plain", "plain"), ("first", "plain"), ("muon=fp32, k=other", "other")):
        monkeypatch.setattr(kernels, "_chosen", {})
        monkeypatch.setenv(kernels.FORCE, text)
        assert kernel.choice() == choice


def test_what_does_not_exist_is_not_forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = measured("k", monkeypatch, plain=1.0, other=0.5)
    monkeypatch.setenv(kernels.FORCE, "k=quick")
    with pytest.raises(UserError, match="k is one of plain, other, and not 'quick'"):
        kernel.choice()
    monkeypatch.setenv(kernels.FORCE, "quick=k")
    with pytest.raises(UserError, match="there is no kernel 'quick'; there are attention-bf16"):
        kernels.check_forced()
    with pytest.raises(UserError, match="there is no kernel 'quick'"):
        run(load("gpt", []), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_measurement_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        kernels.table()
    assert torch.equal(before, torch.get_rng_state())
    assert set(kernels.table()) >= {"attention-bf16", "attention-fp32", "muon", "norm-bf16", "norm-fp32"}


def read(way: str, dtype: torch.dtype, causal: bool, bias: bool) -> list[torch.Tensor]:
    """An output and its gradients."""
    torch.manual_seed(0)
    leaves = [torch.randn(3, 2, 70, 16).to(dtype).requires_grad_() for _ in range(3)]
    added = torch.randn(1, 2, 70, 70).to(dtype).requires_grad_() if bias else None
    mask = None if causal else (torch.arange(70) < torch.tensor([[70], [40], [9]]))[:, None, None]
    sees = Visibility(causal=causal, mask=mask)
    names = [kernel.name for kernel in attention.ATTENTION.values()]
    with kernels.forced(dict.fromkeys(names, way)):
        out = attention.attend(*leaves, sees, 0.25, added)
    out.backward(torch.randn(3, 2, 70, 16).to(dtype))
    return [out.detach(), *(x.grad for x in (*leaves, added) if x is not None)]  # type: ignore[misc]


@cache
def running(dtype: torch.dtype) -> frozenset[str]:
    """The choices for attention that this CPU has: torch's bf16 kernel wants AVX-512 where oneDNN has bf16 products."""
    return frozenset(attention.ATTENTION[dtype, False].measure())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("way", attention.BLOCK_ROWS)
def test_attention_is_its_formula_in_every_choice(
    way: str, causal: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "CACHED_BYTES", 20_000)  # several groups of rows
    exact = read("sdpa", torch.float64, causal, bias)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.04)):
        if way not in running(dtype):
            assert way == "sdpa" and dtype == torch.bfloat16
            continue
        for found, right in zip(read(way, dtype, causal, bias), exact, strict=True):
            assert (found.double() - right).abs().max() < near * right.abs().max()


@pytest.mark.parametrize("way", ["rms_norm", "unit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_its_formula_in_every_choice(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CACHED", 64)  # several parts
    x, slope = torch.randn(5, 7, 24, dtype=torch.float64), torch.randn(5, 7, 24, dtype=torch.float64)

    def both(x: torch.Tensor, plain: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        y = F.rms_norm(x, (24,), eps=1e-6) if plain else fused.unit(x, 1e-6)
        y.backward(slope.to(x.dtype))
        assert x.grad is not None and y.dtype == x.dtype
        return y.detach(), x.grad

    with kernels.forced({kernel.name: way for kernel in fused.NORM.values()}):
        found = both(x.to(dtype), plain=False)
    for got, right in zip(found, both(x, plain=True), strict=True):
        assert (got.double() - right).abs().max() < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize(("rows", "columns"), itertools.product((24, 96), (24, 96)))
def test_muon_is_near_the_polar_factor_in_every_choice(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, rows, columns)
    u, _, v = torch.linalg.svd(stack.double(), full_matrices=False)
    for dtype in (torch.float32, torch.bfloat16):
        found = orthogonalise(stack.to(dtype)).double()
        cosine = (found * (u @ v)).sum((-2, -1)) / (found.norm(dim=(-2, -1)) * (u @ v).norm(dim=(-2, -1)))
        assert cosine.min() > 0.96
        assert torch.linalg.svdvals(found).max() < BAND[1] + 0.05
