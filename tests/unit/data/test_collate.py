"""Batches: training does not depend on how a step is split, padded or packed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from firth.data import attention_fields
from firth.data.collate import Batches, build_examples, collate, first_fit, pack
from firth.data.shuffle import ExampleRNG
from firth.data.windows import ChunksConfig, Documents
from firth.model.attention import AttentionMask
from firth.model.config import ModelConfig
from firth.model.config_groups import EncoderConfig
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.preferences import DPO
from firth.objectives.reward_model import RewardModeling
from firth.objectives.sft import SFT
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Batch, Constraints, Example, Metric, UserError
from tests.support.tiny_corpus import Counting, store, tokenizer

VOCAB = Vocab(size=50, roles={"pad": 0}, special=np.arange(50) < 1)


@dataclass(frozen=True)
class UnknownObjective:
    """An objective that firth does not know: a new label field, a new metric, and random draws."""

    labels: ClassVar[dict[str, str]] = {"surprise": "wonder"}
    metrics: ClassVar[dict[str, Metric]] = {"awe": Metric("astonishment")}
    constraints: ClassVar[Constraints] = Constraints()

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        n = len(example["tokens"])
        return example | {"wonder": np.arange(n), "astonishment": rng.random(n), "draw": rng.random(n)}


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    """Return the real tokens of each row."""
    never = batch["key_time"] == NEVER if "key_time" in batch else torch.zeros_like(batch["tokens"], dtype=torch.bool)
    return [tuple(t[~n].tolist()) for t, n in zip(batch["tokens"], never, strict=True)]


def contents(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [row for batch in batches for row in rows_of(batch)]


def test_batches_depend_only_on_the_step() -> None:
    def make() -> Batches:
        return Batches(Counting(37), UnknownObjective(), VOCAB, batch_size=8, seed=4, gradient_accumulation_steps=2)

    first_run = [batch for step in range(12) for batch in make().batches(step)]
    resumed = [batch for step in range(7, 12) for batch in make().batches(step)]
    for one, other in zip(first_run[14:], resumed, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("rows", [8, 9, 13])
@pytest.mark.parametrize("packed", [0, 32])
def test_ranks_and_micro_batches_split_a_step_and_its_draws(rows: int, packed: int) -> None:
    def draws_of(world: int, accumulate: int) -> dict[tuple[int, ...], float]:
        found: dict[tuple[int, ...], float] = {}
        for rank in range(world):
            b = Batches(
                Counting(40), UnknownObjective(), VOCAB, batch_size=rows, seed=1, gradient_accumulation_steps=accumulate,
                rank=rank, world=world, pack_to_length=packed,
            )  # fmt: skip
            for batch in b.batches(3):
                for tokens, draw in zip(
                    batch["tokens"].flatten().tolist(), batch["draw"].flatten().tolist(), strict=True
                ):
                    if tokens:
                        found[tokens] = found.get(tokens, 0.0) + draw
        return found

    whole = draws_of(1, 1)
    assert len(whole) == rows
    for world, accumulate in ((1, 4), (2, 1), (2, 3), (4, 2)):
        cut = draws_of(world, accumulate)
        assert cut == pytest.approx(whole, abs=1e-5)


def test_every_epoch_has_every_example_once() -> None:
    b = Batches(Counting(30), UnknownObjective(), VOCAB, batch_size=10, seed=0)
    for epoch in range(2):
        seen = [row[0] for step in range(3) for row in contents(b.batches(3 * epoch + step))]
        assert sorted(seen) == list(range(1, 31))


def test_all_batches_cover_the_source_in_order_over_ranks() -> None:
    everything = [
        row[0]
        for row in contents(list(Batches(Counting(30), UnknownObjective(), VOCAB, batch_size=8, seed=0).all_batches()))
    ]
    assert everything == list(range(1, 31))
    shared = [
        row[0]
        for rank in range(3)
        for row in contents(
            list(
                Batches(Counting(30), UnknownObjective(), VOCAB, batch_size=4, seed=0, rank=rank, world=3).all_batches()
            )
        )
    ]
    assert sorted(shared) == everything


def test_padding_has_no_label_in_unknown_fields() -> None:
    b = Batches(Counting(40), UnknownObjective(), VOCAB, batch_size=16, seed=0)
    for packed in (0, 25):
        b.pack_to_length = packed
        batch = b.batches(0)[0]
        padding = batch["key_time"] == NEVER
        assert padding.any()
        assert (batch["wonder"][padding] == IGNORE).all()
        assert (batch["astonishment"][padding] == IGNORE).all()
        assert (batch["draw"][padding] == 0).all()
        assert (batch["wonder"][~padding] != IGNORE).all()


def test_unneeded_fields_are_omitted() -> None:
    same = [{"tokens": np.arange(4)}] * 3
    assert set(collate(same)) == {"tokens"}
    assert set(collate([*same, {"tokens": np.arange(3)}])) == {"tokens", "key_time"}
    assert set(pack(same, 4)) == {"tokens", "document_ids", "positions"}


def test_types_of_fields() -> None:
    example = {
        "tokens": np.arange(3, dtype=np.uint16), "labels": np.arange(3, dtype=np.int32), **attention_fields.causal(3),
        "document_ids": np.zeros(3, np.int64), "positions": np.arange(3), "old": np.zeros(3), "on": np.ones(3, bool), "choice": 1,
    }  # fmt: skip
    kinds = {name: str(field.dtype).removeprefix("torch.") for name, field in collate([example]).items()}
    assert kinds == {
        "tokens": "int64", "labels": "int64", "query_time": "int32", "key_time": "int32", "document_ids": "int32",
        "positions": "int32", "old": "float32", "on": "bool", "choice": "int64",
    }  # fmt: skip


def test_examples_may_differ_only_in_attention_fields() -> None:
    plain = {"tokens": np.array([1, 2])}
    several = {"tokens": np.array([3, 4, 5]), "document_ids": np.array([0, 0, 1]), **attention_fields.causal(3)}
    batch = collate([plain, several])
    assert batch["document_ids"].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert batch["query_time"].tolist() == [[0, 0, -NEVER], [0, 1, 2]]
    assert batch["key_time"].tolist() == [[0, 0, NEVER], [0, 1, 2]]
    with pytest.raises(ValueError, match="'old' is in 1 of 2"):
        collate([plain, plain | {"old": np.zeros(2)}])
    with pytest.raises(ValueError, match="'rank' is neither"):
        collate([plain | {"rank": np.zeros(3)}, plain | {"rank": np.zeros(4)}])


def test_grouped_rows_keep_their_axis() -> None:
    def row(n: int) -> Example:
        return {"tokens": np.arange(1, n + 1), **attention_fields.causal(n)}

    groups = [attention_fields.group([row(n), row(2)]) | {"choice": 0} for n in (2, 4)]
    batch = collate(groups)
    assert batch["tokens"].shape == (2, 2, 4)
    assert batch["choice"].shape == (2,)
    assert (batch["key_time"][0, :, 2:] == NEVER).all()
    packed = pack([{k: v for k, v in g.items() if k != "choice"} for g in groups], 6)
    assert packed["tokens"].tolist() == [[[1, 2, 3, 4, 1, 2], [1, 2, 0, 0, 1, 2]]]
    assert packed["key_time"].tolist() == [[[0, 1, 2, 3, 0, 1], [0, 1, NEVER, NEVER, 0, 1]]]
    assert packed["document_ids"].shape == packed["tokens"].shape


def test_packing_keeps_every_example_whole_and_isolated() -> None:
    source = Counting(60)
    examples = [source[i] | {"labels": np.arange(len(source[i]["tokens"]))} for i in range(60)]
    batch = pack(examples, 24)
    found = {}
    for tokens, labels, document, positions in zip(
        *(batch[k].tolist() for k in ("tokens", "labels", "document_ids", "positions")), strict=True
    ):
        for d in sorted(set(document) - {0}):
            at = [k for k, own in enumerate(document) if own == d]
            assert at == list(range(at[0], at[-1] + 1))
            assert [positions[k] for k in at] == list(range(len(at)))
            assert [labels[k] for k in at] == list(range(len(at)))
            found[tokens[at[0]]] = [tokens[k] for k in at]
        assert sorted(set(document) - {0}) == list(range(1, len(set(document) - {0}) + 1))
        assert all(t == 0 for t, d in zip(tokens, document, strict=True) if d == 0)
    assert found == {1 + i: e["tokens"].tolist() for i, e in enumerate(examples)}


def test_packing_continues_the_numbers_of_own_documents() -> None:
    a = {"tokens": np.arange(5), "document_ids": np.array([0, 0, 1, 2, 2])}
    b = {"tokens": np.arange(3)}
    assert pack([a, b], 8)["document_ids"].tolist() == [[1, 1, 2, 3, 3, 4, 4, 4]]


def test_packing_an_encoder_decoder_packs_both_sides() -> None:
    rng = np.random.default_rng(0)
    examples = [
        attention_fields.seq2seq(np.full(rng.integers(1, 15), i), np.full(rng.integers(1, 9), i), start=0)
        for i in range(1, 30)
    ]
    batch = pack(examples, 20)
    assert batch["source_tokens"].shape[0] == batch["tokens"].shape[0]
    seen = 0
    for row in range(len(batch["tokens"])):
        for d in set(batch["document_ids"][row].tolist()) - {0}:
            target = batch["labels"][row][batch["document_ids"][row] == d]
            source = batch["source_tokens"][row][batch["source_document_ids"][row] == d]
            assert len(set(source.tolist()) | set(target.tolist())) == 1
            assert batch["source_positions"][row][batch["source_document_ids"][row] == d].tolist() == list(
                range(len(source))
            )
            seen += 1
    assert seen == 29


def test_packing_rejects_unsupported_examples() -> None:
    with pytest.raises(UserError, match="no token axis"):
        pack([{"tokens": np.arange(3), "preferred": 0}], 8)
    with pytest.raises(UserError, match="9 tokens does not fit"):
        pack([{"tokens": np.arange(9)}], 8)


def test_first_fit_is_first_fit_decreasing() -> None:
    """Compare with the definition, and check the bound of 11/9 of the optimum."""
    rng = np.random.default_rng(0)
    for sides in (1, 2):
        for _ in range(50):
            lengths = rng.integers(0 if sides == 2 else 1, 21, (sides, rng.integers(1, 80)))
            lengths[0] = np.maximum(lengths[0], 1)
            rows, starts = first_fit(lengths, 20)
            used: list[np.ndarray] = []
            for i in np.lexsort((*lengths, -lengths.max(0))):
                row = next((r for r, u in enumerate(used) if (u + lengths[:, i] <= 20).all()), len(used))
                if row == len(used):
                    used.append(np.zeros(sides, np.int64))
                assert rows[i] == row
                assert starts[:, i].tolist() == used[row].tolist()
                used[row] = used[row] + lengths[:, i]
            if sides == 1:
                assert len(used) <= 11 / 9 * np.ceil(lengths.sum() / 20) + 1 or len(used) <= (lengths > 10).sum() + 1


@pytest.mark.parametrize("encoder", [0, 1])
def test_padding_and_packing_do_not_change_outputs(encoder: int) -> None:
    torch.manual_seed(0)
    model = LM(
        ModelConfig(
            vocab_size=50,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            intermediate_size=64,
            max_positions=64,
            encoder=EncoderConfig(num_layers=encoder),
        ),
        {},
    ).double()
    rng = np.random.default_rng(1)
    examples = []
    for _ in range(12):
        tokens = rng.integers(1, 50, rng.integers(3, 20))
        shown = CausalLM().build_example({"tokens": tokens}, VOCAB, rng)
        examples.append(shown | ({"source_tokens": rng.integers(1, 50, rng.integers(1, 15))} if encoder else {}))
    alone = [model(collate([e]))[0] for e in examples]
    padded = model(collate(examples))
    for one, row in zip(alone, padded, strict=True):
        torch.testing.assert_close(row[: len(one)], one, atol=1e-9, rtol=1e-7)
    batch = pack(examples, 24)
    packed = model(batch)
    answers = {tuple(e["tokens"].tolist()): one for e, one in zip(examples, alone, strict=True)}
    seen = 0
    for row in range(len(packed)):
        for d in set(batch["document_ids"][row].tolist()) - {0}:
            at = batch["document_ids"][row] == d
            torch.testing.assert_close(
                packed[row][at], answers[tuple(batch["tokens"][row][at].tolist())], atol=1e-9, rtol=1e-7
            )
            seen += 1
    assert seen == len(examples)


def preference(rng: np.random.Generator) -> Example:
    """A preference pair with answers of different lengths and reference log-probabilities."""
    example: Example = {"reference": rng.normal(size=2)}
    for which in ("chosen", "rejected"):
        n = int(rng.integers(4, 20))
        example |= {f"{which}_tokens": rng.integers(1, 50, n), f"{which}_mask": np.arange(n) >= 2}
    return example


@pytest.mark.parametrize("objective", [CausalLM(), SFT(), DPO(), RewardModeling()], ids=lambda o: type(o).__name__)
def test_causal_rows_with_end_padding_use_the_causal_kernel(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses and gradients are those of each row alone."""
    masks: list[AttentionMask] = []
    from_times = AttentionMask.from_times
    monkeypatch.setattr(AttentionMask, "from_times", lambda *given: masks.append(from_times(*given)) or masks[-1])
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_positions=64
    )
    model = LM(config, objective.heads(config))
    rng = np.random.default_rng(1)
    shown = [objective.build_example({"tokens": rng.integers(1, 50, n), "mask": np.arange(n) >= 3} | preference(rng), VOCAB, rng)
             for n in (19, 4, 11, 7)]  # fmt: skip

    def learn(batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        terms = [objective.loss(model, objective.forward(model, b), b) for b in batches]
        loss = sum((t[name] for t in terms for name in objective.labels), start=torch.zeros(()))
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    batch = collate(shown)
    assert (batch["key_time"] == NEVER).any(), "nothing is padded here"
    together, gradients = learn([batch])
    last = [False] if isinstance(objective, RewardModeling) else []  # its last block runs for one token of a row
    assert [mask.is_causal for mask in masks] == [True, *last]
    assert masks[0].mask is None
    alone, expected_gradients = learn([collate([one]) for one in shown])
    assert together == pytest.approx(alone, rel=1e-5)
    assert len(gradients) == len(expected_gradients) > 20
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)
    # The same rows with padded queries that attend: another kernel, the same results.
    attending, _ = learn([batch | {"query_time": batch["query_time"].clamp(min=0)}])
    assert not masks[-1 - len(last)].is_causal
    assert attending == pytest.approx(together, rel=1e-5)


def test_batches_reject_empty_sources_and_small_steps() -> None:
    with pytest.raises(UserError, match="cannot be shared"):
        Batches(Counting(10), UnknownObjective(), VOCAB, batch_size=3, seed=0, gradient_accumulation_steps=2, world=2)
    with pytest.raises(UserError, match="nothing to train on"):
        Batches(Counting(0), UnknownObjective(), VOCAB, batch_size=3, seed=0)


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.9])
@pytest.mark.parametrize("with_special_tokens", [False, True])
def test_masking_many_examples_equals_masking_each(tmp_path: Path, rate: float, with_special_tokens: bool) -> None:
    """At a rate of 0.9 more tokens are masked than are drawn at once."""
    made, vocab = store(tmp_path), tokenizer().vocab
    pieces = Documents(ChunksConfig(max_length=24, add_special_tokens=with_special_tokens), made, vocab)
    indices = np.array([3, 0, len(pieces) - 1, 7, 7])
    streams = [(epoch, int(i)) for epoch, i in enumerate(indices)]
    examples = pieces.many(indices.tolist())
    draws, objective = ExampleRNG(5, "view"), MLM(mlm_probability=rate)
    for i, example, found, stream in zip(
        indices, examples, build_examples(objective, examples, vocab, draws, streams), streams, strict=True
    ):
        assert np.array_equal(example["tokens"], pieces[int(i)]["tokens"])
        alone = objective.build_example(pieces[int(i)], vocab, draws.at(*stream))
        assert alone.keys() == found.keys()
        for name in alone:
            assert np.array_equal(alone[name], found[name]) and alone[name].dtype == found[name].dtype
