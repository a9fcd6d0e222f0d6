"""Build models in shards and count the memory of each rank; started by torchrun.

torchrun --nproc-per-node 4 tests/support/shard_build.py build OUT          initialize 386 M parameters
torchrun --nproc-per-node 2 tests/support/shard_build.py start OUT FROM     read a start model
torchrun --nproc-per-node 2 tests/support/shard_build.py shape OUT          divide 7 B parameters without data

Each rank writes OUT/RANK.json: bytes of the whole model, of this rank's shards, of the largest unit that is gathered, and the
peak of the resident size while the model was built, or of the private memory while the start model was read.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from bench.harness import reset_peak, resident
from firth.model.config import ModelConfig, decoder_config
from firth.model.heads import LMHead
from firth.model.init import record_init
from firth.model.model import LM
from firth.model.shard_tensors import gathered, local
from firth.pretrained.load_save import init_from
from firth.training.distributed import Ranks, join
from firth.training.sharding import Shards, divide, make_mesh
from tests.support.streamed_export import CONFIG

LARGE = decoder_config(vocab_size=4096, hidden_size=1024, num_layers=30, num_heads=16, max_positions=64)
SEVEN_B = decoder_config(
    vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, intermediate_size=16384, max_positions=4096
)


def bytes_of(parameters: object) -> int:
    return sum(4 * p.numel() for p in parameters)  # type: ignore[attr-defined]


def sampled_peak(work: Callable[[], object]) -> int:
    """Return the most private memory (RssAnon) of this process while `work` runs. Pages of mapped files do not count."""
    most, done = resident("RssAnon"), threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, resident("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return most


def main(command: str, out: Path, ranks: Ranks) -> None:
    torch.set_num_threads(1)
    config: ModelConfig = {"build": LARGE, "start": CONFIG, "shape": SEVEN_B}[command]
    make_mesh(ranks, ranks.world, torch.device("cpu"))
    ranks.sum(torch.zeros(1))
    start = resident("RssAnon" if command == "start" else "VmRSS")
    reset_peak()
    torch.manual_seed(0)
    with record_init() as record:
        model = LM(config, {"lm": LMHead(config)})
    whole, blocks = bytes_of(model.parameters()), [bytes_of(block.parameters()) for block in model.stack.blocks]  # type: ignore[union-attr, arg-type, operator]
    unit = max(*blocks, whole - sum(blocks))
    sums: dict[str, float] = {}
    if command == "shape":
        divide(model, make_mesh(ranks, ranks.world, torch.device("cpu")))
        assert all(p.is_meta for p in model.parameters())
    else:
        Shards(model, ranks, ranks.world, torch.device("cpu"), record=record)
    peak = resident("VmHWM") - start
    if command == "start":
        peak = sampled_peak(lambda: init_from(model, Path(sys.argv[3]))) - start
    own = bytes_of(local(p) for p in model.parameters())
    if command == "start":
        sums = {name: float(gathered(p.detach()).double().sum()) for name, p in model.named_parameters()}
    found = {"whole": whole, "own": own, "unit": unit, "peak": peak, "sums": sums}
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.wait()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), join())
    torch.distributed.destroy_process_group()
