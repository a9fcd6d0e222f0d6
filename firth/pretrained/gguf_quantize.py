"""ggml's quantization formats: conversion to float32, and from float32 to Q8_0 and Q4_0.

A block has a scale, optionally an offset, and small integers: x = scale * q, or scale * q + offset. The K formats (k-quants,
github.com/ggml-org/llama.cpp, pull request 1684) have blocks of 256 in 8 or 16 groups whose scales are small integers too.

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

CHUNK_BLOCKS = 1 << 14
"""Blocks of 256 converted at once, so that the temporary arrays stay in the CPU cache."""

MIN_SCALE = float(1 / np.finfo(np.float32).max)
"""A scale up to this has no inverse in float32 and is 0 in float16."""

Blocks = np.ndarray
"""uint8, (n, bytes per block)."""


def unpack(kind: str, rows: np.ndarray) -> np.ndarray:
    """Dequantize rows: uint8 (rows, bytes per row) -> float32 (rows, numbers per row)."""
    count, size = rows.shape
    block, bytes = KINDS[kind].block, KINDS[kind].size
    if kind == "F32":
        return rows.view("<f4").astype(np.float32)
    blocks = rows.reshape(-1, bytes)
    out = np.empty((len(blocks), block), np.float32)
    step = CHUNK_BLOCKS * 256 // block
    for at in range(0, len(blocks), step):
        out[at : at + step] = UNPACK[kind](blocks[at : at + step])
    return out.reshape(count, size // bytes * block)


def pack(kind: str, numbers: np.ndarray) -> np.ndarray:
    """Quantize rows to a format in `PACK`: float32 (rows, n) -> uint8 (rows, bytes per row); n a multiple of the block size."""
    block, bytes = KINDS[kind].block, KINDS[kind].size
    blocks = np.ascontiguousarray(numbers, np.float32).reshape(-1, block)
    out = np.empty((len(blocks), bytes), np.uint8)
    step = CHUNK_BLOCKS * 256 // block
    for at in range(0, len(blocks), step):
        out[at : at + step] = PACK[kind](blocks[at : at + step])
    return out.reshape(-1, numbers.shape[-1] // block * bytes)


def float16_to_32(two: np.ndarray) -> np.ndarray:
    """Read a float16: (n, 2) bytes -> (n, 1) float32."""
    return np.ascontiguousarray(two).view("<f2").astype(np.float32)


def nibbles(bytes: np.ndarray) -> np.ndarray:
    """Split bytes into nibbles: (n, k) -> (n, 2k), the low ones first."""
    return np.concatenate((bytes & 15, bytes >> 4), 1)


def high_bits(bytes: np.ndarray) -> np.ndarray:
    """Return the bits of a uint32, lowest first, each as the fifth bit of a number: (n, 4) bytes -> (n, 32)."""
    return np.unpackbits(bytes, axis=1, bitorder="little") << 4


def f16(b: Blocks) -> np.ndarray:
    return float16_to_32(b)


def bf16(b: Blocks) -> np.ndarray:
    return (np.ascontiguousarray(b).view("<u2").astype(np.uint32) << 16).view(np.float32)


def q4_0(b: Blocks) -> np.ndarray:
    return float16_to_32(b[:, :2]) * (nibbles(b[:, 2:]).view(np.int8) - np.int8(8)).astype(np.float32)


def q4_1(b: Blocks) -> np.ndarray:
    return float16_to_32(b[:, :2]) * nibbles(b[:, 4:]).astype(np.float32) + float16_to_32(b[:, 2:4])


def q5_0(b: Blocks) -> np.ndarray:
    q = nibbles(b[:, 6:]) | high_bits(b[:, 2:6])
    return float16_to_32(b[:, :2]) * (q.view(np.int8) - np.int8(16)).astype(np.float32)


def q5_1(b: Blocks) -> np.ndarray:
    q = nibbles(b[:, 8:]) | high_bits(b[:, 4:8])
    return float16_to_32(b[:, :2]) * q.astype(np.float32) + float16_to_32(b[:, 2:4])


def q8_0(b: Blocks) -> np.ndarray:
    return float16_to_32(b[:, :2]) * np.ascontiguousarray(b[:, 2:]).view(np.int8).astype(np.float32)


def unpack_bits(bytes: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Unpack bytes (n, k) of 8 / bits numbers each to (n, 8k / bits); within `run` bytes, the low bits come first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    found: np.ndarray = bytes.reshape(len(bytes), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return found.reshape(len(bytes), -1)


def scale_groups(scales: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Multiply numbers (n, 256) by the scales (n, groups) of their groups."""
    product: np.ndarray = scales[:, :, None] * q.reshape(*scales.shape, -1).astype(np.float32)
    return product


def q2_k(b: Blocks) -> np.ndarray:
    scales, offsets = float16_to_32(b[:, 80:82]) * (b[:, :16] & 15), float16_to_32(b[:, 82:84]) * (b[:, :16] >> 4)
    found = scale_groups(scales, unpack_bits(b[:, 16:80], 2, 32)) - offsets[:, :, None]
    return found.reshape(len(b), 256)


def q3_k(b: Blocks) -> np.ndarray:
    low = nibbles(b[:, 96:104])
    high = unpack_bits(b[:, 104:108], 2, 4)
    scales = (low | high << 4).view(np.int8) - np.int8(32)
    above = unpack_bits(b[:, :32], 1, 32) ^ 1  # 4 is subtracted where the bit is not set
    q = unpack_bits(b[:, 32:96], 2, 32).view(np.int8) - (above << 2).view(np.int8)
    return scale_groups(float16_to_32(b[:, 108:110]) * scales.astype(np.float32), q).reshape(len(b), 256)


def six_bit_scales(twelve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack the six-bit scales and offsets of Q4_K and Q5_K: (n, 12) bytes -> (n, 8) each."""
    d, m, md = twelve[:, :4], twelve[:, 4:8], twelve[:, 8:]
    scales = np.concatenate((d & 63, (md & 15) | (d >> 2 & 48)), 1)
    return scales, np.concatenate((m & 63, (md >> 4) | (m >> 2 & 48)), 1)


def q4_k(b: Blocks) -> np.ndarray:
    return _q45_k(b, unpack_bits(b[:, 16:], 4, 32))


def q5_k(b: Blocks) -> np.ndarray:
    return _q45_k(b, unpack_bits(b[:, 48:], 4, 32) | unpack_bits(b[:, 16:48], 1, 32) << 4)


def _q45_k(b: Blocks, q: np.ndarray) -> np.ndarray:
    scales, offsets = six_bit_scales(b[:, 4:16])
    found = scale_groups(float16_to_32(b[:, :2]) * scales, q) - (float16_to_32(b[:, 2:4]) * offsets)[:, :, None]
    return found.reshape(len(b), 256)


def q6_k(b: Blocks) -> np.ndarray:
    q = unpack_bits(b[:, :128], 4, 64) | unpack_bits(b[:, 128:192], 2, 32) << 4
    scales = float16_to_32(b[:, 208:210]) * np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return scale_groups(scales, q.view(np.int8) - np.int8(32)).reshape(len(b), 256)


def inverse(scale: np.ndarray) -> np.ndarray:
    """Return 1 / scale, or 0 where float32 cannot represent it: the block's numbers are all 0, or 0 in float16."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > MIN_SCALE)


def to_q4_0(blocks: np.ndarray) -> np.ndarray:
    """Quantize to 16 steps; the number farthest from 0 becomes -8, so the scale has the opposite sign.

    Both roundings are in float32, as in the gguf package: another order rounds ties differently and changes the bytes.
    """
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    scale = extreme / np.float32(-8)
    q = np.minimum(np.trunc(blocks * inverse(scale) + np.float32(8.5)), 15).astype(np.uint8)
    return np.concatenate((scale.astype("<f2").view(np.uint8), q[:, :16] | q[:, 16:] << 4), 1)


def to_q8_0(blocks: np.ndarray) -> np.ndarray:
    """Quantize to 255 steps over the range of a block, rounding ties away from zero."""
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    scaled = blocks * inverse(scale)
    size = np.abs(scaled)
    down = np.floor(size)
    q = np.copysign(down + np.floor(2 * (size - down)), scaled).astype(np.int8)
    return np.concatenate((scale.astype("<f2").view(np.uint8), q.view(np.uint8)), 1)


def to_f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype("<f2").view(np.uint8)


def to_bf16(blocks: np.ndarray) -> np.ndarray:
    """Round to bfloat16, ties to even; NaN stays NaN."""
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
"""Functions that write each supported format."""
