"""Hand-written gradients against plain formulas: gradcheck in float64, and autograd of the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from firth.model import attention_kernels, cross_entropy, fused
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.config_groups import (
    EmbeddingConfig,
    EncoderConfig,
    LMHeadConfig,
    NormConfig,
    PositionConfig,
    RopeConfig,
)
from firth.model.flops import num_parameters
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.positions import rope_angles, rotation


def numbers(*size: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


def test_unit() -> None:
    x = numbers(3, 5, 8)
    assert torch.allclose(fused._UnitRMS.apply(x, 1e-3, x.dtype), F.rms_norm(x, (8,), eps=1e-3))
    assert gradcheck(lambda x: fused._UnitRMS.apply(x, 1e-3, x.dtype), x)
    large = torch.randn(64, 512)
    with torch.no_grad():
        assert torch.allclose(fused.unit_rms(large, 1e-6), F.rms_norm(large, (512,), eps=1e-6), atol=1e-6)
    assert torch.equal(fused.unit_rms(large.bfloat16(), 1e-6), F.rms_norm(large.bfloat16(), (512,), eps=1e-6))


def test_relu2() -> None:
    x = numbers(5, 6)
    assert torch.equal(fused.relu2(x), F.relu(x).square())
    assert gradcheck(fused.relu2, x)
    with torch.no_grad():
        assert torch.equal(fused.relu2(x), F.relu(x).square())


@pytest.mark.parametrize("eps", [-1.0, 1e-3])
def test_rotate(eps: float) -> None:
    x = numbers(2, 3, 4, 6)
    config = ModelConfig(
        vocab_size=2,
        hidden_size=24,
        num_layers=1,
        num_heads=4,
        position=PositionConfig("rotary", rope=RopeConfig(sign=-1)),
    )
    cos, sin = (angle.double() for angle in rope_angles(torch.tensor([[0, 3, 9], [5, 1, 2]]), config))
    a, b = x.chunk(2, -1)
    rotated = torch.complex(a, b) * torch.complex(cos[..., :3], sin)
    plain = torch.cat((rotated.real, rotated.imag), -1)
    if eps > 0:
        plain = F.rms_norm(plain, (6,), eps=eps)
    assert torch.allclose(fused.rotate(x, cos, sin, eps), plain)
    with torch.no_grad():
        assert torch.allclose(fused.rotate(x, cos, sin, eps), plain)
    assert gradcheck(lambda x: fused.rotate(x, cos, sin, eps), x)


@pytest.mark.parametrize("eps", [-1.0, 1e-3])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rows", [1, 5])
@torch.no_grad()
def test_rotation_as_a_matrix_product(eps: float, sign: int, rows: int) -> None:
    config = ModelConfig(
        vocab_size=2,
        hidden_size=24,
        num_layers=1,
        num_heads=4,
        position=PositionConfig("rotary", rope=RopeConfig(sign=sign)),
    )
    angles = rope_angles(torch.tensor([[3], [0], [9], [1], [200]])[:rows], config)
    for dtype, near in ((torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        x = torch.randn(5, 1, 4, 6).to(dtype)
        found = fused.rotate_by_matrix(x, rotation(*angles), eps)
        assert found.dtype == dtype
        assert torch.allclose(found, fused.rotate(x, *angles, eps), atol=near)


@pytest.mark.parametrize("rows", [1, 8, 16, 48, 49])
@pytest.mark.parametrize("biased", [False, True])
def test_project_is_linear(rows: int, biased: bool) -> None:
    x, weight, bias = torch.randn(2, rows, 12), torch.randn(20, 12), torch.randn(20) if biased else None
    with torch.no_grad():
        for part in (x, x[:1], x[0], x[0].t().contiguous().t(), x[:, : rows // 2 + 1]):
            found = fused.project(part, weight, bias)
            assert found.shape == (*part.shape[:-1], 20)
            assert torch.allclose(found, F.linear(part, weight, bias), atol=1e-5)
    assert torch.equal(fused.project(x, weight.requires_grad_(), bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("causal", [True, False])
def test_blocked_attention(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "ROWS", 2)
    q, k, v, bias = numbers(2, 2, 5, 3), numbers(2, 2, 5, 3) * 2, numbers(2, 2, 5, 3) + 1, numbers(1, 2, 5, 5)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, bias)]
    assert gradcheck(lambda q, k, v, b: attention_kernels.attend(q, k, v, 0.4, causal, False, None, b), leaves)


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_cross_entropy(cap: float, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 7 * 4 * 8)  # chunks of four rows, the last one short
    monkeypatch.setattr(cross_entropy, "PART_LOGITS", 7 * 3)  # scored three rows at a time
    torch.manual_seed(0)
    states, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (10, 7))
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True) if biased else None
    labels = torch.randint(7, (10,))
    inputs = [x for x in (states, weight, bias) if x is not None]

    def plain() -> Tensor:
        logits = F.linear(states, weight, bias)
        return -F.log_softmax(cap * torch.tanh(logits / cap) if cap else logits, -1)[torch.arange(10), labels]

    total = cross_entropy.SumNLL.apply(states, weight, bias, labels, cap, True)
    assert torch.allclose(total, plain().sum())
    for mine, other in zip(
        torch.autograd.grad(total * 3, inputs), torch.autograd.grad(plain().sum() * 3, inputs), strict=True
    ):
        assert torch.allclose(mine, other)
    each = cross_entropy.LogProbs.apply(states, weight, bias, labels, cap)
    assert torch.allclose(each, -plain())
    direction = torch.randn(10, dtype=torch.float64)
    for mine, other in zip(
        torch.autograd.grad(each, inputs, direction), torch.autograd.grad(-plain(), inputs, direction), strict=True
    ):
        assert torch.allclose(mine, other)
    frozen = weight.detach()
    alone = cross_entropy.SumNLL.apply(states, frozen, None, labels, cap, True)
    assert (
        gradcheck(lambda s: cross_entropy.SumNLL.apply(s, frozen, None, labels, cap, True), states)
        and alone.requires_grad
    )
    none = cross_entropy.SumNLL.apply(states[:0], weight, bias, labels[:0], cap, True)
    assert none == 0 and torch.autograd.grad(none, weight)[0].abs().sum() == 0


def test_extreme_logits_stay_finite() -> None:
    states, weight = (
        torch.tensor([[200.0], [-200.0]], requires_grad=True),
        torch.tensor([[1.0], [-1.0]], requires_grad=True),
    )
    loss = cross_entropy.SumNLL.apply(states, weight, None, torch.tensor([0, 0]), 0.0, True)
    assert loss == 400
    assert torch.autograd.grad(loss, states)[0].tolist() == [[0.0], [-2.0]]


@pytest.mark.parametrize("make", [decoder_config, encoder_config])
def test_head_under_autocast_and_without_gradients(make: object) -> None:
    config = make(vocab_size=60, hidden_size=32, num_layers=1, num_heads=2)  # type: ignore[operator]
    torch.manual_seed(0)
    model = LM(config, {"lm": LMHead(config)})
    head = model.heads["lm"]
    torch.nn.init.normal_(head.weight, std=0.3)
    states, labels = torch.randn(50, 32, requires_grad=True), torch.randint(60, (50,))
    exact = head.nll(states, labels)
    exact.backward()
    kept = {n: p.grad.clone() for n, p in head.named_parameters()}
    with torch.no_grad():
        assert torch.allclose(head.nll(states, labels), exact) and torch.allclose(
            -head.log_probs(states, labels).sum(), exact
        )
        assert torch.allclose(F.cross_entropy(head(states), labels, reduction="sum"), exact)
    head.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rough = head.nll(states, labels)
        each = head.log_probs(states, labels)
    assert rough.dtype == each.dtype == torch.float32 and abs(rough / exact - 1) < 0.01
    rough.backward()
    for name, parameter in head.named_parameters():
        assert (parameter.grad - kept[name]).norm() < 0.03 * kept[name].norm() + 1e-6, name
    head.zero_grad()
    each.sum().neg().backward()
    for name, parameter in head.named_parameters():
        assert (parameter.grad - kept[name]).norm() < 0.03 * kept[name].norm() + 1e-6, name


def test_a_tied_matrix_gets_both_gradients() -> None:
    """The finite difference of the loss along a random direction of the tied matrix."""
    config = decoder_config(vocab_size=20, hidden_size=16, num_layers=1, num_heads=2).with_fields(
        {"tie_embeddings": True, "init.zero_output": False, "init.std": 0.3}
    )
    torch.manual_seed(0)
    model = LM(config, {"lm": LMHead(config)}).double()
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)
    when = torch.arange(6)[None]
    batch = {"tokens": torch.randint(20, (1, 6)), "query_time": when, "key_time": when}
    labels = torch.randint(20, (6,))

    def loss() -> Tensor:
        return model.heads["lm"].nll(model(batch)[0], labels)

    loss().backward()
    weight, direction = model.tokens.weight, torch.randn(20, 16, dtype=torch.float64)
    with torch.no_grad():
        weight += 1e-5 * direction
        up = loss()
        weight -= 2e-5 * direction
        down = loss()
    assert torch.allclose((up - down) / 2e-5, (weight.grad * direction).sum(), rtol=1e-6)


def test_parameter_count_and_seed_of_a_config() -> None:
    for config in (
        decoder_config(50, 32, 2, num_heads=2),
        encoder_config(50, 32, 2, num_heads=2),
        ModelConfig(50, 32, 2, 4),
        ModelConfig(
            50,
            32,
            2,
            4,
            num_kv_heads=2,
            encoder=EncoderConfig(num_layers=3),
            position=PositionConfig("t5"),
            activation="swiglu",
            tie_embeddings=False,
            lm_head=LMHeadConfig(bias=True),
        ),
        ModelConfig(
            50,
            32,
            2,
            4,
            norm=NormConfig(placement="post", embedding=True, first_attention=False),
            embedding=EmbeddingConfig(type_vocab_size=2),
            lm_head=LMHeadConfig("transform", bias=True),
        ),
    ):
        torch.manual_seed(5)
        model = LM(config, {"lm": LMHead(config)})
        assert sum(p.numel() for p in model.parameters()) == num_parameters(config), config
        torch.manual_seed(5)
        again = LM(config, {"lm": LMHead(config)})
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("make", [decoder_config, encoder_config, encoder_decoder_config])
def test_a_model_trains_under_autocast_and_in_bf16(make: object) -> None:
    """bf16 loss and gradient are near those of fp32; with bf16 weights the loss is too."""
    config = make(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2).with_fields({"init.zero_output": False})  # type: ignore[operator]
    torch.manual_seed(0)
    model = LM(config, {"lm": LMHead(config)})
    torch.nn.init.normal_(model.heads["lm"].weight, std=0.2)
    when = torch.arange(10).expand(4, 10) * (make is not encoder_config)
    tokens = torch.randint(50, (4, 10))
    batch = {"tokens": tokens, "source_tokens": tokens.flip(1), "query_time": when, "key_time": when}

    def loss() -> Tensor:
        return model.heads["lm"].nll(model(batch).flatten(0, 1), tokens.flatten()) / tokens.numel()

    exact = loss()
    exact.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rough = loss()
    rough.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert abs(rough / exact - 1) < 0.01
    assert F.cosine_similarity(found, gradient, 0) > 0.99
    model = model.bfloat16()
    assert abs(loss().float() / exact - 1) < 0.02
