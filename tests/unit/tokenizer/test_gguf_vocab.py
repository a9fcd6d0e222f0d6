"""Tokenizers in GGUF files: llama.cpp's golden ids, round trips, and what is rejected."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers

from firth.io import gguf as container
from firth.tokenizer import chat, gguf_write
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError
from tests.support.packages import LLAMA, large

GOLDEN = (
    "gpt-2",
    "bert-bge",
    "llama-spm",
    "llama-bpe",
    "phi-3",
    "deepseek-coder",
    "falcon",
    "qwen2",
    "qwen35",
    "starcoder",
)
SAME = ("command-r", "mpt", "refact")
"""Cut as one of GOLDEN is; the first of them takes four seconds."""
NAMES = (*GOLDEN, *SAME) if os.environ.get("CI") else GOLDEN
SIGN = "\n__ggml_vocab_test__\n"
HARD = [
    "",
    " ",
    "  two  blanks ",
    "\t\n\n",
    "I'm IT'S 123,456.7",
    "<s></s><pad>",
    "Füße 你好 🙂 e\u0301",
    "\u00a0x\u200b",
    "a" * 40,
]
TEXT = [
    "To be, or not to be: that is the question. 1234 times! " * 20,
    "I'm, you're; they'd\n\n  go on…  äöü 你好 " * 20,
]


@pytest.fixture(scope="session")
def goldens(unpack) -> Path:
    return unpack(large(LLAMA), *(f"*/llama.cpp/models/ggml-vocab-{name}.gguf*" for name in NAMES))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_golden_ids_are_equal(goldens, name):
    tokenizer = Tokenizer.load(goldens / f"ggml-vocab-{name}.gguf")
    texts = (goldens / f"ggml-vocab-{name}.gguf.inp").read_text("utf-8").split(SIGN)
    lines = (goldens / f"ggml-vocab-{name}.gguf.out").read_text("utf-8").split("\n")
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text).tolist() == [int(id) for id in line.split()], text


def round_trip(tokenizer, tmp_path, size=0, dialogue=False):
    """Write a tokenizer to a file; return the tokenizer and the metadata that are read back."""
    file = tmp_path / "vocabulary.gguf"
    metadata = {
        "general.architecture": "llama",
        **gguf_write.metadata(tokenizer, size or tokenizer.vocab.size, dialogue),
    }
    container.write(file, metadata, [])
    return Tokenizer.load(file), metadata


def byte_bpe():
    return train(TEXT, "byte-bpe", 500)


def smollm():
    """Byte-level BPE with single digits, like SmolLM's tokenizer.json."""
    tokenizer = train(TEXT, "byte-bpe", 500)
    engine = Engine.from_str(tokenizer.definition)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return Tokenizer(engine)


def sentencepiece():
    """SentencePiece BPE with bytes, as transformers writes Llama's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"theoran", "▁t", "he", "▁the", "or"]
    made = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("o", "r")]
    engine = Engine(
        models.BPE({p: i for i, p in enumerate(pieces)}, made, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(engine)


@pytest.mark.parametrize(("make", "pre"), [(byte_bpe, "gpt-2"), (smollm, "smollm"), (sentencepiece, "default")])
def test_a_tokenizer_survives_a_round_trip(make, pre, tmp_path):
    tokenizer = make()
    back, metadata = round_trip(tokenizer, tmp_path)
    assert metadata["tokenizer.ggml.pre"] == pre
    for text in HARD + TEXT:
        assert back.encode(text).tolist() == tokenizer.encode(text).tolist(), text
        assert back.decode(back.encode(text)) == tokenizer.decode(tokenizer.encode(text)), text
    assert np.array_equal(back.vocab.special, tokenizer.vocab.special)
    assert back.vocab.roles == tokenizer.vocab.roles and back.bos is True
    again, second = round_trip(back, tmp_path)
    assert {k: v for k, v in second.items() if type(v) is not np.ndarray} == {
        k: v for k, v in metadata.items() if type(v) is not np.ndarray
    }
    assert again.definition == back.definition


def test_wordpiece_survives_a_round_trip(tmp_path):
    words = tmp_path / "vocab.txt"
    words.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "to", "be", "##ing", "[", "]", "##s", "1"])
    )
    tokenizer = Tokenizer.load(words)
    back, metadata = round_trip(tokenizer, tmp_path)
    assert metadata["tokenizer.ggml.tokens"][4:9] == ["[MASK]", "▁to", "▁be", "ing", "▁["]
    for text in ["To be, being", "[tos] 1", "[MASK] [", "ing"]:
        assert back.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert back.vocab.roles == tokenizer.vocab.roles


def test_ids_without_a_token_are_named_and_not_used(tmp_path):
    back, metadata = round_trip(byte_bpe(), tmp_path, size=512)
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD511]" and metadata["tokenizer.ggml.token_type"][-1] == 5
    assert back.encode("[PAD511]").tolist() == byte_bpe().encode("[PAD511]").tolist()


def test_a_dialogue_gets_the_same_tokens(tmp_path):
    tokenizer = byte_bpe()
    base, metadata = round_trip(tokenizer, tmp_path)
    assert base.template is None and "tokenizer.chat_template" not in metadata
    back, metadata = round_trip(tokenizer, tmp_path, dialogue=True)
    assert (
        "generation %" not in metadata["tokenizer.chat_template"] and metadata["tokenizer.ggml.add_bos_token"] is False
    )
    assert metadata["tokenizer.ggml.eot_token_id"] == tokenizer.id("<|im_end|>")
    messages = [{"role": "user", "content": "to <|im_end|> be"}, {"role": "assistant", "content": "or not"}]
    for mine, theirs in zip(chat.encode(tokenizer, messages), chat.encode(back, messages), strict=True):
        assert mine.tolist() == theirs.tolist()
    assert chat.stops(back) == chat.stops(tokenizer) and back.bos is False


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "wordpiece"])
def test_an_unsupported_tokenizer_is_rejected(algorithm):
    tokenizer = train(TEXT, algorithm, 400)
    with pytest.raises(UserError, match="train the model with one of `firth tokenizer train --algorithm byte-bpe`"):
        gguf_write.metadata(tokenizer, tokenizer.vocab.size, dialogue=False)


def test_merges_without_scores_are_rejected():
    definition = json.loads(sentencepiece().definition)
    definition["model"]["merges"] = definition["model"]["merges"][:-1]  # "or" is a piece, but no merge makes it
    with pytest.raises(UserError, match="no tokenizer that splits"):
        gguf_write._kind(definition)


def test_usual_names_of_pieces_are_not_roles(tmp_path):
    tokens = ["<s>", "a", "b", "ab", "<|endoftext|>"]
    metadata = {
        "general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": np.array([1, 1, 1, 1, 3], "<i4"),
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 4,
    }  # fmt: skip
    container.write(tmp_path / "a.gguf", metadata, [])
    tokenizer = Tokenizer.load(tmp_path / "a.gguf")
    assert tokenizer.encode("ab").tolist() == [3]
    assert not tokenizer.vocab.special[0] and tokenizer.vocab.roles["eos"] == 4 and tokenizer.bos is False


BASE = {
    "general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"tokenizer.ggml.tokens": 7}, "no list of texts 'tokenizer.ggml.tokens'"),
        ({"tokenizer.ggml.tokens": ["a" * 5000]}, "longer than 1000"),
        ({"tokenizer.ggml.merges": ["c d"]}, "cannot be built"),
        ({"tokenizer.ggml.merges": 1.5}, "no list of texts 'tokenizer.ggml.merges'"),
        ({"tokenizer.ggml.token_type": np.array([1, 1], "<i4")}, "not an array of 3 numbers"),
        ({"tokenizer.ggml.token_type": "111"}, "not an array of 3 numbers"),
        ({"tokenizer.ggml.model": "gemma4"}, "of the kind 'gemma4'; firth reads gpt2, llama, t5, bert"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm', which firth does not know"),
        ({"tokenizer.ggml.pre": 3}, "no text 'tokenizer.ggml.pre'"),
        ({"tokenizer.chat_template": 3}, "no text 'tokenizer.chat_template'"),
        ({"tokenizer.ggml.model": "bert"}, "\\[UNK\\]"),
        ({"tokenizer.ggml.model": "t5", "tokenizer.ggml.token_type": np.array([2, 1, 5], "<i4")}, "unused pieces"),
    ],
)  # fmt: skip
def test_broken_metadata_are_rejected_in_one_line(changed, why, tmp_path):
    container.write(tmp_path / "a.gguf", BASE | changed, [])
    with pytest.raises(UserError, match=why) as error:
        Tokenizer.load(tmp_path / "a.gguf")
    assert "\n" not in str(error.value)


def test_a_file_must_name_its_pre_tokenizer(tmp_path):
    container.write(tmp_path / "a.gguf", {k: v for k, v in BASE.items() if k != "tokenizer.ggml.pre"}, [])
    with pytest.raises(UserError, match="does not name its pre-tokenizer"):
        Tokenizer.load(tmp_path / "a.gguf")


def test_a_missing_tokenizer_is_an_error(tmp_path):
    container.write(tmp_path / "a.gguf", {"general.architecture": "llama"}, [])
    with pytest.raises(UserError, match=r"no list of texts 'tokenizer\.ggml\.tokens'"):
        Tokenizer.load(tmp_path)
