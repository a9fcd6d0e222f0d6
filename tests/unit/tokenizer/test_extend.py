"""Tokens added to a published tokenizer: old ids keep their meaning, and texts of the new kind need fewer tokens."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from firth.tokenizer.extend import extend, longest_match, old_tokens, stripped_accents, tokens_per_word
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError

ENGLISH = ["The quick brown fox jumps over the lazy dog, and it is quick again. " * 20]
FRENCH = ["Le renard brun saute par-dessus le chien paresseux, déjà fatigué de la journée. " * 20]
GREEK = ["η γρήγορη αλεπού πηδάει πάνω από το σκυλί. " * 20]


def ids_of(tokenizer: Tokenizer) -> dict[str, int]:
    found: dict[str, int] = tokenizer.engine.get_vocab(with_added_tokens=True)
    return found


def expanded(old: Tokenizer, new: Tokenizer, ids: np.ndarray) -> list[int]:
    """Return ids with each new one replaced by its old ones."""
    parts = old_tokens(old, new)
    first = old.vocab.size
    return list(chain.from_iterable([i] if i < first else parts[i - first] for i in ids.tolist()))


@pytest.mark.parametrize("algorithm", ["byte-bpe", "wordpiece"])
def test_old_ids_are_unchanged_and_new_text_is_shorter(algorithm: str) -> None:
    old = train([*ENGLISH, "".join(map(chr, range(97, 123)))], algorithm, 400)
    new = extend(old, FRENCH, 40)
    assert ids_of(old).items() <= ids_of(new).items() and new.vocab.size == old.vocab.size + 40
    assert old.vocab.roles == new.vocab.roles and new.encode(ENGLISH[0]).tolist() == old.encode(ENGLISH[0]).tolist()
    assert tokens_per_word(new, FRENCH) < 0.8 * tokens_per_word(old, FRENCH)
    assert new.digest == extend(old, FRENCH, 40).digest != old.digest


@pytest.mark.parametrize("text", [*FRENCH, *ENGLISH, *GREEK, "déjà vu 12 ###", "Le quick renard"])
def test_new_merges_come_after_the_old_ones(text: str) -> None:
    """A text is encoded as before and then merged further, so each new token stands for what it replaced."""
    old = train(ENGLISH, "byte-bpe", 330)
    new = extend(old, FRENCH, 60)
    assert expanded(old, new, new.encode(text)) == old.encode(text).tolist()
    assert new.decode(new.encode(text)) == text


def test_no_new_merge_makes_an_old_token() -> None:
    """Here `abc` is a token that no text has, since b and c are merged first; its embedding was never trained."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*letters, "bc", "ab", "abc"])}
    engine = Engine(models.BPE(vocab=vocab, merges=[("b", "c"), ("a", "b"), ("ab", "c")]))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    old = Tokenizer(engine)
    new = extend(old, ["abc abcd abcde " * 9], 20)
    assert old.pieces("abc") == new.pieces("abc") == ["a", "bc"]
    for text in ("abc", " abcd abc", "abcde"):
        assert expanded(old, new, new.encode(text)) == old.encode(text).tolist()
    assert len(new.encode(" abcde")) < len(old.encode(" abcde"))


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_outside_the_model_keep_their_ids(special: bool, tmp_path: Path) -> None:
    """Qwen's control tokens are not in the vocabulary of its BPE; others have added words."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(
        ENGLISH, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    names = ["<|im_end|>", "renard", "déjà"]
    engine.add_tokens([AddedToken(name, special=special) for name in names])
    old = Tokenizer(engine)
    new = extend(old, FRENCH, 30)
    new.save(tmp_path)
    theirs = Engine.from_file(str(tmp_path / "tokenizer.json"))
    for found in (new, Tokenizer.load(tmp_path)):
        assert ids_of(old).items() <= ids_of(found).items() and len(set(ids_of(found).values())) == found.vocab.size
        assert found.vocab.size == old.vocab.size + 30
        assert found.decode(found.encode(FRENCH[0])) == old.decode(old.encode(FRENCH[0]))
    assert theirs.get_vocab() == ids_of(new)
    spelled = {old.id(name) for name in names}
    assert bool(spelled & set(new.encode(FRENCH[0]).tolist())) != special
    assert (spelled & set(new.encode(FRENCH[0]).tolist())) == (spelled & set(old.encode(FRENCH[0]).tolist()))


def test_wordpiece_learns_the_characters_of_another_script() -> None:
    old = train(ENGLISH, "wordpiece", 300)
    unk = old.vocab.roles["unk"]
    assert (old.encode(GREEK[0]) == unk).mean() > 0.8
    new = extend(old, GREEK, 120)
    assert not (new.encode(GREEK[0]) == unk).any()
    parts = dict(zip(range(old.vocab.size, new.vocab.size), old_tokens(old, new), strict=True))
    assert parts[new.id("η")] == []  # unknown before
    for texts, letters in (
        ([*GREEK, *ENGLISH, "foxes jumping lazily over boxes again and quickly " * 40], 2),
        (GREEK, 8),
    ):  # Greek alone has no known words to merge
        few = extend(old, texts, 8)
        assert sum(len(token.removeprefix("##")) == 1 for token in ids_of(few).keys() - ids_of(old).keys()) == letters


def test_characters_that_are_words_fill_the_new_tokens() -> None:
    """BERT splits Chinese into characters, and so there are no pairs to merge."""
    old = train(ENGLISH, "wordpiece", 300)
    old.engine.normalizer = normalizers.BertNormalizer()
    new = extend(old, ["".join(map(chr, range(0x4E00, 0x4E00 + 50)))], 40)
    assert new.vocab.size == old.vocab.size + 40


def test_longest_match_is_that_of_the_library() -> None:
    old = train(ENGLISH, "wordpiece", 200)
    for word in ("quick", "quickfox", "jumpsover", "z", "thelazydog"):
        pieces = longest_match(word, ids_of(old), "##")
        assert (pieces or ["[UNK]"]) == old.pieces(word)


def test_other_kinds_of_tokenizers_are_refused() -> None:
    with pytest.raises(UserError, match=r"and the tokenizer of the start model is Unigram: leave it out"):
        extend(train(ENGLISH, "unigram", 330), FRENCH, 10)


def test_accents_that_a_normalizer_removes_are_counted() -> None:
    plain = train(FRENCH, "wordpiece", 200)
    assert stripped_accents(plain, FRENCH) == 0
    plain.engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    letters = sum(map(str.isalpha, FRENCH[0]))
    assert stripped_accents(plain, [*FRENCH, "\ud800 12"]) == 20 * 4 / letters
