"""The masks for kernels of GPUs against the rule written out: their function, their blocks, their texts, and eager FlexAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from firth.model.attention import AttentionMask, attend, mask_from_times
from firth.model.attention_kernels import BLOCK, attend_packed, block_mask, packed_texts
from firth.types import ALL_DOCUMENTS, ALWAYS, NEVER

B, T = 2, 300
STEPS = torch.arange(T).expand(B, T)
ZERO = torch.zeros(B, T, dtype=torch.long)
DOCUMENTS = torch.stack([torch.bucketize(STEPS[0], torch.tensor(ends)) for ends in ([20, 150, 151], [255])])
REAL = torch.tensor([[300], [140]]) > STEPS
ORDER = torch.stack([torch.randperm(T, generator=torch.Generator().manual_seed(s)) for s in range(B)])


def padded(times: Tensor) -> dict[str, Tensor]:
    return {"query_time": torch.where(REAL, times, -NEVER), "key_time": torch.where(REAL, times, NEVER)}


def with_documents(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    return fields | {"query_document": DOCUMENTS, "key_document": DOCUMENTS}


CASES: dict[str, dict[str, Tensor]] = {
    "full": {"query_time": ZERO, "key_time": ZERO},
    "causal": {"query_time": STEPS, "key_time": STEPS},
    "prefix": {"query_time": (STEPS - 200).clamp(0), "key_time": (STEPS - 200).clamp(0)},
    "permuted": {"query_time": ORDER, "key_time": ORDER},
    "two streams": {"query_time": ORDER - 1, "key_time": torch.where(STEPS < 150, ORDER, NEVER)},
    "padded": padded(ZERO),
    "causal, padded": padded(STEPS),
    "packed": with_documents({"query_time": ZERO, "key_time": ZERO}),
    "packed causal": with_documents({"query_time": STEPS, "key_time": STEPS}),
    "packed causal, padded": with_documents(padded(STEPS)),
    "packed, from 0 in each text": with_documents(padded(STEPS - 7 * DOCUMENTS)),
    "placeholders": {"query_time": STEPS, "key_time": STEPS, "key_expiry": torch.where(STEPS % 3 == 0, STEPS + 40, NEVER)},
    "nothing visible": {"query_time": ZERO - 1, "key_time": ZERO},
    "a prefix for all texts": {
        "query_time": STEPS, "key_time": torch.cat((torch.full((B, 5), ALWAYS), STEPS), 1), "query_document": DOCUMENTS,
        "key_document": torch.cat((torch.full((B, 5), ALL_DOCUMENTS), DOCUMENTS), 1),
    },
}  # fmt: skip


def rule(fields: dict[str, Tensor]) -> Tensor:
    """Return the rule written out, (B, T, S)."""
    documents = fields.get("query_document"), fields.get("key_document")
    return mask_from_times(fields["query_time"], fields["key_time"], *documents, fields.get("key_expiry"))


@pytest.mark.parametrize("name", CASES)
def test_the_mask_function_is_the_rule(name: str) -> None:
    fields = CASES[name]
    expected, block = rule(fields), block_mask(**fields)
    assert all(length % BLOCK == 0 for length in block.shape[-2:])
    dense = create_mask(block.mask_mod, B, None, *block.shape[-2:], device="cpu")[:, 0]
    assert torch.equal(dense[:, : expected.shape[1], : expected.shape[2]], expected)
    assert not dense[:, : expected.shape[1], expected.shape[2] :].any()


@pytest.mark.parametrize("name", CASES)
def test_blocks_that_are_not_asked_have_one_answer(name: str) -> None:
    """A block that is left out shows nothing, and one that is listed as full shows everything."""
    block = block_mask(**CASES[name])
    dense = create_mask(block.mask_mod, B, None, *block.shape[-2:], device="cpu")[:, 0]
    tiles = dense.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)  # (B, Q, K, BLOCK, BLOCK)
    asked = full = 0
    for b in range(B):
        for i in range(tiles.shape[1]):
            lists = ((block.kv_num_blocks, block.kv_indices), (block.full_kv_num_blocks, block.full_kv_indices))
            partial, every = ({*index[b, 0, i, : count[b, 0, i]].tolist()} for count, index in lists)  # type: ignore[index]
            assert not partial & every
            asked, full = asked + len(partial), full + len(every)
            for j in range(tiles.shape[2]):
                assert tiles[b, i, j].any() <= (j in partial | every), (b, i, j)
                assert tiles[b, i, j].all() or j not in every, (b, i, j)
    if name == "causal":
        assert (asked, full) == (2 * 3, 2 * 3)  # on the diagonal, and below it
    if name == "nothing visible":
        assert (asked, full) == (0, 0)


@pytest.mark.parametrize("name", CASES)
def test_flex_attention_equals_the_dense_mask(name: str) -> None:
    fields = CASES[name]
    times = {"query_time": fields["query_time"], "key_time": fields["key_time"]}
    rest = {k: v for k, v in fields.items() if k not in times}
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, heads, length, 8) for heads, length in
               ((4, T), (2, fields["key_time"].shape[1]), (2, fields["key_time"].shape[1])))  # fmt: skip
    with torch.no_grad():
        expected = attend(q, k, v, AttentionMask.from_times(**times, **rest, flex=False), 0.3)
        found = attend(q, k, v, AttentionMask(block_mask=block_mask(**fields)), 0.3)
    seen = (fields["query_time"] > -NEVER)[:, None, :, None]
    assert torch.allclose(found * seen, expected * seen, atol=1e-6)
    empty = ~rule(fields).any(-1)[:, None, :, None]
    assert not (found * empty).any()


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_iter(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_mask_of_all_pairs_is_made() -> None:
    length = 4096
    times = torch.arange(length)[None]
    documents = times // 1000
    with Largest() as largest:
        mask = AttentionMask.from_times(times, times, documents, documents, flex=True)
    assert mask.block_mask is not None and mask.mask is None and mask.empty_rows is None
    assert largest.elements <= 4 * length < length * length


PACKED = ["packed", "packed causal", "packed causal, padded", "packed, from 0 in each text"]


@pytest.mark.parametrize("name", PACKED)
def test_the_texts_of_packed_rows_give_the_rule(name: str) -> None:
    fields = CASES[name]
    texts = packed_texts(fields["query_time"], fields["key_time"], DOCUMENTS)
    assert texts is not None and texts.starts.dtype == torch.int32
    assert texts.causal == ("causal" in name or "from 0" in name)
    lengths = texts.starts.diff()
    assert texts.longest == lengths.max() and texts.starts[-1] == B * T
    number = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(B * T)
    seen = number[:, None] == number
    seen = seen & (place[:, None] >= place) if texts.causal else seen
    real = fields["query_time"] > -NEVER
    for row in range(B):
        own = seen[row * T : (row + 1) * T, row * T : (row + 1) * T]
        assert torch.equal(own[real[row]], rule(fields)[row][real[row]])


@pytest.mark.parametrize("name", ["prefix", "permuted", "two streams"])
def test_other_masks_have_no_texts(name: str) -> None:
    fields = CASES[name]
    assert packed_texts(fields["query_time"], fields["key_time"], ZERO) is None


def test_texts_that_are_not_adjacent_are_no_texts() -> None:
    back = torch.where(STEPS < 100, 0, torch.where(STEPS < 200, 1, 0))  # text 0 continues after text 1
    assert packed_texts(STEPS, STEPS, back) is None


@pytest.mark.parametrize("name", PACKED)
def test_variable_length_attention_equals_the_dense_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has its kernel on GPUs only: here each text is attended to by itself, from the inputs that the kernel gets."""

    def one_by_one(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, longest: int, most: int, *,
        scale: float, window_size: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        assert torch.equal(starts, key_starts) and longest == most and q.shape[:1] == (B * T,)
        bounds = [*zip(starts.tolist(), starts.tolist()[1:], strict=False)]
        return torch.cat([
            torch.nn.functional.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), scale=scale, is_causal=window_size == (-1, 0)
            )[0].transpose(0, 1)
            for a, b in bounds
        ])  # fmt: skip

    monkeypatch.setattr(varlen, "varlen_attn", one_by_one)
    fields = CASES[name]
    texts = packed_texts(fields["query_time"], fields["key_time"], DOCUMENTS)
    assert texts is not None
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, heads, T, 8) for heads in (4, 2, 2))
    with torch.no_grad():
        found = attend_packed(q, k, v, texts, 0.3)
        expected = attend(q, k, v, AttentionMask.from_times(**fields, flex=False), 0.3)
    seen = (fields["query_time"] > -NEVER)[:, None, :, None]
    assert torch.allclose(found * seen, expected * seen, atol=1e-6)
