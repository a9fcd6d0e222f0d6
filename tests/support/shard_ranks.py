"""First steps of training on several ranks, for each way to spread a model; started by torchrun, or as a single process.

torchrun --nproc-per-node 2 -m tests.support.shard_ranks OUT none 2 full 1 ... [cases NAME ...]

Each pair is a way of `distributed.shard` and a number of micro-batches. OUT gets WAY-ACCUMULATE-CASE.safetensors with the summed
gradients and the losses of the first step, the validation metrics before it, and the weights after two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file

from firth.align.advantages import GAE
from firth.align.rewards import FunctionReward
from firth.align.rollouts import RolloutsConfig, RolloutSource
from firth.data.collate import Batches
from firth.data.source import Source
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.init import record_init
from firth.model.model import LM, compile_blocks
from firth.model.shard_tensors import gathered
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.policy_gradient import PPO
from firth.objectives.preferences import DPO
from firth.objectives.replaced_tokens import RTD
from firth.objectives.semi_supervised import WeightPenalty
from firth.objectives.seq2seq import SpanCorruption
from firth.objectives.sft import SFT
from firth.peft import lora
from firth.training.distributed import DistributedConfig, Parallel, Ranks, Replicas, join
from firth.training.optimizer import Optimizer, OptimizerConfig
from firth.training.sharding import Shards
from firth.training.step import SINGLE, step, validate
from firth.types import Example
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.objective_cases import VOCAB, plain_text, special_tokens_text

ROWS = 11
"""Examples of a step: no number of ranks divides them."""


def dialogue(rng: np.random.Generator) -> Example:
    """Return a dialogue of which a third has no answer: a rank may have few labels or none."""
    example = plain_text(rng)
    start = 3 if rng.random() < 0.7 else len(example["tokens"])
    return example | {"mask": np.arange(len(example["tokens"])) >= start}


def comparison(rng: np.random.Generator) -> Example:
    sides = {f"{side}_{k}": v for side in ("chosen", "rejected") for k, v in dialogue_with_answer(rng).items()}
    return sides | {"reference": rng.normal(size=2)}


def dialogue_with_answer(rng: np.random.Generator) -> Example:
    example = plain_text(rng)
    return example | {"mask": np.arange(len(example["tokens"])) >= 3}


@dataclass(frozen=True)
class Case:
    """An objective with a model and its examples.

    Args:
        objective: The objective.
        config: The model.
        make: Returns a random example.
        lora: Whether only LoRA's matrices are trained.
        checkpointing: Whether activations are computed again in the backward pass.
        compiled: Whether the blocks are compiled.
    """

    objective: Objective
    config: ModelConfig
    make: Callable[[np.random.Generator], Example] = plain_text
    lora: bool = False
    checkpointing: bool = False
    compiled: bool = False


DECODER = decoder_config(vocab_size=101, hidden_size=32, num_layers=2, num_heads=2, max_positions=64)
ENCODER = encoder_config(101, 32, 2, num_heads=2, max_positions=64)
SEQ2SEQ = encoder_decoder_config(101, 32, 2, num_heads=2, max_positions=64)

CASES = {
    "clm": Case(CausalLM(), DECODER),
    "clm-checkpointing": Case(CausalLM(), DECODER, checkpointing=True),
    "mlm": Case(MLM(), ENCODER, special_tokens_text),
    "mlm-shared-blocks": Case(
        MLM(), ENCODER.with_fields({"num_layer_groups": 1, "norm.first_attention": True}), special_tokens_text
    ),
    "rtd": Case(RTD(generator_size=0.5), ENCODER, special_tokens_text),
    "span-corruption": Case(SpanCorruption(), SEQ2SEQ),
    "sft": Case(SFT(), DECODER, dialogue),
    "dpo": Case(DPO(), DECODER, comparison),
    "weight-penalty": Case(CausalLM() + WeightPenalty(weight=0.01), DECODER),
    "weight-penalty-shared-blocks": Case(
        MLM() + WeightPenalty(weight=0.01),
        ENCODER.with_fields({"num_layer_groups": 1, "norm.first_attention": True}),
        special_tokens_text,
        checkpointing=True,
    ),
    "lora": Case(CausalLM(), DECODER, lora=True),
    "ppo": Case(PPO(), DECODER),
}


COMPILED = {"clm-compiled": Case(CausalLM(), DECODER, compiled=True)}
"""Cases that take half a minute."""


class RandomExamples(Source):
    """Examples of a case."""

    def __init__(self, make: Callable[[np.random.Generator], Example]) -> None:
        self.make = make

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Example:
        return self.make(np.random.default_rng([5, index]))


def build(case: Case, ranks: Ranks, way: Literal["none", "full", "hybrid"]) -> tuple[LM, Shards | None]:
    """Return the model of a case, and its sharding; a sharded one is initialized in shards unless it has adapters."""
    config = case.config
    if case.objective == PPO():
        config = replace(config, vocab_size=ByteTokenizer().vocab.size)
    degree = DistributedConfig(way, shard_degree=2 if way == "hybrid" else 0).degree(ranks)
    torch.manual_seed(3)
    with record_init() if degree > 1 and not case.lora else nullcontext() as record:
        model = LM(config, case.objective.heads(config))
    if case.lora:
        lora.add(model, [lora.ALL_LINEAR], lora.LoraConfig(rank=4))
        lora.freeze(model)
        for layer in lora.lora_layers(model).values():  # B is 0 at first, and A has no gradient then
            torch.nn.init.normal_(layer.B, std=0.1)
    for stack in model.stacks():
        stack.gradient_checkpointing = case.checkpointing
    shards = Shards(model, ranks, degree, torch.device("cpu"), record=record) if degree > 1 else None
    if case.compiled:
        compile_blocks(model)
    return model, shards


def source_of(case: Case, model: LM, ranks: Ranks) -> tuple[Source, ByteTokenizer | None]:
    """Return the examples of a case; those of PPO are sampled from the model."""
    if case.objective != PPO():
        return RandomExamples(case.make), None
    tokenizer = ByteTokenizer()
    prompts = [tokenizer.encode(text) for text in ("a", "bcd", "ef", "ghij")]
    torch.manual_seed(4)
    reference = LM(
        replace(case.config, vocab_size=tokenizer.vocab.size), {"lm": case.objective.heads(model.config)["lm"]}
    )
    source = RolloutSource(
        prompts, tokenizer, FunctionReward(lambda text: float(text.count("e") + len(text) % 3)), reference,  # type: ignore[arg-type]
        config=RolloutsConfig(rollout_size=12, num_generations=3, max_new_tokens=7), steps=1, stops=list(range(7, 30)),
        advantage_estimator=GAE(), seed=2, ranks=ranks,
    )  # fmt: skip
    source.prepare(model, 0)
    return source, tokenizer


def validation(case: Case, model: LM, ranks: Ranks, shards: Shards | None) -> dict[str, torch.Tensor]:
    """Return the validation metrics on 12 batches of 9 examples, of which some ranks have fewer than others."""
    held_out = Batches(
        RandomExamples(case.make), case.objective, VOCAB, batch_size=9, seed=1, rank=ranks.rank, world=ranks.world
    )
    with torch.random.fork_rng():
        metrics = validate(
            model, case.objective, held_out.all_batches(), reduce=ranks.sum, parallel=shards or SINGLE,
            filler=[] if shards is None else held_out.filler(),
        )  # fmt: skip
    return {f"valid {name}": torch.tensor(value) for name, value in metrics.items()}


def first_steps(
    case: Case, ranks: Ranks, way: Literal["none", "full", "hybrid"], accumulate: int
) -> dict[str, torch.Tensor]:
    """Return gradients, losses and sampled tokens of the first step, and the weights after two."""
    model, shards = build(case, ranks, way)
    source, tokenizer = source_of(case, model, ranks)
    batches = Batches(
        source, case.objective, VOCAB if tokenizer is None else tokenizer.vocab, batch_size=ROWS, seed=0,
        gradient_accumulation_steps=accumulate, rank=ranks.rank, world=ranks.world,
    )  # fmt: skip
    optimizer = Optimizer(OptimizerConfig("adamw", lr=1e-3), model, ranks=ranks, shards=shards)
    replicas = Replicas(optimizer.parameters, ranks) if ranks.world > 1 and shards is None else Parallel()
    found: dict[str, torch.Tensor] = {f"source {k}": torch.from_numpy(x).clone() for k, x in source.state().items()}
    if tokenizer is None:
        found |= validation(case, model, ranks, shards)
    for number in range(2):
        means = step(model, case.objective, batches.batches(number), ranks.sum, parallel=shards or replicas)
        if not number:
            found |= {f"loss {name}": x for name, x in means.items()}
            found |= {
                f"gradient {n}": gathered(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None
            }
        found[f"norm {number}"] = optimizer.clip_grad_norm()
        optimizer.step(1.0)
    whole = model if shards is None else shards.unsharded()
    return found | ({} if whole is None else {f"weight {n}": p.detach() for n, p in whole.named_parameters()})


def main(out: Path, ranks: Ranks, ways: list[str], names: list[str] | None = None) -> None:
    """Write the results of some cases, by default all of CASES, for each way and number of micro-batches."""
    torch.set_num_threads(1)
    cases = CASES | COMPILED
    for way, accumulate in zip(ways[::2], ways[1::2], strict=True):
        for name in names or CASES:
            found = first_steps(cases[name], ranks, way, int(accumulate))  # type: ignore[arg-type]
            if ranks.first:
                save_file({k: x.contiguous() for k, x in found.items()}, out / f"{way}-{accumulate}-{name}.safetensors")


if __name__ == "__main__":
    end = sys.argv.index("cases") if "cases" in sys.argv else len(sys.argv)
    main(Path(sys.argv[1]), join(), sys.argv[2:end], sys.argv[end + 1 :])
    torch.distributed.destroy_process_group()
