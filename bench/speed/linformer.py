"""Time and memory of Linformer and full attention, from 512 to 16,384 tokens: one forward and backward pass.

    python -m bench.speed.linformer                    # every length, a table for docs/results/index.md; about five minutes
    python -m bench.speed.linformer --check            # equal outputs under identity projections; no timing
    python -m bench.speed.linformer --longest 2048     # fewer lengths

One row of T tokens through the stack of an encoder (2 layers, hidden size 256, 4 heads, rotary positions), no head.
Candidates: `linformer` with 128 slots; `full`, firth's default attention (blocks up to 512 tokens, torch's flash kernel
beyond, which needs T memory and T^2 time); and `written out`, softmax(Q K') V as in the paper's baseline, with T^2
memory too, up to 4,096 tokens. Each measurement is a process of its own: memory is its peak resident size minus its size
with the model built, time the minimum of `--repeats` passes after one that does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from bench.harness import busy_seconds, describe, machine, other_load, peak_mb

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SLOTS = 128
CANDIDATES = ("linformer", "full", "written out")
WRITTEN_OUT = 4096
"""Longest row, in tokens, with all attention weights in memory: 16 T^2 bytes per layer and copy."""


def measure(candidate: str, length: int, repeats: int) -> dict[str, float]:
    """Return the seconds of a pass and its peak memory in MB, measured in this process."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from firth import kernel_choice
    from firth.model.attention import ATTENTION
    from firth.model.config import encoder_config
    from firth.model.model import LM

    torch.manual_seed(0)
    config = encoder_config(vocab_size=1000, hidden_size=256, num_layers=2, num_heads=4, max_positions=max(LENGTHS))
    if candidate == "linformer":
        config = config.with_fields({"attention.linformer.k": SLOTS})
    if candidate == "written out":
        kernel_choice.use({kernel.name: "sdpa" for kernel in ATTENTION.values()})
    backends = [SDPBackend.MATH] if candidate == "written out" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    model = LM(config, {})
    tokens = torch.randint(0, 1000, (1, length))
    held = resident_mb()
    before, started, own = busy_seconds(), time.perf_counter(), time.process_time()
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with sdpa_kernel(backends, set_priority=True):
            model({"tokens": tokens}).sum().backward()
        times.append(time.perf_counter() - start)
    used = other_load(before, busy_seconds(), time.process_time() - own, time.perf_counter() - started)
    return {"seconds": min(times[1:]), "mb": peak_mb() - held, "others": -1.0 if used is None else used}


def resident_mb() -> float:
    """Return the resident size of this process in MB; 0 if unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * 4096 / 1e6


def check() -> None:
    """Assert that Linformer with identity projections equals full attention."""
    import torch

    from firth.model.config import encoder_config
    from firth.model.model import LM

    torch.manual_seed(0)
    config = encoder_config(vocab_size=1000, hidden_size=64, num_layers=2, num_heads=2, max_positions=64)
    full, short = LM(config, {}), LM(config.with_fields({"attention.linformer.k": 64}), {})
    short.load_state_dict(full.state_dict() | {"stack.linformer.weight": torch.eye(64)[None, None]})
    for module in (full, short):
        for name, p in module.named_parameters():
            if name.endswith(("o.weight", "down.weight")):
                torch.nn.init.constant_(p, 0.01)
    tokens = torch.randint(0, 1000, (2, 64))
    torch.testing.assert_close(full({"tokens": tokens}), short({"tokens": tokens}), atol=1e-4, rtol=0)
    print("identity projections: equal outputs")


def table(found: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of measurements by `CANDIDATE LENGTH`."""
    lines = [
        "| tokens | " + " | ".join(f"{c}, s" for c in CANDIDATES) + " | "
        + " | ".join(f"{c}, MB" for c in CANDIDATES) + " | full / linformer, time |",
        "|" + "---|" * (2 + 2 * len(CANDIDATES)),
    ]  # fmt: skip
    for length in LENGTHS:
        rows = [found.get(f"{c} {length}") for c in CANDIDATES]
        if not any(rows):
            continue
        seconds = [f"{r['seconds']:.3f}{'!' if r['others'] > 0.03 else ''}" if r else "" for r in rows]
        memory = [f"{r['mb']:.0f}" if r else "" for r in rows]
        ratio = f"{rows[1]['seconds'] / rows[0]['seconds']:.2f}" if rows[0] and rows[1] else ""
        lines.append(f"| {length:,} | {' | '.join(seconds)} | {' | '.join(memory)} | {ratio} |")
    return "\n".join([*lines, "", "`!`: other processes used more than 3% of the machine."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="assert that the comparison is fair; no timing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--longest", type=int, default=max(LENGTHS))
    parser.add_argument(
        "--save", type=Path, default=Path("runs/linformer.json"), help="existing measurements are not repeated"
    )
    parser.add_argument("--table", action="store_true", help="print the existing measurements")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.repeats)))
        return
    if args.check:
        check()
        return
    found: dict[str, dict[str, float]] = json.loads(args.save.read_text()) if args.save.exists() else {}
    for length in LENGTHS if not args.table else ():
        for candidate in CANDIDATES:
            name = f"{candidate} {length}"
            if name in found or length > args.longest or (candidate == "written out" and length > WRITTEN_OUT):
                continue
            command = [
                sys.executable,
                "-m",
                "bench.speed.linformer",
                "--repeats",
                str(args.repeats),
                "--one",
                candidate,
            ]
            output = subprocess.run([*command, str(length)], check=True, capture_output=True, text=True).stdout
            found[name] = json.loads(output.strip().splitlines()[-1])
            print(name, found[name], file=sys.stderr, flush=True)
            args.save.parent.mkdir(parents=True, exist_ok=True)
            args.save.write_text(json.dumps(found, indent=1))
    print(table(found))
    print(describe(machine()))


if __name__ == "__main__":
    main()
