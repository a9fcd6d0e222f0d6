"""Training: equal to direct implementations, the same in every process, nothing unknown, bounded memory."""

import collections
import itertools
import os
import pydoc_data.topics
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers

from firth.tokenizer import unigram
from firth.tokenizer.inspection import report
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import (
    ALGORITHMS,
    BYTES,
    CONTROL,
    FALLBACK_ALGORITHMS,
    SAMPLE_CHARACTERS,
    blank,
    reservoir,
    train,
    unknown_share,
)
from firth.tokenizer.workers import count as count_words
from firth.types import UserError

TOPICS = sorted(pydoc_data.topics.topics.values())
LITTLE = TOPICS[:12]


def direct(words: dict[str, int], spell, join, first: list[str], size: int) -> list[tuple[str, str, int]]:
    """Sennrich, Haddow and Birch 2016, algorithm 1: count all pairs, merge the most frequent one, repeat.

    Of equally frequent pairs the one with the smaller ids comes first; `first` are the ids from 0 on.
    """
    vocab = {token: i for i, token in enumerate(first)}
    spelled = {word: spell(word) for word in words}
    merges = []
    while len(vocab) < size:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, letters in spelled.items():
            for pair in itertools.pairwise(letters):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], vocab[pair[0]], vocab[pair[1]]))
        merges.append((*best, pairs[best]))
        made = join(*best)
        vocab.setdefault(made, len(vocab))
        for word, letters in spelled.items():
            merged: list[str] = []
            for letter in letters:
                if merged and (merged[-1], letter) == best:
                    merged[-1] = made + "\0"  # a new piece is not merged again in the same pass
                else:
                    merged.append(letter)
            spelled[word] = [piece.removesuffix("\0") for piece in merged]
    return merges


FORMS = {
    "bpe": (lambda w: [*w[:-1], w[-1] + "</w>"], lambda a, b: a + b, lambda c: c + "</w>"),
    "byte-bpe": (list, lambda a, b: a + b, None),
    "wordpiece": (
        lambda w: [w[0], *("##" + c for c in w[1:])],
        lambda a, b: a + b.removeprefix("##"),
        lambda c: "##" + c,
    ),
}
CORPORA = {
    "prose": LITTLE,
    "ties": ["".join(random.Random(7).choices("aab ", k=3000))],
    "repeats": ["aaaa aaaaa aaaaaa abababab bababa " * 3],
}


@pytest.mark.slow
@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("algorithm", FORMS)
def test_merges_and_counts_equal_a_direct_implementation(algorithm, corpus):
    spell, join, form = FORMS[algorithm]
    tokenizer = train(
        CORPORA[corpus], algorithm, 700 if corpus == "prose" else 330, num_sentinels=3, byte_fallback=False
    )
    words = count_words(tokenizer.engine, reservoir(CORPORA[corpus], 10**9, 0))
    letters = sorted(set("".join(words)))
    if algorithm == "byte-bpe":
        letters = sorted(i for i in tokenizer.engine.get_vocab() if len(i) == 1)
        assert len(letters) == 256
    first = [tokenizer.token(i) for i in range(len(CONTROL) + 3)] + letters + [form(c) for c in letters if form]
    expected = direct(words, spell, join, first, tokenizer.vocab.size)
    assert [(m.left, m.right, m.count) for m in tokenizer.merges] == expected
    assert len(expected) > (10 if corpus == "repeats" else 60)
    made = list(dict.fromkeys(join(left, right) for left, right, _ in expected))
    assert [tokenizer.token(i) for i in range(tokenizer.vocab.size)] == first + made


PROGRAM = """
import pydoc_data.topics, sys
from firth.tokenizer.train import train
texts = sorted(pydoc_data.topics.topics.values())[:40]
print(train(texts, sys.argv[1], 1500, seed=3, sample_bytes=int(sys.argv[2])).digest)
"""


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_text_and_seed_give_the_same_file(algorithm):
    found = set()
    for hash_seed, threads in (("1", "1"), ("2", "4"), ("3", "2")):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "RAYON_NUM_THREADS": threads}
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM, algorithm, "100000"], env=env, capture_output=True, text=True, check=True
        )
        found.add(out.stdout)
    assert len(found) == 1
    assert train(TOPICS[:40], algorithm, 1500, seed=4, sample_bytes=100_000).digest not in found.pop()


@pytest.fixture(scope="module")
def trained():
    return {algorithm: train(LITTLE, algorithm, 1000, num_sentinels=100) for algorithm in ALGORITHMS}


LETTERS = sorted({c for text in LITTLE for c in text if not c.isspace()})


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(word=st.text(st.sampled_from(LETTERS), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_a_word_of_known_characters_is_never_unknown(trained, algorithm, word):
    tokenizer = trained[algorithm]
    assert tokenizer.vocab.roles["unk"] not in tokenizer.encode(word)
    assert not tokenizer.vocab.special[tokenizer.encode(word)].any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("word", ["taaaaasty", "laern", "Transformerify"])
def test_unseen_words_split_into_known_pieces(trained, algorithm, word):
    tokenizer = trained[algorithm]
    assert word not in " ".join(LITTLE)
    pieces = tokenizer.pieces(word)
    assert 1 < len(pieces) <= len(word) + 1
    assert "".join(p.replace("</w>", "").removeprefix("##").replace("▁", "") for p in pieces) == word
    assert tokenizer.decode(tokenizer.encode(word)) == word


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ids_begin_with_the_control_tokens(trained, algorithm):
    tokenizer = trained[algorithm]
    vocab = tokenizer.vocab
    assert vocab.size == 1000
    names = [tokenizer.token(i) for i in range(107)]
    usual = [*CONTROL, *(f"<extra_id_{i}>" for i in range(100))]
    assert names == (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *usual[5:]] if algorithm == "wordpiece" else usual)
    if algorithm in FALLBACK_ALGORITHMS:
        assert [tokenizer.token(i) for i in range(107, 363)] == BYTES
    assert (vocab.pad, vocab.roles["unk"], vocab.bos, vocab.eos, vocab.mask) == (0, 1, 2, 3, 4)
    assert (vocab.cls, vocab.sep) == (2, 3)
    assert vocab.sentinels.tolist() == list(range(7, 107))
    assert vocab.special.nonzero()[0].tolist() == list(range(107))


def test_many_characters_leave_ids_for_pieces():
    rng = random.Random(0)
    han = [chr(0x4E00 + i) for i in range(3000)]
    text = "".join(rng.choices(han, weights=[1 / (i + 1) for i in range(3000)], k=60_000)) + " plain words too" * 50
    for algorithm in ("bpe", "wordpiece", "unigram"):
        tokenizer = train([text], algorithm, 2000, byte_fallback=False)
        known = sum(
            len(tokenizer.token(i).strip("#▁").replace("</w>", "")) == 1 for i in range(7, tokenizer.vocab.size)
        )
        assert 400 < known <= 2 * ((2000 - 7) // 4)
        assert tokenizer.vocab.size > 7 + known
        assert tokenizer.vocab.roles["unk"] not in tokenizer.encode(han[0] + han[5] + " plain")
        assert tokenizer.vocab.roles["unk"] in tokenizer.encode(han[2999])


@pytest.fixture(scope="module")
def chinese() -> str:
    """Return 3,000 Han characters, a few of them frequent."""
    rng = random.Random(0)
    han = [chr(0x4E00 + i) for i in range(3000)]
    return "".join(rng.choices(han, weights=[1 / (i + 1) for i in range(3000)], k=40_000)) + " plain words" * 50


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", FALLBACK_ALGORITHMS)
def test_nothing_is_unknown_with_byte_fallback(algorithm: str, chinese: str, tmp_path) -> None:
    """3,000 characters in 1,200 ids: bytes by default, else the unknown share and a hint are reported."""
    messages: list[str] = []
    tokenizer = train([chinese], algorithm, 1200, log=messages.append)
    assert messages == [] and unknown_share(tokenizer, [chinese]) == 0
    tokenizer.save(tmp_path)
    kept = Tokenizer.load(tmp_path)
    for text in (chinese[:300], "\u4e00", "plain \u59b7\u59b6 words 日本 👍", "a<0xE6>\u59b7<0x41>"):
        read = kept.decode(kept.encode(text))
        assert read == text or (read.replace(" ", "") == text.replace(" ", "") and algorithm == "bpe")
        assert not kept.vocab.special[kept.encode(text)].any()
    plain = train([chinese], algorithm, 1200, byte_fallback=False, log=messages.append)
    assert 0.15 < unknown_share(plain, [chinese]) < 0.5
    share, _, what = messages[0].partition("% of the tokens of the training text are <unk>")
    assert float(share) == pytest.approx(100 * unknown_share(plain, [chinese]), abs=0.1)
    assert what.startswith(": 2,4") and len(messages) == 1
    assert "--byte-fallback" in messages[0]


def test_wordpiece_reports_the_share_of_unknown_words(chinese: str) -> None:
    messages: list[str] = []
    train([chinese], "wordpiece", 1200, log=messages.append)
    assert len(messages) == 1
    assert "[UNK]" in messages[0] and "wordpiece files have no byte fallback; use unigram or byte-bpe" in messages[0]


@pytest.mark.parametrize("algorithm", FALLBACK_ALGORITHMS)
def test_bytes_of_a_character_have_its_span(algorithm: str) -> None:
    text = "ab日 語c <0x41> 日"
    ids, spans = train(LITTLE, algorithm, 900).spans(text)
    assert (ids != 1).all() and (np.diff(spans[:, 0]) >= 0).all()
    assert sorted({text[a:b].strip() for a, b in spans} & {"日", "語"}) == ["日", "語"]
    assert spans[-1].tolist() == [len(text) - 1, len(text)]


@pytest.mark.parametrize("algorithm", ["byte-bpe", *FALLBACK_ALGORITHMS])
def test_the_smallest_size_is_the_same_for_all(algorithm: str) -> None:
    """7 control tokens and 256 bytes: 264 ids are enough."""
    tokenizer = train(LITTLE, algorithm, 264)
    text = "The 日本語 of it."
    assert tokenizer.vocab.size <= 264 and tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(UserError, match="at least 263 ids for its 7 control tokens and 256 bytes, not 262"):
        train(LITTLE, algorithm, 262)


def test_unknown_tokens_are_shown_as_such(tmp_path) -> None:
    train(LITTLE, "unigram", 400, byte_fallback=False).save(tmp_path)
    assert report(tmp_path, ["ab日"]).splitlines()[-1].split()[-1] == "<unk>"
    train(LITTLE, "unigram", 700).save(tmp_path)
    assert report(tmp_path, ["ab日"]).splitlines()[-1].split()[-3:] == ["<0xE6>", "<0x97>", "<0xA5>"]


def test_impossible_training_is_a_one_line_error():
    with pytest.raises(UserError, match=r"no tokenizer algorithm 'bqe'; use one of bpe, byte-bpe"):
        train(LITTLE, "bqe", 1000)
    with pytest.raises(
        UserError, match=r"at least 363 ids for its 107 control tokens .* or take fewer sentinels than 100"
    ):
        train(LITTLE, "byte-bpe", 300, num_sentinels=100)
    with pytest.raises(UserError, match=r"at least .* characters, not 100"):
        train(LITTLE, "bpe", 100, byte_fallback=False)
    with pytest.raises(UserError, match="at least 8 ids for its 7 control tokens and one word, not 7"):
        train(LITTLE, "word", 7)
    for nothing in ([], [""], [" \n "]):
        with pytest.raises(UserError, match="no text"):
            train(nothing, "bpe", 400)


def test_a_small_text_gives_fewer_ids():
    tokenizer = train(["a rose is a rose"], "byte-bpe", 5000)
    assert 263 < tokenizer.vocab.size < 300
    assert 263 < train(["a rose is a rose"], "unigram", 5000).vocab.size < 300


def test_lone_surrogates_are_accepted():
    for algorithm in ALGORITHMS:
        tokenizer = train(["a \ud800 b \ud83d\ude00 " * 20], algorithm, 500)
        assert tokenizer.vocab.size > 10


def test_the_reservoir_keeps_order_and_its_size():
    texts = [f"{i:05d} " * 400 for i in range(500)]  # 1.2 MB
    everything = "".join(texts)
    assert "".join(reservoir(texts, 10_000_000, 0)) == everything
    for seed in (0, 1):
        kept = list(reservoir(texts, 200_000, seed))
        assert 200_000 - SAMPLE_CHARACTERS < sum(map(len, kept)) <= 200_000
        numbers = [int(piece.split()[0]) for piece in kept]
        assert numbers == sorted(numbers)
        assert kept == list(reservoir(iter(texts), 200_000, seed))
    assert kept != list(reservoir(texts, 200_000, 0))
    assert max(map(len, reservoir(["x" * 100_000], 10_000_000, 0))) <= SAMPLE_CHARACTERS


def test_the_reservoir_is_uniform():
    seen = np.zeros(100)
    for seed in range(300):
        for piece in reservoir([f"{i:02d}" for i in range(100)], 50, seed):
            seen[int(piece)] += 1
    assert seen.sum() == 300 * 25
    assert (seen > 75 - 6 * np.sqrt(75)).all()
    assert (seen < 75 + 6 * np.sqrt(75)).all()


# Unigram


def ways(part: str, p: dict[str, float]) -> list[tuple[list[str], float]]:
    """Return every segmentation of a part and its probability."""
    if not part:
        return [([], 1.0)]
    return [
        ([part[:n], *rest], p[part[:n]] * q)
        for n in range(1, len(part) + 1)
        if part[:n] in p
        for rest, q in ways(part[n:], p)
    ]


@pytest.fixture(scope="module")
def small():
    found = {"▁lowest": 3, "▁low": 5, "lower": 2, "▁newest": 4, "banana": 6, "▁": 1, "wo": 2}
    table = unigram.PartTable.of(found)
    pieces, weight = unigram.seeds(table)
    base = np.array(table.base)
    spelled = [
        "".join(chr(table.text[base[o + j] + r]) for j in range(n))
        for o, r, n in zip(pieces.offset, pieces.row, pieces.length, strict=True)
    ]
    return found, table, pieces, weight, spelled


def test_seeds_are_the_repeated_substrings(small):
    found, _, _, weight, spelled = small
    count: collections.Counter[str] = collections.Counter()
    for part, often in found.items():
        for a, b in itertools.combinations(range(len(part) + 1), 2):
            count[part[a:b]] += often
    expected = {s: n * len(s) for s, n in count.items() if len(s) == 1 or n >= 2}
    assert dict(zip(spelled, weight, strict=True)) == expected


def test_expected_counts_are_those_of_all_segmentations(small):
    found, table, pieces, weight, spelled = small
    p = weight / weight.sum()
    q = dict(zip(spelled, p, strict=True))
    expected = dict.fromkeys(spelled, 0.0)
    for part, often in found.items():
        cut = ways(part, q)
        whole = sum(w for _, w in cut)
        for segmentation, w in cut:
            for piece in segmentation:
                expected[piece] += often * w / whole
    np.testing.assert_allclose(unigram.expect(table, pieces, p), [expected[s] for s in spelled], rtol=1e-10)


def test_alternatives_are_the_best_other_segmentations(small):
    _, table, pieces, weight, spelled = small
    p = weight / weight.sum()
    q = dict(zip(spelled, p, strict=True))
    found = unigram.alternatives(table, pieces, np.log(p))
    for piece, others in zip(spelled, found, strict=True):
        named = [spelled[i] for i in others if i < len(spelled)][::-1]
        rest = [w for w in ways(piece, q) if w[0] != [piece]]
        if not rest:
            assert named == []
        else:
            best = max(w for _, w in rest)
            assert "".join(named) == piece
            assert np.isclose(np.prod([q[s] for s in named]), best)


def test_digamma_is_the_derivative_of_log_gamma():
    from math import lgamma

    x = np.array([0.5, 0.9, 3.3, 17.0, 1e6])
    h = 1e-5 * x
    slope = [(lgamma(a + b) - lgamma(a - b)) / (2 * b) for a, b in zip(x, h, strict=True)]
    np.testing.assert_allclose(unigram.digamma(x), slope, rtol=1e-6)


def test_pieces_have_letters_of_one_script_digits_or_signs(trained):
    model = trained["unigram"]
    for i in model.vocab.ordinary[model.vocab.ordinary >= model.id(BYTES[-1]) + 1]:
        kinds = {unigram.kind_of(c) for c in model.token(i).removeprefix("▁")}
        assert len(kinds) <= 1, model.token(i)
        assert "▁" not in model.token(i)[1:]
    assert any(unicodedata.category(model.token(i)[-1]) == "Nd" for i in model.vocab.ordinary)


@pytest.mark.slow
@pytest.mark.oracle
def test_held_out_text_is_as_likely_as_under_sentencepiece(tmp_path):
    import sentencepiece

    lines = [" ".join(line.split()) for text in TOPICS for line in text.split("\n\n")]
    random.Random(0).shuffle(lines)
    held, seen = lines[:200], lines[200:]
    (tmp_path / "text").write_text("\n".join(seen), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=2003, character_coverage=1.0,
        minloglevel=2, num_threads=1, max_sentence_length=100_000,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    words = count_words(blank("unigram", "<unk>"), seen)
    ours = dict(unigram.learn(words, 2000))
    assert len(ours) == 2000
    assert abs(sum(map(np.exp, ours.values())) - 1) < 0.1
    engine = Engine(models.Unigram([("<unk>", 0.0), *ours.items()], unk_id=0))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    likely = sum(ours.get(piece, -20.0) for text in held for piece in engine.encode(text).tokens)
    reference = sum(theirs.get_score(i) if i else -20.0 for text in held for i in theirs.encode(text))
    assert likely > reference, (likely, reference)  # 3% fewer nats when this was written
    assert len(ours.keys() & {theirs.id_to_piece(i) for i in range(2003)}) > 1200
