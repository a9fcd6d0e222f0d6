"""Prefix LM, BART denoising and salient spans: inputs, losses against transformers, and learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from firth.data.collate import collate
from firth.data.noise import CORRUPTIONS, Damage, Kind, facts, infilling, permutation, salient
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.config import ModelConfig
from firth.model.config_groups import AttentionConfig, EncoderConfig, LMHeadConfig, NormConfig, PositionConfig
from firth.model.flops import num_parameters
from firth.model.model import LM
from firth.model.presets import PRESETS, bart
from firth.objectives.causal_lm import CausalLM, PrefixLM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.seq2seq import Denoising, SpanCorruption
from firth.objectives.sft import Seq2SeqSFT
from firth.pretrained.load_save import save_model
from firth.tokenizer.train import train
from firth.tokenizer.vocab import Vocab
from firth.training.step import step
from firth.types import IGNORE, NEVER, Example, UserError
from tests.support.objective_cases import VOCAB, plain_text, some_text
from tests.support.tiny_corpus import tokenizer

ONE_ROW = ModelConfig(
    vocab_size=100, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_positions=128, causal=False
)
ENCODER_DECODER = ONE_ROW.with_fields({"causal": True, "encoder.num_layers": 2})


def build_model(objective: Objective, config: ModelConfig, seed: int = 0) -> LM:
    torch.manual_seed(seed)
    return LM(config, objective.heads(config))


def loss_of(objective: Objective, model: LM, examples: list[Example]) -> float:
    batch = collate(examples)
    with torch.no_grad():
        total = objective.loss(model, objective.forward(model, batch), batch)["tokens"]
    return float(total) / int((batch["labels"] != IGNORE).sum())


def test_prefix_one_is_causal_lm() -> None:
    rng = np.random.default_rng(0)
    first, causal = PrefixLM(min_prefix=0, max_prefix=0), CausalLM()
    model = build_model(first, ONE_ROW)
    texts = [plain_text(rng) for _ in range(6)]
    ours, theirs = ([o.build_example(t, VOCAB, np.random.default_rng(1)) for t in texts] for o in (first, causal))
    assert loss_of(first, model, ours) == pytest.approx(loss_of(causal, model, theirs), abs=1e-6)


def test_every_prefix_length_is_equally_likely() -> None:
    rng = np.random.default_rng(0)
    text = {"tokens": some_text(rng, 11)}
    target_lengths = [int((PrefixLM().build_example(text, VOCAB, rng)["labels"] != IGNORE).sum()) for _ in range(4000)]
    counts = np.bincount(target_lengths, minlength=11)[1:]
    assert counts.sum() == 4000 and ((counts - 400) ** 2 / 400).sum() < 34  # 9 degrees of freedom, p = 1e-4
    half = PrefixLM(min_prefix=0.5, max_prefix=0.5, layout="seq2seq")
    for n in (2, 3, 10):
        seen = half.build_example({"tokens": some_text(rng, n)}, VOCAB, rng)
        assert len(seen["labels"]) == n // 2 and len(seen["source_tokens"]) == n - n // 2 + 1
    with pytest.raises(UserError, match="two tokens or more"):
        half.build_example({"tokens": some_text(rng, 1)}, VOCAB, rng)


def hidden_states(model: LM, seen: Example) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(collate([seen]))[0]


@pytest.mark.parametrize("layout", ["prefix", "seq2seq"])
@pytest.mark.parametrize("make", [PrefixLM, Denoising])
def test_targets_are_not_visible_before_they_are_predicted(make: type, layout: str) -> None:
    """Change one token of the target: nothing changes up to the position that predicts it; after it, everything may."""
    objective = make(layout=layout)
    rng = np.random.default_rng(3)
    seen = objective.build_example({"tokens": some_text(rng, 24)}, VOCAB, np.random.default_rng(8))
    model = build_model(objective, ENCODER_DECODER if layout == "seq2seq" else ONE_ROW)
    before = hidden_states(model, seen)
    for at in np.flatnonzero(seen["labels"] != IGNORE)[:-1]:
        tokens = seen["tokens"].copy()
        assert tokens[at + 1] == seen["labels"][at]
        tokens[at + 1] = 25 + (tokens[at + 1] + 3) % 75
        after = hidden_states(model, seen | {"tokens": tokens})
        assert torch.equal(before[: at + 1], after[: at + 1])
        assert not torch.equal(before[at + 1 :], after[at + 1 :])


@pytest.mark.parametrize("name", ["masking", "deletion", "infilling"])
def test_corrupted_tokens_are_not_shown(name: Damage) -> None:
    """Another token where one was hidden: the source is the same, the target is not."""
    for seed in range(20):
        tokens = np.random.default_rng(seed).permutation(np.arange(25, 100))[:40].astype(np.int32)
        objective = Denoising(noises=(name,))
        seen = objective.build_example({"tokens": tokens}, VOCAB, np.random.default_rng(seed))
        gone = np.flatnonzero(~np.isin(tokens, seen["source_tokens"]))
        assert len(gone)
        changed = tokens.copy()
        changed[gone] = 25 + (changed[gone] - 25 + 3) % 75
        other = objective.build_example({"tokens": changed}, VOCAB, np.random.default_rng(seed))
        assert np.array_equal(seen["source_tokens"], other["source_tokens"])
        assert not np.array_equal(seen["labels"], other["labels"])


@pytest.mark.parametrize("name", get_args(Damage))
@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_corruptions_at_every_length(name: Damage, n: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens = some_text(rng, n)
        corrupted = CORRUPTIONS[name](tokens, VOCAB, 0.3, rng)
        kept = corrupted[corrupted != VOCAB.mask]
        if name in ("permutation", "rotation"):
            assert np.array_equal(np.sort(kept), np.sort(tokens)) and len(kept) == n
        else:  # kept tokens stay in order
            left = iter(tokens.tolist())
            assert all(any(k == t for t in left) for k in kept.tolist())
        assert len(corrupted) == n or name in ("deletion", "infilling")


def test_infilling_hides_the_density_in_spans_of_three() -> None:
    rng = np.random.default_rng(0)
    hidden = spans = inserted = 0
    for _ in range(3000):
        corrupted = infilling(np.arange(25, 85), VOCAB, 0.3, rng)
        masks = int((corrupted == VOCAB.mask).sum())
        hidden += 60 - (len(corrupted) - masks)
        spans += masks
        # Where the neighbors of a single mask are neighbors in the text, nothing was hidden.
        at = np.flatnonzero(corrupted == VOCAB.mask)
        at = at[(at > 0) & (at < len(corrupted) - 1)]
        inserted += int((corrupted[at + 1] - corrupted[at - 1] == 1).sum())
    assert hidden == pytest.approx(3000 * 18, rel=1e-9)  # 0.3 * 60 exactly
    # 18 tokens in lengths of mean 3, the last of them truncated: a renewal process, 18 / 3 + (1 + 1 / 3) / 2 spans on average.
    assert spans / 3000 == pytest.approx(6 + 2 / 3, rel=0.03)
    assert inserted / spans == pytest.approx(np.exp(-3), rel=0.25)


def test_sentences_are_permuted_as_units() -> None:
    vocab = tokenizer().vocab
    text = "The cat sat. It saw two dogs! Nothing more\nwas made by men? No."
    tokens = tokenizer().encode(text)
    begins = np.flatnonzero(vocab.sentences(tokens))
    pieces = [tokenizer().decode(part).strip() for part in np.split(tokens, begins[1:])]
    assert pieces == ["The cat sat.", "It saw two dogs!", "Nothing more", "was made by men?", "No."]
    moved = tokenizer().decode(permutation(tokens, vocab, 1.0, np.random.default_rng(0)))
    assert all(piece in moved for piece in pieces) and moved != text
    with pytest.raises(UserError, match="where a sentence ends"):
        permutation(np.arange(3), Vocab(4, {}, np.zeros(4, bool)), 1.0, np.random.default_rng(0))


CASED = (
    "Old Darwin met Emma in London on 12 February 1839, and then they went home. London is large. Nobody knew I did."
)


@pytest.mark.parametrize("algorithm", ["byte-bpe", "unigram", "wordpiece", "bpe"])
def test_facts_are_names_and_dates(algorithm: str) -> None:
    tokenizer = train([CASED] * 30, algorithm, vocab_size=400, num_sentinels=0)
    tokens = tokenizer.encode(CASED)
    runs = facts(tokens, tokenizer.vocab)
    found = [tokenizer.decode(tokens[runs == i]).strip() for i in range(1, runs.max() + 1)]
    assert found == ["Darwin", "Emma", "London", "12 February 1839", "London"]


def test_only_salient_spans_are_hidden_as_units() -> None:
    tokenizer = train([CASED] * 30, "unigram", vocab_size=400, num_sentinels=20)
    vocab, tokens = tokenizer.vocab, tokenizer.encode(CASED)
    runs = facts(tokens, vocab)
    rng = np.random.default_rng(0)
    for rate in (0.01, 0.3, 0.99):
        for _ in range(30):
            hidden = salient(tokens, vocab, rate, rng)
            whole_runs = np.isin(runs, np.unique(runs[hidden]))
            assert hidden.any() and not (hidden & (runs == 0)).any() and np.array_equal(hidden, whole_runs & (runs > 0))
    assert np.array_equal(hidden, runs > 0)
    plain = tokenizer.encode("they went home and then they met on")
    assert 0 < salient(plain, vocab, 0.3, rng).sum() < len(plain)
    seen = SpanCorruption(noise="salient").build_example({"tokens": tokens}, vocab, rng)
    assert set(seen["labels"]) - set(vocab.sentinels) - {vocab.eos} <= set(tokens[runs > 0])
    masked = MLM(noise="salient").build_example({"tokens": vocab.add_special_tokens(tokens)}, vocab, rng)
    assert (masked["labels"] != IGNORE).any()
    with pytest.raises(UserError, match="capitals and digits"):
        salient(np.arange(3), Vocab(4, {}, np.zeros(4, bool)), 0.3, rng)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [PrefixLM(), PrefixLM(layout="seq2seq"), Denoising(), Denoising(layout="prefix"), SpanCorruption(noise="salient")]
    + [Denoising(noises=(name,)) for name in get_args(Damage)],
)  # fmt: skip
def test_ten_steps_lower_the_loss(objective: Objective) -> None:
    rng = np.random.default_rng(0)
    batch = collate([objective.build_example(plain_text(rng), VOCAB, rng) for _ in range(8)])
    model = build_model(objective, ENCODER_DECODER if "source_tokens" in batch else ONE_ROW)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    found = []
    for _ in range(10):
        adam.zero_grad()
        found.append(float(step(model, objective, [batch])["tokens"]))
        adam.step()
    assert found[-1] < 0.85 * found[0]


def check_same_loss(theirs_class: str, objective: Objective, model: LM, vocab: Vocab, folder: Path) -> None:
    """transformers shifts the labels itself and has the same loss."""
    transformers = pytest.importorskip("transformers", reason="the reference; installed with the test extra")
    rng = np.random.default_rng(0)
    batch = collate([objective.build_example({"tokens": some_text(rng, n)}, vocab, rng) for n in (40, 23, 55)])
    save_model(model, None, folder)
    ids = {"pad_token_id": vocab.pad, "decoder_start_token_id": vocab.start}
    theirs = getattr(transformers, theirs_class).from_pretrained(folder, **ids)
    seen = batch["source_key_time"] != NEVER
    with torch.no_grad():
        loss = theirs(input_ids=batch["source_tokens"], attention_mask=seen.long(), labels=batch["labels"]).loss
        ours = (
            objective.loss(model, objective.forward(model, batch), batch)["tokens"] / (batch["labels"] != IGNORE).sum()
        )
    assert abs(float(ours) - float(loss)) < 1e-5


@pytest.mark.oracle
@pytest.mark.parametrize("noise", ["spans", "salient"])
def test_t5_has_the_same_loss_in_transformers(noise: Kind, tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=100, hidden_size=32, num_layers=2, encoder=EncoderConfig(num_layers=2), num_heads=4, head_dim=8,
        intermediate_size=48, max_positions=512, norm=NormConfig("rms", bias=False, eps=1e-6), position=PositionConfig("t5"),
        activation="relu", bias=False, attention=AttentionConfig(scale_scores=False), lm_head=LMHeadConfig(scale=32**-0.5),
    )  # fmt: skip
    objective = SpanCorruption(noise=noise)
    check_same_loss("T5ForConditionalGeneration", objective, build_model(objective, config).eval(), VOCAB, tmp_path)


def random_bart() -> LM:
    """BART with random parameters, so that exchanged embeddings are noticed."""
    model = build_model(Denoising(), bart(100, 32, 2, 4, max_positions=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.oracle
def test_bart_has_the_same_loss_in_transformers(tmp_path: Path) -> None:
    vocab = VOCAB.with_decoder_start("eos")
    assert vocab.start == VOCAB.eos
    check_same_loss("BartForConditionalGeneration", Denoising(), random_bart(), vocab, tmp_path)


class IdTokenizer:
    """A tokenizer that decodes to ids."""

    vocab = replace(VOCAB)

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.mark.oracle
def test_bart_generates_with_and_without_cache(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference; installed with the test extra")
    model = random_bart()
    rng = np.random.default_rng(1)
    prompts = [some_text(rng, n) for n in (9, 14, 5)]
    cached = Engine(model, IdTokenizer(), stops=()).generate(prompts, Sampling(temperature=0, max_new_tokens=12))
    save_model(model, None, tmp_path)
    theirs = transformers.BartForConditionalGeneration.from_pretrained(tmp_path)
    for prompt, answer in zip(prompts, cached, strict=True):
        source, written = torch.as_tensor(prompt, dtype=torch.int64)[None], [VOCAB.eos]
        for _ in range(12):
            tokens = torch.tensor([written])
            causal = torch.arange(len(written))[None]
            batch = {"source_tokens": source, "tokens": tokens, "query_time": causal, "key_time": causal}
            with torch.no_grad():
                written.append(int(model.heads["lm"](model(batch)[0, -1]).argmax()))
        assert answer.tokens.tolist() == written[1:]
        out = theirs.generate(
            source, attention_mask=torch.ones_like(source), max_new_tokens=12, do_sample=False, num_beams=1,
            decoder_start_token_id=VOCAB.eos, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert out[0, 1:].tolist() == written[1:]


def test_targets_start_with_the_decoder_start_token() -> None:
    pair = {"source": np.array([30, 31]), "target": np.array([40, VOCAB.eos])}
    rng = np.random.default_rng(0)
    assert Seq2SeqSFT().build_example(pair, VOCAB, rng)["tokens"][0] == VOCAB.pad
    assert Seq2SeqSFT().build_example(pair, VOCAB.with_decoder_start("eos"), rng)["tokens"][0] == VOCAB.eos


@pytest.mark.parametrize("name", ["bart-base", "bart-large"])
def test_bart_parameter_count_equals_the_release(name: str) -> None:
    """Equal to transformers except two unused rows of each position embedding and the bias of the logits, a constant there."""
    config = PRESETS[name]
    released = {"bart-base": 139_420_416, "bart-large": 406_291_456}[name]
    with torch.device("meta"):
        counted = sum(p.numel() for p in LM(config, Denoising().heads(config)).parameters())
    assert counted == num_parameters(config) == released - 4 * config.hidden_size + config.vocab_size
