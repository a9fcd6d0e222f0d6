"""Damaged and malicious directories: each gives a one-sentence error in bounded memory and time and runs no code."""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from firth.io.safetensors import Storage, header, read_tensors
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.peft import adapter_files, lora
from firth.pretrained.load_save import init_from, load_model, save_model
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from tests.support.errors import refused
from tests.support.tiny_corpus import tokenizer

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]


def gpt2() -> LM:
    config = ModelConfig(vocab_size=tokenizer().vocab.size, hidden_size=16, num_layers=1, num_heads=2, max_positions=32)
    return LM(config, {"lm": LMHead(config)}).eval()


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A directory of a GPT-2, as transformers would write it."""
    save_model(gpt2(), tokenizer(), tmp_path)
    (tmp_path / "firth.json").unlink()
    load_model(tmp_path)
    return tmp_path


def unsealed(file: Path) -> dict[str, Any]:
    """Return a firth.json without content hashes, as an attacker would write it."""
    return {name: value for name, value in json.loads(file.read_text()).items() if name not in ("files", "digest")}


def written(file: Path, head: Any, data: bytes = b"", long: int | None = None) -> None:
    """Write a safetensors file with a header (bytes, or an object for JSON) and data."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(text) if long is None else long) + text + data)


def tensor(first: int, last: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


CUT = "cut off, or its header claims"
HEADERS = {
    "a header of 2^60 bytes": (b"{}", b"", 1 << 60, CUT),
    "a header of 2^64 - 1 bytes": (b"{}", b"", (1 << 64) - 1, CUT),
    "no JSON": (b"\x80 not json", b"", None, "not JSON"),
    "deep JSON": (b'{"a":' * 100_000, b"", None, "not JSON"),
    "deep lists": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", None, "not JSON"),
    "a list": ([1, 2], b"", None, "invalid shape or invalid offsets"),
    "NaN": (b'{"a": NaN}', b"", None, "not JSON"),
    "names twice": (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], '
                    b'"data_offsets": [0, 4]}}', bytes(4), None, "occurs twice"),
    "overlap": ({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12), None, "overlap"),
    "a gap": ({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12), None, "gap"),
    "the same place twice": ({"a": tensor(0, 4, [1]), "b": tensor(0, 4, [1])}, bytes(4), None, "overlap"),
    "past the end": ({"a": tensor(0, 400, [100])}, bytes(4), None, "take 400 bytes, and there are 4"),
    "bytes left over": ({"a": tensor(0, 4, [1])}, bytes(9), None, "take 4 bytes, and there are 9"),
    "a shape that its bytes do not fit": ({"a": tensor(0, 8, [3])}, bytes(8), None, r"shape \(3,\) and 8 bytes, not 12"),
    "a huge shape": ({"a": tensor(0, 8, [1 << 40, 1 << 40])}, bytes(8), None, "more numbers than any file"),
    "a negative shape": ({"a": tensor(0, 4, [-1, -1])}, bytes(4), None, "invalid shape or invalid offsets"),
    "a shape of words": ({"a": tensor(0, 4, ["1"])}, bytes(4), None, "invalid shape or invalid offsets"),
    "a shape of fractions": ({"a": tensor(0, 4, [1.0])}, bytes(4), None, "invalid shape or invalid offsets"),
    "a thousand dimensions": ({"a": tensor(0, 4, [1] * 1000)}, bytes(4), None, "invalid shape or invalid offsets"),
    "backwards": ({"a": tensor(4, 0, [1])}, bytes(4), None, "invalid shape or invalid offsets"),
    "an unknown type": ({"a": tensor(0, 4, [1], "F31")}, bytes(4), None, "unknown type 'F31'"),
    "no type": ({"a": tensor(0, 4, [1], None)}, bytes(4), None, "unknown type None"),
    "no object": ({"a": 3}, bytes(4), None, "invalid shape or invalid offsets"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_invalid_safetensors_headers(name: str, given: Path) -> None:
    head, data, long, says = HEADERS[name]
    written(given / "model.safetensors", head, data, long)
    refused(lambda: load_model(given), says)


def test_a_truncated_file(given: Path) -> None:
    file = given / "model.safetensors"
    whole = file.read_bytes()
    for at in (0, 3, 8, 9, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:at])
        refused(lambda: load_model(given), "cannot be read as safetensors")
    file.write_bytes(whole)
    assert set(header(file)) == set(read_tensors(given))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_unsupported_dtypes(dtype: torch.dtype, given: Path) -> None:
    state = load_file(given / "model.safetensors")
    state["transformer.wte.weight"] = state["transformer.wte.weight"].to(dtype)
    save_file(state, given / "model.safetensors")
    refused(lambda: load_model(given), "(tokens|wte).weight' is .*firth reads weights of fp32, fp16, bf16 and fp64")


def test_double_precision_is_read(given: Path) -> None:
    want = load_model(given).state_dict()
    state = {name: t.double() for name, t in load_file(given / "model.safetensors").items()}
    save_file(state, given / "model.safetensors")
    assert all(torch.equal(t, want[name]) for name, t in load_model(given).state_dict().items())


def test_tensors_of_other_sizes_are_named(given: Path) -> None:
    whole = load_file(given / "model.safetensors")
    for name, wrong in (("transformer.wte.weight", torch.zeros(601, 16)), ("transformer.h.0.attn.c_attn.weight", torch.zeros(4, 5, 6)),
                        ("transformer.h.0.attn.c_attn.bias", torch.zeros(())), ("transformer.wpe.weight", torch.zeros(5, 5))):  # fmt: skip
        save_file(whole | {name: wrong}, given / "model.safetensors")
        refused(lambda: load_model(given), r"tensor '.*' is \(")
    save_file({k: v for k, v in whole.items() if "ln_f" not in k}, given / "model.safetensors")
    refused(lambda: load_model(given), "lacks tensor 'transformer.ln_f")
    save_file(whole | {"transformer.h.7.ln_1.weight": torch.zeros(16)}, given / "model.safetensors")
    refused(lambda: load_model(given), "h.7.ln_1.weight', which is no tensor of a")


@pytest.fixture
def sharded(given: Path) -> Path:
    save_model(load_model(given), tokenizer(), given, storage=Storage(shard=8000))
    (given / "firth.json").unlink()
    load_model(given)
    return given


def mapped(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "/x.safetensors", "a/b.safetensors", "..", "", 3, None, ["a"], "a.bin"]
)
def test_an_index_with_other_paths(name: Any, sharded: Path) -> None:
    mapped(sharded, lambda files: files.update({"transformer.wte.weight": name}))
    refused(lambda: load_model(sharded), "not a safetensors file in the same directory")


def test_an_index_that_disagrees_with_its_files(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    whole = file.read_text()
    mapped(sharded, lambda files: files.pop("transformer.ln_f.weight"))
    refused(
        lambda: load_model(sharded),
        r"model-0000\d-of-0000\d.safetensors has the tensor 'transformer.ln_f.weight', and .*index",
    )
    file.write_text(whole)
    mapped(sharded, lambda files: files.update({"more": files["transformer.wte.weight"]}))
    refused(lambda: load_model(sharded), "index.json has the tensor 'more', and model-")
    file.write_text(whole)
    for text, says in (
        ("{}", "no weight_map"),
        ('{"weight_map": 3}', "no weight_map"),
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
    ):
        file.write_text(text)
        refused(lambda: load_model(sharded), says)
    file.write_text(whole)
    last = sorted(sharded.glob("model-*"))[-1]
    last.rename(sharded / "elsewhere")
    refused(lambda: load_model(sharded), f"names {last.name}, which is not there")


CONFIGS = {
    "a width of 10^6": ({"n_embd": 10**6}, "do not belong together"),
    "a depth of 10^4": ({"n_layer": 10**4}, "do not belong together"),
    "a vocabulary of 10^9": ({"vocab_size": 10**9}, "do not belong together"),
    "a context of 10^9": ({"n_positions": 10**9}, "do not belong together"),
    "an inner width of 10^6": ({"n_inner": 10**6}, "do not belong together"),
    "a width of 10^9": ({"n_embd": 10**9}, "model.hidden_size=1000000000 should be less than or equal to 1048576"),
    "a depth of 10^7": ({"n_layer": 10**7}, "model.num_layers=10000000 should be less than or equal to 10000"),
    "numbers of a thousand digits": ({"n_embd": 10**1000}, "1001 characters"),
    "no layers": ({"n_layer": -1}, "should be greater than or equal to 0"),
    "no heads": ({"n_head": 0}, "should be greater than or equal to 1"),
    "words for numbers": ({"n_embd": "16"}, "model.hidden_size='16' should be a valid integer"),
    "a fraction": ({"n_layer": 1.5}, "model.num_layers=1.5 should be a valid integer"),
    "yes for a number": ({"n_layer": True}, "model.num_layers=True should be a valid integer"),
    "nothing for a number": ({"n_embd": None}, "model.hidden_size=None should be a valid integer"),
    "a list for a name": ({"activation_function": ["gelu"]}, "describes no valid model"),
    "an object for a number": ({"n_positions": {}}, "model.max_positions={} should be a valid integer"),
    "words for a rate": ({"resid_pdrop": "0"}, "model.dropout='0' should be a valid number"),
    "a rate of 7": ({"resid_pdrop": 7.0}, "should be less than 1"),
    "no such family": ({"model_type": "rwkv"}, "model_type 'rwkv'; firth reads .*gpt2"),
    "a family that is no word": ({"model_type": ["gpt2"]}, "firth reads"),
    "no family": ({"model_type": None}, "firth reads"),
    "code": ({"auto_map": {"AutoModel": "modeling.Model"}}, "runs no code of a model directory"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantized .gptq."),
    "quantized, invalid": ({"quantization_config": "yes"}, "quantized"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_invalid_configs(name: str, given: Path) -> None:
    change, says = CONFIGS[name]
    file = given / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(lambda: load_model(given), says)


@pytest.mark.parametrize(
    ("text", "says"),
    [("[1]", "not a JSON object"), ("3", "not a JSON object"), ("{", "not JSON"), ("[" * 200_000, "not JSON"), ('{"a": NaN}', "NaN"),
     ('{"a": Infinity}', "Infinity"), ('{"a": ' + "9" * 10_000 + "}", "not JSON"), ('{"model_type": "gpt2"}', "lacks the field"),
     ("\ufeff{}", "not JSON"), ('{"a": "' + "x" * (33 << 20) + '"}', "not read")],
)  # fmt: skip
def test_config_files_that_are_no_config(text: str, says: str, given: Path) -> None:
    (given / "config.json").write_text(text)
    refused(lambda: load_model(given), says)


FACTS = {
    "a huge head": ({"heads": {"x": {"kind": "linear", "in": 10**9, "out": 10**9, "bias": True}}}, "lacks|unexpected"),
    "a head of words": ({"heads": {"x": {"kind": "linear", "in": "a", "out": 1, "bias": True}}}, "cannot be rebuilt"),
    "a head that is a number": ({"heads": {"x": 3}}, "cannot be rebuilt"),
    "an unknown head": ({"heads": {"x": {"kind": "eval", "of": "import os"}}}, "cannot be rebuilt"),
    "heads that are a list": ({"heads": []}, "describes no valid model"),
    "a deep chain": ('{"family": "gpt2", "config": {}, "heads": {"x": ' + '{"kind": "chain", "of": [' * 5000 + "]}" * 5000 + "}}",
                     "cannot be rebuilt|not JSON"),
    "a config of words": ({"config": {"vocab_size": "many", "hidden_size": 1, "num_layers": 1, "num_heads": 1}},
                          "model.vocab_size='many' should be a valid integer"),
    "a config that lacks a field": ({"config": {}}, "describes no valid model"),
    "no config": ({"config": None}, "describes no valid model"),
    "a field of another version": ({"config": {"color": 1}}, "another version"),
    "a deep submodel": ({"heads": {"x": {"kind": "guest", "heads": {}, "config": {"vocab_size": 9, "hidden_size": 8,
                      "num_layers": 10**8, "num_heads": 1}}}},
                     "cannot be rebuilt"),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_invalid_firth_json(name: str, tmp_path: Path) -> None:
    save_model(gpt2(), None, tmp_path)
    change, says = FACTS[name]
    file = tmp_path / "firth.json"
    file.write_text(change if type(change) is str else json.dumps(unsealed(file) | change))
    refused(lambda: load_model(tmp_path), says)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pth", "a.pkl"])
def test_pickles_are_never_opened(name: str, given: Path) -> None:
    (given / "model.safetensors").unlink()
    (given / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    refused(lambda: load_model(given), rf"pickled weights \({re.escape(name)}\), which can run code and are never read")
    (given / name).rename(given / "model.h5")
    refused(lambda: load_model(given), "holds model.h5 and no model.safetensors")


BOMB = """
import resource, sys
from pathlib import Path
from firth.pretrained.load_save import load_model
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError
for name in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    try:
        (Tokenizer.load(Path(name)).vocab if "tokenizer" in name else load_model(Path(name)))
        print("read")
    except UserError as error:
        print("refused", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Each case may allocate 400 MB more in its process and must use less than 100 MB."""
    names = []
    for name in ("a width of 10^9", "a depth of 10^7", "a vocabulary of 10^9", "a header", "a guest", "tokenizer"):
        directory = tmp_path / name
        save_model(gpt2(), tokenizer(), directory)
        file = directory / "config.json"
        if name in CONFIGS:
            (directory / "firth.json").unlink()
            file.write_text(json.dumps(json.loads(file.read_text()) | CONFIGS[name][0]))
        elif name == "a header":
            (directory / "firth.json").unlink()
            written(directory / "model.safetensors", b"{}", b"", 1 << 60)
        elif name == "a guest":
            content = unsealed(directory / "firth.json")
            content["heads"]["x"] = {"kind": "linear", "in": 10**6, "out": 10**6, "bias": True}
            (directory / "firth.json").write_text(json.dumps(content))
        else:
            content = json.loads((directory / "tokenizer.json").read_text())
            content["model"]["vocab"]["far"] = 4_000_000_000
            (directory / "tokenizer.json").write_text(json.dumps(content))
        names.append(str(directory))
    done = subprocess.run([sys.executable, "-c", BOMB, *names], capture_output=True, text=True, timeout=200)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["refused"] * len(names), done.stdout + done.stderr
    assert all(int(line[1]) < 100 for line in lines), lines


@pytest.mark.slow
def test_loading_needs_a_models_memory_once(tmp_path: Path) -> None:
    """Weights are mapped and copied one by one, never held twice. GPT-2's are transposed."""
    config = ModelConfig(vocab_size=64, hidden_size=1024, num_layers=4, num_heads=8, max_positions=16)
    model = LM(config, {"lm": LMHead(config)})
    size = sum(p.numel() for p in model.parameters()) * 4
    save_model(model, None, tmp_path)
    code = (
        "import sys\nfrom pathlib import Path\nfrom firth.pretrained.load_save import load_model\n"
        "def used(): return sum(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')) * 1024\n"
        "import torch, threading, time\nload_model(Path(sys.argv[2]))\nbefore = used(); most = [0]; go = [True]\n"
        "def watch():\n while go[0]:\n  most[0] = max(most[0], used()); time.sleep(0.001)\n"
        "t = threading.Thread(target=watch); t.start(); m = load_model(Path(sys.argv[1])); go[0] = False; t.join()\n"
        "print(max(most[0], used()) - before)"
    )
    save_model(gpt2(), None, tmp_path / "small")
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "small")], capture_output=True, text=True
    )
    assert 0.8 * size < int(run.stdout) < 1.3 * size, (run.stdout, size, run.stderr)


def bad_tokenizer(text: str) -> dict[str, str]:
    return {"tokenizer.json": text}


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(tokenizer().definition) | fields)


TOKENIZERS = {
    "cut off": (bad_tokenizer(tokenizer().definition[:1000]), "cannot read this tokenizer"),
    "empty": (bad_tokenizer(""), "cannot read this tokenizer"),
    "deep": (bad_tokenizer('{"model":' * 100_000), "cannot read this tokenizer"),
    "another thing": (bad_tokenizer('{"a": 1}'), "cannot read this tokenizer"),
    "no words": (bad_tokenizer(changed(model={"type": "WordLevel", "vocab": {}, "unk_token": "x"}, added_tokens=[])), "no id"),
    "merges of nothing": (bad_tokenizer(changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["q", "r"]]})), "cannot read"),
    "an id of 4 * 10^9": (bad_tokenizer(changed(model={"type": "BPE", "vocab": {"a": 0, "b": 4 * 10**9}, "merges": []})), "damaged"),
    "vocab.txt twice": ({"vocab.txt": "[UNK]\na\nb\na\n"}, "has the token 'a' twice"),
    "vocab.txt empty": ({"vocab.txt": ""}, r"has no \[UNK\]"),
    "vocab.txt of blanks": ({"vocab.txt": "\n\n\n"}, "twice"),
    "vocab.json of words": ({"vocab.json": '{"a": "b"}', "merges.txt": "a b"}, "not a tokenizer"),
    "vocab.json a list": ({"vocab.json": "[1]", "merges.txt": ""}, "not a tokenizer"),
    "merges without words": ({"vocab.json": '{"a": 0}', "merges.txt": "x y\n"}, "not a tokenizer"),
    "merges that are none": ({"vocab.json": '{"a": 0}', "merges.txt": "x\n\n  \nq"}, "not a tokenizer"),
    "a config that is a list": ({"tokenizer.json": tokenizer().definition, "tokenizer_config.json": "[]"}, "not a JSON object"),
    "names that are numbers": ({"tokenizer.json": tokenizer().definition, "merges.json": "7"}, "makes no sense"),
    "a token without its text": ({"vocab.txt": "[UNK]", "tokenizer_config.json": '{"mask_token": {"a": 1}}'}, "makes no sense"),
    "ids that are words": (
        {"vocab.txt": "[UNK]", "tokenizer_config.json": '{"added_tokens_decoder": {"x": {"content": "y"}}}'}, "makes no sense"),
    "added tokens of a billion": (
        {"vocab.txt": "[UNK]", "tokenizer_config.json": '{"added_tokens_decoder": {"999999999": {"content": "y"}}}'}, "not free"),
    "a deep config": ({"tokenizer.json": tokenizer().definition, "tokenizer_config.json": "[" * 99_999}, "not JSON"),
}  # fmt: skip


def replaced(pattern: dict[str, str], content: str, times: int = 1) -> dict[str, str]:
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return bad_tokenizer(changed(normalizer={"type": "Sequence", "normalizers": [step] * times}))


def split_at(expression: str) -> dict[str, str]:
    step = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return bad_tokenizer(changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [step]}))


def nested_steps(depth: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        step = {"type": "Sequence", "normalizers": [step, step]}
    return step


def framed_by(texts: list[str], times: int = 1, tokens: int = 0) -> dict[str, str]:
    single: list[dict[str, Any]] = [{"Sequence": {"id": text, "type_id": 0}} for text in texts]
    special = {"x": {"id": "x", "ids": [0] * tokens, "tokens": ["x"] * tokens}}
    pair = [{"Sequence": {"id": text, "type_id": 0}} for text in "AB"]
    step = {"type": "TemplateProcessing", "pair": pair, "special_tokens": special}
    step["single"] = [*single, *[{"SpecialToken": {"id": "x", "type_id": 0}}] * bool(tokens)]
    return bad_tokenizer(changed(post_processor={"type": "Sequence", "processors": [step] * times}))


PIECES: dict[str, Any] = {
    "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": {"[UNK]": 0, "a": 1, "##a": 2},
}  # fmt: skip

TOKENIZERS |= {
    "one letter to 6 GB": (replaced({"String": "a"}, "a" * 300, 4), "more than 1000 times as long"),
    "what matches nothing": (replaced({"Regex": ""}, "aa", 20), "more than 1000 times as long"),
    "a long text before": (
        bad_tokenizer(changed(normalizer={"type": "Prepend", "prepend": "a" * 10**6})), "more than 1000 times as long"),
    "a decoder that grows": (
        bad_tokenizer(changed(decoder={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 2000})), "its decoder can make"),
    "a thousand steps": (replaced({"String": "a"}, "b", 1000), "more than 100 steps"),
    "steps in steps": (bad_tokenizer(changed(normalizer=nested_steps(12))), "more steps than any tokenizer|more than 100 steps"),
    "a catastrophic expression": (split_at("(a+)+$"), "repeats a group that repeats and could run without end"),
    "a catastrophic choice": (split_at("(a|ab|b)*c"), "repeats a choice"),
    "a power of the length": (split_at("a*a*a*a*a*a*b"), "more than 4 endless repeats"),
    "a large count": (split_at("(a{1,900}){1,900}"), "counts to more than 1000"),
    "a text a hundred times": (framed_by(["A"] * 100), "of the texts A, A.*must be there once"),
    "two templates that double": (framed_by(["A", "A"], 2), "must be there once"),
    "a template without a text": (framed_by([]), r"of the texts \(none\)"),
    "a second text where one is": (framed_by(["A", "B"]), "of the texts A, B"),
    "a million tokens around": (framed_by(["A"], tokens=10**6), "adds more than 10,000 tokens"),
    "WordPiece of endless words": (bad_tokenizer(changed(model=PIECES | {"max_input_chars_per_word": 10**9})), "third power"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_invalid_tokenizers(name: str, tmp_path: Path) -> None:
    files, says = TOKENIZERS[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    refused(lambda: Tokenizer.load(tmp_path).vocab, says)


@pytest.mark.parametrize(
    "data",
    [b"\x00" * 100, b"\xff" * 5_000_000, bytes(range(256)) * 50, b"\x0a\x05\x0a\x03abc", b"\x0a\xff\xff\xff\xff\x0f" + b"a" * 10,
     b"\x0a\x05\x0a\x03\xff\xfe\xfd", b"\x0a\x03\x0a\x01a" * 10],
)  # fmt: skip
def test_garbage_for_a_sentencepiece_model(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(data)
    refused(lambda: Tokenizer.load(tmp_path), "spiece.model")


def test_a_tokenizer_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt", "spiece.model"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(5 << 30)  # a hole: it takes no room
        refused(lambda: Tokenizer.load(tmp_path), "more than any tokenizer needs")
        (tmp_path / name).unlink()


TEMPLATES = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more time"),
    "calls": ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", "more memory|has a fault"),
    "many": ("{{ 'a' * 10**11 }}", "more memory"),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch ran') }}", "unsafe"),
    "import": ("{% import 'os' as os %}", "cannot write|has a fault"),
    "a format": ("{{ '{0.__class__}'.format(1) }}{{ messages[0].content }}", "unsafe|shows a message|has a fault"),
    "no template": ("{% for", "cannot write"),
    "a fault": ("{{ 1 / 0 }}", "has a fault"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_malicious_templates(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, says = TEMPLATES[name]
    tokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    loaded = Tokenizer.load(tmp_path)
    refused(lambda: chat.encode(loaded, MESSAGES), says)
    assert chat.stops(loaded) == [loaded.vocab.eos]
    assert not (tmp_path / "ran").exists()
    fine = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"  # and the next one is served
    assert len(chat.encode(Tokenizer(loaded.engine, template=fine), MESSAGES)[0])


def flips(directory: Path, names: Sequence[str], count: int) -> list[tuple[Path, bytes]]:
    """Return (file, its content with one bit flipped), for bits drawn uniformly over all files."""
    rng = random.Random(0)
    files = [directory / name for name in names]
    found = []
    for file in rng.choices(files, [path.stat().st_size for path in files], k=count):
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        found.append((file, bytes(data)))
    return found


def refuses_every_flip(directory: Path, names: Sequence[str], load: Callable[[Path], Any], count: int) -> None:
    load(directory)
    for file, damaged in flips(directory, names, count):
        whole = file.read_bytes()
        file.write_bytes(damaged)
        refused(
            lambda: load(directory), "as it was written|not JSON|not a JSON|names the base|cannot read|trained with"
        )
        file.write_bytes(whole)
    load(directory)


def test_every_flipped_bit_of_a_model_is_found(tmp_path: Path) -> None:
    """All of 200 flips are found; without content hashes it was 1."""
    save_model(gpt2(), tokenizer(), tmp_path)
    refuses_every_flip(tmp_path, ["model.safetensors", "config.json", "firth.json"], load_model, 200)
    refuses_every_flip(tmp_path, ["firth.json"], load_model, 100)
    refuses_every_flip(tmp_path, ["config.json"], load_model, 50)


def test_every_flipped_bit_of_an_adapter_is_found(tmp_path: Path) -> None:
    model = gpt2()
    save_model(model, tokenizer(), tmp_path / "base")
    lora.add(model, ["q"], lora.LoraConfig(rank=2))
    adapter_files.write(model, tmp_path / "adapter", tmp_path / "base")
    names = ["adapter_model.safetensors", "adapter_config.json", "firth.json"]
    refuses_every_flip(tmp_path / "adapter", names, adapter_files.load, 60)


def test_a_directory_of_transformers_needs_no_hashes(given: Path) -> None:
    assert not (given / "firth.json").exists() and load_model(given)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(number: float, given: Path, tmp_path: Path) -> None:
    state = load_file(given / "model.safetensors")
    state["transformer.h.0.attn.c_attn.weight"][3, 5] = number
    save_file(state, given / "model.safetensors")
    refused(lambda: load_model(given), r"'.*' holds a number that is not finite")
    refused(lambda: init_from(gpt2(), given), "is not finite")
    model = gpt2()
    with torch.no_grad():
        model.tokens.weight[7, 7] = number
    refused(lambda: save_model(model, tokenizer(), tmp_path / "out"), "tokens|wte.* is not finite")
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_numbers_too_large_for_the_saved_dtype(tmp_path: Path) -> None:
    model = gpt2()
    with torch.no_grad():
        model.tokens.weight[7, 7] = 3.4e38  # bf16 ends at 3.39e38
    refused(lambda: save_model(model, None, tmp_path, storage=Storage(torch.float16)), "too large for fp16")
    refused(lambda: save_model(model, None, tmp_path, storage=Storage(torch.bfloat16)), "too large for bf16")
