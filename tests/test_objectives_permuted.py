"""Permuted objectives and XLNet's body: against two streams written out, against transformers, and at their limits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_room import store, tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from firth.data import layout
from firth.data.collate import Batches, collate, pack
from firth.data.windows import Windows
from firth.evaluate.perplexity import TokenizedDocument, one_at_a_time
from firth.evaluate.text_perplexity import scoring_mode
from firth.generate.engine import Engine
from firth.generate.fill_mask import fill
from firth.generate.sampling import Sampling
from firth.model.attention import mask_from_times
from firth.model.block import Linear
from firth.model.config import ModelConfig
from firth.model.flops import MemoryWork, real_tokens, stack_flops, work
from firth.model.model import LM
from firth.model.positions import sinusoid_frequencies
from firth.model.presets import PRESETS
from firth.model.relative_distance import DistanceIndex, RelativeDistance, distance_index
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.mpnet import MPNet
from firth.objectives.objective import Objective
from firth.objectives.permuted_lm import PLM
from firth.pretrained.load_save import load_model, save_model
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.vocab import Vocab
from firth.train.step import step
from firth.types import IGNORE, NEVER, Batch, Example, UserError

VOCAB = Vocab(
    size=61, roles={"pad": 0, "cls": 2, "bos": 2, "sep": 3, "eos": 3, "mask": 4}, special=np.arange(61) < 5,
    spelling=tuple(b"\n" if i < 5 else b" a" if i % 2 else b"a" for i in range(61)),
)  # fmt: skip
BODY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_positions": 40,
    "intermediate_size": 48,
    "causal": False,
}
XLNET = ModelConfig(
    **BODY, norm_placement="post", norm_eps=1e-12, position="xlnet", mask_embedding=True, type_vocab_size=2, activation="gelu", lm_head_bias=True,
)  # fmt: skip
MPNET = ModelConfig(
    **BODY, norm_placement="post", norm_eps=1e-12, position="mpnet", embedding_norm=True, activation="gelu", lm_head="transform",
    lm_head_bias=True,
)  # fmt: skip
OPEN = {"masked": 1.0, "random": 0.0}


def built(config: ModelConfig, objective: Objective | None = None, seed: int = 0) -> LM:
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


# ------------------------------------------------------------------------------------- two streams, written out


def two_streams(model: LM, tokens: np.ndarray, order: np.ndarray) -> torch.Tensor:
    """Yang 2019, equation 3, with loops over positions: the query states of the tokens in `order`, (k, width).

    Post-norm, one sequence. h: content states; g: query states, whose keys and values are h's alone.
    """
    n, when = len(tokens), dict.fromkeys(range(len(tokens)), 0) | {int(p): i + 1 for i, p in enumerate(order)}
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
                far = split(d.r.weight @ torch.cat((angles.sin(), angles.cos())))
                scores.append(
                    (((q + split(d.content)) * keys[j]).sum(-1) + ((q + split(d.place)) * far).sum(-1)) / math.sqrt(8)
                )
            if not scores:
                read = torch.zeros_like(x)
            else:
                weights = torch.stack(scores, -1).softmax(-1)  # (heads, seen)
                read = (weights[..., None] * torch.stack([values[j] for j in seen], 1)).sum(1).flatten()
            x = block.attention_norm(x + a.o.weight @ read)
            return block.mlp_norm(x + block.mlp(x))

        # Content sees what comes before in the order and itself; a query what comes before, and not itself.
        new_h = [attend(h[i], i, [j for j in range(n) if when[j] <= when[i]]) for i in range(n)]
        g = [attend(g[m], int(p), [j for j in range(n) if when[j] < when[int(p)]]) for m, p in enumerate(order)]
        h = new_h
    return torch.stack(g)


@torch.no_grad()
@pytest.mark.parametrize("noise", ["count", "contexts"])
@pytest.mark.parametrize("k", [1, 3])
def test_one_row_is_two_streams(noise: str, k: int) -> None:
    model = built(replace(XLNET, type_vocab_size=0))
    tokens = text(11)
    seen = PLM(k=k, noise=noise).build_example({"tokens": tokens}, VOCAB, np.random.default_rng(1))
    order = seen["positions"][11:]
    assert len(order) > 2
    hidden = model(collate([seen]))[0, 11:]
    torch.testing.assert_close(hidden, two_streams(model, tokens, order), rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------------- transformers


@torch.no_grad()
@pytest.mark.parametrize("memory", [0, 6])
@pytest.mark.parametrize("kinds", [False, True])
def test_both_streams_and_memory_are_transformers(memory: int, kinds: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
    transformers.logging.set_verbosity_error()
    config = replace(XLNET, memory_length=memory)
    model = built(config)
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
    when = torch.as_tensor(np.stack([s["query_time"][:n] for s in shown]))
    places = torch.as_tensor(np.stack([s["positions"][n:] for s in shown])).long()
    given = {
        "input_ids": batch["tokens"][:, :n],
        # One may not see what appears at its own time or later, but what is there from the start; itself it may see
        # in the first stream, which transformers sees to.
        "perm_mask": ((when[:, None, :] >= when[:, :, None]) & (when[:, None, :] > 0)).float(),
        "target_mapping": F.one_hot(places, n).float(),
        "labels": torch.as_tensor(np.stack([s["labels"][n:] for s in shown])),
    }
    if kinds:
        given["token_type_ids"] = batch["token_type_ids"][:, :n]
    if memory:
        given["mems"] = theirs(batch["memory_tokens"], use_mems=True).mems
    want = theirs(**given, output_hidden_states=True)
    hidden, head = model(batch), model.heads["lm"]
    assert want.logits.std() > 0.05 and k > 2
    torch.testing.assert_close(head(hidden[:, n:]), want.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(hidden[:, :n], want.hidden_states[-2], rtol=0, atol=1e-4)  # the content stream
    ours = loss(model, PLM(), batch) / int((batch["labels"] != IGNORE).sum())
    assert ours == pytest.approx(float(want.loss), abs=1e-5)
    again = load_model(tmp_path)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


@torch.no_grad()
def test_masked_lm_of_mpnet_is_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
    transformers.logging.set_verbosity_error()
    model = built(MPNET)
    save_model(model, None, tmp_path)
    theirs = transformers.MPNetForMaskedLM.from_pretrained(tmp_path).eval()
    shown = MLM(mlm_probability=0.4).build_example({"tokens": text(30)}, VOCAB, np.random.default_rng(0))
    batch = collate([shown])
    want = theirs(batch["tokens"], labels=batch["labels"])
    torch.testing.assert_close(model.heads["lm"](model(batch)), want.logits, rtol=0, atol=1e-4)
    ours = loss(model, MLM(), batch) / int((batch["labels"] != IGNORE).sum())
    assert ours == pytest.approx(float(want.loss), abs=1e-5)


# ------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("position", ["none", "rotary", "xlnet"])
@torch.no_grad()
def test_the_order_of_the_text_is_causal_language_modelling(position: str) -> None:
    """With K = 1 and the text's own order, the streams are those of CausalLM, and so is the loss once a query is shown the
    token before it in the place of [MASK] and of its own position: P1 asks that token, and nothing else is different."""
    model = built(replace(XLNET, position=position, type_vocab_size=0, mask_embedding=False))
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


@pytest.mark.parametrize("shape", [XLNET, replace(XLNET, position="rotary", mask_embedding=False, type_vocab_size=0)])
@torch.no_grad()
def test_the_loss_is_the_chain_rule(config: ModelConfig) -> None:
    """log p of an order is the sum of one prediction after the other, each read in a row of its own."""
    model, tokens = built(config), text(9)
    seen = PLM(k=2).build_example({"tokens": tokens}, VOCAB, np.random.default_rng(4))
    order = seen["positions"][9:]
    total = 0.0
    for turn, place in enumerate(order):
        later = order[turn:]
        kept = np.setdiff1d(np.arange(9), later)
        when = seen["query_time"][:9][kept]
        alone = {
            "tokens": np.append(tokens[kept], VOCAB.mask), "positions": np.append(kept, place),
            "query_time": np.append(when, turn), "key_time": np.append(when, NEVER),
            "labels": np.append(np.full(len(kept), IGNORE), tokens[place]),
        }  # fmt: skip
        total += loss(model, PLM(), collate([alone]))
    assert loss(model, PLM(), collate([seen])) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("shape", [MPNET, replace(XLNET, mask_embedding=False)])
@torch.no_grad()
def test_mpnet_is_mlm_where_nothing_is_revealed(config: ModelConfig) -> None:
    model, tokens = built(config), text(20)
    seen = MPNet(mlm_probability=0.4, **OPEN).build_example({"tokens": tokens}, VOCAB, np.random.default_rng(2))
    order = seen["positions"][-8:]
    assert len(set(order)) == 8
    hidden = np.isin(np.arange(20), order)
    masked = {"tokens": np.where(hidden, VOCAB.mask, tokens), "labels": np.where(hidden, tokens, IGNORE)}
    together = collate([seen | {"query_time": np.where(seen["labels"] != IGNORE, 0, seen["query_time"])}])
    assert loss(model, MPNet(), together) == pytest.approx(loss(model, MLM(), collate([masked])), rel=1e-5)
    # The first of the order is predicted so in any case; the rest learn from what came before.
    states, plain = model(collate([seen]))[0, -8:], model(collate([masked]))[0]
    torch.testing.assert_close(states[0], plain[order[0]], rtol=0, atol=1e-5)
    assert (states[1:] - plain[order[1:].astype(int)]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("shape", [MPNET, XLNET])
@torch.no_grad()
def test_mpnet_is_plm_without_its_stand_ins(config: ModelConfig) -> None:
    model, tokens = built(config), text(20)
    seen = MPNet(mlm_probability=0.3, **OPEN).build_example({"tokens": tokens}, VOCAB, np.random.default_rng(2))
    order = seen["positions"][-6:].astype(int)
    permuted = layout.permuted({"tokens": tokens}, order, np.full(6, VOCAB.mask))
    blind = collate([seen | {"key_time": np.where(seen["key_expiry"] < NEVER, NEVER, seen["key_time"])}])
    plm = loss(model, PLM(), collate([permuted]))
    assert loss(model, MPNet(), blind) == pytest.approx(plm, rel=1e-5)
    assert abs(loss(model, MPNet(), collate([seen])) - plm) > 1e-2


def test_mpnet_sees_every_place_once() -> None:
    seen = MPNet(mlm_probability=0.3).build_example({"tokens": text(20)}, VOCAB, np.random.default_rng(5))
    fields = {name: torch.as_tensor(seen[name])[None] for name in ("query_time", "key_time", "key_expiry", "positions")}
    visible = mask_from_times(fields["query_time"], fields["key_time"], None, None, fields["key_expiry"])[0]
    for row in visible:
        assert sorted(seen["positions"][row.numpy()].tolist()) == list(range(20))


def test_a_third_of_a_text_is_asked_of_k_3_and_control_tokens_never() -> None:
    tokens = VOCAB.add_special_tokens(text(60))
    for noise in ("count", "contexts"):
        asked = [
            PLM(k=3, noise=noise).build_example({"tokens": tokens}, VOCAB, np.random.default_rng(s)) for s in range(300)
        ]
        shares = [(s["labels"] != IGNORE).sum() / 60 for s in asked]
        assert np.mean(shares) == pytest.approx(1 / 3, abs=0.02)
        assert all(not np.isin(s["positions"][62:], (0, 61)).any() for s in asked)
    with pytest.raises(UserError, match="k=0"):
        PLM(k=0)
    with pytest.raises(UserError, match=r"rate=1\.5"):
        MPNet(mlm_probability=1.5)


# ------------------------------------------------------------------------------------- what an objective owes


CASES: dict[str, tuple[Objective, ModelConfig]] = {
    "plm": (PLM(k=3), XLNET),
    "plm, rotary": (
        PLM(k=3, noise="contexts"),
        replace(XLNET, position="rotary", mask_embedding=False, type_vocab_size=0),
    ),
    "mpnet": (MPNet(mlm_probability=0.3, **OPEN), MPNET),
    "mpnet, xlnet": (MPNet(mlm_probability=0.3, **OPEN), XLNET),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_no_token_reaches_its_own_query_or_an_earlier_one(name: str) -> None:
    objective, config = CASES[name]
    model = built(config)
    tokens = text(20)
    seen = objective.build_example({"tokens": tokens}, VOCAB, np.random.default_rng(0))
    k = int((seen["labels"] != IGNORE).sum())
    assert k > 3
    order = seen["positions"][-k:].astype(int)
    before = model(collate([seen]))[0]
    context = np.setdiff1d(np.arange(20), order)
    for turn, place in enumerate(order):
        changed = tokens.copy()
        changed[place] = 5 + (changed[place] - 5 + 8) % 56  # a word begins where one began
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
def test_a_cloze_hides_one_token_and_shows_the_rest(objective: Objective) -> None:
    tokens = text(9)
    shown = objective.hide(tokens, 4, VOCAB)
    assert shown is not None
    assert shown["labels"][shown["labels"] != IGNORE].tolist() == [tokens[4]]
    visible = (shown["key_time"] == 0) & (shown["tokens"] > 4)
    assert shown["tokens"][visible].tolist() == np.delete(tokens, 4).tolist()


@pytest.mark.parametrize("name", CASES)
def test_packed_padded_and_split_batches_have_one_gradient(name: str) -> None:
    objective, config = CASES[name]
    rng = np.random.default_rng(0)
    shown = [objective.build_example({"tokens": text(int(rng.integers(8, 20)), s)}, VOCAB, rng) for s in range(6)]
    model = built(config)
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


# ------------------------------------------------------------------------------------- relative positions


def test_the_bias_is_gathered_by_distance() -> None:
    """Against scores with a vector for each pair, values and gradients, with queries out of order and positions anew."""
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
    far = one.r(torch.cat((angles.sin(), angles.cos()), -1)).unflatten(-1, (2, 8))  # (B, T, S, H, D)
    plain = torch.einsum("bhtd,btshd->bhts", q + one.place.view(2, 1, 8), far)
    kinds = one.kinds[other.long()]  # (B, T, S, H, D)
    plain = 0.3 * (plain + torch.einsum("bhtd,btshd->bhts", q + one.segment.view(2, 1, 8), kinds))
    torch.testing.assert_close(bias, plain, rtol=0, atol=1e-6)
    weigh = torch.randn_like(bias)
    wanted = [q, one.r.weight, one.place, one.segment, one.kinds]
    ours, theirs = (torch.autograd.grad((x * weigh).sum(), wanted) for x in (bias, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cached_text_is_read_as_a_whole_one() -> None:
    """Relative positions read what the cache has noted, so that a decoder with them writes as any other."""
    model = built(replace(XLNET, causal=True))
    tokens = torch.as_tensor(text(9))[None]
    when = torch.arange(9)[None]
    whole = model({"tokens": tokens, "query_time": when, "key_time": when})
    cache = model.make_cache(1, 9)
    parts = [model({"tokens": tokens[:, :5], "query_time": when[:, :5], "key_time": when[:, :5]}, cache)]
    parts.append(model({"tokens": tokens[:, 5:6], "query_time": when[:, 5:6], "key_time": when[:, 5:6]}, cache))
    cache.start_decoding()
    parts += [model({"tokens": tokens[:, i : i + 1]}, cache) for i in range(6, 9)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def test_shapes_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.memory_length=4 needs positions that reach back"):
        replace(XLNET, position="rotary", type_vocab_size=0, memory_length=4)
    with pytest.raises(UserError, match="model.position=xlnet needs"):
        replace(XLNET, num_encoder_layers=2)
    for config in (
        XLNET,
        MPNET,
        replace(XLNET, type_vocab_size=0, bias=False, tie_embeddings=False),
        replace(MPNET, num_encoder_layers=0, mask_embedding=True),
    ):
        model = LM(config, PLM().heads(config))
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


# ------------------------------------------------------------------------------------- memory


def test_windows_give_what_stands_before_them(tmp_path: Path) -> None:
    whole = store(tmp_path)
    tokens, offsets = whole.tokens, whole.offsets
    source = Windows(whole, 32, memory=20)
    reached = 0
    for i in range(len(source)):
        example, start = source[i], 32 * i
        opens = int(offsets[offsets <= start][-1])
        assert example["memory_tokens"].tolist() == tokens[max(opens, start - 20) : start].tolist()
        reached += len(example["memory_tokens"]) == 20
    assert 0 < reached < len(source)
    assert "memory_tokens" not in Windows(whole, 32)[3]
    free = Windows(whole, 32, isolate=False, memory=20)
    assert all(len(free[i]["memory_tokens"]) == 20 for i in range(1, len(free)))


@torch.no_grad()
def test_memory_is_read_by_its_own_document_and_padding_changes_nothing() -> None:
    model = built(replace(XLNET, memory_length=6))
    objective = PLM(k=2)
    first: Example = {"tokens": text(10), "memory_tokens": text(6, 7), "document_ids": np.repeat([0, 1], [6, 4])}
    second: Example = {"tokens": text(8, 1), "memory_tokens": text(2, 8)}
    third: Example = {"tokens": text(10, 2), "memory_tokens": text(0, 8)}
    shown = [objective.build_example(e, VOCAB, np.random.default_rng(0)) for e in (first, second, third)]
    batch = collate(shown)
    assert batch["memory_tokens"].shape == (3, 6)
    alone = [loss(model, objective, collate([s])) for s in shown]
    assert loss(model, objective, batch) == pytest.approx(sum(alone), rel=1e-5)
    bare = {name: field for name, field in shown[2].items() if name != "memory_tokens"}
    assert alone[2] == loss(model, objective, collate([bare]))
    before = model(collate(shown[:1]))[0]
    changed = dict(shown[0], memory_tokens=text(6, 9))
    after = model(collate([changed]))[0]
    inside = torch.as_tensor(shown[0]["document_ids"]) == 0
    moved = (after - before).abs().amax(-1)
    assert moved[inside].min() > 1e-4
    assert moved[~inside].max() == 0


def test_memory_gets_no_gradient_but_is_read_by_keys_that_do() -> None:
    model = built(replace(XLNET, memory_length=6)).train()
    example: Example = {"tokens": text(10), "memory_tokens": np.full(6, 60)}
    example["tokens"][example["tokens"] == 60] = 59
    shown = PLM(k=2).build_example(example, VOCAB, np.random.default_rng(0))
    batch = collate([shown])
    hidden = model(batch)
    [table] = torch.autograd.grad(hidden.square().sum(), [model.tokens.weight])
    assert table[60].abs().max() == 0 and table[59].abs().max() >= 0
    [there] = torch.autograd.grad(model(batch).square().sum(), [model.stack.layers()[0].attention.k.weight])
    [gone] = torch.autograd.grad(
        model({n: f for n, f in batch.items() if n != "memory_tokens"}).square().sum(),
        [model.stack.layers()[0].attention.k.weight],
    )
    assert (there - gone).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("at", ["pre", "post"])
def test_a_causal_memory_is_the_text_before(at: str) -> None:
    """One block deep, what a memory gives is what the same tokens give in the row itself."""
    model = built(replace(XLNET, causal=True, num_layers=1, norm_placement=at))
    tokens = text(16)
    whole = CausalLM().build_example({"tokens": tokens}, VOCAB, np.random.default_rng(0))
    cut = CausalLM().build_example({"tokens": tokens[6:], "memory_tokens": tokens[:6]}, VOCAB, np.random.default_rng(0))
    torch.testing.assert_close(model(collate([cut])), model(collate([whole]))[:, 6:], rtol=0, atol=1e-5)


def test_a_step_with_memory_is_a_pure_function_of_its_number(tmp_path: Path) -> None:
    source = Windows(store(tmp_path), 24, memory=16)
    ways = [
        Batches(source, PLM(), tokenizer().vocab, batch_size=4, seed=0, gradient_accumulation_steps=n)
        for n in (1, 1, 2)
    ]
    ways[0].batches(0)
    late = [way.batches(5) for way in ways]
    assert all(torch.equal(a, b) for a, b in zip(late[0][0].values(), late[1][0].values(), strict=True))
    model = built(ModelConfig(**BODY | {"vocab_size": tokenizer().vocab.size}, position="xlnet", memory_length=16))
    found = []
    for batches in (late[0], late[2]):
        model.zero_grad()
        found.append((float(step(model, PLM(), batches)["tokens"]), model.tokens.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_a_memory_that_nobody_can_give_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"model\.memory_length=64 needs rows of one text each, and batch\.pack_to_length=128 .* batch\.pack_to_length=0",
    ):
        load("xlnet", ["model.memory_length=64", "batch.pack_to_length=128"])
    with pytest.raises(
        UserError,
        match=r"model\.memory_length=64 .* examples=chunks does not have: set model.memory_length=0, or take examples=windows",
    ):
        load("xlnet", ["model.memory_length=64", "examples=chunks"])
    with pytest.raises(UserError, match=r"model\.memory_length=64 needs positions that reach back .*'rotary'"):
        load("bert", ["model.memory_length=64"])
    with pytest.raises(
        UserError, match="objective plm reads a text in an order of its own, which a causal decoder cannot"
    ):
        load("xlnet", ["model.causal=true"])
    shown = PLM().build_example({"tokens": text(9), "memory_tokens": text(4)}, VOCAB, np.random.default_rng(0))
    with pytest.raises(UserError, match="cannot be packed"):
        pack([shown], 64)
    with pytest.raises(UserError, match="position 'mpnet' has no place for them"):
        built(MPNET)(collate([shown]))


# ------------------------------------------------------------------------------------- what it costs, what it counts


@pytest.mark.parametrize("objective", [PLM(k=3), MPNet(mlm_probability=0.3)])
def test_flops_count_queries_stand_ins_and_memory(objective: Objective) -> None:
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
    bare = work({name: field for name, field in batch.items() if not name.startswith("memory_")})
    assert stack_flops(XLNET, counted) > stack_flops(XLNET, bare)


def test_flops_of_memory_are_those_that_torch_counts() -> None:
    """A memory's share, all being seen: the scores of distances are left aside, which torch counts for all distances."""
    config = replace(XLNET, memory_length=6)
    model = built(config)
    example: Example = {"tokens": torch.as_tensor(text(10))[None], "memory_tokens": torch.as_tensor(text(6))[None]}
    total = []
    for fields in (example, {"tokens": example["tokens"]}):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(fields).sum().backward()
        total.append(counter.get_total_flops())
    inner, width, hidden = 32, 32, 48
    per_token, keys = 4 * width * inner + 2 * width * hidden, 2 * width * inner
    # Distances: 16 + 10 - 1 = 25 here, 11 within the memory, 19 without one; scores of them and their map.
    far = 2 * inner * (width * (2 * (25 - 19)) + 10 * 3 * (25 - 19)) * 2 + 2 * inner * 11 * (width + 6)
    plain = MemoryWork(6, 36, 60).cost(2, per_token, keys, 2 * inner) * 6
    assert total[0] - total[1] == plain + far


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("xlnet-large", "XLNetLMHeadModel", {}),
        ("xlnet-base", "XLNetLMHeadModel", {"d_model": 768, "n_layer": 12, "n_head": 12, "d_inner": 3072}),
        ("mpnet-base", "MPNetForMaskedLM", {"max_position_embeddings": 514}),
    ],
)
def test_published_sizes_are_those_of_transformers(name: str, kind: str, settings: dict[str, int]) -> None:
    """To the weight, but for two rows of MPNet's positions that nobody reads."""
    transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
    cls = getattr(transformers, kind)
    with torch.device("meta"):
        theirs = sum(p.numel() for p in cls(cls.config_class(**settings)).parameters())
        ours = sum(p.numel() for p in LM(PRESETS[name], PLM().heads(PRESETS[name])).parameters())
    assert ours == PRESETS[name].num_parameters() == theirs - 2 * 768 * (name == "mpnet-base")


# ------------------------------------------------------------------------------------- asking a trained one


@torch.no_grad()
def test_a_gap_is_a_query_that_nobody_sees() -> None:
    """`fill` and a pseudo-likelihood ask an XLNet as PLM does: a query at the gap, and no [MASK] that others see."""
    coder = tokenizer()
    model = built(ModelConfig(**BODY | {"vocab_size": coder.vocab.size}, position="xlnet", mask_embedding=True))
    mask = coder.token(coder.vocab.mask)
    [found] = fill(model, coder, f"What is a {mask} in Python?", k=3)
    words = coder.vocab.frame(
        np.concatenate((coder.encode("What is a"), [coder.vocab.mask], coder.encode(" in Python?")))
    )
    at = int(np.flatnonzero(words == coder.vocab.mask)[0])
    words[at] = found[0].token
    seen = collate([layout.permuted({"tokens": words}, np.array([at]), np.array([coder.vocab.mask]))])
    share = model.heads["lm"](model(seen)[0, -1]).softmax(-1)
    assert found[0].probability == pytest.approx(float(share[found[0].token]), rel=1e-4)
    assert scoring_mode(model.config) == "masked" and scoring_mode(replace(model.config, causal=True)) == "causal"
    document = TokenizedDocument(words[1:-1], np.ones(len(words) - 2, int))
    asked = list(one_at_a_time(document, 40, coder.vocab, query=True))[at - 1]
    assert loss(model, PLM(), collate([asked])) == pytest.approx(-math.log(found[0].probability), rel=1e-4)


@torch.no_grad()
def test_a_decoder_with_relative_positions_writes_what_it_would_read() -> None:
    """The engine's cache serves position="xlnet" as any other: rows of other lengths beside it, and options of one prompt."""
    coder = tokenizer()
    config = ModelConfig(
        **BODY | {"vocab_size": coder.vocab.size, "causal": True},
        position="xlnet",
        mask_embedding=True,
        memory_length=8,
    )
    model = built(config)
    prompts = [coder.encode("What is a module?"), coder.encode("In Python")]
    written = Engine(model, coder, stops=()).generate(prompts, Sampling(max_new_tokens=6, temperature=0))
    for prompt, answer in zip(prompts, written, strict=True):
        row = np.asarray(prompt)
        for token in answer.tokens:
            when = torch.arange(len(row))[None]
            hidden = model({"tokens": torch.as_tensor(row)[None].long(), "query_time": when, "key_time": when})
            assert int(model.heads["lm"](hidden[0, -1]).argmax()) == token
            row = np.append(row, token)
    engine, options = Engine(model, coder), [coder.encode(" of"), coder.encode(" that is")]
    assert engine.options(prompts[0], options) == pytest.approx(engine.score([prompts[0]] * 2, options), rel=1e-4)


def test_half_precision_has_the_gradient_of_full() -> None:
    model = built(replace(XLNET, memory_length=6)).train()
    batch = collate(
        [PLM(k=2).build_example({"tokens": text(20), "memory_tokens": text(6, 1)}, VOCAB, np.random.default_rng(0))]
    )
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        step(model, PLM(), [batch], precision=lambda on=enabled: torch.autocast("cpu", torch.bfloat16, enabled=on))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert F.cosine_similarity(grads[0], grads[1], dim=0) > 0.99


def test_an_xlnet_is_finetuned_without_its_memory(tmp_path: Path) -> None:
    """Records have nothing before them: what starts from a model with memory reads without, and packs if it likes."""
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
    small = ["model.hidden_size=32", "model.num_heads=2", "model.num_layers=2", "model.head_dim=0", "model.intermediate_size=48", "model.num_kv_heads=0",
             "tokenizer.vocab_size=400", "max_steps=2", "batch.size=4", "evaluation.every=0"]  # fmt: skip
    first = run(load("xlnet", [*small, f"data.path={plays}"]), tmp_path / "first", log=lambda _: None)
    assert load_model(first.model).config.memory_length == 128
    told = [
        f"init_from={tmp_path / 'first'}",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "max_steps=2",
        "batch.pack_to_length=64",
    ]
    second = run(load("classification", told), tmp_path / "second", log=lambda _: None)
    assert load_model(second.model).config.memory_length == 0
