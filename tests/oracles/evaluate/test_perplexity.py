"""Likelihood of text against transformers' loss on the same exported model, and general properties."""

import math

import numpy as np
import pytest
import torch

from firth.evaluate.perplexity import Likelihood, TokenizedDocument, halves, one_at_a_time, score, strided, tokenize
from firth.model.config import decoder_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.pretrained.load_save import save_model
from firth.tokenizer.train import train
from firth.tokenizer.vocab import Vocab, replace_lone_surrogates
from firth.types import IGNORE, UserError
from tests.support.hf_families import AUTO_CLASSES, CONFIGS
from tests.support.models import perturbed_model

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")

VOCAB = Vocab(size=61, roles={"pad": 0, "bos": 1, "eos": 2, "cls": 1, "sep": 2, "mask": 3}, special=np.arange(61) < 4)


def document(n, seed=0):
    rng = np.random.default_rng(seed)
    return TokenizedDocument(rng.integers(4, 61, n), rng.integers(0, 5, n))


def exported(name, tmp_path):
    """Return a model of firth, and the model that transformers loads from its files."""
    model = perturbed_model(CONFIGS[name])
    save_model(model, None, tmp_path)
    return model, getattr(transformers, AUTO_CLASSES[name.split("-")[0]]).from_pretrained(tmp_path).eval()


def their_nll(theirs, tokens, labels, **fields):
    """Return the mean loss of transformers."""
    labels = torch.as_tensor(labels)[None]
    with torch.no_grad():
        loss = theirs(input_ids=torch.as_tensor(tokens)[None], labels=labels, **fields).loss
    return float(loss)


@pytest.mark.parametrize("name", ["gpt2", "llama", "nanochat"])
def test_causal_in_one_window_equals_transformers(name, tmp_path):
    ours, theirs = exported(name, tmp_path)
    text = document(30)
    result = score(ours, strided(text, context=40))
    assert (result.tokens, result.size) == (29, int(text.sizes[1:].sum()))
    mean = their_nll(theirs, text.tokens, text.tokens)
    assert result.nll == pytest.approx(29 * mean, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(29 * mean / math.log(2) / text.sizes[1:].sum(), rel=1e-5)


def test_causal_in_strides_equals_transformers(tmp_path):
    """The loop of transformers' page on perplexity of fixed-length models, with windows of 25 and a stride of 12."""
    ours, theirs = exported("gpt2", tmp_path)
    text = document(25 + 12 * 6)
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(text.tokens), 12):
        end = min(begin + 25, len(text.tokens))
        target = text.tokens[begin:end].copy()
        target[: -(end - before)] = IGNORE
        scored = int((target[1:] != IGNORE).sum())
        total += scored * their_nll(theirs, text.tokens[begin:end], target)
        count, before = count + scored, end
        if end == len(text.tokens):
            break
    result = score(ours, strided(text, context=24))
    assert result.tokens == count == len(text.tokens) - 1
    assert result.nll == pytest.approx(total, rel=1e-5)


def test_causal_with_bos_scores_the_first_token_too(tmp_path):
    ours, theirs = exported("llama", tmp_path)
    text = document(30)
    with_bos = np.concatenate(([VOCAB.bos], text.tokens))
    result = score(ours, strided(text, context=40, bos=VOCAB.bos))
    assert (result.tokens, result.size) == (30, int(text.sizes.sum()))
    assert result.nll == pytest.approx(30 * their_nll(theirs, with_bos, with_bos), rel=1e-5)
    assert result.nll != pytest.approx(score(ours, strided(text, context=40)).nll, rel=1e-3)


@pytest.mark.parametrize(("bos", "every"), [(None, True), (1, True), (1, False)])
@pytest.mark.parametrize("context", [2, 3, 8, 9, 64])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 30, 65])
def test_every_token_is_scored_once_with_half_a_context(n, context, bos, every):
    text = TokenizedDocument(np.arange(100, 100 + n), np.ones(n, np.int64))
    scored = []
    for x in strided(text, context, bos, every):
        assert len(x["tokens"]) <= context
        for i in np.flatnonzero(x["labels"] != IGNORE):
            scored.append(int(x["labels"][i]))
            seen = x["tokens"][: i + 1].tolist()
            index = scored[-1] - 100
            assert len(seen) >= min(index + (bos is not None), context - context // 2)
            real = [bos] * (bos is not None) + list(range(100, 100 + index))
            assert seen[1:] == real[len(real) - len(seen) + 1 :]
            assert seen[0] == (bos if bos is not None and every else real[len(real) - len(seen)])
    assert scored == list(range(101 if bos is None else 100, 100 + n))


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_masked_is_the_sum_over_single_masks(name, tmp_path):
    ours, theirs = exported(name, tmp_path)
    text = document(17)
    framed = np.concatenate(([VOCAB.cls], text.tokens, [VOCAB.sep]))
    total = 0.0
    for at in range(1, 18):
        inputs, labels = framed.copy(), np.full(19, IGNORE)
        inputs[at], labels[at] = VOCAB.mask, framed[at]
        total += their_nll(theirs, inputs, labels)
    result = score(ours, one_at_a_time(text, 40, VOCAB))
    assert (result.tokens, result.size) == (17, int(text.sizes.sum()))
    assert result.nll == pytest.approx(total, rel=1e-5)


def test_masked_splits_long_documents_into_even_pieces():
    rows = list(one_at_a_time(document(50), 20, VOCAB))
    assert sorted({len(x["tokens"]) for x in rows}) == [18, 19]
    assert len(rows) == 50
    assert [int(x["labels"].max()) for x in rows] == document(50).tokens.tolist()


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1"])
def test_encoder_decoders_score_the_second_half(name, tmp_path):
    ours, theirs = exported(name, tmp_path)
    text = document(21)
    source = np.concatenate((text.tokens[:10], [VOCAB.eos]))
    result = score(ours, halves(text, 40, VOCAB))
    assert (result.tokens, result.size) == (11, int(text.sizes[10:].sum()))
    assert result.nll == pytest.approx(11 * their_nll(theirs, source, text.tokens[10:]), rel=1e-5)


@pytest.mark.parametrize(("name", "build_examples"), [
    ("gpt2", lambda d: strided(d, 24)),
    ("bert", lambda d: one_at_a_time(d, 24, VOCAB)),
    ("t5-v1.1", lambda d: halves(d, 13, VOCAB)),
])  # fmt: skip
def test_batching_changes_nothing(name, build_examples):
    model = perturbed_model(CONFIGS[name])
    model.train()
    texts = [document(n, seed=n) for n in (61, 5, 33, 2)]
    alone = [score(model, build_examples(text), max_tokens=1) for text in texts]
    together = score(model, (x for text in texts for x in build_examples(text)), max_tokens=100_000)
    summed = sum(alone, Likelihood())
    assert (summed.tokens, summed.size) == (together.tokens, together.size)
    assert summed.nll == pytest.approx(together.nll, rel=1e-5)
    assert model.training


def test_empty_text_gives_no_examples():
    assert (
        list(strided(document(0), 8))
        == list(one_at_a_time(document(0), 8, VOCAB))
        == list(halves(document(0), 8, VOCAB))
        == []
    )
    with pytest.raises(UserError, match="at least 2"):
        list(strided(document(5), 1))
    with pytest.raises(UserError, match="at least 4"):
        list(one_at_a_time(document(5), 2, VOCAB))


HARD = [
    "", " ", "a", "plain words, twice.", "  leading and trailing  \n", "na\u00efve caf\u00e9", "日本語のテキスト",
    "\U0001f469\u200d\U0001f467 and \U0001f3f4", "e\u0301 \u00e9 \ufb01 \u212b", "\ud800 alone", "\x00\x07",
    "ÀÉÎ Straße ŒUVRE", "<mask> </s> <extra_id_0>", "a" * 400, "\u202eright\u202c",
]  # fmt: skip


@pytest.mark.parametrize("algorithm", ["bpe", "byte-bpe", "wordpiece", "unigram"])
def test_sizes_add_up_to_the_bytes_of_the_text(algorithm):
    tokenizer = train(
        ["the quick brown fox jumps over the lazy dog, plain words " * 20], algorithm, 300, num_sentinels=2
    )
    for text in HARD:
        found = tokenize(tokenizer, text)
        assert found.tokens.tolist() == tokenizer.encode(text).tolist()
        assert len(found.sizes) == len(found.tokens)
        assert (found.sizes >= 0).all()
        if len(found.tokens):
            assert found.sizes.sum() == len(replace_lone_surrogates(text).encode())


def test_sizes_are_the_bytes_of_each_token():
    tokenizer = train(["ab ab ab"], "byte-bpe", 400, num_sentinels=0)
    found = tokenize(tokenizer, "ab é ab")
    words = [(tokenizer.decode([t]), int(n)) for t, n in zip(found.tokens, found.sizes, strict=True)]
    assert words[0] == ("ab", 2)
    assert words[-1] == (" ab", 3)
    assert sum(n for _, n in words[1:-1]) == 3  # a blank, and é of two bytes


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    """A uniform model costs log2(vocab) bits per token, so its bits per byte follow from the counts alone."""
    text = "the quick brown fox jumps over the lazy dog " * 10
    for size in (300, 340):
        tokenizer = train([text], "byte-bpe", size, num_sentinels=0)
        config = decoder_config(tokenizer.vocab.size, 64, 1, max_positions=32)
        model = LM(config, {"lm": LMHead(config)})
        torch.nn.init.zeros_(model.heads["lm"].weight)
        found = tokenize(tokenizer, text)
        result = score(model, strided(found, 32))
        assert result.tokens == len(found.tokens) - 1
        wanted = (len(found.tokens) - 1) * math.log2(tokenizer.vocab.size) / (len(text) - found.sizes[0])
        assert result.bits_per_byte == pytest.approx(wanted, rel=1e-5)
        assert result.perplexity == pytest.approx(tokenizer.vocab.size, rel=1e-5)
