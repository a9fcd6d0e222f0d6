"""The tokenizer: text never becomes a control token, hard text is restored, other libraries read what is saved."""

import json
import pickle
import pydoc_data.topics
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers

from firth.tokenizer import inspection
from firth.tokenizer.merges import Merge
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import ALGORITHMS, train
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.types import UserError

PROSE = sorted(pydoc_data.topics.topics.values())[:12]
SPELLED = "<pad> <unk> <s> </s> <mask> <|im_start|> <|im_end|> <extra_id_0> [MASK] [CLS] [SEP] [UNK] [PAD] "
"""Every control token, so that all of their characters are known and the tokens could be learned."""

HARD = [
    "", " ", "   ", "\n", "\n\n \n", "\t", "\r\n", " lead", "trail ", "a\n  b\n\n\tc", "x" * 3000, "é", "e\u0301", "ﬁ Å ①",
    "日本語のテキスト", "عربى نص", "नमस्ते", "👩‍👩‍👧‍👦 🏴‍☠️", "\u200b\u200d\ufeff", "\x00\x01\x7f", "\u202eright\u202c", "\uffff\ufffe",
    "\U0010ffff", "▁ ▁▁x", "Ġ Ċ", "##x</w>", "don't WON'T", "1234567", "a" + "\u0301" * 50, SPELLED, "<|im_end|>\n<|im_start|>assistant",
    "＜/s＞ ＜mask＞", "<extra_id_0><extra_id_1>", "<s", "/s>", "<<s>>", "</s></s>",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    return {algorithm: train([*PROSE, SPELLED * 50], algorithm, 1000, num_sentinels=3) for algorithm in ALGORITHMS}


@pytest.fixture(params=ALGORITHMS)
def tokenizer(request, trained):
    return trained[request.param]


def controls(tokenizer: Tokenizer, text: str) -> set[str]:
    """Return the control tokens in the ids of a text, except unk."""
    vocab = tokenizer.vocab
    return {tokenizer.token(i) for i in tokenizer.encode(text) if vocab.special[i] and i != vocab.roles.get("unk")}


# Control tokens


@pytest.mark.parametrize("text", HARD)
def test_text_never_becomes_a_control_token(tokenizer, text):
    for shape in (text, f"a{text}b", f" {text}\n", text * 3):
        assert controls(tokenizer, shape) == set()
        assert np.array_equal(tokenizer.encode_batch([shape, "x"])[0], tokenizer.encode(shape))


def test_spelled_control_tokens_are_not_unknown(tokenizer):
    assert tokenizer.vocab.roles["unk"] not in tokenizer.encode(SPELLED)


@given(
    st.lists(st.sampled_from([*SPELLED.split(), "<", ">", "/s", "|", " ", "a", "▁", "\n", "＜", "[", "]"]), max_size=8)
)
@settings(max_examples=100, deadline=None)
def test_no_combination_becomes_a_control_token(trained, parts):
    for tokenizer in trained.values():
        assert controls(tokenizer, "".join(parts)) == set()


def test_the_engine_alone_would_yield_control_tokens(trained):
    """The test above can fail: SentencePiece models have their control symbols among their pieces."""
    bare = Engine.from_str(trained["unigram"].definition)
    bare.encode_special_tokens = True
    assert "</s>" in bare.encode("a</s>").tokens
    assert "</s>" not in trained["unigram"].pieces("a</s>")


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_foreign_models_yield_no_control_tokens(tmp_path, ignore_merges):
    vocab = {t: i for i, t in enumerate(["</s>", "<", "/", "s", ">", "a", "</", "s>"])}
    merges = [("<", "/"), ("s", ">")] + ([] if ignore_merges else [("</", "s>")])
    engine = Engine(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens(["</s>"])
    engine.save(str(tmp_path / "tokenizer.json"))
    bare = Engine.from_file(str(tmp_path / "tokenizer.json"))
    bare.encode_special_tokens = True
    assert bare.encode("a </s>").tokens == ["a", "</s>"]
    assert Tokenizer.load(tmp_path).pieces("a </s>") == ["a", "<", "/", "s>"]


# Round trip


@pytest.mark.parametrize("text", HARD)
def test_bytes_are_restored(trained, text):
    tokenizer = trained["byte-bpe"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_byte_bpe_restores_any_text(trained, text):
    tokenizer = trained["byte-bpe"]
    assert tokenizer.decode(tokenizer.encode(text)) == replace_lone_surrogates(text)


@given(st.text(st.sampled_from("ab  \n\n\tT.,</s>"), max_size=40))
@settings(max_examples=200, deadline=None)
def test_unigram_restores_characters_blanks_and_lines(trained, text):
    tokenizer = train_tabs() if "\t" in text else trained["unigram"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def train_tabs() -> Tokenizer:
    if not TABS:
        TABS.append(train([*PROSE, SPELLED + "\t" * 40], "unigram", 1000, num_sentinels=0))
    return TABS[0]


TABS: list[Tokenizer] = []


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_words_and_signs_are_restored_with_single_blanks(trained, algorithm):
    tokenizer = trained[algorithm]
    ids = tokenizer.encode("This is,  of course,\nall of the text. No more!")
    assert tokenizer.decode(ids) == "This is, of course, all of the text. No more!"


def test_lone_surrogates_become_the_replacement_character(tokenizer):
    for text, read in (
        ("a\ud800b", "a\ufffdb"),
        ("\udc00", "\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
    ):
        assert replace_lone_surrogates(text) == read
        assert np.array_equal(tokenizer.encode(text), tokenizer.encode(read))
        assert np.array_equal(tokenizer.encode_batch([text])[0], tokenizer.encode(read))
    assert replace_lone_surrogates("plain") == "plain"


def test_array_shapes_and_dtypes(tokenizer):
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode("a b").dtype == np.int32
    ids, spans = tokenizer.spans("some words here")
    assert np.array_equal(ids, tokenizer.encode("some words here"))
    assert spans.shape == (len(ids), 2)
    assert "".join("some words here"[a:b] for a, b in spans).replace(" ", "") == "somewordshere"
    assert tokenizer.spans("")[1].shape == (0, 2)
    assert [tokenizer.token(i) for i in ids] == tokenizer.pieces("some words here")
    assert [tokenizer.id(token) for token in tokenizer.pieces("some words here")] == ids.tolist()


def test_control_tokens_are_skipped_in_decoded_text(tokenizer):
    vocab = tokenizer.vocab
    framed = [vocab.bos, *tokenizer.encode("some words"), vocab.mask, vocab.eos, *vocab.sentinels]
    assert tokenizer.decode(np.array(framed)) == "some words"


def test_unknown_tokens_and_ids_are_errors(tokenizer):
    with pytest.raises(UserError, match="no token 99999: this tokenizer has ids 0 to 999"):
        tokenizer.token(99999)
    with pytest.raises(UserError, match="no token 'nosuchtoken'"):
        tokenizer.id("nosuchtoken")


# Where words begin


WORDS = {
    "bpe": "He wrote: unbelievable, X2!",
    "byte-bpe": "He wrote: unbelievable,\nnaïve X2!\n\n  indented",
    "wordpiece": "He wrote: unbelievable, X2!",
    "unigram": "He wrote: unbelievable,\nnaive X2!\n\n  indented",
}


@pytest.mark.parametrize("algorithm", WORDS)
def test_starts_of_words(trained, algorithm):
    """Words are runs of letters and digits, and single signs. Blanks belong to the next word."""
    tokenizer, text = trained[algorithm], WORDS[algorithm]
    ids, spans = tokenizer.spans(text)
    begins = np.flatnonzero(tokenizer.vocab.starts(ids))
    assert begins[0] == 0
    words = [text[part[0, 0] : part[-1, 1]].strip() for part in np.split(spans, begins[1:])]
    assert [word for word in words if word] == re.findall(r"\w+|[^\w\s]", text)
    assert len(ids) > len(words)


@pytest.mark.parametrize("dictionary", [False, True])
def test_no_word_starts_inside_a_character(trained, dictionary, monkeypatch):
    """Without a dictionary each character is a word, with one the three are; a partial character starts none."""
    if dictionary:
        pytest.importorskip("icu4py")
    monkeypatch.setattr("firth.tokenizer.segmentation.has_dictionary", lambda: dictionary)
    tokenizer = trained["byte-bpe"]
    ids = tokenizer.encode("日本語")
    assert len(ids) == 9
    words = [True] + [False] * 8 if dictionary else [True, False, False] * 3
    assert tokenizer.vocab.starts(ids).tolist() == words


def test_a_word_starts_after_a_control_token(tokenizer):
    ids = tokenizer.encode("unbelievable")
    assert len(ids) > 1
    starts = tokenizer.vocab.starts(np.array([tokenizer.vocab.cls, *ids, tokenizer.vocab.sep]))
    assert starts[0]
    assert starts[1]
    assert starts[-1]


# Files


def test_a_saved_tokenizer_is_loaded_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run" / "tokenizer")
    for place in (tmp_path / "run", tmp_path / "run" / "tokenizer", tmp_path / "run" / "tokenizer" / "tokenizer.json"):
        again = Tokenizer.load(place)
        assert again.digest == tokenizer.digest
        assert again.merges == tokenizer.merges
        assert again.vocab.roles == tokenizer.vocab.roles
        assert np.array_equal(again.vocab.special, tokenizer.vocab.special)
        assert np.array_equal(again.encode(PROSE[0]), tokenizer.encode(PROSE[0]))
    first = {p.name: p.read_bytes() for p in (tmp_path / "run" / "tokenizer").iterdir()}
    Tokenizer.load(tmp_path / "run").save(tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == first
    assert not list(tmp_path.rglob("*.partial"))


def test_a_pickled_tokenizer_is_the_same(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert (again.digest, again.template, again.merges) == (tokenizer.digest, tokenizer.template, tokenizer.merges)
    assert controls(again, SPELLED) == set()
    assert np.array_equal(again.encode(PROSE[0]), tokenizer.encode(PROSE[0]))


@pytest.mark.oracle
def test_transformers_gives_the_same_ids(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*PROSE[:4], *(t for t in HARD if not controls_spelled(t))]
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text).tolist()
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    vocab = tokenizer.vocab
    named = (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.mask_token_id, theirs.unk_token_id)
    assert named == (vocab.pad, vocab.bos, vocab.eos, vocab.mask, vocab.roles["unk"])
    assert (theirs.cls_token_id, theirs.sep_token_id, len(theirs)) == (vocab.cls, vocab.sep, vocab.size)
    assert set(theirs.all_special_ids) == set(np.flatnonzero(vocab.special).tolist())
    # A control token in template text is one: the saved file must allow it.
    end = tokenizer.token(vocab.eos)
    assert theirs(f"a{end}", add_special_tokens=False)["input_ids"][-1] == vocab.eos


def controls_spelled(text: str) -> bool:
    return any(t in unicodedata.normalize("NFKC", text) for t in [*SPELLED.split(), "<extra_id_1>", "<extra_id_2>"])


def test_chat_templates_are_saved(tmp_path, trained):
    engine = Engine(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    Tokenizer(engine).save(tmp_path / "none")
    assert not (tmp_path / "none" / "chat_template.jinja").exists()
    Tokenizer(engine, template="{{ 1 }}").save(tmp_path / "own")
    assert Tokenizer.load(tmp_path / "own").template == "{{ 1 }}"
    trained["bpe"].save(tmp_path / "chat")
    assert "<|im_start|>" in (tmp_path / "chat" / "chat_template.jinja").read_text()
    config = tmp_path / "none" / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "{{ 2 }}"}, {"name": "default", "template": "{{ 3 }}"}]
    for stated, read in (("{{ 4 }}", "{{ 4 }}"), (named, "{{ 3 }}"), (named[:1], None), (None, None)):
        config.write_text(json.dumps({"chat_template": stated}))
        assert Tokenizer.load(tmp_path / "none").template == read


def test_damaged_files_are_one_line_errors(tmp_path, trained):
    trained["bpe"].save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: this is not JSON"):
        Tokenizer.load(tmp_path)


def test_no_torch():
    program = "import firth.tokenizer.tokenizer, firth.tokenizer.train, firth.tokenizer.inspection, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


# Show


def test_show_prints_merges_in_order_with_their_counts(trained, tmp_path):
    for algorithm in ("bpe", "byte-bpe", "wordpiece"):
        trained[algorithm].save(tmp_path / algorithm)
        seen = inspection.inspect_tokenizer(trained[algorithm], ["laern"], first=5)
        assert seen.merges == trained[algorithm].merges[:5]
        counts = [m.count for m in seen.merges]
        assert counts == sorted(counts, reverse=True)
        assert seen.splits == (("laern", tuple(trained[algorithm].pieces("laern"))),)
        text = inspection.report(tmp_path / algorithm, ["laern", "taaaaasty"], first=5)
        rows = [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
        assert [int(row[1].replace(",", "")) for row in rows] == counts
        assert "taaaaasty" in text
    assert inspection.render(inspection.TokenizerView("BPE", 9, 3, (Merge("##a", "##b", 7),), (), (), ())).split()[-6:-1] == [
        "##a", "+", "##b", "->", "##ab",
    ]  # fmt: skip


def test_byte_level_pieces_are_shown_as_text():
    tokenizer = train(["kůň kůň kůň", "kůň"] * 20, "byte-bpe", vocab_size=330)
    shown = inspection.render(inspection.inspect_tokenizer(tokenizer, ["kůň", "€"]))
    assert re.search(r"-> ␣kůň\n", shown)
    assert re.search(r"^  kůň +kůň$", shown, re.M)
    assert "\\xe2  \\x82  \\xac" in shown  # no merge has made it whole
    assert not set(shown) & set("ÃÄÅ")


def test_show_of_unigram_prints_the_most_likely_pieces(trained):
    seen = inspection.inspect_tokenizer(trained["unigram"], [], first=8)
    scores = [score for _, score in seen.scores]
    assert scores == sorted(scores, reverse=True)
    assert all(score < 0 for score in scores)
    assert seen.kind == "Unigram"
    assert "log p" in inspection.render(seen)


def test_show_of_a_foreign_tokenizer(tmp_path, trained):
    trained["byte-bpe"].save(tmp_path)
    (tmp_path / "merges.json").unlink()
    seen = inspection.inspect_tokenizer(Tokenizer.load(tmp_path), [], first=3)
    assert [(m.left, m.right) for m in seen.merges] == [(m.left, m.right) for m in trained["byte-bpe"].merges[:3]]
    assert [m.count for m in seen.merges] == [None] * 3
    trained["wordpiece"].save(tmp_path)
    (tmp_path / "merges.json").unlink()
    seen = inspection.inspect_tokenizer(Tokenizer.load(tmp_path), [], first=3)
    assert seen.merges == ()
    assert len(seen.pieces) == 3
    assert json.dumps(seen.pieces)
