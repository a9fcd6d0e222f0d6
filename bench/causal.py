"""Training speed of a causal language model: 6 layers, width 384, vocabulary 8192, 16 rows of 256 tokens, CPU.

    python -m bench.causal                 # nine rounds of all contenders, a table for docs/results/index.md
    python -m bench.causal --check         # equal sizes, equal tokens, first losses near ln 8192; no timing

Contenders: transformers' `Trainer` on a `GPT2LMHeadModel` as it comes (only the size, the batch and dropout are
set; no progress bar and no checkpoints, in its favour), the same with bf16=True, a plain fp32 loop in the manner of
nanoGPT, and firth's own step, optimizer and pipeline. All see the same windows; every contender pays for making its
batches. The tokens are drawn once from a Zipf distribution: speed does not depend on what the text says.
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

from bench.harness import Turn, arguments, command

VOCAB, WIDTH, DEPTH, HEADS, ROWS, LENGTH = 8192, 384, 6, 6, 16, 256
SHARE = 3  # steps in a turn
STORE = 2048  # windows


def windows(seed: int = 0) -> np.ndarray:
    """(STORE, LENGTH + 1) int64: token ids by Zipf's law, none of them below 200 (where control ids live)."""
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, VOCAB - 199)
    return rng.choice(np.arange(200, VOCAB), size=(STORE, LENGTH + 1), p=chance / chance.sum())


# ------------------------------------------------------------------------------- transformers' Trainer


def hf_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_positions=LENGTH, n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    return model


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """What a user hands to `Trainer`: {"input_ids", "labels"} of one row."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = torch.from_numpy(np.ascontiguousarray(rows[:, :LENGTH]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer(turn: Turn, bf16: bool) -> None:
    """transformers' Trainer; its share ends in a callback after every SHARE steps."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Turns(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
            if state.global_step % SHARE == 0:  # type: ignore[attr-defined]
                turn(SHARE * ROWS * LENGTH)

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, per_device_train_batch_size=ROWS, max_steps=1_000_000, bf16=bf16, use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(hf_model(), arguments, train_dataset=Rows(windows()), callbacks=[Turns()]).train()


def trainer_fp32(turn: Turn) -> None:
    trainer(turn, bf16=False)


def trainer_bf16(turn: Turn) -> None:
    trainer(turn, bf16=True)


# ------------------------------------------------------------------------------- a plain loop


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.n2(x))))
        return out


class Plain(nn.Module):
    """GPT-2 as one writes it by hand: the same shape and number of parameters as the GPT2LMHeadModel above."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.ModuleList(PlainBlock() for _ in range(DEPTH)), nn.LayerNorm(WIDTH)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * DEPTH) if residual else 1))
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
    """nanoGPT's: AdamW (0.9, 0.95), weight decay 0.1 on matrices only, fused."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def rows_for_ever(rows: np.ndarray, n: int, seed: int) -> Iterator[Tensor]:
    """(n, LENGTH + 1) tensors of distinct rows, a new permutation each epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - n + 1, n):
            yield torch.from_numpy(rows[order[start : start + n]].astype(np.int64))


def plain(turn: Turn) -> None:
    torch.manual_seed(0)
    model = Plain()
    optimizer = plain_optimizer(model, 6e-4)
    for done, batch in enumerate(rows_for_ever(windows(), ROWS, seed=0), start=1):
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if done % SHARE == 0:
            turn(SHARE * ROWS * LENGTH)


# ------------------------------------------------------------------------------- firth


def firth_parts(seed: int = 0) -> tuple[Any, Any, Any]:
    """(model, objective, batches): what `firth train` builds for the default decoder on these windows."""
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
        vocab_size=VOCAB, hidden_size=WIDTH, num_layers=DEPTH, num_heads=HEADS, max_positions=LENGTH
    )
    vocab = Vocab(size=VOCAB, roles={"pad": 0, "bos": 2, "eos": 3}, special=np.arange(VOCAB) < 107)
    return (
        LM(config, objective.heads(config)),
        objective,
        Batches(Drawn(), objective, vocab, batch_size=ROWS, seed=seed),
    )


def firth_run(
    turn: Turn,
    optimizer: Literal["muon", "adamw"],
    units: Callable[[int], float],
    made: tuple[Any, Any, Any],
    share: int = SHARE,
) -> None:
    """firth's own loop with its progress, log and counting; its share ends where a user's evaluation would be.

    share: steps in a turn. units: of the turn that ends with a step.
    """
    from firth.train.logging import NullReporter
    from firth.train.optimizer import OptimizerConfig
    from firth.train.schedule import Budget, Schedule
    from firth.train.trainer import TrainerConfig, train

    def evaluate(_: object, step: int) -> dict[str, float]:
        turn(units(step))
        return {}

    model, objective, batches = made
    with tempfile.TemporaryDirectory() as directory:
        train(
            model, objective, batches, Path(directory), budget=Budget(max_steps=1_000_000), reporter=NullReporter(),
            optimizer=OptimizerConfig(name=optimizer), schedule=Schedule("constant", warmup_ratio=0), evaluate=evaluate,
            config=TrainerConfig(eval_every=share, save_every=0),
        )  # fmt: skip


def firth(turn: Turn) -> None:
    firth_run(turn, "muon", lambda _: SHARE * ROWS * LENGTH, firth_parts())


def firth_adamw(turn: Turn) -> None:
    firth_run(turn, "adamw", lambda _: SHARE * ROWS * LENGTH, firth_parts())


CONTENDERS: dict[str, Callable[[Turn], None]] = {
    "transformers Trainer": trainer_fp32,
    "transformers Trainer, bf16": trainer_bf16,
    "plain fp32 loop": plain,
    "firth, AdamW": firth_adamw,
    "firth": firth,
}


def check() -> None:
    """What makes the comparison fair, asserted: sizes, tokens, and that everybody starts at ln(vocabulary)."""
    rows = torch.from_numpy(windows())[:ROWS]
    theirs, ours = hf_model(), Plain()
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in (("transformers", theirs), ("plain", ours))}
    assert sizes["transformers"] == sizes["plain"], sizes
    with torch.no_grad():
        first = {
            "transformers": theirs(input_ids=rows[:, :LENGTH], labels=rows[:, :LENGTH]).loss.item(),
            "plain": ours(rows[:, :-1], rows[:, 1:]).item(),
        }
        model, objective, batches = firth_parts()
        sizes["firth"] = sum(p.numel() for p in model.parameters())
        from firth.train.step import count_targets

        batch = batches.batches(0)[0]
        asked = count_targets(objective, [batch])["tokens"].item()
        loss = objective.loss(model, objective.run(model, batch), batch)["tokens"]
        first["firth"] = loss.item() / asked
        assert asked == ROWS * LENGTH, asked
        known = {tuple(r) for r in windows()[:, :LENGTH].tolist()}
        assert all(tuple(r) in known for r in batch["tokens"].tolist()), "firth was shown other windows"
    for name, loss in first.items():
        assert abs(loss - math.log(VOCAB)) < 0.2, f"{name} starts at {loss:.3f}, not at ln {VOCAB}"
    matrices = sum(p.numel() for n, p in model.named_parameters() if "blocks" in n and p.ndim == 2)
    assert matrices == 12 * DEPTH * WIDTH**2, "firth's blocks do other work than the peers'"
    print(f"parameters {sizes} (firth's head is not tied to its embedding: same work, {VOCAB * WIDTH:,} more numbers)")
    shown = ", ".join(f"{name} {loss:.3f}" for name, loss in first.items())
    print(f"first losses: {shown}; ln {VOCAB} = {math.log(VOCAB):.3f}")


def main() -> None:
    given = arguments(__doc__, CONTENDERS).parse_args()
    if given.check:
        check()
    else:
        command(given, CONTENDERS)


if __name__ == "__main__":
    main()
