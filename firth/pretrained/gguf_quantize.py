"""ggml's blocks of few bits: back to float32, and float32 into Q8_0 and Q4_0.

A block is a scale, perhaps an offset, and small integers: x = scale * q, or scale * q + offset. The K kinds (k-quants,
github.com/ggml-org/llama.cpp, pull request 1684) are blocks of 256 in 8 or 16 groups whose scales are small integers too.

    name   bits   x                                        name   bits   x
    Q4_0   4.5    d (q - 8)                                Q2_K   2.6    d s q - m o,   s and o of 4 bits, 16 numbers each
    Q4_1   5      d q + m                                  Q3_K   3.4    d (s - 32)(q - 4),   s of 6 bits, 16 each
    Q5_0   5.5    d (q - 16)                               Q4_K   4.5    d s q - m o,   s and o of 6 bits, 32 each
    Q5_1   6      d q + m                                  Q5_K   5.5    the same with q of 5 bits
    Q8_0   8.5    d q,   q from -127 to 127                Q6_K   6.6    d s (q - 32),   s of 8 bits, 16 each

>>> blocks = pack("Q8_0", np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32))
>>> blocks.shape, float(np.abs(unpack("Q8_0", blocks)[0, :3] - np.linspace(-1, 1, 64)[:3]).max()) < 0.004
((2, 34), True)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from firth.io.gguf import KINDS

AT_ONCE = 1 << 14
"""Blocks of 256 that are packed or unpacked at once: the temporary arrays stay in the cache, and small."""

SMALLEST_SCALE = float(1 / np.finfo(np.float32).max)
"""A scale up to this has no inverse in float32, and is 0 in float16."""

Blocks = np.ndarray
"""(n, bytes of a block) uint8."""


def unpack(kind: str, rows: np.ndarray) -> np.ndarray:
    """(rows, bytes of a row) uint8 to (rows, numbers of a row) float32."""
    count, size = rows.shape
    block, bytes = KINDS[kind].block, KINDS[kind].size
    if kind == "F32":
        return rows.view("<f4").astype(np.float32)
    blocks = rows.reshape(-1, bytes)
    out = np.empty((len(blocks), block), np.float32)
    step = AT_ONCE * 256 // block
    for at in range(0, len(blocks), step):
        out[at : at + step] = UNPACK[kind](blocks[at : at + step])
    return out.reshape(count, size // bytes * block)


def pack(kind: str, numbers: np.ndarray) -> np.ndarray:
    """(rows, n) float32 to (rows, bytes of a row) uint8; for the kinds in PACK, n a multiple of their block."""
    block, bytes = KINDS[kind].block, KINDS[kind].size
    blocks = np.ascontiguousarray(numbers, np.float32).reshape(-1, block)
    out = np.empty((len(blocks), bytes), np.uint8)
    step = AT_ONCE * 256 // block
    for at in range(0, len(blocks), step):
        out[at : at + step] = PACK[kind](blocks[at : at + step])
    return out.reshape(-1, numbers.shape[-1] // block * bytes)


def half(two: np.ndarray) -> np.ndarray:
    """(n, 2) bytes, a float16: (n, 1) float32."""
    return np.ascontiguousarray(two).view("<f2").astype(np.float32)


def nibbles(bytes: np.ndarray) -> np.ndarray:
    """(n, k) bytes: (n, 2k), the low halves and then the high ones."""
    return np.concatenate((bytes & 15, bytes >> 4), 1)


def fifth(bytes: np.ndarray) -> np.ndarray:
    """(n, 4) bytes: (n, 32) the bits of a uint32 from the lowest, at the place of a fifth bit."""
    return np.unpackbits(bytes, axis=1, bitorder="little") << 4


def f16(b: Blocks) -> np.ndarray:
    return half(b)


def bf16(b: Blocks) -> np.ndarray:
    return (np.ascontiguousarray(b).view("<u2").astype(np.uint32) << 16).view(np.float32)


def q4_0(b: Blocks) -> np.ndarray:
    return half(b[:, :2]) * (nibbles(b[:, 2:]).view(np.int8) - np.int8(8)).astype(np.float32)


def q4_1(b: Blocks) -> np.ndarray:
    return half(b[:, :2]) * nibbles(b[:, 4:]).astype(np.float32) + half(b[:, 2:4])


def q5_0(b: Blocks) -> np.ndarray:
    q = nibbles(b[:, 6:]) | fifth(b[:, 2:6])
    return half(b[:, :2]) * (q.view(np.int8) - np.int8(16)).astype(np.float32)


def q5_1(b: Blocks) -> np.ndarray:
    q = nibbles(b[:, 8:]) | fifth(b[:, 4:8])
    return half(b[:, :2]) * q.astype(np.float32) + half(b[:, 2:4])


def q8_0(b: Blocks) -> np.ndarray:
    return half(b[:, :2]) * np.ascontiguousarray(b[:, 2:]).view(np.int8).astype(np.float32)


def quarters(bytes: np.ndarray, bits: int, run: int) -> np.ndarray:
    """(n, k) bytes, each of 8 / bits numbers, in runs of `run` bytes: first the low bits of a run, then those above."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    found: np.ndarray = bytes.reshape(len(bytes), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return found.reshape(len(bytes), -1)


def grouped(scales: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(n, groups) float32 and (n, 256): each number times the scale of its group."""
    product: np.ndarray = scales[:, :, None] * q.reshape(*scales.shape, -1).astype(np.float32)
    return product


def q2_k(b: Blocks) -> np.ndarray:
    scales, offsets = half(b[:, 80:82]) * (b[:, :16] & 15), half(b[:, 82:84]) * (b[:, :16] >> 4)
    found = grouped(scales, quarters(b[:, 16:80], 2, 32)) - offsets[:, :, None]
    return found.reshape(len(b), 256)


def q3_k(b: Blocks) -> np.ndarray:
    low = nibbles(b[:, 96:104])
    high = quarters(b[:, 104:108], 2, 4)
    scales = (low | high << 4).view(np.int8) - np.int8(32)
    above = quarters(b[:, :32], 1, 32) ^ 1  # where the bit is not set, 4 is taken off
    q = quarters(b[:, 32:96], 2, 32).view(np.int8) - (above << 2).view(np.int8)
    return grouped(half(b[:, 108:110]) * scales.astype(np.float32), q).reshape(len(b), 256)


def sixes(twelve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 12) bytes: the scales and offsets of Q4_K and Q5_K, (n, 8) each, of six bits."""
    d, m, md = twelve[:, :4], twelve[:, 4:8], twelve[:, 8:]
    scales = np.concatenate((d & 63, (md & 15) | (d >> 2 & 48)), 1)
    return scales, np.concatenate((m & 63, (md >> 4) | (m >> 2 & 48)), 1)


def q4_k(b: Blocks) -> np.ndarray:
    return _eight(b, quarters(b[:, 16:], 4, 32))


def q5_k(b: Blocks) -> np.ndarray:
    return _eight(b, quarters(b[:, 48:], 4, 32) | quarters(b[:, 16:48], 1, 32) << 4)


def _eight(b: Blocks, q: np.ndarray) -> np.ndarray:
    scales, offsets = sixes(b[:, 4:16])
    found = grouped(half(b[:, :2]) * scales, q) - (half(b[:, 2:4]) * offsets)[:, :, None]
    return found.reshape(len(b), 256)


def q6_k(b: Blocks) -> np.ndarray:
    q = quarters(b[:, :128], 4, 64) | quarters(b[:, 128:192], 2, 32) << 4
    scales = half(b[:, 208:210]) * np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return grouped(scales, q.view(np.int8) - np.int8(32)).reshape(len(b), 256)


def inverse(scale: np.ndarray) -> np.ndarray:
    """Return 1 / scale, and 0 where float32 cannot hold that: the block's numbers are all 0, or 0 in float16."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > SMALLEST_SCALE)


def to_q4_0(blocks: np.ndarray) -> np.ndarray:
    """Quantize to 16 steps; the number furthest from 0 is the lowest, -8, of a scale of the other sign.

    Both roundings are in float32, as in the gguf package: another order changes halves, so the bytes.
    """
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    scale = furthest / np.float32(-8)
    q = np.minimum(np.trunc(blocks * inverse(scale) + np.float32(8.5)), 15).astype(np.uint8)
    return np.concatenate((scale.astype("<f2").view(np.uint8), q[:, :16] | q[:, 16:] << 4), 1)


def to_q8_0(blocks: np.ndarray) -> np.ndarray:
    """To the nearest of 255 steps between the largest number of a block and its negative; halves away from zero."""
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    scaled = blocks * inverse(scale)
    size = np.abs(scaled)
    down = np.floor(size)
    q = np.copysign(down + np.floor(2 * (size - down)), scaled).astype(np.int8)
    return np.concatenate((scale.astype("<f2").view(np.uint8), q.view(np.uint8)), 1)


def to_f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype("<f2").view(np.uint8)


def to_bf16(blocks: np.ndarray) -> np.ndarray:
    """To the nearest, halves to even; a NaN stays one."""
    bits = blocks.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(blocks), bits >> 16 | 64, near).astype("<u2").view(np.uint8)


UNPACK: dict[str, Callable[[Blocks], np.ndarray]] = {
    "F16": f16, "BF16": bf16, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q2_K": q2_k,
    "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k,
}  # fmt: skip

PACK: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda blocks: blocks.view(np.uint8), "F16": to_f16, "BF16": to_bf16, "Q8_0": to_q8_0, "Q4_0": to_q4_0,
}  # fmt: skip
"""The kinds that are written."""
