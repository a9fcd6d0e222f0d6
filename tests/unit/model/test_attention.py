"""Attention masks: every form against the rule in plain loops; decoding with a cache against without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from firth.model import attention_kernels
from firth.model.attention import AttentionMask, attend
from firth.model.block import Attention, initialize
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.config_groups import AttentionConfig, InitConfig
from firth.model.forward_context import ForwardContext
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.types import NEVER, Batch

B, T, H, D = 3, 9, 4, 8
STEPS = torch.arange(T).expand(B, T)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, fields: dict[str, Tensor], scale: float, bias: Tensor | None
) -> Tensor:
    """Return attention under the rule in plain loops: one query, one key at a time."""
    groups = q.shape[1] // k.shape[1]
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [
                    j
                    for j in range(k.shape[2])
                    if fields["document_ids"][b, i] == fields["key_document"][b, j]
                    and fields["key_time"][b, j] <= fields["query_time"][b, i]
                ]
                if not seen:
                    rows.append(q[b, h, i] * 0)
                    continue
                scores = torch.stack([scale * q[b, h, i] @ k[b, h // groups, j] for j in seen])
                if bias is not None:
                    scores = scores + bias[b % len(bias), h, i, seen]
                rows.append(scores.softmax(0) @ v[b, h // groups, seen])
    return torch.stack(rows).view(q.shape)


def padded(lengths: list[int], query_time: Tensor, key_time: Tensor, fill: int) -> dict[str, Tensor]:
    real = torch.arange(query_time.shape[1]) < torch.tensor(lengths)[:, None]
    return {"query_time": torch.where(real, query_time, fill), "key_time": torch.where(real, key_time, NEVER)}


ORDER = torch.stack([torch.randperm(T, generator=torch.Generator().manual_seed(s)) for s in range(B)])
PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9, [0, 1, 1, 1, 1, 1, 2, 3, 3]])
ZERO = torch.zeros(B, T, dtype=torch.long)
CASES = {
    "full": ({"query_time": ZERO, "key_time": ZERO}, "none"),
    "causal": ({"query_time": STEPS, "key_time": STEPS}, "causal"),
    "causal from five": ({"query_time": STEPS + 5, "key_time": STEPS + 5}, "causal"),
    "prefix": ({"query_time": (STEPS - 3).clamp(0), "key_time": (STEPS - 3).clamp(0)}, "mask"),
    "permuted": ({"query_time": ORDER, "key_time": ORDER}, "mask"),
    "two streams": ({"query_time": ORDER - 1, "key_time": torch.where(STEPS < 6, ORDER, NEVER)}, "mask"),
    "padded": (padded([9, 5, 1], ZERO, ZERO, 0), "keys"),
    "padded, absent": (padded([9, 5, 1], ZERO, ZERO, -NEVER), "keys"),
    "a whole row of padding": (padded([9, 0, 3], ZERO, ZERO, 0), "keys"),
    "causal, padded": (padded([9, 5, 1], STEPS, STEPS, 0), "mask"),
    "causal, absent": (padded([9, 5, 1], STEPS, STEPS, -NEVER), "causal"),
    "causal, padded on the left": ({"query_time": STEPS - 2, "key_time": torch.where(STEPS < 2, NEVER, STEPS - 2)}, "mask"),
    "packed": ({"query_time": ZERO, "key_time": ZERO, "document_ids": PACKED}, "mask"),
    "packed causal": ({"query_time": STEPS, "key_time": STEPS, "document_ids": PACKED}, "lower"),
    "nothing visible": ({"query_time": ZERO - 1, "key_time": ZERO}, "mask"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["train", "read", "flex", "bias", "groups"])
def test_every_mask_form_matches_the_rule(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, kind = CASES[name]
    document = fields.get("document_ids")
    monkeypatch.setattr(attention_kernels, "ROWS", 4)  # several blocks, the last one short
    torch.manual_seed(0)
    kv = 2 if way == "groups" else H
    q, k, v = (torch.randn(B, n, T, D, dtype=torch.float64, requires_grad=way != "read") for n in (H, kv, kv))
    bias = torch.randn(1, H, T, T, dtype=torch.float64, requires_grad=True) if way == "bias" else None
    if way == "flex":
        q, k, v = (x.detach().float() for x in (q, k, v))
    with torch.set_grad_enabled(way not in ("read", "flex")):
        mask = AttentionMask.from_times(
            fields["query_time"], fields["key_time"], document, document, flex=way == "flex"
        )
        found = attend(q, k, v, mask, 0.3, bias)
    form = "causal" if mask.is_causal else "none" if mask.mask is None else "lower" if mask.lower_triangular else "mask"
    form = "keys" if mask.mask is not None and mask.mask.shape[-2] == 1 else form
    assert mask.block_mask is not None if way == "flex" and kind in ("mask", "lower") else form in (kind, "lower")
    owned = ZERO if document is None else document
    want = reference_attention(q, k, v, fields | {"document_ids": owned, "key_document": owned}, 0.3, bias)
    real = (fields["query_time"] > -NEVER)[:, None, :, None]
    assert found.isfinite().all()
    assert torch.allclose(found * real, want * real, atol=1e-6 if way == "flex" else 1e-12)
    if q.requires_grad:
        inputs = [x for x in (q, k, v, bias) if x is not None]
        weight = torch.randn_like(want) * real
        ours = torch.autograd.grad((found * weight).sum(), inputs)
        theirs = torch.autograd.grad((want * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.allclose(mine, other, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invisible_keys_are_left_out(dtype: torch.dtype) -> None:
    """The query stream of a permuted order is at the end of the rows."""
    torch.manual_seed(0)
    order = torch.stack([torch.randperm(20) for _ in range(B)])
    query_time = torch.cat((order, order - 1, order - 1), 1)
    key_time = torch.cat((order, torch.full((B, 40), NEVER)), 1)
    q, k, v = (torch.randn(B, H, 60, D, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = torch.randn(B, H, 60, 60, dtype=dtype, requires_grad=True)
    mask = AttentionMask.from_times(query_time, key_time)
    assert mask.num_keys == 32 and mask.mask is not None and mask.mask.shape[-1] == 32
    nothing = torch.zeros(B, 60)
    fields = {"query_time": query_time, "key_time": key_time, "document_ids": nothing, "key_document": nothing}
    slope, found = torch.randn(B, H, 60, D, dtype=dtype), []
    for out in (attend(q, k, v, mask, 0.3, bias), reference_attention(q, k, v, fields, 0.3, bias)):
        found.append([out, *torch.autograd.grad((out * slope).sum(), (q, k, v, bias))])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_cross_attention_matches_the_rule() -> None:
    """Packed rows: other lengths, other documents, padding."""
    torch.manual_seed(0)
    source = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [0] * 7, [0, 1, 1, 2, 2, 3, 3]])
    key_time = torch.where(torch.arange(7) < torch.tensor([7, 4, 6])[:, None], 0, NEVER)
    query_time = torch.full((B, T), NEVER - 1)
    q, k, v = (torch.randn(B, H, n, D, dtype=torch.float64, requires_grad=True) for n in (T, 7, 7))
    mask = AttentionMask.from_times(query_time, key_time, PACKED, source)
    fields = {"query_time": query_time, "key_time": key_time, "document_ids": PACKED, "key_document": source}
    assert torch.allclose(attend(q, k, v, mask, 0.3), reference_attention(q, k, v, fields, 0.3, None), atol=1e-12)
    keys = AttentionMask.from_times(query_time, key_time)
    assert keys.mask is not None and keys.mask.shape == (B, 1, 1, 7)


POSITIONS = ["learned", "sinusoidal", "rotary", "t5", "none"]


def build(config: ModelConfig) -> LM:
    torch.manual_seed(0)
    model = LM(config, {"lm": LMHead(config)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("source", [False, True], ids=["decoder", "encoder-decoder"])
@torch.inference_mode()
def test_cached_equals_uncached(position: str, source: bool) -> None:
    """Prompts of three lengths padded on the right, then four tokens each, with gaps in the slots."""
    make = encoder_decoder_config if source else decoder_config
    model = build(
        make(50, 32, 2, num_heads=4, max_positions=64).with_fields(
            {"position.type": position, "num_kv_heads": 2, "init.zero_output": False}
        )
    )
    lengths, more = [6, 3, 1], 4
    tokens = torch.randint(50, (3, 10))
    extra = {}
    if source:
        keep = torch.arange(8) < torch.tensor([8, 2, 5])[:, None]
        extra = {"source_tokens": torch.randint(50, (3, 8)), "source_key_time": torch.where(keep, 0, NEVER)}
    cache = model.make_cache(3, 6 + more)
    when = torch.arange(6).expand(3, 6)
    prompt = {"tokens": tokens[:, :6]} | padded(lengths, when, when, 0) | extra
    first = model(prompt, ForwardContext(cache))
    steps = []
    at = torch.tensor(lengths)[:, None]
    new = tokens[:, 6:]
    for i in range(more):
        batch = {"tokens": new[:, i : i + 1], "positions": at + i, "query_time": at + i, "key_time": at + i}
        steps.append(model(batch, ForwardContext(cache)))
    for row, length in enumerate(lengths):
        whole = torch.cat((tokens[row, :length], new[row]))[None]
        order = torch.arange(length + more)[None]
        alone: Batch = {"tokens": whole, "query_time": order, "key_time": order}
        alone |= {name: field[row : row + 1] for name, field in extra.items()}
        want = model(alone)[0]
        got = torch.cat((first[row, :length], torch.cat(steps, 1)[row]))
        assert torch.allclose(got, want, atol=2e-5), (position, row)
    assert cache.length == 10


@torch.inference_mode()
def test_rows_are_added_and_removed_while_decoding() -> None:
    model = build(encoder_decoder_config(50, 32, 2, num_heads=4).with_fields({"init.zero_output": False}))
    when = torch.arange(5).expand(3, 5)
    batch = {
        "tokens": torch.randint(50, (3, 5)),
        "query_time": when,
        "key_time": when,
        "source_tokens": torch.randint(50, (3, 7)),
    }
    tokens = torch.tensor([[7], [8], [9]])
    last = {"tokens": tokens, "query_time": torch.full((3, 1), 5), "key_time": torch.full((3, 1), 5)}
    whole, some = model.make_cache(3, 6), model.make_decoding_cache(4)
    model(batch, ForwardContext(whole))
    some.add(whole, [0, 1], [5, 5], capacity=6)
    some.add(whole, [2], [5], capacity=8)
    assert some.remove([0]) == [2, 1]
    want = model(last, ForwardContext(whole))[[2, 1]]
    got = model({"tokens": tokens[[2, 1]], "positions": torch.full((2, 1), 5)}, ForwardContext(some))
    assert torch.allclose(got, want, atol=1e-6)
    assert some.lengths == [6, 6]
    assert some.allocations == 2


@pytest.mark.parametrize("make", [decoder_config, encoder_config, encoder_decoder_config])
def test_packing_padding_and_groups_change_nothing(make: object) -> None:
    """Two texts alone, padded, packed into one row, and as a group (1, 2, T) have the same states."""
    config = make(50, 32, 2, num_heads=4).with_fields({"init.zero_output": False})  # type: ignore[operator]
    model = build(config).train()
    a, b, s, t = (torch.randint(50, (n,)) for n in (5, 3, 4, 6))
    causal = make is not encoder_config

    def alone(tokens: Tensor, source: Tensor) -> Tensor:
        when = torch.arange(len(tokens))[None] * causal
        return model({"tokens": tokens[None], "query_time": when, "key_time": when, "source_tokens": source[None]})[0]

    want = torch.cat((alone(a, s), alone(b, t)))
    join, count = torch.cat, torch.arange
    batch = {
        "tokens": join((a, b))[None], "positions": join((count(5), count(3)))[None],
        "document_ids": torch.tensor([[0] * 5 + [1] * 3]), "source_tokens": join((s, t))[None],
        "source_positions": join((count(4), count(6)))[None], "source_document_ids": torch.tensor([[0] * 4 + [1] * 6]),
    }  # fmt: skip
    batch["query_time"] = batch["key_time"] = batch["positions"] * causal
    assert torch.allclose(model(batch)[0], want, atol=1e-5)
    pad = torch.zeros(2, dtype=torch.long)
    when = count(5).expand(2, 5) * causal
    rows = {"tokens": torch.stack((a, join((b, pad)))), "source_tokens": torch.stack((join((s, pad)), t))}
    rows |= padded([5, 3], when, when, 0)
    rows["source_key_time"] = torch.tensor([[0, 0, 0, 0, NEVER, NEVER], [0] * 6])
    got = model(rows)
    assert torch.allclose(join((got[0], got[1, :3])), want, atol=1e-5)
    assert torch.allclose(model({n: x[None] for n, x in rows.items()})[0], got, atol=1e-6)


@pytest.mark.parametrize("scale_scores", [True, False])
def test_initial_scores_have_unit_variance(scale_scores: bool) -> None:
    """T5 has no 1 / sqrt(d) in the product, so the factor is in the initial query weights."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        hidden_size=256,
        num_layers=1,
        num_heads=4,
        attention=AttentionConfig(scale_scores=scale_scores),
        init=InitConfig(std=0.0),
    )
    attention = Attention(config)
    initialize(attention, config)
    x = torch.randn(1, 200, 256)
    q, k = (f(x).unflatten(-1, (4, 64)).transpose(1, 2) for f in (attention.q, attention.k))
    assert 0.8 < float((attention.scale * q @ k.transpose(-1, -2)).detach().std()) < 1.25
