"""Write a model as a checkpoint in two parts, and copy it to a model directory; prints bytes and peak memory.

python tests/support/streamed_export.py write FOLDER
python tests/support/streamed_export.py whole|streamed FOLDER OUT
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.harness import reset_peak, resident
from firth.model.config import decoder_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.pretrained.load_save import describe_model, load_model, open_model, save_model
from firth.training import checkpoint

CONFIG = decoder_config(vocab_size=4096, hidden_size=512, num_layers=16, num_heads=8, max_positions=64)


def write(folder: Path) -> None:
    """Write the checkpoint of a model as two ranks do: each weight in halves, in files that name their place."""
    torch.manual_seed(0)
    model = LM(CONFIG, {"lm": LMHead(CONFIG)})
    for p in model.parameters():
        torch.nn.init.normal_(p)

    def halves(place: Path) -> dict[str, Any]:
        (place / "shards").mkdir()
        found = {}
        for rank in range(2):
            parts, where = {}, {}
            for name, p in checkpoint.weights(model).items():
                size = -(-len(p) // 2)
                start = rank * size
                parts[f"model/{name}"] = p.detach()[start : start + size].contiguous()
                where[f"model/{name}"] = {"saved_offsets": [start] + [0] * (p.dim() - 1)}
            path = place / f"shards/shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
            save_file(parts, path, {"DCP_SHARDING_INFO": json.dumps(where)})
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[f"shards/{path.name}"] = {"bytes": path.stat().st_size, "sha256": digest}
        return found

    description = describe_model(model, None) | {"facts": {}}
    checkpoint.save(
        folder, 1, {}, {"step": 1}, layout={}, recipe="r", write_shards=halves, description=description
    )  # fmt: skip
    save_model(model, None, folder / "expected")


def copy(folder: Path, out: Path, streamed: bool) -> None:
    """Read the checkpoint and write a model directory."""
    place = folder / "checkpoints/step-000001"
    torch.set_num_threads(1)
    before = resident("VmRSS")
    reset_peak()
    if streamed:
        model, read = open_model(place)
        save_model(model, None, out, read=read)
    else:
        save_model(load_model(place), None, out)
    print(sum(4 * p.numel() for p in model.parameters()) if streamed else 0, resident("VmHWM") - before)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        copy(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[1] == "streamed")
