"""Write the safetensors format block by block.

The library's own writer reports a full disk as an error of its own type, and cannot hash or flush while it writes.
Reading uses the library (`safetensors.safe_open`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
"""torch dtype -> its name in a safetensors header."""


def safetensors_blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: the length of the header (8 bytes), the header (JSON), then the raw tensors.

    The widest dtypes come first, so that every tensor is aligned to its own item size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, x in ordered.items():
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [start, start + x.nbytes]}
        start += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for x in ordered.values():
        yield x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
