"""Prefix and prompt tuning: packing and padding, the cache, checkpointing, initial values, errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from firth.data.attention_fields import causal
from firth.data.collate import collate, pack
from firth.generate.engine import Engine
from firth.generate.quantized import quantize
from firth.generate.sampling import Sampling
from firth.model.attention import AttentionMask, attend
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config, recurrent_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.runs.peft_options import prefix_of, prompt_of
from firth.types import ALL_DOCUMENTS, ALWAYS, NEVER, Example, UserError

LEARNED = ModelConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, max_positions=40, tie_embeddings=False)
CONFIGS: dict[str, ModelConfig] = {
    "rotary": decoder_config(50, 64, 2, num_heads=2, max_positions=40),
    "learned": LEARNED,
    "relative": LEARNED.with_fields(
        {"position.type": "t5", "position.relative_buckets": 8, "position.relative_max_distance": 16}
    ),
    "encoder": encoder_config(50, 64, 2, num_heads=2, max_positions=40),
    "bert": LEARNED.with_fields({"causal": False, "norm.placement": "post", "embedding.type_vocab_size": 2}),
    "encoder-decoder": encoder_decoder_config(50, 64, 2, num_heads=2, max_positions=40),
}
KINDS = {"prefix": prefix_of, "prompt": prompt_of}
IDS = [7, 3, 9]


def build(config: ModelConfig, kind: str = "prefix", seed: int = 0) -> LM:
    torch.manual_seed(seed)
    model = LM(config, {"lm": LMHead(config)}).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.heads[kind] = KINDS[kind](model, IDS)
    model.heads[kind].table.weight.data += 0.3 * torch.randn_like(model.heads[kind].table.weight)
    return model


def examples(config: ModelConfig, n: int = 5) -> list[Example]:
    rng = np.random.default_rng(0)
    out = []
    for _ in range(n):
        tokens = rng.integers(0, 50, rng.integers(3, 9)).astype(np.int32)
        example: Example = {"tokens": tokens} | (causal(len(tokens)) if config.causal else {})
        out.append(example | ({"source_tokens": tokens[::-1].copy()} if config.encoder.num_layers else {}))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_padded_and_packed_rows_match_single_texts(name: str, kind: str) -> None:
    config = CONFIGS[name]
    model, texts = build(config, kind).double(), examples(config)
    with torch.no_grad():
        alone = [model(collate([text], set()))[0] for text in texts]
        plain_model = LM(config, {"lm": model.heads["lm"]}).eval().double()
        plain_model.load_state_dict({n: x for n, x in model.state_dict().items() if kind not in n})
        assert (plain_model(collate([texts[0]], set()))[0] - alone[0]).abs().max() > 0.01
        padded = model(collate(texts, set()))
        for row, own in zip(padded, alone, strict=True):
            torch.testing.assert_close(row[: len(own)], own, atol=1e-10, rtol=0)
        rows = pack(texts, 16, set())
        assert int(rows["document_ids"].amax()) > 1
        hidden = model(rows)
    found = [_texts(hidden[i], rows["document_ids"][i], rows["tokens"][i]) for i in range(len(hidden))]
    by_tokens = {key: states for row in found for key, states in row.items()}
    for text, own in zip(texts, alone, strict=True):
        torch.testing.assert_close(by_tokens[tuple(text["tokens"].tolist())], own, atol=1e-10, rtol=0)


def _texts(hidden: Tensor, document: Tensor, tokens: Tensor) -> dict[tuple[int, ...], Tensor]:
    """Return the states of each text of a packed row by its tokens."""
    numbers = [int(n) for n in document.unique() if n]
    return {tuple(tokens[document == n].tolist()): hidden[document == n] for n in numbers}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_padded_and_packed_rows_have_equal_gradients(name: str, kind: str) -> None:
    config = CONFIGS[name]
    model, texts = build(config, kind).train().double(), examples(config)
    found = []
    for rows in (collate(texts, set()), pack(texts, 16, set())):
        real = rows["document_ids"] > 0 if "document_ids" in rows else rows["key_time"] < NEVER
        model.zero_grad()
        (model(rows) * real[..., None]).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert float(found[0][f"heads.{kind}.table.weight"].abs().max()) > 0
    for n, g in found[0].items():
        torch.testing.assert_close(found[1][n], g, atol=1e-10, rtol=1e-9, msg=n)


@pytest.mark.parametrize("form", ["mask", "block"])
def test_every_document_attends_to_a_prefix(form: str) -> None:
    torch.manual_seed(0)
    document = torch.tensor([[1, 1, 2, 2, 2, 0]])
    when = torch.tensor([[0, 1, 0, 1, 2, 0]])
    key_time = torch.cat((torch.full((1, 2), ALWAYS), when), 1)
    keys = torch.cat((torch.full((1, 2), ALL_DOCUMENTS), document), 1)
    q, k, v = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    mask = AttentionMask.from_times(when, key_time, document, keys, flex=form == "block")
    wanted = torch.zeros(6, 8, dtype=torch.bool)
    for i in range(6):
        for j in range(8):
            own = j >= 2 and document[0, i] == document[0, j - 2] and when[0, j - 2] <= when[0, i]
            wanted[i, j] = j < 2 or bool(own)
    scores = (q @ k.mT).masked_fill(~wanted, float("-inf"))
    torch.testing.assert_close(attend(q, k, v, mask, 1.0), scores.softmax(-1) @ v, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].causal])
def test_decoding_with_a_cache_matches_without(name: str, kind: str) -> None:
    model = build(CONFIGS[name], kind)
    prompts = [np.array([4, 8, 15, 16]), np.array([23, 42])]
    engine = Engine(model, _Tokenizer(), stops=[])
    sampling = Sampling(temperature=0, max_new_tokens=7)
    together = [tuple(output.tokens) for output in engine.generate(prompts, sampling)]
    for prompt, answer in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for token in answer:
            shown = {"tokens": torch.tensor([tokens])}
            if CONFIGS[name].encoder.num_layers:
                written = [engine.start, *tokens[len(prompt) :]]
                shown = {"source_tokens": torch.tensor([list(prompt)]), "tokens": torch.tensor([written])}
            when = torch.arange(shown["tokens"].shape[1])[None]
            with torch.no_grad():
                hidden = model(shown | {"query_time": when, "key_time": when})
                assert int(model.heads["lm"](hidden[0, -1]).argmax()) == token
            tokens.append(token)
    options = [np.array([5, 6]), np.array([9])]
    scores = engine.options(prompts[0], options)
    assert scores == pytest.approx(engine.score([prompts[0]] * 2, options), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_models_with_trained_positions(kind: str) -> None:
    model = build(CONFIGS["rotary"], kind)
    rows = collate(examples(CONFIGS["rotary"]), set())
    real = (rows["key_time"] < NEVER)[..., None]
    with torch.no_grad():
        wanted, found = model(rows) * real, quantize(model, "int8")(rows) * real
    assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()


class _Tokenizer:
    """A tokenizer stub."""

    def __init__(self) -> None:
        from firth.tokenizer.vocab import Vocab

        self.vocab = Vocab(size=50, roles={"bos": 0, "eos": 1, "pad": 2}, special=np.arange(50) < 3)

    def decode(self, ids: object) -> str:
        return str(ids)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "mlp"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_keeps_the_gradient(name: str, kind: str) -> None:
    config = CONFIGS[name]
    model = build(config, "prompt" if kind == "prompt" else "prefix").train()
    if kind == "mlp":
        model.heads["prefix"] = prefix_of(model, IDS, hidden=5)
    rows = collate(examples(config), set())
    found = []
    for again in (False, True):
        for stack in model.stacks():
            stack.gradient_checkpointing = again
        model.zero_grad()
        model(rows).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and any("prefix" in n or "prompt" in n for n in plain)
    assert float(next(g for n, g in plain.items() if "prefix" in n or "prompt" in n).abs().max()) > 0
    for n, g in plain.items():
        torch.testing.assert_close(recomputed[n], g, atol=1e-6, rtol=1e-5, msg=n)


def test_gradient_checkpointing_saves_memory() -> None:
    config = replace(CONFIGS["rotary"], num_layers=4)
    model = LM(config, {}).train()
    rows = collate(examples(config), set())
    sizes = []
    for again in (False, True):
        model.stack.gradient_checkpointing = again
        kept = 0

        def note(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(rows)
        sizes.append(kept)
    assert sizes[1] < sizes[0] / 4


@pytest.mark.parametrize("name", ["rotary", "learned", "relative"])
def test_an_initial_prefix_matches_its_text(name: str) -> None:
    torch.manual_seed(0)
    model = LM(CONFIGS[name], {}).eval()
    own, both = torch.tensor([[11, 12, 13, 14]]), torch.tensor([[*IDS, 11, 12, 13, 14]])
    when = torch.arange(7)[None]
    with torch.no_grad():
        wanted = model({"tokens": both, "query_time": when, "key_time": when})[:, 3:]
        model.heads["prefix"] = prefix_of(model, IDS)
        got = model({"tokens": own, "query_time": when[:, :4], "key_time": when[:, :4]})
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_an_initial_prompt_matches_its_text() -> None:
    model = LM(LEARNED, {}).eval()
    own, both = torch.tensor([[11, 12]]), torch.tensor([[*IDS, 11, 12]])
    when = torch.arange(5)[None]
    with torch.no_grad():
        wanted = model({"tokens": both, "query_time": when, "key_time": when})[:, 3:]
        model.heads["prompt"] = prompt_of(model, IDS)
        got = model({"tokens": own, "query_time": when[:, :2], "key_time": when[:, :2]})
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
        assert model.all_hidden_states({"tokens": own}).shape == (3, 1, 2, 32)


def test_prefix_without_its_mlp_is_unchanged() -> None:
    model = LM(LEARNED, {}).eval()
    model.heads["prefix"] = prefix_of(model, IDS, hidden=6)
    rows = collate(examples(LEARNED), set())
    with torch.no_grad():
        before = model(rows)
        model.heads["prefix"] = model.prefix.without_mlp()
        assert torch.equal(model(rows), before) and model.prefix.hidden == 0


@pytest.mark.parametrize("name", ["bert", "learned"])
def test_a_prompt_leaks_no_later_tokens(name: str) -> None:
    """A changed token changes no state that may not depend on it, not even through a prompt, in any order."""
    model = build(CONFIGS[name], "prompt")
    tokens, when = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[0, 1, 2, 3]])
    other = torch.tensor([[4, 5, 8, 7]])
    with torch.no_grad():
        states = [model({"tokens": shown, "query_time": when - 1, "key_time": when})[0] for shown in (tokens, other)]
    change = (states[1] - states[0]).abs().amax(-1)
    assert change[:2].max() == 0 and change[2:].min() > 1e-3


def test_unsupported_models_are_rejected() -> None:
    small = ModelConfig(vocab_size=50, hidden_size=32, num_layers=1, num_heads=4, causal=False)
    for config in (
        recurrent_config(50, 32, 1),
        small.with_fields({"position.type": "xlnet"}),
        small.with_fields({"max_positions": 16, "attention.linformer.k": 4}),
    ):
        model = LM(config, {})
        for kind, make in KINDS.items():
            with pytest.raises(
                UserError, match=f"peft={kind} puts trained positions before a text, which .* cannot read"
            ):
                make(model, IDS)
    model = build(LEARNED)
    assert model.context == 37
    with pytest.raises(UserError, match=r"longer than model.max_positions=40"):
        model({"tokens": torch.zeros(1, 38, dtype=torch.long)})
