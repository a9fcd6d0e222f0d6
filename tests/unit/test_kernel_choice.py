"""Kernels are chosen by one measurement on the machine; every implementation computes the same."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from firth import kernel_choice
from firth.kernel_choice import Kernel
from firth.model import attention, cross_entropy, fused, native, positions
from firth.model.attention import AttentionMask
from firth.model.block import MLP
from firth.model.config import ModelConfig
from firth.objectives import word2vec
from firth.runs.recipe import load
from firth.runs.run import run
from firth.training import muon
from firth.training.muon import BAND, orthogonalize
from firth.types import UserError


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No kernel is chosen or forced, and the cache is empty."""
    monkeypatch.delenv(kernel_choice.FORCE, raising=False)
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "_chosen", {})
    monkeypatch.setattr(kernel_choice, "KERNELS", dict(kernel_choice.KERNELS))


def measured(name: str, monkeypatch: pytest.MonkeyPatch, **took: float) -> Kernel:
    """Return a kernel whose measurement yields these seconds."""
    kernel = Kernel(name, dict.fromkeys(took, lambda: lambda: None))
    monkeypatch.setattr(Kernel, "measure", lambda self: dict(took))
    return kernel


@pytest.mark.parametrize(("other", "choice"), [(0.5, "other"), (0.89, "other"), (0.95, "plain"), (2.0, "plain")])
def test_a_faster_implementation_is_chosen(other: float, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured("k", monkeypatch, plain=1.0, other=other).choice() == choice


def test_a_kernel_is_measured_once_per_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = measured("k", monkeypatch, plain=1.0, other=0.5)
    assert kernel.choice() == "other"
    monkeypatch.setattr(Kernel, "measure", lambda self: pytest.fail("measured again"))
    monkeypatch.setattr(kernel_choice, "_chosen", {})
    assert kernel.choice() == "other"
    assert json.loads((tmp_path / "kernels.json").read_text())[kernel_choice.machine()] == {
        "k": {"plain": 1.0, "other": 0.5}
    }


@pytest.mark.parametrize("text", ["", "{", "[]", '{"MACHINE": 3}', '{"MACHINE": {"k": {"plain": -1.0}}}', "\x00\xff"])
def test_a_damaged_file_is_measured_again(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text(text.replace("MACHINE", kernel_choice.machine()))
    assert measured("k", monkeypatch, plain=1.0, other=0.5).choice() == "other"
    assert json.loads((tmp_path / "kernels.json").read_text())[kernel_choice.machine()]["k"]["other"] == 0.5


def test_an_unwritable_cache_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "file" / "below"))
    assert measured("k", monkeypatch, plain=1.0, other=0.5).choice() == "other"


def test_an_implementation_that_fails_is_not_chosen() -> None:
    def missing() -> kernel_choice.Workload:
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
        monkeypatch.setattr(kernel_choice, "_chosen", {})
        monkeypatch.setenv(kernel_choice.FORCE, text)
        assert kernel.choice() == choice


def test_an_unknown_choice_cannot_be_forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = measured("k", monkeypatch, plain=1.0, other=0.5)
    monkeypatch.setenv(kernel_choice.FORCE, "k=quick")
    with pytest.raises(UserError, match="k is one of plain, other, and not 'quick'"):
        kernel.choice()
    monkeypatch.setenv(kernel_choice.FORCE, "quick=k")
    with pytest.raises(UserError, match="there is no kernel 'quick'; there are activation-bf16"):
        kernel_choice.check_forced()
    with pytest.raises(UserError, match="there is no kernel 'quick'"):
        run(load("gpt", []), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_measurement_changes_no_random_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        kernel_choice.table()
    assert torch.equal(before, torch.get_rng_state())
    assert set(kernel_choice.table()) >= {"attention-bf16", "attention-fp32", "muon", "norm-bf16", "norm-fp32"}


def read(way: str, dtype: torch.dtype, causal: bool, bias: bool) -> list[torch.Tensor]:
    """Return the output of attention and its gradients."""
    torch.manual_seed(0)
    leaves = [torch.randn(3, 2, 70, 16).to(dtype).requires_grad_() for _ in range(3)]
    added = torch.randn(1, 2, 70, 70).to(dtype).requires_grad_() if bias else None
    mask = None if causal else (torch.arange(70) < torch.tensor([[70], [40], [9]]))[:, None, None]
    attention_mask = AttentionMask(is_causal=causal, mask=mask)
    names = [kernel.name for kernel in attention.ATTENTION.values()]
    with kernel_choice.forced(dict.fromkeys(names, way)):
        out = attention.attend(*leaves, attention_mask, 0.25, added)
    out.backward(torch.randn(3, 2, 70, 16).to(dtype))
    return [out.detach(), *(x.grad for x in (*leaves, added) if x is not None)]  # type: ignore[misc]


@cache
def running(dtype: torch.dtype) -> frozenset[str]:
    """Return the attention kernels that this CPU supports: torch's bf16 kernel needs AVX-512 where oneDNN has bf16 products."""
    return frozenset(attention.ATTENTION[dtype, False].measure())


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("way", attention.KERNELS)
def test_every_attention_kernel_matches_the_formula(way: str, causal: bool, bias: bool) -> None:
    exact = read("sdpa", torch.float64, causal, bias)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.04)):
        if way not in running(dtype):
            assert native.why_not() if way.startswith("native") else way == "sdpa" and dtype == torch.bfloat16
            continue
        for found, right in zip(read(way, dtype, causal, bias), exact, strict=True):
            assert (found.double() - right).abs().max() < near * right.abs().max()


def test_a_large_soft_cap_does_not_overflow() -> None:
    states, weight = torch.eye(4) * 150, torch.eye(4)
    right = -F.log_softmax(200 * torch.tanh(states / 200), -1).diagonal()
    for way in cross_entropy.KERNEL[torch.float32].measure():
        with kernel_choice.forced({"cross-entropy-fp32": way}):
            found = trained(
                lambda s, w: cross_entropy.LogProbs.apply(s, w, None, torch.arange(4), 200.0), states, weight
            )
        torch.testing.assert_close(-found[0], right)
        assert all(x.isfinite().all() for x in found)


def trained(function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the output of a function and the gradients of its inputs, for a fixed output gradient."""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x is not None)]  # type: ignore[misc]


def same(
    table: dict[torch.dtype, Kernel], function: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor],
    *inputs: torch.Tensor | None, learned: int = 0,
) -> None:  # fmt: skip
    """Check every choice that runs here, in fp32 and bf16, against a plain formula in float64.

    Args:
        learned: Number of inputs, the last ones, that are parameters, which stay in fp32.
    """
    exact = trained(plain, *inputs)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        count = len(inputs) - learned
        given = [None if x is None else x.to(dtype if i < count else torch.float32) for i, x in enumerate(inputs)]
        ways = set(table[dtype].measure())
        assert ("native" in ways) is not bool(native.why_not())
        if dtype == torch.bfloat16 and any(x is not None for x in inputs[count:]):
            ways &= {
                "native"
            }  # torch's own layer norm takes parameters in bf16 alone, and sums their gradients in bf16
        for way in ways:
            with kernel_choice.forced({table[dtype].name: way}):
                found = trained(function, *given)
            assert found[0].dtype == dtype
            for got, right in zip(found, exact, strict=True):
                assert (got.double() - right).abs().max() <= near * right.abs().max().clamp(min=1), (way, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("width", [24, 384])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_every_norm_kernel_matches_the_formula(center: bool, gain: bool, offset: bool, width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 40, width, dtype=torch.float64) * 3 + 1
    learned = [torch.randn(width, dtype=torch.float64) if has else None for has in (gain, offset)]

    def plain(x: torch.Tensor, gain: torch.Tensor | None, offset: torch.Tensor | None) -> torch.Tensor:
        if center:
            return F.layer_norm(x, (width,), gain, offset, 1e-6)
        y = F.rms_norm(x, (width,), gain, 1e-6)
        return y if offset is None else y + offset

    table = fused.LAYER_NORM if center else fused.NORM
    same(table, lambda x, g, o: fused.normalized(x, g, o, 1e-6, center), plain, x, *learned, learned=2)


@pytest.mark.slow
@pytest.mark.parametrize("width", [10, 64])
@pytest.mark.parametrize("eps", [-1.0, 1e-3])
@pytest.mark.parametrize("turned", ["not", "alike", "each"])
def test_every_heads_kernel_matches_the_formula(turned: str, eps: float, width: int) -> None:
    torch.manual_seed(0)
    angles = torch.randn(3 if turned == "each" else 1, 7, 1, width // 2).repeat(1, 1, 1, 2)
    turns = None if turned == "not" else (angles.cos(), angles[..., : width // 2].sin())

    def plain(joined: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (-1, width)) for x in joined.split([4 * width, 2 * width, 2 * width], -1))
        both = torch.cat((q, k), 2)
        both = F.rms_norm(both, (width,), eps=eps) if eps > 0 else both
        if turns is not None:
            first, second = torch.view_as_real(
                torch.complex(*both.chunk(2, -1)) * torch.complex(turns[0][..., : width // 2], turns[1])
            ).unbind(-1)
            both = torch.cat((first, second), -1)
        return torch.cat((both, v), 2).transpose(1, 2)

    joined = torch.randn(3, 7, 8 * width, dtype=torch.float64)
    same(fused.HEADS, lambda x: torch.cat(fused.heads(x, turns, eps, 4, 2, width), 1), plain, joined)


@pytest.mark.parametrize("alike", [True, False])
def test_every_distance_kernel_gathers_alike(alike: bool) -> None:
    torch.manual_seed(0)
    met, index = torch.randn(3, 2, 40, 60, dtype=torch.float64), torch.randint(60, (1 if alike else 3, 40, 75))

    def plain(met: torch.Tensor) -> torch.Tensor:
        return met.gather(-1, index[:, None].expand(3, 2, -1, -1))

    same(positions.COLUMNS, lambda x: positions.gather_distances(x, index), plain, met)


def test_every_neighbor_kernel_averages_alike() -> None:
    torch.manual_seed(0)
    x, at = torch.randn(3, 70, 24, dtype=torch.float64), torch.arange(70)
    left, right = (torch.minimum(torch.randint(6, (3, 70)), room) for room in (at, 69 - at))
    offset = at[None, None, :] - at[None, :, None]
    near = ((offset >= -left[..., None]) & (offset <= right[..., None]) & (offset != 0)).double()

    def plain(x: torch.Tensor) -> torch.Tensor:
        return near / near.sum(-1, keepdim=True).clamp(min=1) @ x

    exact, cbow = trained(plain, x), word2vec.Word2Vec(algorithm="cbow")
    for way in word2vec.NEIGHBORS.measure():
        with kernel_choice.forced({"neighbors": way}):
            found = trained(lambda x: cbow._means(x, {"left": left, "right": right}), x.float())
        for got, right_ in zip(found, exact, strict=True):
            assert (got - right_).abs().max() < 1e-5 * right_.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "geglu_tanh"])
def test_every_mlp_kernel_matches_the_formula(name: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=9, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=600, activation=name
    )  # type: ignore[arg-type]
    mlp = MLP(config)
    x = torch.randn(70, 600 * (2 if config.gated else 1), dtype=torch.float64) * 4
    act = {"relu": F.relu, "relu2": lambda x: F.relu(x) ** 2, "gelu": F.gelu, "silu": F.silu}.get(
        mlp.activation, lambda x: F.gelu(x, approximate="tanh")
    )

    def plain(x: torch.Tensor) -> torch.Tensor:
        return act(x[:, :600]) * x[:, 600:] if config.gated else act(x)

    same(fused.ACTIVATION, mlp.inner, plain, x)


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_every_cross_entropy_kernel_matches_the_formula(cap: float, biased: bool) -> None:
    torch.manual_seed(0)
    labels, absent = torch.randint(300, (50,)), torch.tensor([301, 340])
    states, weight = torch.randn(50, 16, dtype=torch.float64), torch.randn(350, 16, dtype=torch.float64)
    bias = torch.randn(350, dtype=torch.float64) if biased else None

    def plain(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = F.linear(states, weight, bias)
        logits = cap * torch.tanh(logits / cap) if cap else logits
        logits = logits.index_fill(1, absent, float("-inf"))
        return -F.log_softmax(logits, -1)[torch.arange(50), labels]

    exact = trained(plain, states, weight, bias)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        given = [None if x is None else x.float() for x in (states, weight, bias)]
        for way in cross_entropy.KERNEL[dtype].measure():
            with (
                kernel_choice.forced({cross_entropy.KERNEL[dtype].name: way}),
                torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            ):
                found = trained(lambda *x: cross_entropy.LogProbs.apply(*x[:2], x[2], labels, cap, absent), *given)
                total = cross_entropy.SumNLL.apply(*given, labels, cap, False, absent)
            for got, right in zip([-found[0], *(-x for x in found[1:])], exact, strict=True):
                assert (got.double() - right).abs().max() < near * right.abs().max(), (way, dtype)
            assert total.item() == pytest.approx(exact[0].sum().item(), rel=near)


@pytest.mark.skipif(bool(native.why_not()), reason=f"no native kernels: {native.why_not()}")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_kernels_propagate_nan_and_infinity(bad: float, dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 4 * 512).view(4, 512).to(dtype)
    x[1, 3] = bad
    written = {
        "layer norm": native.norm(x, None, None, 1e-6, True),
        "RMS norm": native.norm(x, None, None, 1e-6, False),
        "heads": native.heads(x[None], None, 1e-6, 4, 2, 64)[0][0].transpose(0, 1).flatten(1),
        "relu2": native.activation("relu2", x.abs()),
        "swiglu": native.activation("silu", x, gated=True),
        "gelu": native.activation("gelu", x if bad > 0 else -x),
    }
    for name, y in written.items():
        finite = y.isfinite().all(-1).tolist()
        assert finite == [True, False, True, True], name


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("inner", "outer"), [(512, 300), (33, 7)])
@torch.no_grad()
def test_every_one_row_kernel_multiplies_alike(inner: int, outer: int, biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, inner), torch.randn(outer, inner)
    bias = torch.randn(outer) if biased else None
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):
        given = [None if t is None else t.to(dtype) for t in (x, weight, bias)]
        right = F.linear(*(None if t is None else t.double() for t in given))
        for way in fused.ONE_ROW[dtype].measure():
            with kernel_choice.forced({fused.ONE_ROW[dtype].name: way}):
                found = fused.project(*given)
            assert found.dtype == dtype and found.shape == (1, 1, outer)
            assert (found - right).abs().max() < near * right.abs().max()


def test_every_muon_kernel_steps_alike() -> None:
    torch.manual_seed(0)
    grad, start, weight = torch.randn(3, 50, 77).unbind()
    right = 0.9 * start.double() + 0.1 * grad.double()
    for dtype in (torch.float32, torch.bfloat16):
        for way in muon.MOMENTUM.measure():
            momentum, moved, direction = start.clone(), weight.clone(), torch.empty(50, 77, dtype=dtype)
            with kernel_choice.forced({"momentum": way}):
                muon.nesterov(grad, momentum, direction, 0.9)
                muon.apply(moved, direction, 0.99, 0.1)
            torch.testing.assert_close(momentum.double(), right, rtol=1e-6, atol=1e-6)
            ahead = (0.9 * right + 0.1 * grad).to(dtype)
            torch.testing.assert_close(direction, ahead, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
            torch.testing.assert_close(moved, weight * 0.99 - 0.1 * direction.float(), rtol=1e-5, atol=1e-6)


def test_results_do_not_depend_on_threads() -> None:
    """Except the sums of a gain's gradient, which each thread starts anew."""
    if native.why_not():
        pytest.skip(f"no native kernels: {native.why_not()}")
    before, found = torch.get_num_threads(), []
    x, gain = torch.linspace(-3, 3, 400 * 256).sin().view(400, 256), torch.linspace(0, 1, 256)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(trained(lambda x, g: native.norm(x, g, None, 1e-6, True), x, gain))
            found[-1] += trained(lambda x: native.activation("gelu", x, True), x)
    finally:
        torch.set_num_threads(before)
    for number, (one, two) in enumerate(zip(*found, strict=True)):
        assert torch.equal(one, two) or (number == 2 and torch.allclose(one, two, rtol=1e-5, atol=1e-4))


def test_torch_is_used_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    native._outcome.cache_clear()
    try:
        assert native.why_not() == "no C compiler is found"
        assert set(fused.NORM[torch.float32].measure()) == {"rms_norm", "unit"}
        (tmp_path / "cc").write_text("#!/bin/sh\necho 'it broke' >&2\nexit 1\n")
        (tmp_path / "cc").chmod(0o755)
        monkeypatch.setenv("CC", str(tmp_path / "cc"))
        native._outcome.cache_clear()
        assert native.why_not().endswith("fails: it broke")
    finally:
        native._outcome.cache_clear()


def test_a_stored_choice_is_dropped_with_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler may be gone, as in a container with the cache of another one: kernels are measured again."""
    if native.why_not():
        pytest.skip(f"no native kernels: {native.why_not()}")
    kernel = Kernel("compiled", {"torch": lambda: lambda: None, "native": lambda: native.library().decode})
    kernel_choice._write("compiled", {"torch": 2.0, "native": 1.0})
    assert kernel.choice() == "native"
    with monkeypatch.context() as patch:
        patch.setenv("CC", "no-such-compiler")
        native._outcome.cache_clear()
        kernel_choice._chosen.clear()
        try:
            assert kernel.choice() == "torch"
        finally:
            native._outcome.cache_clear()
    kernel_choice._chosen.clear()
    assert kernel.choice() == "native", "the earlier measurement is kept"


@pytest.mark.slow
def test_a_damaged_library_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A power failure can leave an empty file under the final name, or one whose end is missing, which would end the process."""
    if native.why_not():
        pytest.skip(f"no native kernels: {native.why_not()}")
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "SOURCES", native.SOURCES[-1:])
    monkeypatch.setenv(
        "CC", f"{shutil.which('env')} LANG=C {os.environ.get('CC') or 'cc'}"
    )  # a compiler may have arguments
    whole = native.build().read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        native.build().write_bytes(content)
        assert native.build().read_bytes() == whole
    assert ctypes.CDLL(str(native.build())).summarize
    compiled = native.build().stat().st_mtime_ns
    assert native.build().stat().st_mtime_ns == compiled, "an intact one is used"


@pytest.mark.parametrize(("rows", "columns"), itertools.product((24, 96), (24, 96)))
def test_every_muon_kernel_is_near_the_polar_factor(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, rows, columns)
    u, _, v = torch.linalg.svd(stack.double(), full_matrices=False)
    for dtype in (torch.float32, torch.bfloat16):
        found = orthogonalize(stack.to(dtype)).double()
        cosine = (found * (u @ v)).sum((-2, -1)) / (found.norm(dim=(-2, -1)) * (u @ v).norm(dim=(-2, -1)))
        assert cosine.min() > 0.96
        assert torch.linalg.svdvals(found).max() < BAND[1] + 0.05
