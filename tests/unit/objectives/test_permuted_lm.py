"""Permuted objectives and XLNet: against a two-stream reference, against transformers, and in limiting cases."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from firth.data import attention_fields
from firth.data.collate import Batches, collate, pack
from firth.data.windows import Documents, WindowsConfig
from firth.evaluate.perplexity import TokenizedDocument, one_at_a_time
from firth.generate.engine import Engine
from firth.generate.fill import fill_masks
from firth.generate.sampling import Sampling
from firth.generate.scoring import scoring_mode
from firth.model.attention import mask_from_times
from firth.model.block import Linear
from firth.model.config import ModelConfig
from firth.model.config_groups import AttentionConfig, EmbeddingConfig, LMHeadConfig, NormConfig, PositionConfig
from firth.model.flops import MemoryWork, num_parameters, real_tokens, stack_flops, work
from firth.model.forward_context import ForwardContext
from firth.model.model import LM
from firth.model.positions import DistanceIndex, RelativeDistance, distance_index, sinusoid_frequencies
from firth.model.presets import PRESETS
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.permuted_lm import PLM, MPNet
from firth.pretrained.load_save import load_model, save_model
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.vocab import Vocab
from firth.training.step import step
from firth.types import IGNORE, NEVER, Batch, Example, UserError
from tests.support.tiny_corpus import store, tokenizer

VOCAB = Vocab(
    size=61, roles={"pad": 0, "cls": 2, "bos": 2, "sep": 3, "eos": 3, "mask": 4}, special=np.arange(61) < 5,
    spelling=tuple(b"\n" if i < 5 else b" a" if i % 2 else b"a" for i in range(61)),
)  # fmt: skip
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_positions": 40,
    "intermediate_size": 48,
    "causal": False,
}
XLNET = ModelConfig(
    **SIZES, norm=NormConfig(placement="post", eps=1e-12), position=PositionConfig("xlnet"),
    embedding=EmbeddingConfig(mask=True, type_vocab_size=2), activation="gelu", lm_head=LMHeadConfig(bias=True),
)  # fmt: skip
MPNET = ModelConfig(
    **SIZES, norm=NormConfig(placement="post", eps=1e-12, embedding=True), position=PositionConfig("mpnet"),
    activation="gelu", lm_head=LMHeadConfig("transform", bias=True),
)  # fmt: skip
ALL_MASKED = {"mask_fraction": 1.0, "random_fraction": 0.0}


def build_model(config: ModelConfig, objective: Objective | None = None, seed: int = 0) -> LM:
    """A model whose every parameter is random."""
    torch.manual_seed(seed)
    model = LM(config, (objective or PLM()).heads(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def text(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 61, n)


def loss(model: LM, objective: Objective, batch: Batch) -> float:
    with torch.no_grad():
        return float(objective.loss(model, objective.forward(model, batch), batch)["tokens"])


# ---- two-stream reference


def two_streams(model: LM, tokens: np.ndarray, order: np.ndarray) -> torch.Tensor:
    """Yang 2019, equation 3, with loops over positions: the query states of the tokens in `order`, (k, width).

    Post-norm, one sequence. h: content states; g: query states, whose keys and values come from h only.
    """
    n, time = len(tokens), dict.fromkeys(range(len(tokens)), 0) | {int(p): i + 1 for i, p in enumerate(order)}
    h = [model.tokens.weight[t] for t in tokens]
    g = [model.query for _ in order]
    config, heads = model.config, model.config.num_heads

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.view(heads, -1)

    for block in model.stack.layers():
        a, d = block.attention, block.attention.distance
        keys, values = [split(a.k.weight @ x) for x in h], [split(a.v.weight @ x) for x in h]

        def attend(x, i, seen, a=a, d=d, keys=keys, values=values, block=block):
            q, scores = split(a.q.weight @ x), []
            for j in seen:
                angles = sinusoid_frequencies(torch.tensor(i - j), config.hidden_size)
                relative = split(d.r.weight @ torch.cat((angles.sin(), angles.cos())))
                scores.append(
                    (((q + split(d.content)) * keys[j]).sum(-1) + ((q + split(d.place)) * relative).sum(-1))
                    / math.sqrt(8)
                )
            if not scores:
                attended = torch.zeros_like(x)
            else:
                weights = torch.stack(scores, -1).softmax(-1)  # (heads, seen)
                attended = (weights[..., None] * torch.stack([values[j] for j in seen], 1)).sum(1).flatten()
            x = block.attention_norm(x + a.o.weight @ attended)
            return block.mlp_norm(x + block.mlp(x))

        # Content sees the tokens before it in the order and itself; a query sees those before it and not itself.
        new_h = [attend(h[i], i, [j for j in range(n) if time[j] <= time[i]]) for i in range(n)]
        g = [attend(g[m], int(p), [j for j in range(n) if time[j] < time[int(p)]]) for m, p in enumerate(order)]
        h = new_h
    return torch.stack(g)


@torch.no_grad()
@pytest.mark.parametrize("noise", ["count", "contexts"])
@pytest.mark.parametrize("k", [1, 3])
def test_one_row_equals_two_streams(noise: str, k: int) -> None:
    model = build_model(XLNET.with_fields({"embedding.type_vocab_size": 0}))
    tokens = text(11)
    seen = PLM(k=k, noise=noise).build_example({"tokens": tokens}, VOCAB, np.random.default_rng(1))
    order = seen["positions"][11:]
    assert len(order) > 2
    hidden = model(collate([seen]))[0, 11:]
    torch.testing.assert_close(hidden, two_streams(model, tokens, order), rtol=0, atol=2e-5)


# ---- transformers


@pytest.mark.oracle
@torch.no_grad()
@pytest.mark.parametrize("memory", [0, 6])
@pytest.mark.parametrize("kinds", [False, True])
def test_both_streams_and_memory_equal_transformers(memory: int, kinds: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference; installed with the test extra")
    transformers.logging.set_verbosity_error()
    config = XLNET.with_fields({"attention.memory_length": memory})
    model = build_model(config)
    save_model(model, None, tmp_path)
    theirs = transformers.XLNetLMHeadModel.from_pretrained(tmp_path).eval()
    n, rng = 12, np.random.default_rng(3)
    examples: list[Example] = [{"tokens": text(n, s)} for s in (1, 2)]
    for number, example in enumerate(examples):
        if kinds:
            example["token_type_ids"] = (np.arange(n) > 4 + number).astype(np.int64)
        if memory:
            example["memory_tokens"] = text(memory, 10 + number)
    shown = [PLM(k=3).build_example(e, VOCAB, rng) for e in examples]
    k = len(shown[0]["positions"]) - n
    batch = collate(shown)
    times = torch.as_tensor(np.stack([s["query_time"][:n] for s in shown]))
    target_positions = torch.as_tensor(np.stack([s["positions"][n:] for s in shown])).long()
    inputs = {
        "input_ids": batch["tokens"][:, :n],
        # A token does not see those that appear at its own time or later, except those present from the start; in the
        # first stream it sees itself, which transformers handles.
        "perm_mask": ((times[:, None, :] >= times[:, :, None]) & (times[:, None, :] > 0)).float(),
        "target_mapping": F.one_hot(target_positions, n).float(),
        "labels": torch.as_tensor(np.stack([s["labels"][n:] for s in shown])),
    }
    if kinds:
        inputs["token_type_ids"] = batch["token_type_ids"][:, :n]
    if memory:
        inputs["mems"] = theirs(batch["memory_tokens"], use_mems=True).mems
    expected = theirs(**inputs, output_hidden_states=True)
    hidden, head = model(batch), model.heads["lm"]
    assert expected.logits.std() > 0.05 and k > 2
    torch.testing.assert_close(head(hidden[:, n:]), expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(hidden[:, :n], expected.hidden_states[-2], rtol=0, atol=1e-4)  # the content stream
    ours = loss(model, PLM(), batch) / int((batch["labels"] != IGNORE).sum())
    assert ours == pytest.approx(float(expected.loss), abs=1e-5)
    again = load_model(tmp_path)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.oracle
@torch.no_grad()
def test_masked_lm_of_mpnet_equals_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference; installed with the test extra")
    transformers.logging.set_verbosity_error()
    model = build_model(MPNET)
    save_model(model, None, tmp_path)
    theirs = transformers.MPNetForMaskedLM.from_pretrained(tmp_path).eval()
    shown = MLM(mlm_probability=0.4).build_example({"tokens": text(30)}, VOCAB, np.random.default_rng(0))
    batch = collate([shown])
    expected = theirs(batch["tokens"], labels=batch["labels"])
    torch.testing.assert_close(model.heads["lm"](model(batch)), expected.logits, rtol=0, atol=1e-4)
    ours = loss(model, MLM(), batch) / int((batch["labels"] != IGNORE).sum())
    assert ours == pytest.approx(float(expected.loss), abs=1e-5)


# ---- limiting cases


@pytest.mark.parametrize("position", ["none", "rotary", "xlnet"])
@torch.no_grad()
def test_identity_order_is_causal_language_modeling(position: str) -> None:
    """With K = 1 and the order of the text, the streams are those of CausalLM, and so is the loss once a query has the token
    and position before it instead of [MASK] and its own position: the only difference between the two objectives."""
    model = build_model(
        XLNET.with_fields({"position.type": position, "embedding.type_vocab_size": 0, "embedding.mask": False})
    )
    tokens = np.concatenate(([VOCAB.bos], text(12)))
    causal = CausalLM().build_example({"tokens": tokens}, VOCAB, np.random.default_rng(0))
    seen = PLM(k=1, order="identity").build_example({"tokens": tokens}, VOCAB, np.random.default_rng(0))
    n = len(tokens)
    assert seen["labels"][n:].tolist() == causal["labels"].tolist()
    assert seen["query_time"][:n].tolist() == list(range(n))
    one, other = collate([causal]), collate([seen])
    torch.testing.assert_close(model(other)[:, : n - 1], model(one), rtol=0, atol=1e-5)
    plain = loss(model, PLM(), other)
    other["tokens"][:, n:] = other["tokens"][:, : n - 1]
    other["positions"][:, n:] -= 1
    assert loss(model, PLM(), other) == pytest.approx(loss(model, CausalLM(), one), rel=1e-6)
    assert abs(plain - loss(model, CausalLM(), one)) > 1e-2


@pytest.mark.parametrize(
    "config",
    [XLNET, XLNET.with_fields({"position.type": "rotary", "embedding.mask": False, "embedding.type_vocab_size": 0})],
)
@torch.no_grad()
def test_loss_is_the_chain_rule(config: ModelConfig) -> None:
    """log p of an order is the sum of its predictions, each computed in a row of its own."""
    model, tokens = build_model(config), text(9)
    seen = PLM(k=2).build_example({"tokens": tokens}, VOCAB, np.random.default_rng(4))
    order = seen["positions"][9:]
    total = 0.0
    for turn, position in enumerate(order):
        later = order[turn:]
        kept = np.setdiff1d(np.arange(9), later)
        times = seen["query_time"][:9][kept]
        row = {
            "tokens": np.append(tokens[kept], VOCAB.mask), "positions": np.append(kept, position),
            "query_time": np.append(times, turn), "key_time": np.append(times, NEVER),
            "labels": np.append(np.full(len(kept), IGNORE), tokens[position]),
        }  # fmt: skip
        total += loss(model, PLM(), collate([row]))
    assert loss(model, PLM(), collate([seen])) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("config", [MPNET, XLNET.with_fields({"embedding.mask": False})])
@torch.no_grad()
def test_mpnet_without_revealed_tokens_is_mlm(config: ModelConfig) -> None:
    model, tokens = build_model(config), text(20)
    seen = MPNet(mlm_probability=0.4, **ALL_MASKED).build_example({"tokens": tokens}, VOCAB, np.random.default_rng(2))
    order = seen["positions"][-8:]
    assert len(set(order)) == 8
    hidden = np.isin(np.arange(20), order)
    masked = {"tokens": np.where(hidden, VOCAB.mask, tokens), "labels": np.where(hidden, tokens, IGNORE)}
    together = collate([seen | {"query_time": np.where(seen["labels"] != IGNORE, 0, seen["query_time"])}])
    assert loss(model, MPNet(), together) == pytest.approx(loss(model, MLM(), collate([masked])), rel=1e-5)
    # The first of the order is always predicted so; the others also see the tokens before them in the order.
    states, plain = model(collate([seen]))[0, -8:], model(collate([masked]))[0]
    torch.testing.assert_close(states[0], plain[order[0]], rtol=0, atol=1e-5)
    assert (states[1:] - plain[order[1:].astype(int)]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("config", [MPNET, XLNET])
@torch.no_grad()
def test_mpnet_without_placeholders_is_plm(config: ModelConfig) -> None:
    model, tokens = build_model(config), text(20)
    seen = MPNet(mlm_probability=0.3, **ALL_MASKED).build_example({"tokens": tokens}, VOCAB, np.random.default_rng(2))
    order = seen["positions"][-6:].astype(int)
    permuted = attention_fields.permuted({"tokens": tokens}, order, np.full(6, VOCAB.mask))
    blind = collate([seen | {"key_time": np.where(seen["key_expiry"] < NEVER, NEVER, seen["key_time"])}])
    plm = loss(model, PLM(), collate([permuted]))
    assert loss(model, MPNet(), blind) == pytest.approx(plm, rel=1e-5)
    assert abs(loss(model, MPNet(), collate([seen])) - plm) > 1e-2


def test_mpnet_sees_every_position_once() -> None:
    seen = MPNet(mlm_probability=0.3).build_example({"tokens": text(20)}, VOCAB, np.random.default_rng(5))
    fields = {name: torch.as_tensor(seen[name])[None] for name in ("query_time", "key_time", "key_expiry", "positions")}
    visible = mask_from_times(fields["query_time"], fields["key_time"], None, None, fields["key_expiry"])[0]
    for row in visible:
        assert sorted(seen["positions"][row.numpy()].tolist()) == list(range(20))


def test_k_3_predicts_a_third_and_no_special_tokens() -> None:
    tokens = VOCAB.add_special_tokens(text(60))
    for noise in ("count", "contexts"):
        examples = [
            PLM(k=3, noise=noise).build_example({"tokens": tokens}, VOCAB, np.random.default_rng(s)) for s in range(300)
        ]
        shares = [(s["labels"] != IGNORE).sum() / 60 for s in examples]
        assert np.mean(shares) == pytest.approx(1 / 3, abs=0.02)
        assert all(not np.isin(s["positions"][62:], (0, 61)).any() for s in examples)
    with pytest.raises(UserError, match="k=0"):
        PLM(k=0)
    with pytest.raises(UserError, match=r"mlm_probability=1\.5"):
        MPNet(mlm_probability=1.5)


# ---- properties of every objective


CASES: dict[str, tuple[Objective, ModelConfig]] = {
    "plm": (PLM(k=3), XLNET),
    "plm, rotary": (
        PLM(k=3, noise="contexts"),
        XLNET.with_fields({"position.type": "rotary", "embedding.mask": False, "embedding.type_vocab_size": 0}),
    ),
    "mpnet": (MPNet(mlm_probability=0.3, **ALL_MASKED), MPNET),
    "mpnet, xlnet": (MPNet(mlm_probability=0.3, **ALL_MASKED), XLNET),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_tokens_do_not_reach_their_own_or_earlier_queries(name: str) -> None:
    objective, config = CASES[name]
    model = build_model(config)
    tokens = text(20)
    seen = objective.build_example({"tokens": tokens}, VOCAB, np.random.default_rng(0))
    k = int((seen["labels"] != IGNORE).sum())
    assert k > 3
    order = seen["positions"][-k:].astype(int)
    before = model(collate([seen]))[0]
    context = np.setdiff1d(np.arange(20), order)
    for turn, position in enumerate(order):
        changed = tokens.copy()
        changed[position] = 5 + (changed[position] - 5 + 8) % 56  # words start at the same positions
        other = objective.build_example({"tokens": changed}, VOCAB, np.random.default_rng(0))
        assert np.array_equal(other["positions"], seen["positions"])
        after = model(collate([other]))[0]
        queries = len(before) - k
        assert torch.equal(after[queries : queries + turn + 1], before[queries : queries + turn + 1])
        assert torch.equal(after[context], before[context])
        assert torch.equal(after[order[:turn]], before[order[:turn]])
        if turn < k - 1:
            assert (after[queries + turn + 1 :] - before[queries + turn + 1 :]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("objective", [PLM(), MPNet()])
def test_hide_hides_one_token_and_shows_the_rest(objective: Objective) -> None:
    tokens = text(9)
    shown = objective.hide((tokens[:4], tokens[5:]), VOCAB, tokens[4])
    assert shown is not None
    assert shown["labels"][shown["labels"] != IGNORE].tolist() == [tokens[4]]
    visible = (shown["key_time"] == 0) & (shown["tokens"] > 4)
    assert shown["tokens"][visible].tolist() == np.delete(tokens, 4).tolist()


@pytest.mark.parametrize("name", CASES)
def test_packed_and_split_batches_have_the_same_gradient(name: str) -> None:
    objective, config = CASES[name]
    rng = np.random.default_rng(0)
    shown = [objective.build_example({"tokens": text(int(rng.integers(8, 20)), s)}, VOCAB, rng) for s in range(6)]
    model = build_model(config)
    found, gradient = [], []
    for batches in ([collate(shown)], [pack(shown, 64)], [collate(shown[:2]), pack(shown[2:], 90)]):
        model.zero_grad()
        found.append(float(step(model, objective, batches)["tokens"]))
        gradient.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other, g in zip(found[1:], gradient[1:], strict=True):
        assert other == pytest.approx(found[0], rel=1e-5)
        torch.testing.assert_close(g, gradient[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_lower_the_loss(name: str) -> None:
    objective, config = CASES[name]
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    batch = collate(
        [objective.build_example({"tokens": text(20, s)}, VOCAB, np.random.default_rng(s)) for s in range(4)]
    )
    adam, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(10):
        adam.zero_grad()
        losses.append(float(step(model, objective, [batch])["tokens"]))
        adam.step()
    assert losses[-1] < losses[0] - 0.3


# ---- relative positions


def test_bias_is_gathered_by_distance() -> None:
    """Against scores with a vector for each pair, values and gradients, with unordered queries and repeated positions."""
    torch.manual_seed(0)
    config = replace(XLNET, hidden_size=16, num_heads=2, num_kv_heads=2)
    one = RelativeDistance(config, Linear).double()
    with torch.no_grad():
        for p in one.parameters():
            p.copy_(torch.randn_like(p))
    queries, keys = torch.tensor([[0, 1, 2, 1], [4, 0, 1, 1]]), torch.tensor([[-2, -1, 0, 1, 2], [0, 0, 1, 2, 3]])
    other = torch.rand(2, 4, 5) < 0.5
    q = torch.randn(2, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    index, table = distance_index(queries, keys, 16)
    _, bias = one(q, DistanceIndex(index, table.double(), other), 0.3)
    angles = sinusoid_frequencies(queries[:, :, None] - keys[:, None], 16).double()
    relative = one.r(torch.cat((angles.sin(), angles.cos()), -1)).unflatten(-1, (2, 8))  # (B, T, S, H, D)
    plain = torch.einsum("bhtd,btshd->bhts", q + one.place.view(2, 1, 8), relative)
    kinds = one.kinds[other.long()]  # (B, T, S, H, D)
    plain = 0.3 * (plain + torch.einsum("bhtd,btshd->bhts", q + one.segment.view(2, 1, 8), kinds))
    torch.testing.assert_close(bias, plain, rtol=0, atol=1e-6)
    weights = torch.randn_like(bias)
    parameters = [q, one.r.weight, one.place, one.segment, one.kinds]
    ours, theirs = (torch.autograd.grad((x * weights).sum(), parameters) for x in (bias, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@torch.no_grad()
def test_cached_and_full_forward_are_equal() -> None:
    """Relative positions use the positions in the cache, so that such a decoder generates like any other."""
    model = build_model(replace(XLNET, causal=True))
    tokens = torch.as_tensor(text(9))[None]
    when = torch.arange(9)[None]
    whole = model({"tokens": tokens, "query_time": when, "key_time": when})
    cache = model.make_cache(1, 9)
    parts = [
        model({"tokens": tokens[:, :5], "query_time": when[:, :5], "key_time": when[:, :5]}, ForwardContext(cache))
    ]
    parts.append(
        model({"tokens": tokens[:, 5:6], "query_time": when[:, 5:6], "key_time": when[:, 5:6]}, ForwardContext(cache))
    )
    rows = model.make_decoding_cache(1)
    rows.add(cache, [0], [6], capacity=9)
    parts += [model({"tokens": tokens[:, i : i + 1]}, ForwardContext(rows)) for i in range(6, 9)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def test_invalid_configs_are_rejected() -> None:
    with pytest.raises(UserError, match=r"model\.attention\.memory_length=4 needs positions that extend before a row"):
        XLNET.with_fields({"position.type": "rotary", "embedding.type_vocab_size": 0, "attention.memory_length": 4})
    with pytest.raises(UserError, match=r"model\.position=xlnet needs"):
        XLNET.with_fields({"encoder.num_layers": 2})
    for config in (
        XLNET,
        MPNET,
        XLNET.with_fields({"embedding.type_vocab_size": 0, "bias": False, "tie_embeddings": False}),
        MPNET.with_fields({"encoder.num_layers": 0, "embedding.mask": True}),
    ):
        model = LM(config, PLM().heads(config))
        assert sum(p.numel() for p in model.parameters()) == num_parameters(config)


# ---- memory


class JoinedWindows(WindowsConfig):
    """Windows whose documents attend to each other."""

    isolate = False


def test_windows_give_the_tokens_before_them(tmp_path: Path) -> None:
    whole = store(tmp_path)
    tokens, offsets = whole.tokens, whole.offsets[:]
    source = Documents(WindowsConfig(max_length=32), whole, tokenizer().vocab, memory=20)
    reached = 0
    for i in range(len(source)):
        example, start = source[i], 32 * i
        opens = int(offsets[offsets <= start][-1])
        assert example["memory_tokens"].tolist() == tokens[max(opens, start - 20) : start].tolist()
        reached += len(example["memory_tokens"]) == 20
    assert 0 < reached < len(source)
    assert "memory_tokens" not in Documents(WindowsConfig(max_length=32), whole, tokenizer().vocab)[3]
    free = Documents(JoinedWindows(max_length=32), whole, tokenizer().vocab, memory=20)
    assert all(len(free[i]["memory_tokens"]) == 20 for i in range(1, len(free)))


@torch.no_grad()
def test_memory_is_visible_to_its_own_document_only() -> None:
    model = build_model(XLNET.with_fields({"attention.memory_length": 6}))
    objective = PLM(k=2)
    first: Example = {"tokens": text(10), "memory_tokens": text(6, 7), "document_ids": np.repeat([0, 1], [6, 4])}
    second: Example = {"tokens": text(8, 1), "memory_tokens": text(2, 8)}
    third: Example = {"tokens": text(10, 2), "memory_tokens": text(0, 8)}
    shown = [objective.build_example(e, VOCAB, np.random.default_rng(0)) for e in (first, second, third)]
    batch = collate(shown)
    assert batch["memory_tokens"].shape == (3, 6)
    separate = [loss(model, objective, collate([s])) for s in shown]
    assert loss(model, objective, batch) == pytest.approx(sum(separate), rel=1e-5)
    no_memory = {name: field for name, field in shown[2].items() if name != "memory_tokens"}
    assert separate[2] == loss(model, objective, collate([no_memory]))
    before = model(collate(shown[:1]))[0]
    changed = dict(shown[0], memory_tokens=text(6, 9))
    after = model(collate([changed]))[0]
    inside = torch.as_tensor(shown[0]["document_ids"]) == 0
    moved = (after - before).abs().amax(-1)
    assert moved[inside].min() > 1e-4
    assert moved[~inside].max() == 0


def test_memory_has_no_gradient_but_its_keys_do() -> None:
    model = build_model(XLNET.with_fields({"attention.memory_length": 6})).train()
    example: Example = {"tokens": text(10), "memory_tokens": np.full(6, 60)}
    example["tokens"][example["tokens"] == 60] = 59
    shown = PLM(k=2).build_example(example, VOCAB, np.random.default_rng(0))
    batch = collate([shown])
    hidden = model(batch)
    [table] = torch.autograd.grad(hidden.square().sum(), [model.tokens.weight])
    assert table[60].abs().max() == 0 and table[59].abs().max() >= 0
    [with_memory] = torch.autograd.grad(model(batch).square().sum(), [model.stack.layers()[0].attention.k.weight])
    [without_memory] = torch.autograd.grad(
        model({n: f for n, f in batch.items() if n != "memory_tokens"}).square().sum(),
        [model.stack.layers()[0].attention.k.weight],
    )
    assert (with_memory - without_memory).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("at", ["pre", "post"])
def test_a_causal_memory_is_the_text_before_it(at: str) -> None:
    """With one block, a memory gives the same states as the same tokens in the row."""
    model = build_model(XLNET.with_fields({"causal": True, "num_layers": 1, "norm.placement": at}))
    tokens = text(16)
    whole = CausalLM().build_example({"tokens": tokens}, VOCAB, np.random.default_rng(0))
    rest = CausalLM().build_example(
        {"tokens": tokens[6:], "memory_tokens": tokens[:6]}, VOCAB, np.random.default_rng(0)
    )
    torch.testing.assert_close(model(collate([rest])), model(collate([whole]))[:, 6:], rtol=0, atol=1e-5)


def test_batches_with_memory_depend_on_the_step_only(tmp_path: Path) -> None:
    source = Documents(WindowsConfig(max_length=24), store(tmp_path), tokenizer().vocab, memory=16)
    loaders = [
        Batches(source, PLM(), tokenizer().vocab, batch_size=4, seed=0, gradient_accumulation_steps=n)
        for n in (1, 1, 2)
    ]
    loaders[0].batches(0)
    late = [loader.batches(5) for loader in loaders]
    assert all(torch.equal(a, b) for a, b in zip(late[0][0].values(), late[1][0].values(), strict=True))
    model = build_model(
        ModelConfig(
            **SIZES | {"vocab_size": tokenizer().vocab.size},
            position=PositionConfig("xlnet"),
            attention=AttentionConfig(memory_length=16),
        )
    )
    found = []
    for batches in (late[0], late[2]):
        model.zero_grad()
        found.append((float(step(model, PLM(), batches)["tokens"]), model.tokens.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_recipes_that_cannot_have_memory_are_rejected() -> None:
    with pytest.raises(
        UserError,
        match=r"model\.attention\.memory_length=64 needs rows of one text each, and batch\.pack_to_length=128 .* batch\.pack_to_length=0",
    ):
        load("xlnet", ["model.attention.memory_length=64", "batch.pack_to_length=128"])
    with pytest.raises(
        UserError,
        match=r"model\.attention\.memory_length=64 .* examples=chunks does not have: "
        r"set model.attention.memory_length=0, or take examples=windows",
    ):
        load("xlnet", ["model.attention.memory_length=64", "examples=chunks"])
    with pytest.raises(
        UserError, match=r"model\.attention\.memory_length=64 needs positions that extend before a row, and .*'rotary'"
    ):
        load("bert", ["model.attention.memory_length=64"])
    with pytest.raises(
        UserError, match="objective plm predicts a text in a random order, which a causal decoder cannot"
    ):
        load("xlnet", ["model.causal=true"])
    shown = PLM().build_example({"tokens": text(9), "memory_tokens": text(4)}, VOCAB, np.random.default_rng(0))
    with pytest.raises(UserError, match="cannot be packed"):
        pack([shown], 64)
    with pytest.raises(UserError, match=r"model\.position='mpnet' does not extend before a row"):
        build_model(MPNET)(collate([shown]))


# ---- FLOPs and parameter counts


@pytest.mark.parametrize("objective", [PLM(k=3), MPNet(mlm_probability=0.3)])
def test_flops_count_queries_placeholders_and_memory(objective: Objective) -> None:
    rng = np.random.default_rng(0)
    examples = [{"tokens": text(n, n), "memory_tokens": text(m, m)} for n, m in ((12, 5), (9, 0), (7, 3))]
    shown = [objective.build_example(e, VOCAB, rng) for e in examples]
    batch = collate(shown)
    counted = work(batch)
    assert counted.positions == sum(len(s["tokens"]) for s in shown)
    real = batch["query_time"] > -NEVER
    seen = (
        mask_from_times(batch["query_time"], batch["key_time"], None, None, batch.get("key_expiry")) & real[..., None]
    )
    assert counted.pairs == int(seen.sum())
    lengths = [(5, len(shown[0]["tokens"])), (0, 0), (3, len(shown[2]["tokens"]))]
    assert counted.memory == MemoryWork(8, 25 + 9, sum(m * n for m, n in lengths))
    assert real_tokens(batch) == 12 + 9 + 7
    no_memory = work({name: field for name, field in batch.items() if not name.startswith("memory_")})
    assert stack_flops(XLNET, counted) > stack_flops(XLNET, no_memory)


def test_flops_of_memory_equal_torch() -> None:
    """The FLOPs of a fully visible memory, without the scores of distances, which torch counts for all distances."""
    config = XLNET.with_fields({"attention.memory_length": 6})
    model = build_model(config)
    example: Example = {"tokens": torch.as_tensor(text(10))[None], "memory_tokens": torch.as_tensor(text(6))[None]}
    total = []
    for fields in (example, {"tokens": example["tokens"]}):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(fields).sum().backward()
        total.append(counter.get_total_flops())
    inner, width, hidden = 32, 32, 48
    per_token, keys = 4 * width * inner + 2 * width * hidden, 2 * width * inner
    # Distances: 16 + 10 - 1 = 25 here, 11 within the memory, 19 without one; scores of them and their map.
    distances = 2 * inner * (width * (2 * (25 - 19)) + 10 * 3 * (25 - 19)) * 2 + 2 * inner * 11 * (width + 6)
    plain = MemoryWork(6, 36, 60).cost(2, per_token, keys, 2 * inner) * 6
    assert total[0] - total[1] == plain + distances


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("xlnet-large", "XLNetLMHeadModel", {}),
        ("xlnet-base", "XLNetLMHeadModel", {"d_model": 768, "n_layer": 12, "n_head": 12, "d_inner": 3072}),
        ("mpnet-base", "MPNetForMaskedLM", {"max_position_embeddings": 514}),
    ],
)
def test_preset_parameter_counts_equal_transformers(name: str, kind: str, settings: dict[str, int]) -> None:
    """Exact, except two unused rows of MPNet's position embedding."""
    transformers = pytest.importorskip("transformers", reason="the reference; installed with the test extra")
    cls = getattr(transformers, kind)
    with torch.device("meta"):
        theirs = sum(p.numel() for p in cls(cls.config_class(**settings)).parameters())
        ours = sum(p.numel() for p in LM(PRESETS[name], PLM().heads(PRESETS[name])).parameters())
    assert ours == num_parameters(PRESETS[name]) == theirs - 2 * 768 * (name == "mpnet-base")


# ---- inference


@torch.no_grad()
def test_a_gap_is_a_query_that_no_token_sees() -> None:
    """`fill` and the pseudo-likelihood use XLNet as PLM does: a query at the gap, and no [MASK] that other tokens see."""
    text_tokenizer = tokenizer()
    model = build_model(
        ModelConfig(
            **SIZES | {"vocab_size": text_tokenizer.vocab.size},
            position=PositionConfig("xlnet"),
            embedding=EmbeddingConfig(mask=True),
        )
    )
    mask = text_tokenizer.token(text_tokenizer.vocab.mask)
    [found] = fill_masks(model, text_tokenizer, f"What is a {mask} in Python?", k=3)
    words = text_tokenizer.vocab.add_special_tokens(
        np.concatenate(
            (text_tokenizer.encode("What is a"), [text_tokenizer.vocab.mask], text_tokenizer.encode(" in Python?"))
        )
    )
    at = int(np.flatnonzero(words == text_tokenizer.vocab.mask)[0])
    words[at] = found[0].token
    seen = collate(
        [attention_fields.permuted({"tokens": words}, np.array([at]), np.array([text_tokenizer.vocab.mask]))]
    )
    share = model.heads["lm"](model(seen)[0, -1]).softmax(-1)
    assert found[0].probability == pytest.approx(float(share[found[0].token]), rel=1e-4)
    assert scoring_mode(model.config) == "masked" and scoring_mode(replace(model.config, causal=True)) == "causal"
    document = TokenizedDocument(words[1:-1], np.ones(len(words) - 2, int))
    example = list(one_at_a_time(document, 40, text_tokenizer.vocab, query=True))[at - 1]
    assert loss(model, PLM(), collate([example])) == pytest.approx(-math.log(found[0].probability), rel=1e-4)


@torch.no_grad()
def test_a_decoder_with_relative_positions_generates() -> None:
    """The engine's cache works with position="xlnet": rows of different lengths, and options of one prompt."""
    text_tokenizer = tokenizer()
    config = ModelConfig(
        **SIZES | {"vocab_size": text_tokenizer.vocab.size, "causal": True},
        position=PositionConfig("xlnet"),
        embedding=EmbeddingConfig(mask=True),
        attention=AttentionConfig(memory_length=8),
    )
    model = build_model(config)
    prompts = [text_tokenizer.encode("What is a module?"), text_tokenizer.encode("In Python")]
    written = Engine(model, text_tokenizer, stops=()).generate(prompts, Sampling(max_new_tokens=6, temperature=0))
    for prompt, answer in zip(prompts, written, strict=True):
        row = np.asarray(prompt)
        for token in answer.tokens:
            times = torch.arange(len(row))[None]
            hidden = model({"tokens": torch.as_tensor(row)[None].long(), "query_time": times, "key_time": times})
            assert int(model.heads["lm"](hidden[0, -1]).argmax()) == token
            row = np.append(row, token)
    engine, options = Engine(model, text_tokenizer), [text_tokenizer.encode(" of"), text_tokenizer.encode(" that is")]
    assert engine.options(prompts[0], options) == pytest.approx(engine.score([prompts[0]] * 2, options), rel=1e-4)


def test_half_precision_gradient_is_close_to_full() -> None:
    model = build_model(XLNET.with_fields({"attention.memory_length": 6})).train()
    batch = collate(
        [PLM(k=2).build_example({"tokens": text(20), "memory_tokens": text(6, 1)}, VOCAB, np.random.default_rng(0))]
    )
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        step(model, PLM(), [batch], precision=lambda on=enabled: torch.autocast("cpu", torch.bfloat16, enabled=on))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert F.cosine_similarity(grads[0], grads[1], dim=0) > 0.99


@pytest.mark.slow
def test_xlnet_is_finetuned_without_its_memory(tmp_path: Path) -> None:
    """Records have no text before them: a model with memory is finetuned without it, and rows may be packed."""
    rng = np.random.default_rng(0)
    plays = tmp_path / "plays"
    plays.mkdir()
    for i in range(6):
        (plays / f"{i}.txt").write_text(
            " ".join(rng.choice(["the", "king", "and", "queen", "walk", "by", "night"], 300))
        )
    rows = [
        json.dumps({"text": f"the {'king' if i % 2 else 'queen'} did walk", "label": "ab"[i % 2]}) for i in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    small = ["model.hidden_size=32", "model.num_heads=2", "model.num_layers=2", "model.head_dim=0",
    "model.intermediate_size=48", "model.num_kv_heads=0",
             "tokenizer.vocab_size=400", "max_steps=2", "batch.size=4", "evaluation.every=0"]  # fmt: skip
    first = run(load("xlnet", [*small, f"data.path={plays}"]), tmp_path / "first", log=lambda _: None)
    assert load_model(first.model).config.attention.memory_length == 128
    settings = [
        f"init_from={tmp_path / 'first'}",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "max_steps=2",
        "batch.pack_to_length=64",
    ]
    second = run(load("classification", settings), tmp_path / "second", log=lambda _: None)
    assert load_model(second.model).config.attention.memory_length == 0
