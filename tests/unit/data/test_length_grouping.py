"""Length-grouped batches: every example occurs once per epoch, a run resumes exactly, and sums are unchanged."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.data.collate import Batches
from firth.data.dialogues import Seq2SeqConfig
from firth.data.labeled import LabeledConfig
from firth.data.records import Records
from firth.data.shuffle import length_grouped_batches
from firth.data.source import MixtureSource, Source, SubsetSource
from firth.model.config import encoder_config
from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.types import Example, UserError
from tests.support.tiny_corpus import Counting, tokenizer


class Sized(Counting):
    """Counting, with known lengths."""

    @property
    def lengths(self) -> np.ndarray:
        return self.token_counts

    def __getitem__(self, index: int) -> Example:
        return super().__getitem__(index) | {"label": index % 3}


OBJECTIVE = Classification(class_names=("a", "b", "c"))


def batches(n: int = 53, *, rows: int = 4, sort: int = 5, seed: int = 3, **more: int) -> Batches:
    return Batches(Sized(n), OBJECTIVE, tokenizer().vocab, batch_size=rows, seed=seed, group_by_length=sort, **more)


@pytest.mark.parametrize(("n", "rows", "sort"), [(53, 4, 5), (40, 4, 5), (7, 3, 50), (1, 1, 2)])
def test_grouping_keeps_epochs_and_moves_examples_little(n: int, rows: int, sort: int) -> None:
    made, steps = batches(n, rows=rows, sort=sort), 6 * sort
    positions = np.stack([made.positions(step) for step in range(steps)])
    assert np.array_equal(np.sort(positions.ravel()), np.arange(steps * rows))
    original = positions // rows  # the step without grouping
    assert (np.abs(original - np.arange(steps)[:, None]) < sort).all()
    epochs, indices = made.source.order(made.seed, positions.ravel())
    for epoch in range(steps * rows // n):
        assert np.array_equal(np.sort(indices[epochs == epoch]), np.arange(n))


def test_batches_depend_only_on_seed_and_step() -> None:
    first_run, resumed = batches(), batches()
    whole = [first_run.batches(step) for step in range(23)]
    for step in (22, 7, 13):  # in any order
        [one], [other] = whole[step], resumed.batches(step)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    other_seed = batches(seed=4)
    assert any(not np.array_equal(first_run.positions(s), other_seed.positions(s)) for s in range(5))


def test_ranks_and_micro_batches_split_a_step() -> None:
    """Each reads its part of the same examples."""
    for step in (0, 9):
        [whole] = batches(rows=8).batches(step)
        micro_batches = [
            p
            for rank in range(2)
            for p in batches(rows=8, rank=rank, world=2, gradient_accumulation_steps=2).batches(step)
        ]
        firsts = [row[0].item() for batch in micro_batches for row in batch["tokens"]]
        assert firsts == whole["tokens"][:, 0].tolist()


def test_lengths_within_a_step_are_similar_and_steps_shuffled() -> None:
    plain, grouped = (batches(400, rows=8, sort=sort) for sort in (0, 25))
    slots = [sum(m.batches(step)[0]["tokens"].numel() for step in range(50)) for m in (plain, grouped)]
    useful = sum(int(grouped.source.lengths[i]) for i in grouped.source.order(3, np.arange(400))[1])  # type: ignore[index]
    assert slots[1] < 1.08 * useful < slots[0] / 1.3
    lengths = [grouped.batches(step)[0]["tokens"].shape[1] for step in range(25)]
    assert lengths != sorted(lengths)
    assert abs(np.corrcoef(lengths, np.arange(25))[0, 1]) < 0.6


def test_grouping_is_a_permutation_that_differs_by_group() -> None:
    sizes = np.random.default_rng(0).integers(1, 9, 60)
    dealt = [length_grouped_batches(sizes, 10, 0, number) for number in range(3)]
    for one in dealt:
        assert np.array_equal(np.sort(one.ravel()), np.arange(60))
        steps = sorted(sizes[one].tolist(), key=sum)
        assert all(max(low) <= min(high) for low, high in pairwise(steps))
    assert not np.array_equal(dealt[0], dealt[1])


def test_loss_and_gradient_sums_are_unchanged() -> None:
    config = encoder_config(
        vocab_size=tokenizer().vocab.size, hidden_size=32, num_layers=1, num_heads=2, max_positions=32
    )
    torch.manual_seed(0)
    model = LM(config, OBJECTIVE.heads(config)).eval()
    torch.nn.init.normal_(model.heads["classes"].weight, std=1.0)

    def total(made: Batches) -> torch.Tensor:
        model.zero_grad()
        each = []
        for step in range(10):
            [batch] = made.batches(step)
            each.append(OBJECTIVE.loss(model, OBJECTIVE.forward(model, batch), batch)["class"])
        loss = torch.stack(each).sum()
        loss.backward()
        return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])

    torch.testing.assert_close(total(batches(sort=5)), total(batches(sort=0)), rtol=1e-5, atol=1e-5)


def test_source_lengths_follow_token_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{'word ' * (i % 7 + 1)},{i % 2}\n" for i in range(30)))
    source = Records(LabeledConfig(max_length=64), [str(path)], tokenizer())
    tokens = np.array([len(source[i]["tokens"]) for i in range(len(source))])
    assert np.array_equal(np.argsort(source.lengths, kind="stable"), np.argsort(tokens, kind="stable"))
    some = np.array([4, 2, 9])
    part = SubsetSource(source, some)
    assert np.array_equal(part.lengths, source.lengths[some])  # type: ignore[arg-type]
    mixed = MixtureSource([source, part], [2, 1])
    assert np.array_equal(mixed.lengths, np.concatenate((source.lengths, source.lengths[some])))  # type: ignore[arg-type]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join('{"prompt": "%s", "completion": "yes"}\n' % ("why " * (9 - i)) for i in range(8)))
    assert np.all(
        np.diff(Records(Seq2SeqConfig(max_length=64, max_target_length=64), [str(lines)], tokenizer()).lengths) < 0
    )


def test_grouping_needs_known_lengths() -> None:
    class Unknown(Source):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Example:
            return {"tokens": np.array([index])}

    assert MixtureSource([Unknown(), Sized(3)], [1, 1]).lengths is None
    with pytest.raises(UserError, match=r"set batch\.group_by_length=0"):
        Batches(Unknown(), OBJECTIVE, tokenizer().vocab, batch_size=2, seed=0, group_by_length=3)
