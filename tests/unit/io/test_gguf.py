"""The GGUF container and ggml's blocks: round trips, and damaged files raise a one-line error."""

from __future__ import annotations

import contextlib
import resource
import struct
import time

import numpy as np
import pytest

from firth.io import gguf
from firth.io.gguf import KINDS, GGUFTensorSpec, find, read, write
from firth.pretrained.gguf_quantize import PACK, pack, unpack
from firth.types import UserError

METADATA = {
    "general.architecture": "llama", "a.flag": True, "a.number": 7, "a.rate": 1e-5, "a.text": "Füße\n",
    "a.list": ["", "▁a", "🙂"], "a.scores": np.array([0.5, -1.0], "<f4"), "a.types": np.array([1, 3, 6], "<i4"),
}  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """A small valid file and its bytes."""
    file = tmp_path / "small.gguf"
    numbers = np.arange(64, dtype=np.float32).reshape(2, 32)
    tensors = [
        GGUFTensorSpec("a.weight", "F32", (2, 32), lambda: numbers), GGUFTensorSpec("b.bias", "F32", (3,), lambda: numbers[0, :3]),
        GGUFTensorSpec("c.weight", "Q8_0", (2, 32), lambda: pack("Q8_0", numbers)),
    ]  # fmt: skip
    write(file, METADATA, tensors)
    return file, file.read_bytes()


def test_a_written_file_is_read_back(small):
    file, _ = small
    found = read(file)
    assert {k: v for k, v in found.metadata.items() if not isinstance(v, np.ndarray)} == {
        k: v for k, v in METADATA.items() if not isinstance(v, np.ndarray)
    }
    assert found.numbers("a.types", 3).tolist() == [1, 3, 6]
    assert [(t.kind, t.shape) for t in found.tensors.values()] == [("F32", (2, 32)), ("F32", (3,)), ("Q8_0", (2, 32))]
    assert np.array_equal(unpack("F32", found.tensors["a.weight"].data), np.arange(64).reshape(2, 32))
    assert np.abs(unpack("Q8_0", found.tensors["c.weight"].data) - np.arange(64).reshape(2, 32)).max() < 0.26
    assert not file.with_name("small.gguf.partial").exists()


def test_find_returns_the_only_file(small, tmp_path):
    file, data = small
    assert find(file) == file and find(tmp_path) == file and find(tmp_path / "none") is None
    (tmp_path / "second.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(second\.gguf, \.\.\.\)"):
        find(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert find(tmp_path) is None
    with pytest.raises(UserError, match="no such file"):
        find(tmp_path / "missing.gguf")


def refused(file, data, match):
    """Reading `data` raises a one-line error, in little time and memory."""
    file.write_bytes(data)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match=match) as error:
        read(file)
    assert "\n" not in str(error.value)
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_a_truncated_file_is_rejected(small):
    file, data = small
    whole = len(data)
    for size in [0, 3, 4, 10, 23, *range(24, whole - 64, 7), whole - 40]:
        refused(file, data[:size], "too short|past its end|outside of the file|not UTF-8|list of")


def header(tensors=0, keys=0, version=3, magic=b"GGUF", rest=b""):
    return magic + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value


def info(name=b"t", shape=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "another magic": (header(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (header(version=1), "of version 1"),
    "version 9": (header(version=9), "of version 9"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "2^60 keys": (header(keys=1 << 60), "states 1152921504606846976 keys"),
    "2^60 tensors": (header(tensors=1 << 60), "states 1152921504606846976 tensors"),
    "a key of 2^60 bytes": (header(keys=1, rest=struct.pack("<Q", 1 << 60)), "a key is 1152921504606846976 bytes"),
    "a key past the end": (header(keys=1, rest=struct.pack("<Q", 100) + b"abc"), "past its end"),
    "a key that is no UTF-8": (header(keys=1, rest=text(b"\xff\xfe") + struct.pack("<I", 0) + b"1"), "not UTF-8"),
    "the same key twice": (header(keys=2, rest=(text(b"k") + struct.pack("<IB", 0, 1)) * 2), "'k' occurs twice"),
    "a text of 2^60 bytes": (header(keys=1, rest=text(b"k") + struct.pack("<IQ", 8, 1 << 60)), "past its end"),
    "an unknown type": (header(keys=1, rest=text(b"k") + struct.pack("<I", 77)), "unknown type 77"),
    "2^60 numbers": (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 6, 1 << 60)), "past its end"),
    "2^60 texts": (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60)), "list of 1152921504606846976 texts"),
    "2^22 texts in 20 bytes": (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 22)), "list of 4194304 texts"),
    "lists in lists": (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1 << 60)), "list of the type 9"),
    "an alignment of 3": (header(keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 3)), "alignment is 3"),
    "an alignment of 0": (header(keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0)), "alignment is 0"),
    "an alignment that is text": (
        header(keys=1, rest=text(b"general.alignment") + struct.pack("<I", 8) + text(b"32")), "alignment is '32'",
    ),
    "a kind of tensor that is not read": (header(tensors=1, rest=info(kind=39) + b"\0" * 64), "ggml's type 39"),
    "a dimension of 0": (header(tensors=1, rest=info(shape=(0,)) + b"\0" * 64), "not a whole number of F32 blocks"),
    "no dimensions": (header(tensors=1, rest=info(shape=()) + b"\0" * 64), "has 0 dimensions"),
    "2^31 dimensions": (header(tensors=1, rest=text(b"t") + struct.pack("<I", 1 << 31)), "2147483648 dimensions"),
    "dimensions whose product overflows": (header(tensors=1, rest=info(shape=(1 << 33, 1 << 31)) + b"\0" * 256), "outside"),
    "half a block": (header(tensors=1, rest=info(shape=(33,), kind=8) + b"\0" * 256), "not a whole number of Q8_0 blocks"),
    "half a block of four bits": (header(tensors=1, rest=info(shape=(48,), kind=2) + b"\0" * 256), "not a whole number of Q4_0 blocks"),
    "a row more of four bits than there are": (header(tensors=1, rest=info(shape=(32, 15), kind=2) + b"\0" * 265), "outside"),
    "2^62 numbers of four bits": (header(tensors=1, rest=info(shape=(1 << 31, 1 << 31), kind=2) + b"\0" * 256), "outside"),
    "an offset outside": (header(tensors=1, rest=info(offset=1 << 50) + b"\0" * 256), "outside"),
    "an offset out of line": (header(tensors=1, rest=info(offset=16) + b"\0" * 256), "not aligned"),
    "tensors over each other": (header(tensors=2, rest=info() + info(b"u", offset=32) + b"\0" * 512), "overlaps another"),
    "the same tensor twice": (header(tensors=2, rest=info() + info(offset=128) + b"\0" * 512), "'t' occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_broken_file_is_rejected_in_one_line(what, tmp_path):
    data, match = HOSTILE[what]
    refused(tmp_path / "broken.gguf", data + b"\0" * 8, match)


def test_changed_bytes_raise_nothing_but_user_errors(small):
    file, data = small
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        for at in rng.integers(4, len(data), 3):
            changed[at] = rng.integers(256)
        file.write_bytes(changed)
        with contextlib.suppress(UserError):
            assert all(t.data.nbytes <= len(data) for t in read(file).tensors.values())


def by_hand(kind, block):
    """Dequantize one block value by value, as ggml's reference code does."""
    half = [float(x) for x in np.frombuffer(block, "<f2")]
    b = list(block)
    if kind == "Q8_0":
        return [half[0] * (x - 256 * (x > 127)) for x in b[2:]]
    if kind in ("Q4_0", "Q4_1"):
        at = 2 if kind == "Q4_0" else 4
        q = [x & 15 for x in b[at:]] + [x >> 4 for x in b[at:]]
        return [half[0] * (x - 8) for x in q] if at == 2 else [half[0] * x + half[1] for x in q]
    if kind in ("Q5_0", "Q5_1"):
        at = 6 if kind == "Q5_0" else 8
        high = int.from_bytes(block[at - 4 : at], "little")
        q = [x & 15 for x in b[at:]] + [x >> 4 for x in b[at:]]
        q = [x | (high >> i & 1) << 4 for i, x in enumerate(q)]
        return [half[0] * (x - 16) for x in q] if at == 6 else [half[0] * x + half[1] for x in q]
    if kind == "Q6_K":
        scales, d = np.frombuffer(block[192:208], np.int8), float(np.frombuffer(block[208:], "<f2")[0])
        out = []
        for i in range(256):
            n, j, part = i // 128, i % 32, i % 128 // 32
            low = b[64 * n + 32 * (part % 2) + j] >> 4 * (part // 2) & 15
            q = low | (b[128 + 32 * n + j] >> 2 * part & 3) << 4
            out.append(d * int(scales[i // 16]) * (q - 32))
        return out
    d, m = (float(x) for x in np.frombuffer(block[:4], "<f2"))
    s, out = b[4:16], []
    for i in range(256):
        g = i // 32
        scale = s[g] & 63 if g < 4 else (s[g + 4] & 15) | (s[g - 4] >> 6) << 4
        offset = s[g + 4] & 63 if g < 4 else (s[g + 4] >> 4) | (s[g] >> 6) << 4
        low = b[(16 if kind == "Q4_K" else 48) + 32 * (i // 64) + i % 32] >> 4 * (g % 2) & 15
        q = low | (b[16 + i % 32] >> g & 1) << 4 if kind == "Q5_K" else low
        out.append(d * scale * q - m * offset)
    return out


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_are_unpacked_as_they_are_defined(kind):
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 256, (5, 2 * KINDS[kind].size), dtype=np.uint8)
    blocks = rows.reshape(-1, KINDS[kind].size)
    places = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for at in places:  # scales of a usual magnitude
        blocks[:, at : at + 2] = rng.standard_normal(10).astype("<f2").reshape(-1, 1).view(np.uint8)
    want = np.array([by_hand(kind, block.tobytes()) for block in blocks]).reshape(5, -1)
    assert np.allclose(unpack(kind, rows), want, rtol=1e-6, atol=1e-6)


@pytest.mark.oracle
def test_blocks_equal_those_of_the_gguf_package():
    theirs = pytest.importorskip("gguf", reason="the gguf package, an oracle, is not installed")
    rng = np.random.default_rng(2)
    for kind, stored in KINDS.items():
        if stored.block > 1 or kind == "BF16":
            rows = rng.integers(0, 256, (100, 4 * stored.size), dtype=np.uint8)
            with np.errstate(all="ignore"):
                want = theirs.quants.dequantize(rows, theirs.GGMLQuantizationType[kind])
                assert np.array_equal(unpack(kind, rows), want, equal_nan=True), kind
    numbers = (rng.standard_normal((64, 256)) * rng.lognormal(0, 3, (64, 1))).astype(np.float32)
    numbers[0, :40] = 0
    numbers[1] = np.round(numbers[1] * 4) / 4  # ties of the largest number and halves of steps
    numbers[2, ::2] = -numbers[2, 1::2]
    numbers[3] *= np.float32(1e-30)
    for kind in PACK:
        want = theirs.quants.quantize(numbers, theirs.GGMLQuantizationType[kind])
        assert np.array_equal(pack(kind, numbers), want.view(np.uint8)), kind


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_packed_blocks_do_not_depend_on_their_number(kind):
    """Rows are packed in chunks; the number of chunks changes nothing."""
    many = np.random.default_rng(4).standard_normal((140_000, 32)).astype(np.float32)
    packed = pack(kind, many.reshape(-1, 320))
    assert packed.shape == (14_000, 10 * KINDS[kind].size)
    packed = packed.reshape(140_000, -1)
    for at in (0, 131_071, 131_072, 139_999):
        assert np.array_equal(packed[at], pack(kind, many[at : at + 1])[0])


def test_q4_0_spends_its_lowest_step_on_the_largest_number():
    numbers = np.zeros((4, 32), np.float32)
    numbers[0, :5] = [8, 7, -7, 0.5, -0.5]  # the step is -1: q is 0, 1, 15 and the halves 8 and 9
    numbers[1, :3] = [-16, 14, 16]  # the first of the two largest decides: 16 is past the highest step
    numbers[3, :2] = [1e-40, -1e-41]  # no float32 is the inverse of such a step
    with np.errstate(all="raise", under="ignore"):
        packed = pack("Q4_0", numbers)
    found = unpack("Q4_0", packed)
    assert found[0, :5].tolist() == [8, 7, -7, 0, -1] and found[1, :3].tolist() == [-16, 14, 14]
    assert not found[2].any() and not found[3].any()
    assert packed[0, 2] == 0x80 and packed[0, 3] == 0x81  # the numbers 0 and 16 of a block share a byte


def test_q8_0_rounds_to_the_nearest_of_255_steps():
    numbers = np.zeros((3, 32), np.float32)
    numbers[0, :4] = [127, 0.5, -0.5, 1.49]
    numbers[1, :3] = [-254, 3, 1]
    found = unpack("Q8_0", pack("Q8_0", numbers))
    assert found[0, :4].tolist() == [127, 1, -1, 1] and found[1, :3].tolist() == [-254, 4, 2] and not found[2].any()


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_sixteen_bits_round_as_torch_does(kind):
    import torch

    numbers = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    numbers[0, :4] = [np.inf, -np.inf, 0.0, 65504.0]
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    assert np.array_equal(unpack(kind, pack(kind, numbers)), torch.from_numpy(numbers).to(dtype).float().numpy())
    numbers[1, 0] = np.nan
    assert np.isnan(unpack(kind, pack(kind, numbers))[1, 0])


def test_a_value_of_another_type_is_named(small):
    found = read(small[0])
    for ask in (lambda: found.text("a.number"), lambda: found.list("a.text"), lambda: found.numbers("a.scores", 3)):
        with pytest.raises(UserError, match=r"a\.(number|text|scores)"):
            ask()
    assert gguf.read(small[0]).numbers("none", 3) is None
