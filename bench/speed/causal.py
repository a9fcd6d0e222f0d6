"""Training speed of a causal language model: 6 layers, hidden size 384, vocabulary 8192, 16 rows of 256 tokens, CPU.

    python -m bench.speed.causal                 # nine rounds of all candidates, a table for docs/results/index.md
    python -m bench.speed.causal --check         # equal sizes, equal tokens, first losses near ln 8192; no timing

Candidates: transformers' `Trainer` on a `GPT2LMHeadModel` with its defaults (only the size, the batch and dropout are
set; progress bar and checkpoints are off, in its favor), the same with bf16=True, a plain fp32 loop like nanoGPT's, and
firth's own step, optimizer and pipeline. All train on the same windows, and the time to make batches counts for all. The
tokens are drawn once from a Zipf distribution: speed does not depend on the text.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import EndSample, arguments, command

VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, ROWS, LENGTH = 8192, 384, 6, 6, 16, 256
STEPS_PER_SAMPLE = 3
"""Steps per sample."""
STORE = 2048
"""Windows."""


def windows(seed: int = 0) -> np.ndarray:
    """Return (STORE, LENGTH + 1) int64 token ids by Zipf's law, none below 200 (where the control ids are)."""
    rng = np.random.default_rng(seed)
    probabilities = 1 / np.arange(1, VOCAB_SIZE - 199)
    return rng.choice(np.arange(200, VOCAB_SIZE), size=(STORE, LENGTH + 1), p=probabilities / probabilities.sum())


# ------------------------------------------------------------------------------- transformers' Trainer


def hf_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_positions=LENGTH, n_embd=HIDDEN_SIZE, n_layer=NUM_LAYERS, n_head=NUM_HEADS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    return model


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Data set for `Trainer`: {"input_ids", "labels"} of one row."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = torch.from_numpy(np.ascontiguousarray(rows[:, :LENGTH]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer(end_sample: EndSample, bf16: bool) -> None:
    """Run transformers' Trainer; a callback ends the sample after STEPS_PER_SAMPLE steps."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class EndSampleCallback(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
            if state.global_step % STEPS_PER_SAMPLE == 0:  # type: ignore[attr-defined]
                end_sample(STEPS_PER_SAMPLE * ROWS * LENGTH)

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, per_device_train_batch_size=ROWS, max_steps=1_000_000, bf16=bf16, use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(hf_model(), arguments, train_dataset=Rows(windows()), callbacks=[EndSampleCallback()]).train()


def trainer_fp32(end_sample: EndSample) -> None:
    trainer(end_sample, bf16=False)


def trainer_bf16(end_sample: EndSample) -> None:
    trainer(end_sample, bf16=True)


# ------------------------------------------------------------------------------- a plain loop


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(HIDDEN_SIZE), nn.LayerNorm(HIDDEN_SIZE)
        self.qkv, self.out = nn.Linear(HIDDEN_SIZE, 3 * HIDDEN_SIZE), nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.up, self.down = nn.Linear(HIDDEN_SIZE, 4 * HIDDEN_SIZE), nn.Linear(4 * HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.n2(x))))
        return out


class Plain(nn.Module):
    """GPT-2 written by hand, with the sizes and the number of parameters of the GPT2LMHeadModel above."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE), nn.Embedding(LENGTH, HIDDEN_SIZE)
        self.blocks, self.norm = nn.ModuleList(PlainBlock() for _ in range(NUM_LAYERS)), nn.LayerNorm(HIDDEN_SIZE)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * NUM_LAYERS) if residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)
        return loss


def plain_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return nanoGPT's optimizer: fused AdamW (0.9, 0.95), weight decay 0.1 on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def endless_batches(rows: np.ndarray, n: int, seed: int) -> Iterator[Tensor]:
    """Yield (n, LENGTH + 1) tensors of distinct rows forever, with a new permutation each epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - n + 1, n):
            yield torch.from_numpy(rows[order[start : start + n]].astype(np.int64))


def plain(end_sample: EndSample) -> None:
    torch.manual_seed(0)
    model = Plain()
    optimizer = plain_optimizer(model, 6e-4)
    for done, batch in enumerate(endless_batches(windows(), ROWS, seed=0), start=1):
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if done % STEPS_PER_SAMPLE == 0:
            end_sample(STEPS_PER_SAMPLE * ROWS * LENGTH)


# ------------------------------------------------------------------------------- firth


def firth_setup(seed: int = 0) -> tuple[Any, Any, Any]:
    """Return (model, objective, batches) as `firth train` builds them for the default decoder on these windows."""
    from firth.data.collate import Batches
    from firth.data.source import Source
    from firth.model.config import decoder_config
    from firth.model.model import LM
    from firth.objectives.causal_lm import CausalLM
    from firth.tokenizer.vocab import Vocab
    from firth.types import Example

    class Drawn(Source):
        rows = windows()

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> Example:
            return {"tokens": self.rows[i]}

    torch.manual_seed(seed)
    objective = CausalLM()
    config = decoder_config(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, num_layers=NUM_LAYERS, num_heads=NUM_HEADS, max_positions=LENGTH
    )
    vocab = Vocab(size=VOCAB_SIZE, roles={"pad": 0, "bos": 2, "eos": 3}, special=np.arange(VOCAB_SIZE) < 107)
    return (
        LM(config, objective.heads(config)),
        objective,
        Batches(Drawn(), objective, vocab, batch_size=ROWS, seed=seed),
    )


def firth_run(
    end_sample: EndSample,
    optimizer: Literal["muon", "adamw"],
    units: Callable[[int], float],
    setup: tuple[Any, Any, Any],
    share: int = STEPS_PER_SAMPLE,
) -> None:
    """Run firth's own loop with its progress, log and counting; samples end where evaluation would run.

    Args:
        end_sample: Callback of the harness.
        optimizer: Name of the optimizer.
        units: Maps a step to the units of the sample that ends with it.
        setup: (model, objective, batches).
        share: Steps per sample.
    """
    from firth.training.logging import NullReporter
    from firth.training.optimizer import OptimizerConfig
    from firth.training.schedule import Budget, Schedule
    from firth.training.trainer import TrainerConfig, train

    def evaluate(_: object, step: int) -> dict[str, float]:
        end_sample(units(step))
        return {}

    model, objective, batches = setup
    with tempfile.TemporaryDirectory() as directory:
        train(
            model, objective, batches, Path(directory), budget=Budget(max_steps=1_000_000), reporter=NullReporter(),
            optimizer=OptimizerConfig(name=optimizer), schedule=Schedule("constant", warmup_ratio=0), evaluate=evaluate,
            config=TrainerConfig(eval_every=share, save_every=0),
        )  # fmt: skip


def firth(end_sample: EndSample) -> None:
    firth_run(end_sample, "muon", lambda _: STEPS_PER_SAMPLE * ROWS * LENGTH, firth_setup())


def firth_adamw(end_sample: EndSample) -> None:
    firth_run(end_sample, "adamw", lambda _: STEPS_PER_SAMPLE * ROWS * LENGTH, firth_setup())


CANDIDATES: dict[str, Callable[[EndSample], None]] = {
    "transformers Trainer": trainer_fp32,
    "transformers Trainer, bf16": trainer_bf16,
    "plain fp32 loop": plain,
    "firth, AdamW": firth_adamw,
    "firth": firth,
}


def check() -> None:
    """Assert that the comparison is fair: equal sizes and tokens, and every first loss near ln(vocabulary)."""
    rows = torch.from_numpy(windows())[:ROWS]
    theirs, ours = hf_model(), Plain()
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in (("transformers", theirs), ("plain", ours))}
    assert sizes["transformers"] == sizes["plain"], sizes
    with torch.no_grad():
        first = {
            "transformers": theirs(input_ids=rows[:, :LENGTH], labels=rows[:, :LENGTH]).loss.item(),
            "plain": ours(rows[:, :-1], rows[:, 1:]).item(),
        }
        model, objective, batches = firth_setup()
        sizes["firth"] = sum(p.numel() for p in model.parameters())
        from firth.training.step import count_targets

        batch = batches.batches(0)[0]
        num_labels = count_targets(objective, [batch])["tokens"].item()
        loss = objective.loss(model, objective.forward(model, batch), batch)["tokens"]
        first["firth"] = loss.item() / num_labels
        assert num_labels == ROWS * LENGTH, num_labels
        known = {tuple(r) for r in windows()[:, :LENGTH].tolist()}
        assert all(tuple(r) in known for r in batch["tokens"].tolist()), "firth read other windows"
    for name, loss in first.items():
        assert abs(loss - math.log(VOCAB_SIZE)) < 0.2, f"{name} starts at {loss:.3f}, not at ln {VOCAB_SIZE}"
    matrices = sum(p.numel() for n, p in model.named_parameters() if "blocks" in n and p.ndim == 2)
    assert matrices == 12 * NUM_LAYERS * HIDDEN_SIZE**2, "firth's blocks do different work"
    print(
        f"parameters {sizes} (firth does not tie its head to its embedding: same work, {VOCAB_SIZE * HIDDEN_SIZE:,} more parameters)"
    )
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in first.items())
    print(f"first losses: {losses}; ln {VOCAB_SIZE} = {math.log(VOCAB_SIZE):.3f}")


def main() -> None:
    args = arguments(__doc__, CANDIDATES).parse_args()
    if args.check:
        check()
    else:
        command(args, CANDIDATES)


if __name__ == "__main__":
    main()
