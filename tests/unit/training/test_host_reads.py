"""What the host reads of tensors of the device in a training step: each read makes it wait for the device.

The reads are those of docs/how-to/train-on-several-processes.md. They are counted on the CPU, where the same code runs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from firth.data.collate import Batches
from firth.model.attention_kernels import packed_texts
from firth.model.config import decoder_config, encoder_config, encoder_decoder_config
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective, supervised
from firth.objectives.preferences import DPO
from firth.objectives.replaced_tokens import RTD
from firth.objectives.semi_supervised import WeightPenalty
from firth.objectives.seq2seq import SpanCorruption
from firth.training import trainer
from firth.training.distributed import Ranks
from firth.training.logging import NullReporter, read_metrics
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule
from firth.training.trainer import TrainerConfig
from firth.types import IGNORE, NEVER, Batch, with_host_copy
from tests.support.objective_cases import VOCAB, plain_text, special_tokens_text
from tests.support.shard_ranks import RandomExamples, comparison

PACKAGE = Path(__file__).parents[3] / "firth"
READS = {"item", "tolist", "numpy", "nonzero", "unique", "masked_select", "__bool__", "__int__", "__float__", "__index__",
         "is_nonzero", "equal", "allclose"}  # fmt: skip
"""Functions whose result depends on the numbers of a tensor, so that the host waits for them."""
COPIES = {"tensor", "as_tensor"}
"""Functions that copy numbers of the host to a device, if one is named: the host waits for all that the device has to do."""
ON_THE_HOST = ("flops.", "collate.", "native.", "cross_entropy._score_native", "kernel_choice.")
"""Readers of tensors of the host: batches before they are copied, and inputs of compiled kernels of the CPU."""
ON_A_CPU = {
    "attention._masked",
    "optimizer.coalesced",
    "optimizer._add_rows",
    "optimizer._update_native",
    "optimizer.clip_grad_norm",
}
"""Readers of tensors of the device if that is the CPU, which does not wait for itself: empty rows of a mask, AdamW on the rows
of an embedding table, whether the norm is above its limit."""


class HostReads(TorchFunctionMode):
    """Counts the reads in a function of `_Run` by the function of firth that reads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        masked = name == "__getitem__" and any(
            isinstance(x, Tensor) and x.dtype == torch.bool
            for x in (args[1] if isinstance(args[1], tuple) else args[1:])
        )
        if name in READS or masked or (name in COPIES and (kwargs or {}).get("device") is not None):
            frame: Any = sys._getframe(1)
            own = []
            while frame is not None:
                path = Path(frame.f_code.co_filename)
                own += [f"{path.stem}.{frame.f_code.co_name}"] if PACKAGE in path.parents else []
                frame = frame.f_back
            if (
                own
                and not isinstance(args[0], HostCopy)
                and not any(one.startswith(ON_THE_HOST) or one.endswith(".flops") for one in own)
            ):
                self.found[own[0]] += 1
        return func(*args, **(kwargs or {}))


EVERY_STEP = {"trainer._step": 1}
"""Whether the step is skipped, on a CPU. What depends on the numbers of a batch (the form of its mask, the positions that the last
block runs at, those with labels) is read from the copy of the batch in main memory."""


class HostCopy(Tensor):
    """A tensor of the host; so are the results of operations on it."""


def copied(batch: Batch, _: torch.device) -> Batch:
    """Return a batch as `firth.training.step.to` copies it to an accelerator."""
    return {name: with_host_copy(x.clone(), x.as_subclass(HostCopy)) for name, x in batch.items()}


CASES: dict[str, tuple[Objective, Any, Any]] = {
    "clm": (CausalLM(), decoder_config(101, 32, 2, num_heads=2, max_positions=64), plain_text),
    "mlm": (MLM(), encoder_config(101, 32, 2, num_heads=2, max_positions=64), special_tokens_text),
    "rtd": (RTD(), encoder_config(101, 32, 2, num_heads=2, max_positions=64), special_tokens_text),
    "dpo": (DPO(), decoder_config(101, 32, 2, num_heads=2, max_positions=64), comparison),
    "span corruption": (
        SpanCorruption(),
        encoder_decoder_config(101, 32, 2, num_heads=2, max_positions=64),
        plain_text,
    ),
    "penalty": (
        CausalLM() + WeightPenalty(weight=0.01),
        decoder_config(101, 32, 2, num_heads=2, max_positions=64),
        plain_text,
    ),
}


def count(method: str, monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Return a list that gets the reads of each call of a method of `_Run`."""
    counted: list[Counter[str]] = []
    original = getattr(trainer._Run, method)

    def counting(run: Any, *arguments: Any) -> Any:
        with HostReads() as reads:
            result = original(run, *arguments)
        counted.append(reads.found)
        return result

    monkeypatch.setattr(trainer._Run, method, counting)
    return counted


@pytest.mark.parametrize(
    ("name", "accumulate", "optimizer"),
    [*((name, 1, "adamw") for name in CASES), ("clm", 3, "muon"), ("mlm", 1, "muon")],
)
def test_a_step_on_a_gpu_reads_nothing(
    name: str, accumulate: int, optimizer: Literal["adamw", "muon"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU each step is read. As on a GPU, 11 steps are read twice, and give the same losses and weights."""
    objective, config, make = CASES[name]
    counted, read = count("_step", monkeypatch), count("_read", monkeypatch)

    def train(directory: Path) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = LM(config, objective.heads(config))
        batches = Batches(
            RandomExamples(make), objective, VOCAB, batch_size=12, seed=0, gradient_accumulation_steps=accumulate
        )
        trainer.train(
            model, objective, batches, directory, budget=Budget(max_steps=11), optimizer=OptimizerConfig(optimizer),
            schedule=Schedule("constant"), config=TrainerConfig(precision="fp32", save_every=0), reporter=NullReporter(),
            ranks=Ranks(),
        )  # fmt: skip
        return model.state_dict()

    tolerance = 1e-5 if optimizer == "adamw" else 1e-2  # Muon enlarges rounding, and may compute in bf16
    own = train(tmp_path / "own")
    assert all(found.total() > 1 for found in counted)
    counted.clear()
    monkeypatch.setattr(trainer, "to", copied)
    same = train(tmp_path / "copied")
    assert len(counted) == 11
    for one in counted:
        assert Counter({key: n for key, n in one.items() if key not in ON_A_CPU}) == Counter(EVERY_STEP)
    assert all(torch.equal(own[name], same[name]) for name in own)

    counted.clear()
    read.clear()
    monkeypatch.setattr(trainer, "defers_reads", lambda device: True)
    late = train(tmp_path / "late")
    assert len(counted) == 11
    for one in counted:
        assert one.keys() <= {"attention._masked"}  # on a CPU only
    assert [found for found in read if found] == [Counter({"trainer._read": 1})] * 2
    rows = [read_metrics(tmp_path / one / "metrics.jsonl") for one in ("own", "late")]
    assert [row["step"] for row in rows[1]] == [*range(1, 12)]
    for one, other in zip(*rows, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["flops"] == other["flops"]
        for metric in ("loss", "norm"):
            assert one[metric] == pytest.approx(other[metric], rel=tolerance)
    assert all((own[name] - late[name]).abs().max() < tolerance for name in own)


def test_the_counter_counts() -> None:
    labels = torch.tensor([[1, IGNORE, 2]])
    with HostReads() as reads:
        supervised(torch.zeros(1, 3, 4), labels)
    assert reads.found == {"objective.label_indices": 1}


def test_packed_texts_are_found_from_the_copy_in_main_memory() -> None:
    times = torch.tensor([[0, 1, 2, 3, 4, 5, 6, NEVER], [0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.int32)
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3], [0, 0, 0, 0, 1, 1, 2, 2]], dtype=torch.int32)
    queries = times.masked_fill(times == NEVER, -NEVER)
    expected = packed_texts(queries, times, documents)
    batch = copied({"q": queries, "k": times, "d": documents}, torch.device("cpu"))
    with HostReads() as reads:
        found = packed_texts(batch["q"], batch["k"], batch["d"])
    assert not reads.found
    assert expected is not None and found is not None
    assert torch.equal(found.starts, expected.starts)
    assert not isinstance(found.starts, HostCopy)
    assert (found.longest, found.causal) == (expected.longest, expected.causal) == (4, True)
