"""Bugs in text processing and tokenization that users of other toolkits reported, and the correct behavior.

Each test names the public issue of the toolkit.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from firth.corpora.readers import Document
from firth.data.noise import NOISES
from firth.data.token_store import TokenStore
from firth.data.windows import Documents, WindowsConfig
from firth.generate import embeddings
from firth.model.config import decoder_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.seq2seq import SpanCorruption
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError

SUBJECTS = [
    "the otter",
    "a baker",
    "my uncle",
    "the pilot",
    "one heron",
    "the tailor",
    "our cook",
    "a farmer",
    "the clerk",
    "that fox",
]
VERBS = ["watches", "paints", "repairs", "carries", "finds", "sells", "hides", "counts", "washes", "forgets"]
THINGS = [
    "the boat",
    "a lamp",
    "some bread",
    "the red door",
    "two coins",
    "a coat",
    "the map",
    "an old drum",
    "the river",
    "a letter",
]


def sentences(count: int) -> str:
    rng = random.Random(1)
    parts = (SUBJECTS, VERBS, THINGS)
    return " ".join(" ".join(map(rng.choice, parts)).capitalize() + "." for _ in range(count))


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    sizes = {"byte-bpe": 600, "unigram": 700, "wordpiece": 400}
    return {name: train([sentences(400)], name, size, num_sentinels=100) for name, size in sizes.items()}


def test_a_text_shorter_than_a_window_is_refused(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    """RWKV-PEFT#52, lit-llama#378: the error names both numbers."""
    store = TokenStore.build([Document("a", "A heron counts the rain.")], tokenizers["byte-bpe"], tmp_path / "store")
    with pytest.raises(UserError, match=rf"{len(store.tokens)} tokens.* too few for one window of 64"):
        Documents(WindowsConfig(max_length=64), store, tokenizers["byte-bpe"].vocab)


@pytest.mark.parametrize(
    "text", ["hello !", "a , b . c", "do n't", "   three blanks", "tab\tand\n\n  lines ", "don 't ' s"]
)
def test_blanks_before_punctuation_are_decoded(text: str, tokenizers: dict[str, Tokenizer]) -> None:
    """tokenizers#1543: "hello !" came back as "hello!"."""
    for name in ("byte-bpe", "unigram"):
        assert tokenizers[name].decode(tokenizers[name].encode(text)) == text


@pytest.mark.parametrize("algorithm", ["byte-bpe", "unigram", "wordpiece"])
def test_saved_tokenizers_disable_clean_up(algorithm: str, tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizers[algorithm].save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["clean_up_tokenization_spaces"] is False


def test_text_with_control_token_names_is_encoded_as_text(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    """LlamaFactory#370: `<|endoftext|>` in a text stopped preparation, or became the control token."""
    text = "stop </s> here <|im_end|> a<s>b<mask><pad> <|endoftext|> <extra_id_0> end"
    for name in ("byte-bpe", "unigram"):
        tokenizer = tokenizers[name]
        store = TokenStore.build([Document("a", text)], tokenizer, tmp_path / name)
        inside = np.array(store.tokens[int(store.opened) : len(store.tokens) - 1])
        assert not tokenizer.vocab.special[inside].any()
        assert tokenizer.decode(inside) == text


@pytest.mark.parametrize("algorithm", ["byte-bpe", "wordpiece", "unigram"])
def test_whole_word_masking_with_any_tokenizer(algorithm: str, tokenizers: dict[str, Tokenizer]) -> None:
    """transformers#11768: whole-word masking knew `##` alone."""
    text = (
        "The otterly paintings watchword uncled forgetfulness repaired the boathouse near Osloan bakerware without "
        "sellings at lampdawn. "
    ) * 3
    tokenizer = tokenizers[algorithm]
    ids, spans = tokenizer.spans(text)
    word = np.array([text[:end].rstrip().count(" ") for _, end in spans])
    letters = np.array([any(map(str.isalpha, text[begin:end])) for begin, end in spans])
    hidden = np.stack([NOISES["words"](ids, tokenizer.vocab, 0.15, np.random.default_rng(s)) for s in range(200)])
    several = 0
    for number in set(word.tolist()):
        of_word = hidden[:, (word == number) & letters]
        several += of_word.shape[1] > 1
        assert (of_word.any(1) == of_word.all(1)).all()
    assert several > 20
    assert 0.11 < hidden[:, ~tokenizer.vocab.special[ids]].mean() < 0.19


@pytest.mark.parametrize("algorithm", ["word", "byte-bpe", "unigram"])
def test_a_vectors_file_has_one_field_per_word(algorithm: str, tmp_path: Path) -> None:
    """gensim#2795, #2881: a word that contains or is a blank made a file that cannot be loaded."""
    words = ["otter", "baker", "pilot\u00a0boat", "tailor\u2009coat", "river", "drum\u3000map", "caf\u00e9"]
    rng = random.Random(0)
    tokenizer = train([" ".join(rng.choice(words) for _ in range(900))], algorithm, 420)
    config = decoder_config(tokenizer.vocab.size, 64, 1)
    embeddings.write(LM(config, {"lm": LMHead(config)}), tokenizer, tmp_path / "a.vec")
    head, *rows, last = (tmp_path / "a.vec").read_text("utf-8").split("\n")
    count, width = map(int, head.split())
    assert last == "" and len(rows) == count == len(tokenizer.vocab.ordinary)
    assert {len(row.split()) for row in rows} == {len(row.split(" ")) for row in rows} == {width + 1}
    names = [row.split(" ")[0] for row in rows]
    assert len(set(names)) == len(names)


def test_sentinels_are_named_in_order(tokenizers: dict[str, Tokenizer]) -> None:
    """transformers#14282: a collator's sentinels were not the tokenizer's `<extra_id_0>`, `<extra_id_1>`, ..."""
    tokenizer = tokenizers["byte-bpe"]
    ids = tokenizer.encode(sentences(60)[:900])
    seen = SpanCorruption().build_example({"tokens": ids}, tokenizer.vocab, np.random.default_rng(0))
    source, target = (
        [name for i in row if i >= 0 and (name := tokenizer.token(int(i))).startswith("<extra_id_")]
        for row in (seen["source_tokens"], seen["labels"])
    )
    assert target == [f"<extra_id_{k}>" for k in range(len(target))]
    assert source == target[:-1] and len(source) > 5


def test_too_few_sentinels_are_an_error_with_a_fix(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-bpe"]
    ids = np.resize(tokenizer.encode(sentences(60)), 2048)
    with pytest.raises(UserError, match=r"102 dropped spans need 103 sentinels .* has 100: .*--num-sentinels 204"):
        SpanCorruption().build_example({"tokens": ids}, tokenizer.vocab, np.random.default_rng(0))
