"""Muon against the singular value decomposition, AdamW against its formula, and the parameter groups."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn

from firth import kernel_choice
from firth.model.config import decoder_config, encoder_decoder_config
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.training.muon import BAND, MIN_RELATIVE_VALUE, orthogonalize
from firth.training.optimizer import Optimizer, OptimizerConfig, param_groups
from firth.types import UserError


def tiny() -> LM:
    torch.manual_seed(0)
    config = decoder_config(vocab_size=40, hidden_size=32, num_layers=2)
    return LM(config, CausalLM().heads(config))


def with_singular_values(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    s = len(values)
    u = torch.linalg.qr(torch.randn(rows, s, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, s, dtype=torch.float64)).Q
    return (u * values.double()) @ v.mT


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 80), (48, 192), (192, 48), (7, 5), (1, 9)])
def test_singular_values_end_in_the_band(rows: int, columns: int) -> None:
    torch.manual_seed(1)
    s = min(rows, columns)
    # From about the smallest supported fraction of the Schatten-4 norm to the largest; three matrices at three scales.
    values = torch.logspace(math.log10(2 * MIN_RELATIVE_VALUE), 0, s)
    exact = torch.stack([with_singular_values(rows, columns, values * scale) for scale in (1e-6, 1.0, 1e4)])
    found = orthogonalize(exact.float())
    values = torch.linalg.svdvals(found.double())
    assert values.min() > BAND[0] - 1e-3, values.min()
    assert values.max() < BAND[1] + 1e-3, values.max()
    # The same directions: U^T found V is diagonal and positive.
    for m, f in zip(exact, found.double(), strict=True):
        u, _, v = torch.linalg.svd(m, full_matrices=False)
        core = u.mT @ f @ v.mT
        assert (core - torch.diag(core.diag())).abs().max() < 2e-3
        assert core.diag().min() > 0


def test_both_algorithms_agree_and_bf16_is_near_the_band() -> None:
    torch.manual_seed(2)
    wide = torch.randn(3, 32, 128)
    exact = orthogonalize(wide.double())  # without the Gram matrix
    assert (orthogonalize(wide).double() - exact).abs().max() < 1e-4  # with the Gram matrix
    assert (orthogonalize(wide.mT.contiguous()).mT.double() - exact).abs().max() < 1e-4
    in_bf16 = torch.linalg.svdvals(orthogonalize(wide.bfloat16()).float())
    assert in_bf16.min() > BAND[0] - 0.05
    assert in_bf16.max() < BAND[1] + 0.05


def test_small_singular_values_grow_and_zeros_stay() -> None:
    torch.manual_seed(3)
    values = torch.cat([torch.ones(8), torch.full((24,), 1e-4)])
    got = torch.linalg.svdvals(orthogonalize(with_singular_values(32, 128, values).float()[None])[0])
    assert got[8:].min() > 1e-4 * 100  # multiplied by hundreds, still below the band
    assert torch.equal(orthogonalize(torch.zeros(2, 8, 8)), torch.zeros(2, 8, 8))
    assert torch.equal(orthogonalize(torch.zeros(2, 8, 32)), torch.zeros(2, 8, 32))


@pytest.mark.parametrize("size", [1e-33, 1e-20, 1e-14, 1e-12, 1e15, 1e30])
@pytest.mark.parametrize("columns", [24, 96])
def test_the_scale_of_a_gradient_does_not_matter(size: float, columns: int) -> None:
    """Key weights have gradients of 1e-14 while query weights are near zero: their fourth powers underflow."""
    stack = torch.randn(2, 24, columns, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(orthogonalize(size * stack), orthogonalize(stack), atol=2e-5)


def test_muon_steps_along_the_polar_factor_by_0_2_lr() -> None:
    torch.manual_seed(4)
    layers = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(3)])
    before = [m.weight.detach().clone() for m in layers]
    optimizer = Optimizer(OptimizerConfig(lr=0.01, weight_decay=0.5, momentum=0.9), layers)
    grads = [torch.randn(64, 64) for _ in layers]
    for m, g in zip(layers, grads, strict=True):
        m.weight.grad = g.clone()
    optimizer.step(0.5)
    for m, w, g in zip(layers, before, grads, strict=True):
        change = w * (1 - 0.01 * 0.5 * 0.5) - m.weight.detach()
        assert change.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01 * 0.5, rel=0.15)
        u, _, v = torch.linalg.svd(g)
        cosine = (change * (u @ v)).sum() / change.norm() / (u @ v).norm()
        assert cosine > 0.97
        assert m.weight.grad is None


def test_momentum_is_nesterov() -> None:
    layer = nn.ModuleList([nn.Linear(8, 8, bias=False)])
    first, second = torch.randn(8, 8), torch.randn(8, 8)
    with kernel_choice.forced({"muon": "fp32"}):
        optimizer = Optimizer(OptimizerConfig(lr=0.1, weight_decay=0.0, momentum=0.9), layer)
    for g in (first, second):
        before = layer[0].weight.detach().clone()
        layer[0].weight.grad = g.clone()
        optimizer.step(1.0)
    momentum = 0.9 * (0.1 * first) + 0.1 * second
    expected = orthogonalize((0.1 * second + 0.9 * momentum)[None])[0] * 0.1 * 0.2 * math.sqrt(8)
    assert torch.allclose(before - layer[0].weight.detach(), expected, atol=1e-6)


def test_adamw_follows_its_formula() -> None:
    torch.manual_seed(5)
    model = tiny()
    optimizer = Optimizer(OptimizerConfig("adamw", lr=0.01, weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-6), model)
    mean = {p.name: torch.zeros_like(p.parameter) for p in optimizer.groups}
    square = {p.name: torch.zeros_like(p.parameter) for p in optimizer.groups}
    for t in (1, 2, 3):
        expected = {}
        for p in optimizer.groups:
            w = p.parameter.detach().clone()
            g = torch.randn_like(w)
            p.parameter.grad = g.clone()
            mean[p.name] = 0.8 * mean[p.name] + 0.2 * g
            square[p.name] = 0.9 * square[p.name] + 0.1 * g * g
            step = (mean[p.name] / (1 - 0.8**t)) / ((square[p.name] / (1 - 0.9**t)).sqrt() + 1e-6)
            expected[p.name] = w * (1 - 0.005 * p.weight_decay) - 0.005 * step
        optimizer.step(0.5)
        for p in optimizer.groups:
            assert torch.allclose(p.parameter, expected[p.name], atol=1e-6), p.name


def test_parameter_groups() -> None:
    spec = OptimizerConfig(lr=0.02, embedding_lr=0.3, scalar_lr=0.004, weight_decay=0.1)
    by_name = {p.name: p for p in param_groups(spec, tiny())}
    q, table, head = (by_name[n] for n in ("stack.blocks.0.attention.q.weight", "tokens.weight", "heads.lm.weight"))
    assert (q.muon, q.lr, q.weight_decay) == (True, 0.02, 0.1)
    assert (table.muon, table.lr, table.weight_decay) == (False, 0.3, 0.0)
    assert (head.muon, head.lr, head.weight_decay) == (False, 0.004, 0.1)
    config = encoder_decoder_config(vocab_size=40, hidden_size=32, num_layers=1)
    for p in param_groups(spec, LM(config, CausalLM().heads(config))):
        if p.parameter.ndim < 2 or "relative" in p.name:
            assert (p.muon, p.lr, p.weight_decay) == (False, 0.004, 0.0), p.name
        elif "blocks" in p.name:
            assert p.muon, p.name
    assert not any(p.muon for p in param_groups(OptimizerConfig("adamw"), tiny()))


def test_a_tied_head_is_an_embedding_table() -> None:
    torch.manual_seed(0)
    config = replace(decoder_config(vocab_size=40, hidden_size=32, num_layers=1), tie_embeddings=True)
    tied = LM(config, CausalLM().heads(config))
    groups = param_groups(OptimizerConfig(embedding_lr=0.5), tied)
    assert [p.name for p in groups if p.parameter.shape == (40, 32)] == ["tokens.weight"]
    assert next(p for p in groups if p.name == "tokens.weight").weight_decay == 0


def test_clipping_scales_all_gradients_together() -> None:
    model = tiny()
    optimizer = Optimizer(OptimizerConfig(max_grad_norm=1.0), model)
    for p in optimizer.parameters:
        p.grad = torch.randn_like(p)
    whole = torch.cat([p.grad.flatten() for p in optimizer.parameters])
    assert optimizer.clip_grad_norm().item() == pytest.approx(whole.norm().item(), rel=1e-5)
    clipped = torch.cat([p.grad.flatten() for p in optimizer.parameters])
    assert torch.allclose(clipped, whole / whole.norm(), atol=1e-7)
    before = clipped.clone()
    optimizer.clip_grad_norm()  # at the limit already: only rounding
    assert torch.allclose(torch.cat([p.grad.flatten() for p in optimizer.parameters]), before, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_skipped_on_the_device_changes_nothing(name: Literal["adamw", "muon"], value: float) -> None:
    """With 1, weights, moments and counters of steps stay to the bit; with 0, the step is the usual one."""
    models = [tiny(), tiny()]
    late, usual = (Optimizer(OptimizerConfig(name), model, deferred=model is models[0]) for model in models)
    for number in range(3):
        for optimizer in (late, usual):
            generator = torch.Generator().manual_seed(number)
            for p in optimizer.parameters:
                p.grad = torch.randn(p.shape, generator=generator)
        if number == 2:
            late.parameters[3].grad.view(-1)[5] = value
            assert not late.clip_grad_norm().isfinite()
            before = {k: x.clone() for k, x in (late.state() | dict(models[0].named_parameters())).items()}
            late.step(1.0, torch.ones(()))
            after = late.state() | dict(models[0].named_parameters())
            assert before.keys() == after.keys()
            assert {x.item() for k, x in after.items() if k.startswith("step/")} == {2}
            assert all(torch.equal(x, after[k]) for k, x in before.items())
            assert all(p.grad is None for p in late.parameters)
        else:
            assert torch.equal(late.clip_grad_norm(), usual.clip_grad_norm())
            late.step(1.0, torch.zeros(()))
            usual.step(1.0)
            for p, other in zip(late.parameters, usual.parameters, strict=True):
                assert torch.allclose(p, other, rtol=1e-5, atol=1e-7)


def test_state_and_restore_are_inverse() -> None:
    one, other = tiny(), tiny()
    optimizers = [Optimizer(OptimizerConfig(), m) for m in (one, other)]

    def take_step(optimizer: Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in optimizer.parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step(1.0)

    take_step(optimizers[0], 1)
    other.load_state_dict(one.state_dict())
    optimizers[1].restore(optimizers[0].state())
    for optimizer in optimizers:
        take_step(optimizer, 2)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_invalid_values_are_rejected_by_name() -> None:
    with pytest.raises(UserError, match=r"optimizer.beta2=1.0 should be less than 1"):
        OptimizerConfig(beta2=1.0)
    with pytest.raises(UserError, match=r"optimizer\.lr=nan should be a finite number"):
        OptimizerConfig(lr=float("nan"))
    with pytest.raises(UserError, match="nothing to train"):
        Optimizer(OptimizerConfig(), tiny().requires_grad_(False))
