"""FLOPs against torch's counter on the real model, and pairs against a dense mask."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.config_groups import PositionConfig
from firth.model.flops import real_tokens, supervised_positions, work
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.objective import supervised
from firth.types import IGNORE, NEVER, Batch


def random_batch(vocab: int, sides: tuple[str, ...]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    batch: Batch = {}
    for side, length in zip(sides, (12, 17), strict=False):
        shape = (3, length)
        batch[side + "tokens"] = torch.randint(1, vocab, shape, generator=generator)
        batch[side + "query_time"] = torch.randint(0, 9, shape, generator=generator, dtype=torch.int32)
        key_time = torch.randint(0, 9, shape, generator=generator, dtype=torch.int32)
        key_time[:, -3:] = NEVER  # padding
        batch[side + "query_time"][:, -3:] = -NEVER
        batch[side + "key_time"] = key_time
        batch[side + "document_ids"] = torch.randint(1, 4, shape, generator=generator, dtype=torch.int32)
    return batch


@pytest.mark.parametrize("sides", [("",), ("", "source_")])
def test_pairs_match_the_dense_mask(sides: tuple[str, ...]) -> None:
    batch = random_batch(30, sides)

    def pairs(query: str, key: str, query_time: torch.Tensor) -> int:
        real = (batch[query + "key_time"] != NEVER)[..., None]
        same = batch[query + "document_ids"][..., None] == batch[key + "document_ids"][:, None]
        return int((real & same & (batch[key + "key_time"][:, None] <= query_time[..., None])).sum())

    found = work(batch)
    assert real_tokens(batch) == found.positions + found.source_positions
    assert found.positions == 3 * 9
    assert found.pairs == pairs("", "", batch["query_time"])
    if "source_" in sides:
        assert found.source_positions == 3 * 14
        assert found.source_pairs == pairs("source_", "source_", batch["source_query_time"])
        assert found.crossing_pairs == pairs("", "source_", torch.full_like(batch["query_time"], NEVER - 1))


@pytest.mark.parametrize(
    "config",
    [
        decoder_config(vocab_size=70, hidden_size=32, num_layers=2, num_heads=2),
        encoder_config(vocab_size=70, hidden_size=32, num_layers=2, num_heads=2),
        encoder_decoder_config(vocab_size=70, hidden_size=32, num_layers=2, num_heads=2),
        ModelConfig(
            vocab_size=70,
            hidden_size=32,
            num_layers=1,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=40,
            position=PositionConfig("rotary"),
            activation="swiglu",
        ),
    ],
)
def test_flops_of_a_step_match_torch(config: ModelConfig) -> None:
    torch.manual_seed(0)
    objective = CausalLM()
    model = LM(config, objective.heads(config))
    batch: Batch = {"tokens": torch.randint(1, 70, (2, 12)), "labels": torch.randint(1, 70, (2, 12))}
    batch["labels"][:, :5] = IGNORE  # with subsets, the last block runs at 7 of 12 positions
    if config.encoder.num_layers:
        batch["source_tokens"] = torch.randint(1, 70, (2, 9))
    counted = work(batch)
    assert (counted.positions, counted.pairs) == (24, 2 * 12 * 12)  # no fields: all attend to all
    assert supervised_positions(batch["labels"]) == 14
    # The counter sees plain products only: no fused attention kernel on the CPU, no chunked head.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.heads["lm"](supervised(objective.forward(model, batch)["hidden"], batch["labels"])[0]).sum().backward()
    assert counter.get_total_flops() == objective.flops(model, batch)
