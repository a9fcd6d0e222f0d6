"""Profile of a training step: time by phase and by kind of operator, with the lower bound that the arithmetic sets.

    python -m bench.speed.profile                # firth's causal step of bench/speed/causal.py, in the precision that training takes here
    python -m bench.speed.profile --precision fp32
    python -m bench.speed.profile --plain        # the plain fp32 loop, for comparison
    python -m bench.speed.profile --ops 25       # also the most expensive operators by input shape

The lower bound is the FLOPs of the matrix products over the GEMM rate measured in the same minute: no program that does
the same arithmetic in the same precision can be faster. The rest is memory traffic, kernels that are not GEMMs, and GEMMs of
shapes for which the library is slow.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench.harness import gemm_rate
from bench.speed.causal import (
    HIDDEN_SIZE,
    LENGTH,
    NUM_LAYERS,
    ROWS,
    VOCAB_SIZE,
    Plain,
    endless_batches,
    firth_setup,
    plain_optimizer,
    windows,
)  # fmt: skip
from firth import kernel_choice
from firth.training import device

KINDS = (
    ("casts and copies", ("copy_", "aten::cat", "aten::stack", "contiguous", "clone", "aten::to", "split")),
    ("linear", ("addmm", "aten::mm", "mkldnn_linear")),
    ("batched products", ("aten::bmm", "baddbmm")),
    ("fused attention", ("flash_attention", "scaled_dot_product")),
    ("norms", ("layer_norm", "rms_norm", "rsqrt")),
    ("activation", ("gelu", "relu", "tanh", "silu", "threshold", "aten::pow", "square")),
    ("softmax, cross-entropy", ("softmax", "nll_loss", "logsumexp")),
    ("embedding", ("embedding", "index", "gather", "scatter")),
    ("optimizer", ("_foreach", "_fused_adam", "lerp")),
    ("elementwise", ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::neg", "aten::sum", "aten::exp")),
)
"""Kind of operator -> substrings of operator names; the first match counts."""

Phases = list[tuple[str, Callable[[], object]]]


def flops() -> dict[str, float]:
    """Return the FLOPs of the matrix products of one step, forward and backward (three products per linear map)."""
    tokens = ROWS * LENGTH
    return {
        "blocks' linear maps": 6 * tokens * 12 * NUM_LAYERS * HIDDEN_SIZE**2,
        "vocabulary head": 6 * tokens * VOCAB_SIZE * HIDDEN_SIZE,
        "attention, the causal half": 3 * NUM_LAYERS * ROWS * 2 * 2 * LENGTH**2 * HIDDEN_SIZE / 2,
    }


def firth_phases(name: str, chosen: Literal["fp32", "bf16"]) -> Phases:
    """Return the phases of firth's step in order."""
    from firth.training.device import flush_denormals, keep_freed_memory
    from firth.training.optimizer import Optimizer, OptimizerConfig
    from firth.training.step import step

    keep_freed_memory()
    flush_denormals()
    casts = device.casts(chosen, torch.device("cpu"))
    model, objective, batches = firth_setup()
    optimizer = Optimizer(OptimizerConfig(name=name), model, sparse=True)  # type: ignore[arg-type]
    batches_made: list[Any] = []
    number = iter(range(1_000_000))

    def batch() -> None:
        batches_made[:] = batches.batches(next(number))

    return [
        ("build batch", batch),
        ("forward and backward", lambda: step(model, objective, batches_made, precision=casts)),
        ("clip", optimizer.clip_grad_norm),
        (f"optimizer step ({name})", lambda: optimizer.step(0.5)),
    ]


def plain_phases() -> Phases:
    model = Plain()
    optimizer = plain_optimizer(model, 6e-4)
    batches = endless_batches(windows(), ROWS, seed=0)
    batches_made: list[torch.Tensor] = []

    def batch() -> None:
        batches_made[:] = [next(batches)]

    def step_optimizer() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return [
        ("build batch", batch),
        ("forward and backward", lambda: model(batches_made[0][:, :-1], batches_made[0][:, 1:]).backward()),
        ("clip", lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0)),
        ("optimizer step (AdamW)", step_optimizer),
    ]


def operator_kind(operator: str) -> str:
    return next((k for k, parts in KINDS if any(p in operator for p in parts)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"))
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ops", type=int, default=0)
    args = parser.parse_args()
    chosen = "fp32" if args.plain else device.choose_precision(args.precision, torch.device("cpu"))
    phases = plain_phases() if args.plain else firth_phases(args.optimizer, chosen)
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(args.steps + 2):
        for name, work in phases:
            started = time.perf_counter()
            work()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    fastest = {name: min(seconds) for name, seconds in times.items()}
    total = sum(fastest.values())
    rate, products = gemm_rate(torch.bfloat16 if chosen == "bf16" else torch.float32), flops()
    lower_bound = sum(products.values()) / rate
    print(f"step {total * 1e3:,.0f} ms = {ROWS * LENGTH / total:,.0f} tokens/s (minimum of {args.steps} per phase)")
    print(
        f"lower bound {lower_bound * 1e3:,.0f} ms at {rate / 1e9:,.0f} GFLOP/s {chosen}: the step reaches {lower_bound / total:.0%} of it"
    )
    for name, n in products.items():
        print(f"  {name:36} {n / 1e9:7.1f} GFLOP {n / rate * 1e3:7.0f} ms at least")
    for name, seconds in fastest.items():
        print(f"  {name:36} {seconds * 1e3:7.0f} ms {seconds / total:6.1%}")
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as traced:
        for _ in range(2):
            for _, step_phase in phases:
                step_phase()
    kinds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in traced.key_averages():
        kinds[operator_kind(event.key)] += event.self_cpu_time_total / 2e3
        calls[operator_kind(event.key)] += event.count
    # The profiler slows the step down, small operators most: shares are of profiled time, milliseconds are scaled to the step.
    profiled = sum(kinds.values())
    print(
        f"by kind of operator, own time (kernels: {', '.join(f'{n}={c}' for n, c in kernel_choice.table().items())}):"
    )
    for name, ms in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {name:36} {ms / profiled * total * 1e3:7.0f} ms {ms / profiled:6.1%} {calls[name] // 2:6} calls")
    if args.ops:
        by_shape = traced.key_averages(group_by_input_shape=True)
        for event in sorted(by_shape, key=lambda e: -e.self_cpu_time_total)[: args.ops]:
            ms = event.self_cpu_time_total / 2e3
            print(f"  {ms:7.1f} ms x{event.count // 2:<4} {event.key:44} {str(event.input_shapes)[:90]}")


if __name__ == "__main__":
    main()
